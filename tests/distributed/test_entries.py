"""Three ways to start a run, one config, one result."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_sft.commands.report_figures import CURVES, curves, lengths, memory, time_by_part
from ds_sft.commands.report_page import labelled_numbers, report_html
from ds_sft.commands.report_runs import read_runs
from ds_sft.training.clock import PARTS
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, TRAIN, listing, read_lines, run_forked, step_losses, train
from tests.test_encode import reference_row

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.timeout(3000),
]  # the fixture is five runs, each with a limit of its own

SYSTEM = "Answer."
NUM_ROWS, NUM_EVAL = 24, 5  # 5 validation rows: no number of ranks here divides them
ENTRIES = {  # launcher, ranks, DeepSpeed configuration; 8 rows a step in all of them
    "python": ("python", 1, "zero2.json"),
    "torchrun-ddp": ("torchrun", 2, None),
    "torchrun-zero2": ("torchrun", 2, "zero2.json"),
    "deepspeed-zero2": ("deepspeed", 2, "zero2.json"),
    "torchrun-zero3": ("torchrun", 2, "zero3.json"),
}
FILES = [
    "chat_template.jinja",
    "config.json",
    "config.yaml",
    "data_report.json",
    "generation_config.json",
    "metrics.jsonl",
    "model.safetensors",
    "predictions.jsonl",
    "run.json",
    "swanlab.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


def settings(model_dir: Path, folder: Path, ranks: int, engine: str | None, **changes: Any) -> dict[str, Any]:
    """float32, no dropout, three steps an epoch: the numbers of all entries must agree."""
    write_rows(folder / "train.jsonl", questions_and_answers(NUM_ROWS))
    write_rows(folder / "eval.jsonl", questions_and_answers(NUM_EVAL))
    keys = {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "eval_file": "eval.jsonl",
        "output_dir": "out",
        "system_prompt": SYSTEM,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4 // ranks,
        "per_device_eval_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": "1e-3",
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "eval_strategy": "epoch",
        "eval_on_start": True,
        "predict_max_new_tokens": 8,
        **({"deepspeed": str(ROOT / "ds_configs" / engine)} if engine else {}),
    }
    return keys | changes


@pytest.fixture(scope="module")
def results(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output folder of a run through each entry."""
    folders = {}
    for name, (launcher, ranks, engine) in ENTRIES.items():
        cwd = tmp_path_factory.mktemp(name)
        with pytest.MonkeyPatch.context() as patched:
            patched.delenv("SWANLAB_MODE")  # what a user has who says nothing of SwanLab
            done = train(launcher, ranks, settings(model_dir, cwd, ranks, engine), cwd=cwd)
        assert done.code == 0, done.output[-6000:]
        (cwd / "log").write_text(done.output, encoding="utf-8")
        folders[name] = cwd / "out"
    return folders


@pytest.fixture(scope="module")
def plain(results: dict[str, Path]) -> Path:
    return results["python"]


@pytest.mark.parametrize("name", ENTRIES)
def test_the_same_files(results: dict[str, Path], name: str) -> None:
    assert listing(results[name]) == FILES


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != "python"])
def test_the_same_training(results: dict[str, Path], plain: Path, name: str) -> None:
    losses, expected = step_losses(results[name]), step_losses(plain)
    assert len(expected) == 6
    assert losses == pytest.approx(expected, rel=1e-5)
    weights, wanted = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (results[name], plain))
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=1e-5, msg=key)
    assert read_lines(results[name] / "predictions.jsonl") == read_lines(plain / "predictions.jsonl")


def test_the_report_knows_all_that_a_run_leaves(results: dict[str, Path]) -> None:
    runs = read_runs(list(results.values()))
    assert [run.name for run in runs] == [f"{folder.parent.name}/out" for folder in results.values()]
    for run, folder in zip(runs, results.values(), strict=True):
        assert (run.state, run.missing, run.step) == ("finished", [], 6)
        assert list(run.parts) == list(PARTS)
        assert sum(run.parts.values()) == pytest.approx(run.speed["seconds"], rel=1e-3)
        absent = [name for name, value in labelled_numbers(run).items() if not value]
        assert absent == ["exact match", "chrF", "ROUGE-L"]  # of no evaluate_rows
        assert "All of it on one page: ds-sft report out\n" in (folder.parent / "log").read_text(encoding="utf-8")
    titles = [picture.title for picture in curves(runs)]
    assert titles == list(CURVES.values())
    assert [picture is None for picture in (time_by_part(runs), memory(runs), lengths(runs))] == [False] * 3
    assert report_html(runs).count('<section class="row">') == len(read_lines(results["python"] / "predictions.jsonl"))


@pytest.mark.parametrize("name", ENTRIES)
def test_eval_loss_is_the_token_mean_of_the_whole_set(results: dict[str, Path], model_dir: Path, name: str) -> None:
    """Against bare PyTorch, one row at a time, for the first model and the last."""
    reported = [row["eval_loss"] for row in read_lines(results[name] / "metrics.jsonl") if "eval_loss" in row]
    assert len(reported) == 3  # before training and after each epoch
    assert reported[0] == pytest.approx(token_mean(model_dir), rel=1e-5)
    assert reported[-1] == pytest.approx(token_mean(results[name]), rel=1e-5)


def token_mean(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for row in questions_and_answers(NUM_EVAL):
        ids, labels = reference_row(tokenizer, row["question"], row["answer"], SYSTEM, 2048)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        learned = [(position - 1, label) for position, label in enumerate(labels) if label != -100]
        total -= sum(logits[position, label].item() for position, label in learned)
        count += len(learned)
    return total / count


def test_predictions_stop_where_training_taught_to(results: dict[str, Path], plain: Path) -> None:
    rows = read_lines(plain / "predictions.jsonl")
    asked = [(row["question"], row["answer"]) for row in questions_and_answers(3)]
    assert [(row["question"], row["reference"]) for row in rows] == asked
    assert all(set(row) == {"question", "reference", "prediction"} for row in rows)
    assert "Predictions" in (plain.parent / "log").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ENTRIES)
def test_run_json(results: dict[str, Path], name: str) -> None:
    launcher, ranks, engine = ENTRIES[name]
    record = json.loads((results[name] / "run.json").read_text(encoding="utf-8"))
    stage = int(engine[4]) if engine and launcher != "python" else None
    assert (record["launcher"], record["world_size"], record["zero_stage"]) == (launcher, ranks, stage)
    assert (record["seed"], record["steps"], record["epochs"]) == (42, 6, 2.0)
    report = json.loads((results[name] / "data_report.json").read_text(encoding="utf-8"))
    assert record["tokens"] == 2 * report["train"]["tokens"]  # two epochs, no padding counted
    assert len(record["peak_memory"]) == ranks
    plan = record["plan"]
    assert plan["layout"] == ("no DeepSpeed" if stage is None else f"ZeRO-{stage}")
    assert abs(plan["planned_gib"] - plan["measured_gib"]) < 0.5  # of a model that itself needs next to nothing
    assert "iB planned)" in (results[name].parent / "log").read_text(encoding="utf-8")
    assert set(record["versions"]) >= {"python", "torch", "transformers", "deepspeed", "swanlab"}
    assert record["eval_loss"] < record["eval_loss_first"]
    assert record["export"]["verified"] is True
    assert record["export"]["loss_trained"] == pytest.approx(record["eval_loss"], rel=1e-6)  # the same five rows


@pytest.mark.parametrize("name", ENTRIES)
def test_figures_of_every_logging_step(results: dict[str, Path], name: str) -> None:
    """Counted exactly, timed sanely, the same in metrics.jsonl, in run.json and in what was printed."""
    steps = [row for row in read_lines(results[name] / "metrics.jsonl") if "loss" in row]
    report = json.loads((results[name] / "data_report.json").read_text(encoding="utf-8"))["train"]
    record = json.loads((results[name] / "run.json").read_text(encoding="utf-8"))
    speed, log = record["speed"], (results[name].parent / "log").read_text(encoding="utf-8")
    for figure, unit in (("tokens", "tokens"), ("supervised_tokens", "supervised_tokens")):
        counted = sum(row[f"{unit}_per_second"] * row["interval_seconds"] for row in steps)
        assert counted == pytest.approx(2 * report[figure], rel=1e-4)  # two epochs
        assert speed[figure] == 2 * report[figure]
    for row in [*steps, speed]:
        assert sum(row[f"{part}_share"] for part in PARTS) == pytest.approx(1, abs=1e-4)
        assert all(0 <= row[f"{part}_share"] < 1 for part in PARTS)
        assert 0 <= row["waiting_share"] < 1
        assert (row["waiting_share"] == 0) == (record["world_size"] == 1)
        assert row["padding_share"] == 0  # rows lie end to end
        assert 0 < row["mfu"] < 0.9
    assert all(row["forward_backward_share"] > 0 and row["optimizer_share"] > 0 for row in steps)
    assert all((row["communication_share"] > 0) == (record["world_size"] > 1) for row in steps)
    assert all(0.1 < row["peak_memory_gib"] < 3 for row in steps)
    assert speed["seconds"] < record["train_seconds"]  # evaluations are left out
    assert log.count("Peak for MFU: ") == 1
    assert len(re.findall(r"Step [1-6] of 6: loss .*, [\d,]+ tokens/s, MFU .*%, waiting .*%, padding .*%", log)) == 6
    assert "{'loss'" not in log
    assert f"supervised tokens/s, MFU {speed['mfu']:.1%}, waiting {speed['waiting_share']:.1%}" in log


def test_the_final_model_is_whole(results: dict[str, Path], model_dir: Path) -> None:
    from safetensors import safe_open

    original = json.loads((model_dir / "config.json").read_text())
    with safe_open(model_dir / "model.safetensors", "pt") as file:
        expected = {key: file.get_tensor(key).shape for key in file.keys()}  # noqa: SIM118 (not a mapping)
    for folder in results.values():
        with safe_open(folder / "model.safetensors", "pt") as file:
            found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert {key: value.shape for key, value in found.items()} == expected  # the tied head is not there twice
        assert {value.dtype for value in found.values()} == {torch.float32}
        exported = json.loads((folder / "config.json").read_text())
        differing = {key for key in original.keys() | exported.keys() if original.get(key) != exported.get(key)}
        assert differing <= {"dtype", "transformers_version", "eos_token_id"}
        assert exported["eos_token_id"] == [0, 2]  # the pad token, which ends what was learned, then the model's own
        assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_what_was_decided_is_said_once(results: dict[str, Path]) -> None:
    plain_log = (results["python"].parent / "log").read_text(encoding="utf-8")
    assert plain_log.count("No launcher: plain Trainer in one process, the deepspeed key is ignored") == 1
    assert (
        plain_log.count("Batch: 2 rows x 4 accumulated x 1 rank = 8 rows a step; 24 rows => 3 steps an epoch, 6") == 1
    )
    log = (results["deepspeed-zero2"].parent / "log").read_text(encoding="utf-8")
    assert log.count("Batch: 2 rows x 2 accumulated x 2 ranks = 8 rows a step; 24 rows => 3 steps an epoch, 6") == 1
    assert log.count("│ supervised tokens ") == 1
    assert "No launcher" not in log
    assert "it/s]" not in plain_log + log  # no bars where nobody sees them move


def test_the_written_config_repeats_the_run(results: dict[str, Path], plain: Path) -> None:
    changes = ["--output_dir", "again", "--max_steps", "2", "--profile_steps", "2"]
    done = run_forked([TRAIN, "--config", "out/config.yaml", *changes], None, cwd=plain.parent)
    assert done.code == 0, done.output[-4000:]
    path = "again/profile/steps-2-2-rank0.json.gz"
    assert f"Profile: {path}, for https://ui.perfetto.dev." in done.output
    assert re.search(r"\d+\.\d% +[\d.]+ ms +\d+ x  aten::mm\n", done.output)
    events = json.loads(gzip.decompress((plain.parent / path).read_bytes()))["traceEvents"]
    assert sum("aten::mm" in str(event.get("name")) for event in events) > 10
    # The schedule is shorter, so the second step has another learning rate; the first loss is before any step.
    assert step_losses(plain.parent / "again")[0] == step_losses(plain)[0]


@pytest.mark.parametrize(("launcher", "code"), [("python", 2), ("torchrun", 1), ("deepspeed", 2)])
def test_a_bad_row_is_said_once_and_ends_every_rank(model_dir: Path, tmp_path: Path, launcher: str, code: int) -> None:
    """torchrun ends with 1 whatever its workers return."""
    ranks = 1 if launcher == "python" else 2
    config = settings(model_dir, tmp_path, ranks, "zero2.json")
    write_rows(tmp_path / "train.jsonl", [*questions_and_answers(3), {"question": "half a row"}])
    done = train(launcher, ranks, config, cwd=tmp_path)
    assert done.code == code
    assert done.output.count("ds_sft: error: ") == 1
    assert "train.jsonl:4: no field 'answer' (found: question)" in done.output
    assert 'train.py", line' not in done.output  # torchrun prints a traceback of its own, ours has none
    assert not (tmp_path / "out").exists()


def test_bfloat16_exports_bfloat16_with_an_engine_and_without(model_dir: Path, tmp_path: Path) -> None:
    losses = {}
    for name, ranks, engine in (("python", None, None), ("zero2", 2, "zero2.json")):
        folder = tmp_path / name
        folder.mkdir()
        keys = settings(model_dir, folder, ranks or 1, engine, bf16=True, num_predictions=0)
        done = train("forked", ranks, keys, cwd=folder)
        assert done.code == 0, done.output[-4000:]
        model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype="auto")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        losses[name] = step_losses(folder / "out")
        assert read_lines(folder / "out" / "predictions.jsonl") == []
    # The same bfloat16 weights of the same float32 ones, in other micro batches: 3e-5 measured; 3e-4 under autocast.
    assert losses["zero2"] == pytest.approx(losses["python"], rel=1e-4)


def test_float32_export_of_a_bfloat16_run_comes_from_the_masters(model_dir: Path, tmp_path: Path) -> None:
    keys = settings(model_dir, tmp_path, 2, "zero3.json", bf16=True, export_dtype="float32", num_predictions=0)
    done = train("forked", 2, keys, cwd=tmp_path)
    assert done.code == 0, done.output[-4000:]
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert {value.dtype for value in weights.values()} == {torch.float32}
    rounded = sum((v == v.to(torch.bfloat16).float()).float().mean().item() for v in weights.values()) / len(weights)
    assert rounded < 0.1  # masters hold more bits than bfloat16 keeps
