"""Rows -> steps -> checkpoints, and how large a checkpoint is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_sft.config.keys import Config
from ds_sft.plan.size import ModelSize, in_units, model_size, tensor_shapes, written_bytes
from ds_sft.plan.steps import Steps

BASE: dict[str, Any] = {"micro": 2, "accumulation": 4, "ranks": 2, "num_rows": 100, "epochs": 2.0}


@pytest.mark.parametrize(
    ("changes", "per_epoch", "steps"),
    [
        ({}, 7, 14),
        ({"epochs": 0.5}, 7, 4),
        ({"max_steps": 3}, 7, 3),
        ({"num_rows": 112}, 7, 14),
        ({"num_rows": 97, "drop_last": True}, 6, 12),
        ({"num_rows": 3, "drop_last": True}, 1, 2),
    ],
)
def test_steps(changes: dict[str, Any], per_epoch: int, steps: int) -> None:
    counted = Steps(**{**BASE, **changes})
    assert (counted.rows_per_step, counted.steps_per_epoch, counted.steps) == (16, per_epoch, steps)


def test_steps_of_micro_batches_that_tokens_fill() -> None:
    filled = Steps(**{**BASE, "micro": None, "max_tokens": 4096, "num_bins": 25})
    assert (filled.rows_per_step, filled.steps_per_epoch, filled.steps) == (None, 4, 8)
    assert filled.in_words() == (
        "Batch: at most 4,096 tokens x 4 accumulated x 2 ranks = 32,768 tokens a step; 100 rows in 25 micro batches => "
        "4 steps an epoch, 8 steps in all."
    )
    assert Steps(**{**BASE, "micro": None, "num_bins": 25, "drop_last": True}).steps == 6
    assert Steps(**BASE, max_tokens=4096).in_words() == (
        "Batch: 2 rows x 4 accumulated x 2 ranks = 16 rows a step; 100 rows => 7 steps an epoch, 14 steps in all. "
        "No micro batch has more than 4,096 tokens; to fill them leave per_device_train_batch_size out."
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_rows": 3, "ranks": 3}, ""),
        ({"num_rows": 3, "ranks": 4}, " Ranks that have rows: 3 of 4."),
        ({"num_rows": 3, "ranks": 4, "group": 2}, " Groups that have rows: 3 of 4."),
        ({"micro": None, "max_tokens": 4096, "num_bins": 1}, " Ranks that have rows: 1 of 2."),
    ],
)
def test_ranks_without_rows_are_said(changes: dict[str, Any], said: str) -> None:
    assert Steps(**{**BASE, **changes}).in_words().partition("steps in all.")[2] == said


@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"save_steps": 5.0}, [5, 10, 14]),
        ({"save_steps": 7}, [7, 14]),
        ({"save_steps": 400.0}, [14]),
        ({"save_steps": 0.25}, [4, 8, 12, 14]),  # a share of all steps, rounded up
        ({"save_strategy": "epoch", "save_steps": 5}, [7, 14]),
        ({"save_strategy": "no", "save_steps": 5}, []),
    ],
)
def test_checkpoints(training: dict[str, Any], expected: list[int]) -> None:
    assert Steps(**BASE).checkpoints(training) == expected


def make(**training: Any) -> Config:
    return Config(model_name_or_path="m", train_file="t", training=training)


SIZE = ModelSize(100, embedding=30, tied=True)


@pytest.mark.parametrize(
    ("bf16", "stage", "written"),
    [
        (True, None, (1200, 200)),
        (True, 2, (2 * 100 + 2 * 100 + 1200 + 2 * 30, 200)),
        (True, 3, (2 * 100 + 1200, 200)),
        (False, 2, (4 * 100 + 4 * 100 + 1200 + 4 * 30, 400)),
        (False, 3, (4 * 100 + 1200, 400)),
    ],
)
def test_written_bytes(bf16: bool, stage: int | None, written: tuple[int, int]) -> None:
    assert written_bytes(SIZE, stage, make(bf16=bf16)) == written


def test_the_dtype_of_the_final_model() -> None:
    config = Config(model_name_or_path="m", train_file="t", export_dtype="float32", training={"bf16": True})
    assert written_bytes(SIZE, 3, config) == (1400, 400)


def test_size_of_a_model_folder(model_dir: Path, tmp_path: Path) -> None:
    """Against transformers' own count."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert model_size(model_dir) == ModelSize(model.num_parameters(), embedding=400 * 64, tied=True)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert model_size(tmp_path) == model_size(model_dir)
    next(tmp_path.glob("model-*.safetensors")).unlink()
    assert model_size(tmp_path) is None


def test_files_that_are_not_what_they_say(model_dir: Path, tmp_path: Path) -> None:
    whole = (model_dir / "model.safetensors").read_bytes()
    for name, content, message in (
        ("empty", b"", "not a safetensors file"),
        ("page", b"<html>not found</html>", "not a safetensors file"),
        ("cut", whole[:-10], r"is cut off: [\d,]+ of [\d,]+ bytes"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            tensor_shapes(tmp_path / name)


def test_units() -> None:
    shown = [in_units(n) for n in (0, 1023, 1536, 2**20, 15 * 2**30, 3 * 2**40, 2**60)]
    assert shown == ["0 bytes", "1,023 bytes", "1.5 KiB", "1.0 MiB", "15.0 GiB", "3.0 TiB", "1,048,576.0 TiB"]
