"""Tokenizers as they are published: what is mended, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_sft.errors import UserError
from ds_sft.model.tokenizer import load_tokenizer
from ds_sft.ranks.launch import Launch
from tests.test_load import make

ALONE = Launch(launcher="python")
NO_FOLDER = "no such folder (the current directory is {here}), and not a hub id such as Qwen/Qwen3-0.6B"


def forget(file: Path, *keys: str) -> None:
    """Take keys out of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({k: v for k, v in content.items() if k not in keys}), encoding="utf-8")


def test_a_tokenizer_with_a_pad_token_is_left_alone(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(make(model_dir), ALONE)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<|im_end|>",
        "right",
    )
    assert capsys.readouterr().out == ""


def test_without_a_pad_token_eos_ends_the_answers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget(copy / "tokenizer_config.json", "pad_token")
    assert load_tokenizer(make(copy), ALONE).pad_token == "<|im_end|>"
    assert capsys.readouterr().out == "The tokenizer has no pad token: '<|im_end|>' (eos) ends the answers instead.\n"


def test_without_either_the_model_is_refused(copy: Path) -> None:
    forget(copy / "tokenizer_config.json", "pad_token", "eos_token")
    with pytest.raises(UserError, match="its tokenizer has neither a pad nor an eos token"):
        load_tokenizer(make(copy), ALONE)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", NO_FOLDER),
        ("a/b/c", NO_FOLDER),
        ("empty", "this folder has no config.json, so it is not a model"),
        ("file", "is a file; give the folder of a model, or a hub id"),
    ],
)
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        load_tokenizer(make(name), ALONE)
    assert str(caught.value) == f"model_name_or_path: {name}: {said.format(here=tmp_path)}"


def test_a_model_that_the_hub_does_not_give(model_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(make("nobody/nothing"), ALONE)
    assert str(caught.value).startswith("model_name_or_path: nobody/nothing: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_broken_files(copy: Path, file: str) -> None:
    (copy / file).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"^model_name_or_path: ") as caught:
        load_tokenizer(make(copy), ALONE)
    assert "\n" not in str(caught.value)
