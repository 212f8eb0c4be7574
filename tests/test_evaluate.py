"""`ds-sft evaluate`: what it shows, writes and refuses."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from ds_sft.cli import main
from ds_sft.commands.evaluate import data_words, flags_and_keys
from ds_sft.config.read import load_config
from ds_sft.data.dataset import load_data
from ds_sft.data.records import read_dialogues, reading_of
from ds_sft.data.rows import fingerprint
from ds_sft.data.sources import find_files
from ds_sft.errors import UserError
from ds_sft.export.predict import predict
from ds_sft.model.tokenizer import load_tokenizer
from ds_sft.ranks.launch import Launch
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import free_port, read_lines

LAUNCH = Launch(launcher="python")
METRICS = ["loss", "perplexity", "exact_match", "chrf", "rouge_l"]


@pytest.fixture
def run(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what a run leaves in `out`, whose weights are not those of its base, in float32."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, "base")
    model = AutoModelForCausalLM.from_pretrained("base", dtype=torch.float32)
    model.save_pretrained("base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    shutil.copytree("base", "out")
    model.save_pretrained("out")
    rows = questions_and_answers(14)
    write_rows(tmp_path / "eval.jsonl", rows[:9])
    write_rows(tmp_path / "more.jsonl", rows[9:])
    keys = {"model_name_or_path": "base", "train_file": "train.jsonl", "eval_file": "eval.jsonl", "output_dir": "out",
            "system_prompt": "S", "max_length": 96, "predict_max_new_tokens": 6, "use_cpu": True}  # fmt: skip
    load_config([word for name, value in keys.items() for word in (f"--{name}", str(value))]).save(
        Path("out/config.yaml")
    )
    return tmp_path


def read(name: str = "out/evaluate.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
    return found


def plain_loss(folder: str, rows: list[dict[str, str]], tokenizer: Any) -> float:
    """Token mean of the cross-entropy of answers and the pad token after them, a row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        before = (
            f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        )
        prompt, answer = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, row["answer"]))
        learned = [*answer, tokenizer.pad_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + learned])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(learned), reduction="sum").item()
        count += len(learned)
    return total / count


def test_before_and_after(run: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """On the run's own validation rows, where nothing else is said."""
    assert main(["evaluate", "out"]) == 0
    found, rows = read(), questions_and_answers(9)
    assert found["data"] == ["eval.jsonl"]
    assert found["difference"] == "after - before"
    assert {name: model["path"] for name, model in found["models"].items()} == {"before": "base", "after": "out"}
    assert list(found["sources"]) == ["all"]
    part = found["sources"]["all"]
    assert part["rows"] == 9
    for name, folder in (("before", "base"), ("after", "out")):
        numbers = part["models"][name]
        assert list(numbers) == ["supervised_tokens", "answered", "cut", *METRICS]
        assert numbers["answered"] == 9
        assert numbers["loss"]["value"] == pytest.approx(plain_loss(folder, rows, tokenizer), rel=1e-6)
        assert numbers["perplexity"]["value"] == pytest.approx(math.exp(numbers["loss"]["value"]))
        assert numbers["loss"]["low"] < numbers["loss"]["value"] < numbers["loss"]["high"]
    assert list(part["difference"]) == METRICS
    losses = [part["models"][name]["loss"]["value"] for name in ("before", "after")]
    assert part["difference"]["loss"]["value"] == pytest.approx(losses[1] - losses[0])
    said = capsys.readouterr().out
    assert "Answers (after): 9 of 9 rows" in said
    assert "all: 9 rows" in said
    assert said.splitlines()[-1] == "Wrote out/evaluate.json and out/evaluate.jsonl."


def test_answers_are_those_of_predictions(run: Path, tokenizer: Any) -> None:
    """Of each model, in the order of the data, with their scores."""
    assert main(["evaluate", "out"]) == 0
    config = load_config(["--config", "out/config.yaml", "--predict_before", "yes"])

    (file,) = find_files("eval.jsonl", "eval_file")
    samples: list[Any] = [row for _, row in read_dialogues(file, reading_of(config))]
    predicted = predict(config, samples, tokenizer)
    lines = read_lines(Path("out/evaluate.jsonl"))
    assert [line["model"] for line in lines] == ["before"] * 9 + ["after"] * 9
    assert [line["source"] for line in lines] == [f"eval.jsonl:{i}" for i in range(1, 10)] * 2
    assert [line["prediction"] for line in lines[:9]] == [row.before for row in predicted]
    assert [line["prediction"] for line in lines[9:]] == [row.prediction for row in predicted]
    assert [(line["question"], line["reference"]) for line in lines[9:]] == [
        (r.question, r.reference) for r in predicted
    ]
    assert list(lines[0])[-5:] == ["tokens", "cut", "exact_match", "chrf", "rouge_l"]


def test_each_source_and_all_of_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Limits hold; a weight is for learning, and no row counts twice."""
    given = "[{path: eval.jsonl, limit: 4, weight: 3}, more.jsonl]"
    assert main(["evaluate", "out", "--data", given, "--no-before", "--loss-only"]) == 0
    found = read()
    assert {name: part["rows"] for name, part in found["sources"].items()} == {
        "all": 9,
        "eval.jsonl": 4,
        "more.jsonl": 5,
    }
    every, *parts = (part["models"]["out"] for part in found["sources"].values())
    assert every["supervised_tokens"] == sum(part["supervised_tokens"] for part in parts)
    total = sum(part["loss"]["value"] * part["supervised_tokens"] for part in parts)
    assert every["loss"]["value"] == pytest.approx(total / every["supervised_tokens"])
    assert list(every) == ["supervised_tokens", "answered", "cut", "loss", "perplexity"]
    assert found["difference"] is None
    assert not Path("out/evaluate.jsonl").exists()
    assert "Weights are for learning: every row is measured once." in capsys.readouterr().out


def test_of_many_sources_the_first_are_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [f"part{i:02}.jsonl" for i in range(13)]
    for file, row in zip(files, questions_and_answers(13), strict=True):
        write_rows(run / file, [row])
    assert main(["evaluate", "out", "--data", "part*.jsonl", "--no-before", "--loss-only"]) == 0
    assert list(read()["sources"]) == ["all", *files]
    said = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [f"{file}: 1 row" in said for file in files] == [True] * 11 + [False] * 2
    assert "2 more sources are not shown; the JSON has them." in said


def test_two_models_are_asked_as_they_were_taught(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another system prompt is other prompts, and the same answers to learn: the losses can be compared."""
    shutil.copytree("out", "other")
    keys = yaml.safe_load(Path("other/config.yaml").read_text(encoding="utf-8")) | {"system_prompt": "You are brief."}
    Path("other/config.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert main(["evaluate", "--compare", "out", "other", "--limit", "5", "--out", "two.json"]) == 0
    found = read("two.json")
    assert {name: model["system_prompt"] for name, model in found["models"].items()} == {
        "out": "S",
        "other": "You are brief.",
    }
    assert list(found["sources"]["all"]["difference"]) == METRICS
    assert [line["model"] for line in read_lines(Path("two.jsonl"))] == ["out"] * 5 + ["other"] * 5
    assert "Each is asked as it was taught: system_prompt differ." in capsys.readouterr().out
    assert main(["evaluate", "out", "--no-before", "--limit", "5", "--out", "one.json"]) == 0
    assert read("one.json")["sources"]["all"]["models"]["out"] == found["sources"]["all"]["models"]["out"]


def test_a_model_and_its_copy_do_not_differ(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However far the rows are apart: both have the same draws."""
    shutil.copytree("out", "copied")
    assert main(["evaluate", "--compare", "out", "copied", "--out", "two.json"]) == 0
    part = read("two.json")["sources"]["all"]
    assert part["models"]["out"] == part["models"]["copied"]
    assert part["models"]["out"]["loss"]["low"] < part["models"]["out"]["loss"]["high"]
    nothing = {"value": 0, "low": 0, "high": 0, "better": 0, "worse": 0}
    assert part["difference"] == dict.fromkeys(METRICS, nothing)
    said = capsys.readouterr().out
    assert said.count(" equal ") == 5
    assert "asked as it was taught" not in said


@pytest.mark.parametrize("moved", [False, True])
def test_a_run_is_evaluated_from_any_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moved: bool
) -> None:
    """The base, the rows and the cache that its relative paths name are found, also where the whole project has moved;
    the numbers are beside the run, and nothing is where the command was called."""
    words = ["--loss-only", "--limit", "4"]
    config = load_config(["--config", "out", "--cache_dir", "cached"])
    config.save(Path("out/config.yaml"))
    assert main(["evaluate", "out", *words]) == 0
    here, project = read()["sources"], run / "project"
    if moved:
        files = [path for path in run.iterdir() if path.name != "model"]
        project.mkdir()
        for path in files:
            path.rename(project / path.name)
    (run / "elsewhere").mkdir()
    monkeypatch.chdir(run / "elsewhere")
    folder = project if moved else run
    (folder / "out/evaluate.json").unlink()
    capsys.readouterr()
    assert main(["evaluate", str(folder / "out"), *words]) == 0
    assert "Without the model before training" not in capsys.readouterr().out
    found = read(str(folder / "out/evaluate.json"))
    assert found["sources"]["all"] == here["all"]
    assert found["data"] == [str(folder / "eval.jsonl")]
    assert list(Path().iterdir()) == []


def test_models_that_no_run_has_left_keep_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor does a comparison: there is no folder where anyone would look. It is said before the work."""
    there = sorted(run.rglob("*"))
    words = [
        "--data",
        "eval.jsonl",
        "--limit",
        "2",
        "--template",
        "reference",
        "--predict_max_new_tokens",
        "2",
        "--use_cpu",
        "yes",
    ]
    said = "Nothing will be written: --out FILE.json keeps the numbers, and the answers beside it."
    for subject in (["base"], ["--compare", "base", "out"]):
        assert main(["evaluate", *subject, *words]) == 0
        assert capsys.readouterr().out.splitlines()[0] == said
    assert sorted(run.rglob("*")) == there


def test_answers_are_greedy_whatever_the_run_did(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "out", "--no-before", "--limit", "4"]
    assert main(words) == 0
    greedy = Path("out/evaluate.jsonl").read_bytes()
    capsys.readouterr()
    assert main([*words, "--generation", "{do_sample: true, temperature: 9.0}"]) == 0
    assert Path("out/evaluate.jsonl").read_bytes() == greedy
    said = "out: greedy answers, so that numbers come again; generation says do_sample."
    assert said in capsys.readouterr().out.splitlines()


def test_losses_of_other_tokens_are_not_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor rows that one of the two has no room for."""
    for folder, changes in (("short", {"max_length": 42}), ("short2", {"max_length": 42, "overlong": "drop"})):
        shutil.copytree("out", folder)
        keys = yaml.safe_load(Path("out/config.yaml").read_text(encoding="utf-8")) | changes
        Path(f"{folder}/config.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert main(["evaluate", "--compare", "out", "short", "--out", "two.json"]) == 0
    assert list(read("two.json")["sources"]["all"]["difference"]) == ["exact_match", "chrf", "rouge_l"]
    assert "max_length differ" in capsys.readouterr().out
    assert main(["evaluate", "--compare", "out", "short2", "--loss-only", "--out", "two.json"]) == 0
    kept = read("two.json")["sources"]["all"]["rows"]
    assert 0 < kept < 9
    said = f"{9 - kept} rows are left out: not all models have room for them (max_length)."
    assert said in capsys.readouterr().out


def test_an_interrupted_one_keeps_its_answers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_sft.evaluation import measure

    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_batch(*args)

    answer_batch = measure.answer_batch
    monkeypatch.setattr(measure, "answer_batch", interrupted)
    assert main(["evaluate", "out"]) == 130
    assert len(read_lines(Path("out/evaluate.jsonl"))) == 4  # of two batches
    assert "out/evaluate.jsonl has the answers so far." in capsys.readouterr().out
    assert not Path("out/evaluate.json").exists()


@pytest.mark.parametrize(
    ("data", "out", "said"),
    [
        ("eval.jsonl", "eval.json", "--out: the answers would replace eval.jsonl, which has none of ours"),
        ("more.jsonl", "eval.json", "--out: the answers would replace eval.jsonl, which has none of ours"),
        ("rows.json", "./rows.json", "--out: rows.json has the rows that are measured"),
    ],
)
def test_nothing_of_the_users_is_overwritten(
    run: Path, capsys: pytest.CaptureFixture[str], data: str, out: str, said: str
) -> None:
    Path("rows.json").write_text(json.dumps(questions_and_answers(3)), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in run.glob("*.json*")}
    assert ended(["out", "--data", data, "--out", out]) == 2
    assert capsys.readouterr().err == f"ds_sft: error: {said}: name another FILE.json\n"
    assert {path.name: path.read_bytes() for path in run.glob("*.json*")} == before


def test_an_earlier_evaluation_is_replaced(run: Path) -> None:
    for limit in ("3", "2"):
        assert main(["evaluate", "out", "--no-before", "--limit", limit]) == 0
        assert len(read_lines(Path("out/evaluate.jsonl"))) == int(limit)


def test_without_the_packages_the_loss_can_be_had(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ds_sft.evaluation.scores.PACKAGES", ("sacre_blue",))
    assert ended(["out"]) == 2
    assert capsys.readouterr().err == (
        "ds_sft: error: sacre-blue is not installed, which scores answers: pip install sacre-blue, or "
        "--loss-only for the loss alone\n"
    )
    assert main(["evaluate", "out", "--loss-only", "--limit", "2"]) == 0


def test_rows_that_a_run_has_set_aside_are_its_validation_rows(run: Path) -> None:
    write_rows(run / "train.jsonl", questions_and_answers(12))
    keys = yaml.safe_load(Path("out/config.yaml").read_text(encoding="utf-8")) | {"eval_file": None, "val_size": 4}
    Path("out/config.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    assert main(["evaluate", "out", "--no-before"]) == 0
    aside = [line["source"] for line in read_lines(Path("out/evaluate.jsonl"))]
    config = load_config(["--config", "out/config.yaml"])
    data = load_data(config, load_tokenizer(config, LAUNCH), LAUNCH)
    assert aside == [data.where("eval", row) for row in range(4)]
    assert main(["evaluate", "out", "--data", "more.jsonl", "--loss-only"]) == 0
    assert read()["data"] == ["more.jsonl"]


def test_rows_that_a_run_may_have_learned_are_told_of(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another file is cut otherwise."""
    write_rows(run / "train.jsonl", questions_and_answers(12))
    keys = yaml.safe_load(Path("out/config.yaml").read_text(encoding="utf-8")) | {"eval_file": None, "val_size": 4}
    Path("out/config.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    config = load_config(["--config", "out/config.yaml"])
    data = load_data(config, load_tokenizer(config, LAUNCH), LAUNCH)
    Path("out/run.json").write_text(json.dumps({"identity": {"eval_data": fingerprint(data.eval)}}), encoding="utf-8")
    said = "out has set other validation rows aside: train_file or a key has changed since"
    assert main(["evaluate", "out", "--loss-only", "--no-before"]) == 0
    assert said not in capsys.readouterr().out
    write_rows(run / "train.jsonl", questions_and_answers(14))
    assert main(["evaluate", "out", "--loss-only", "--no-before"]) == 0
    assert said in capsys.readouterr().out


def test_a_base_that_is_gone_is_done_without(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("base")
    assert main(["evaluate", "out", "--loss-only", "--limit", "2"]) == 0
    assert list(read()["models"]) == ["out"]
    assert "Without the model before training: model_name_or_path: base: no such folder" in capsys.readouterr().out


def ended(words: list[str]) -> int:
    """The exit code of a mistake."""
    with pytest.raises(SystemExit) as end:
        main(["evaluate", *words])
    return int(end.value.code or 0)


def as_it_is(run: Path) -> None:
    pass


def unfinished(run: Path) -> None:
    Path("out/model.safetensors").unlink()


def rows(*given: Any) -> Callable[[Path], None]:
    return lambda run: (write_rows(run / "bad.jsonl", list(given)), None)[1]


@pytest.mark.parametrize(
    ("arrange", "words", "said"),
    [
        (as_it_is, [], "expected ds-sft evaluate FOLDER, or --compare A B; --help says more"),
        (as_it_is, ["out", "--compare", "a", "b"], "expected ds-sft evaluate FOLDER, or --compare A B"),
        (as_it_is, ["--compare", "out", "out"], "--compare: out is given twice: there is nothing to compare"),
        (as_it_is, ["out", "--limit", "0"], "--limit: expected a number of rows, 1 or more, found 0"),
        (as_it_is, ["out", "--limt", "3"], "--limt: unknown key: did you mean --limit?"),
        (as_it_is, ["out", "--out", "no/x.json"], "--out: expected FILE.json in a folder that can be written"),
        (as_it_is, ["out", "--out", "x.jsonl"], "--out: expected FILE.json in a folder that can be written"),
        (as_it_is, ["out", "--data", "no.jsonl"], "no.jsonl: no such file"),
        (as_it_is, ["base"], "base: no validation rows are known of it (eval_file, val_size): write --data FILE"),
        (as_it_is, ["--compare", "base", "out"], "--compare: base has no eval_file: name rows with --data FILE"),
        (unfinished, ["out"], "out: the run in it has left no final model yet"),
        (rows({"question": "q"}), ["out", "--data", "bad.jsonl"], "bad.jsonl:1: no field 'answer' (found: question)"),
        (rows({"x": 1}), ["out", "--data", "bad.jsonl"], "bad.jsonl:1: no field 'question' (found: x)"),
        (rows({"messages": [{"role": "user", "content": "q"}]}), ["out", "--data", "bad.jsonl"],
         "bad.jsonl:1: no assistant message to learn"),
        (rows(), ["out", "--data", "bad.jsonl"], "bad.jsonl: the file has no rows"),
    ],
)  # fmt: skip
def test_mistakes(
    run: Path, capsys: pytest.CaptureFixture[str], arrange: Callable[[Path], None], words: list[str], said: str
) -> None:
    arrange(run)
    assert ended(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"ds_sft: error: {said}")


def test_files_become_the_key_of_a_run() -> None:
    """Whatever stands in a file's name."""
    assert data_words(["a.jsonl"]) == ["--eval_file", "a.jsonl", "--val_size", "0"]
    run = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
    for files in (["a.jsonl"], ["a, b.jsonl", "ü '\".csv"], [{"path": "a.jsonl", "limit": 3}], ["[ab].jsonl", "c"]):
        given = load_config([*run, *data_words(files)]).eval_file
        assert given == (files[0] if files == ["a.jsonl"] else files)
    _, words = flags_and_keys(["out", "--use_cpu", "yes", "--data", "a", "b", "--max_length", "9"])
    assert words[:4] == ["--use_cpu", "yes", "--max_length", "9"]


def test_a_checkpoint_is_exported_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not by each of several ranks."""
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_PORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    Path("out/checkpoint-3").mkdir()
    Path("out/checkpoint-3/trainer_state.json").write_text("{}", encoding="utf-8")
    assert ended(["out/checkpoint-3"]) == 2
    assert capsys.readouterr().err == (
        "ds_sft: error: out/checkpoint-3 is a checkpoint: on several ranks export it first: "
        "ds-sft export out/checkpoint-3 FOLDER\n"
    )


def test_a_run_that_scores_wants_rows_to_score(tmp_path: Path) -> None:
    run = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o", "--evaluate_rows", "5"]
    with pytest.raises(UserError, match=r"^--evaluate_rows: it needs an eval_file \(or val_size\)$"):
        load_config(run)
    assert load_config([*run, "--val_size", "3"]).evaluate_rows == 5


def test_an_adapter_has_its_base_before_it(run: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), LoraConfig(init_lora_weights=False))
    model.save_pretrained("adapter")
    for file in Path("base").glob("tokenizer*"):
        shutil.copy(file, "adapter")
    words = ["--template", "reference", "--system_prompt", "S", "--use_cpu", "yes", "--loss-only"]
    assert main(["evaluate", "adapter", "--data", "eval.jsonl", "--out", "one.json", *words]) == 0
    found = read("one.json")
    assert {name: model["path"] for name, model in found["models"].items()} == {"before": "base", "after": "adapter"}
    assert found["sources"]["all"]["difference"]["loss"]["value"] != 0
