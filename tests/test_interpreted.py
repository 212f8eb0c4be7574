"""Our GPU kernel and Liger's as we call them: the results of PyTorch, in Triton's interpreter; and ours compiled."""

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


def told_by(program: str) -> Any:
    """What a program of this folder prints last, as JSON."""
    if not (KERNELS / "triton").is_dir():
        pytest.skip(f"needs Triton and Liger: pip install --no-deps --target {KERNELS} triton liger-kernel")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(KERNELS)])}
    done = subprocess.run([sys.executable, "-m", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> Any:
    return told_by("tests.interpreted")


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


def test_the_loss_is_compiled_for_cards_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ampere, Hopper, Blackwell. Nothing spills, and programs of 512 threads share a multiprocessor's 65,536 registers:
    at least two in bfloat16."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # so that it is compiled
    variants = told_by("tests.compiled")
    assert {variant["capability"] for variant in variants} == {80, 90, 120}
    assert len(variants) == 12
    for variant in variants:
        assert variant["spilled"] == 0, variant
        assert 0 < variant["registers"] <= (64 if variant["dtype"] == "bf16" else 128), variant
