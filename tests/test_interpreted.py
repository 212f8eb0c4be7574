"""Our GPU kernel and Liger's as we call them: the results of PyTorch, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = Path(sys.prefix) / "kernels"


@pytest.fixture(scope="module")
def found() -> Any:
    if not (KERNELS / "triton").is_dir():
        pytest.skip(f"needs Triton and Liger: pip install --no-deps --target {KERNELS} triton liger-kernel")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(KERNELS)])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_loss(found: Any) -> None:
    """Its gradient is rounded as PyTorch's: a value beside 1 or less may fall on the next bfloat16."""
    bounds = {"float32": 1e-6, "bfloat16": 2.0**-8}
    assert len(found["losses"]) == 7
    for case in found["losses"]:
        assert case["loss"] < 1e-6
        assert case["slopes"] <= bounds[case["dtype"]]


def test_norms_gates_and_rotations(found: Any) -> None:
    assert found["fused"].keys() == {"norm llama", "norm gemma", "silu_mul", "gelu_mul", "rotate"}
    assert max(found["fused"].values()) < 1e-6


def test_a_layer_keeps_what_is_planned(found: Any) -> None:
    assert found["memory"] == pytest.approx({"llama": 1, "qwen3": 1}, rel=0.002)
