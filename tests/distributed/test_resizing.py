"""Rows that `resize_embeddings` adds: the same under every engine, in what is exported, verified and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_sft.commands.export import main as export
from tests.conftest import write_rows
from tests.distributed.harness import read_lines, run_forked, script, step_losses, write_yaml
from tests.distributed.test_trajectory import engine, settings, untied_dir

pytestmark = pytest.mark.distributed
__all__ = ["untied_dir"]  # a fixture

NEW = ["<|think|>", "<|act|>"]
ROWS = [{"question": f"What is {i}?", "answer": f"<|think|>{i}<|act|>Paris" * (1 + i % 3)} for i in range(16)]


def with_new_tokens(model_dir: Path, folder: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": NEW})
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_for_new_tokens_whatever_the_engine(
    model_dir: Path, untied_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks. At learning rate 0 the exported model is the first one and the mean of its rows; training goes on from
    a checkpoint, bit for bit."""
    tied, own = with_new_tokens(model_dir, tmp_path / "tied"), with_new_tokens(untied_dir, tmp_path / "own")
    still = {"learning_rate": 0, "max_steps": 1, "eval_strategy": "no", "export_dtype": "float32"}
    saving = {"save_steps": 1, "save_strategy": "steps"}
    answers = {"verify_export": True, "num_predictions": 2, "predict_max_new_tokens": 4, "predict_before": True}
    runs: dict[str, dict[str, Any]] = {}
    for name in ("none", "zero2", "zero3"):
        runs[f"{name}-tied"] = settings(tied, tmp_path, "none", 2, 2, **still)
        runs[f"{name}-whole"] = settings(tied, tmp_path, "none", 2, 2, **saving)
        runs[f"{name}-resumed"] = {**runs[f"{name}-whole"], "resume": f"{name}-whole/checkpoint-1"}
    runs["zero3-own"] = settings(own, tmp_path, "none", 2, 2, **still)
    runs["zero3-bf16"] = {**runs["zero3-tied"], "bf16": True}
    runs["zero3-whole"] |= answers
    for name in ("zero2", "zero3"):
        (tmp_path / name).mkdir()
        engine(name, tmp_path / name)
    files = [
        str(write_yaml(tmp_path / f"{key}.yaml", {
            **keys, "output_dir": key, "resize_embeddings": True,
            **({} if key.startswith("none") else {"deepspeed": f"{key[:5]}/engine.json"}),
        }))
        for key, keys in runs.items()
    ]  # fmt: skip
    write_rows(tmp_path / "train.jsonl", ROWS)
    write_rows(tmp_path / "eval.jsonl", ROWS[:3])
    done = run_forked([script("splits"), *files], 2, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    line = "resize_embeddings: 400 -> 448 embedding rows for 402 tokens, a multiple of 64; new ones are the mean of the"
    assert done.output.count(line) == len(runs)
    for key in runs:
        assert json.loads((tmp_path / key / "config.json").read_text(encoding="utf-8"))["vocab_size"] == 448
    for key in [key for key in runs if not key.endswith(("whole", "resumed"))]:
        assert_equal(weights(tmp_path / key), resized(own if key.endswith("own") else tied))
    monkeypatch.chdir(tmp_path)
    for name in ("none", "zero2", "zero3"):
        assert step_losses(tmp_path / f"{name}-whole") == pytest.approx(step_losses(tmp_path / "none-whole"), rel=1e-5)
        assert export([f"{name}-whole/checkpoint-2", f"{name}-exported"]) == 0
        for other in ("resumed", "exported"):
            assert_equal(weights(tmp_path / f"{name}-{other}"), weights(tmp_path / f"{name}-whole"))
    assert json.loads(Path("zero3-whole/run.json").read_text(encoding="utf-8"))["export"]["verified"] is True
    assert len(read_lines(tmp_path / "zero3-whole" / "predictions.jsonl")) == 2


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def resized(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in `folder` in float32, with 48 rows more of each matrix that has one for each token."""
    found = {name: value.float() for name, value in weights(folder).items()}
    more = {
        name: torch.cat([value, value.double().mean(0).bfloat16().float().expand(48, -1)])
        for name, value in found.items()
        if len(value) == 400
    }
    return found | more
