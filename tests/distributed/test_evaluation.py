"""`load_best_model_at_end` under ZeRO: the best checkpoint is what is exported, predicted with and reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import write_rows
from tests.distributed.harness import read_lines, train
from tests.distributed.test_trajectory import engine

pytestmark = pytest.mark.distributed

# What is learned is the opposite of what is measured, so the validation loss rises once the format is learned.
TRAIN = [{"question": "?", "answer": "no no no"}] * 32
EVAL = [{"question": "?", "answer": "天气天气天气天气天气"}]  # fewer rows than ranks


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
def test_the_best_model_is_exported(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Also where a site forbids unpickling of more than tensors: loading the best model is loading, too."""
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    write_rows(tmp_path / "train.jsonl", TRAIN)
    write_rows(tmp_path / "eval.jsonl", EVAL)
    keys: dict[str, Any] = {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "eval_file": "eval.jsonl",
        "output_dir": "out",
        "system_prompt": "",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 2e-2,
        "num_train_epochs": 1,
        "eval_steps": 2,
        "save_steps": 2,
        "logging_steps": 2,
        "save_total_limit": 5,
        "load_best_model_at_end": True,
        "bf16": False,
        "num_predictions": 1,
        "predict_max_new_tokens": 4,
        **({"deepspeed": engine(name, tmp_path)} if name != "none" else {}),
    }
    done = train("forked", 2, keys, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    out = tmp_path / "out"
    evaluated = {row["step"]: row["eval_loss"] for row in read_lines(out / "metrics.jsonl") if "eval_loss" in row}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert len(evaluated) == 4
    assert best < max(evaluated), evaluated  # else the last would pass for the best
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert record["best_checkpoint"] == f"checkpoint-{best}"
    assert record["eval_loss"] == evaluated[best]
    assert f"Exporting the best model: checkpoint-{best}" in done.output
    exported, saved = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
        for folder in (out, out / f"checkpoint-{best}")
    )
    for key, value in saved.items():
        torch.testing.assert_close(exported[key], value, rtol=0, atol=0, msg=key)
