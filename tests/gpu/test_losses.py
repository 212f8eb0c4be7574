"""Every way to compute on a GPU gives the losses that a CPU gives for the same rows; and so does every engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from ds_sft.export.verify import BOUNDS
from tests.conftest import write_rows
from tests.distributed.harness import read_lines, step_losses
from tests.distributed.test_trajectory import BF16_LOSS, ROWS, engine
from tests.gpu.lane import GPU, LONG, ON_GPU, Ran, make, run_all, settings

pytestmark = GPU

ONE_KERNEL = "Attention      varlen_attn"
NORMS = 0.03  # of a gradient's length; ways to compute on one CPU differ by a thousandth, in losses, too
# Name -> whose losses on a CPU it must have, keys, and what it says of itself on a GPU.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "end_to_end": ("end_to_end", {}, ONE_KERNEL),
    "recomputed": ("end_to_end", {"gradient_checkpointing": True}, ONE_KERNEL),
    "padded": ("end_to_end", {"batching": "padded"}, ""),
    "packed": ("packed", {"packing": "concat", "per_device_train_batch_size": 2}, ONE_KERNEL),
    "long": ("long", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_length": LONG},
             ONE_KERNEL),
    "window": ("window", {}, ONE_KERNEL),
    "mixture": ("mixture", {}, "by grouped_mm (transformers')"),
    "liger": ("end_to_end", {"fused_kernels": "liger"}, "Fused kernels  9 norms, 2 gates, 2 rotations (Liger"),
    "compiled_layers": ("end_to_end", {"fused_kernels": "compile"}, "Fused kernels  2 layers, each compiled"),
    "compiled": ("end_to_end", {"torch_compile": True}, ""),
}  # fmt: skip
NEEDS_GPU = ("liger",)


@pytest.fixture(scope="module")
def keys(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of each case."""
    folder = tmp_path_factory.mktemp("learned")
    qwen3 = make(folder / "qwen3", tokenizer_dir)
    models = {
        "window": make(folder / "mistral", tokenizer_dir, "mistral", sliding_window=40),
        "mixture": make_mixture(folder / "mixture", tokenizer_dir),
    }
    answers = [" ".join(str(n * i % 997) for n in range(LONG)) for i in range(4)]  # more tokens than fit
    long = write_rows(folder / "long.jsonl", [{"question": "Count", "answer": answer} for answer in answers])
    rows = {"long": long}
    short = write_rows(folder / "rows.jsonl", ROWS)
    return {
        name: settings(models.get(name, qwen3), rows.get(name, short), **changes)
        for name, (_, changes, _) in CASES.items()
    }


def make_mixture(folder: Path, tokenizer_dir: Path) -> Path:
    return make(folder, tokenizer_dir, "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
                output_router_logits=True)  # fmt: skip


@pytest.fixture(scope="module")
def on_cpu(keys: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    wanted = dict.fromkeys(reference for reference, _, _ in CASES.values())
    return run_all(tmp_path_factory.mktemp("cpu"), {name: keys[name] | {"use_cpu": True} for name in wanted})


@pytest.fixture(scope="module")
def on_gpu(keys: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Ran:
    cases = {name: found for name, found in keys.items() if runs(name)}
    return run_all(tmp_path_factory.mktemp("gpu"), cases, timeout=900)


def runs(name: str) -> bool:
    """Whether this machine has what a case needs."""
    return name not in NEEDS_GPU or (ON_GPU and importlib.util.find_spec("liger_kernel") is not None)


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_a_cpu(name: str, on_cpu: Ran, on_gpu: Ran) -> None:
    """Within bfloat16's bound, at each of four steps; and so are lengths of gradients."""
    if not runs(name):
        pytest.skip("Liger is not installed")
    reference, _, said = CASES[name]
    expected, out = on_cpu.out(reference), on_gpu.out(name)
    assert len(step_losses(out)) == 4
    for found, wanted in zip(step_losses(out), step_losses(expected), strict=True):
        assert abs(found - wanted) <= BOUNDS["bfloat16"] * max(1, wanted)
    assert gradient_norms(out) == pytest.approx(gradient_norms(expected), rel=NORMS)
    assert said in on_gpu.said[name] or not ON_GPU
    assert "cuDNN's attention allowed: False" in on_gpu.said[name]


def gradient_norms(folder: Path) -> list[float]:
    return [row["grad_norm"] for row in read_lines(folder / "metrics.jsonl") if "grad_norm" in row]


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_engines_on_one_card_have_the_losses_of_none(
    name: str, keys: dict[str, dict[str, Any]], on_gpu: Ran, tmp_path: Path
) -> None:
    asked = keys["end_to_end"] | {"deepspeed": engine(name, tmp_path)}
    out = run_all(tmp_path, {name: asked}, ranks=1).out(name)
    assert step_losses(out) == pytest.approx(step_losses(on_gpu.out("end_to_end")), rel=BF16_LOSS)
