"""The plan against trainings of real size: a subset of benchmarks/plan_accuracy.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import plan_accuracy

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


CASES = [
    ("qwen3-10m", "none", 1, False),
    ("qwen3-10m", "zero2", 2, False),
    ("qwen3-10m", "zero3", 2, True),
    ("qwen3-10m", "zero2-offload", 2, True),
    ("llama-30m", "zero1", 2, True),
    ("llama-30m", "zero2", 2, False),
    ("llama-30m", "zero3", 2, False),
]  # tied and untied, with and without checkpointing


@pytest.mark.timeout(900)  # the first offload case compiles DeepSpeed's CPU Adam
@pytest.mark.parametrize(("model", "layout", "ranks", "checkpointing"), CASES)
def test_plan_is_what_is_measured(folder: Path, model: str, layout: str, ranks: int, checkpointing: bool) -> None:
    case = plan_accuracy.Case(model, layout, ranks, checkpointing, micro_batch=4, length=512)
    found: dict[str, Any] = plan_accuracy.compare(case, folder)
    assert found["states_predicted"] == pytest.approx(found["states_measured"], rel=0.02)
    ratio = found["whole_predicted"] / found["whole_measured"]
    assert 0.95 <= ratio <= 1.1, found
