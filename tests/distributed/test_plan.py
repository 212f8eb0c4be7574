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
    ("llama-30m", "none", 2, True, "all"),
    ("llama-30m", "none", 1, False, "all"),
    ("llama-30m", "zero1", 2, True, "all"),
    ("llama-30m", "zero2", 2, False, "all"),
    ("llama-30m", "zero3", 2, True, "all"),
    ("qwen3-10m", "zero2-offload", 2, True, "all"),
    ("qwen3-10m", "zero3", 2, True, "all"),
    ("llama-30m", "none", 1, False, "lora"),
    ("llama-30m", "zero2", 2, True, "lora"),
    ("llama-30m", "zero3", 2, True, "lora"),
]  # untied and tied


@pytest.mark.timeout(2000)
@pytest.mark.parametrize(("model", "layout", "ranks", "checkpointing", "trained"), CASES)
def test_plan_is_what_is_measured(
    folder: Path, model: str, layout: str, ranks: int, checkpointing: bool, trained: str
) -> None:
    case = plan_accuracy.Case(model, layout, ranks, checkpointing, keys=trained)
    found: dict[str, Any] = plan_accuracy.compare(case, folder)
    assert found["states_predicted"] == pytest.approx(found["states_measured"], rel=0.02)
    spread = 8 * plan_accuracy.MIB  # of what is imported later, of which these small models take little more
    assert 0.95 * found["whole_measured"] - spread <= found["whole_predicted"], found
    assert found["whole_predicted"] <= 1.1 * found["whole_measured"] + spread, found
