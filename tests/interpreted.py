"""GPU kernels in Triton's interpreter, against the same in PyTorch. A program of its own: `TRITON_INTERPRET` is read
when a kernel is defined. Prints what it finds as JSON, which `tests/test_interpreted.py` judges.

    PYTHONPATH=.:.venv/kernels python -m tests.interpreted
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import liger_kernel.ops.geglu
import liger_kernel.ops.rms_norm
import liger_kernel.ops.swiglu
import torch
import triton
import triton.language as tl

from ds_sft.model import loss_kernel
from ds_sft.model.fused import Kernels, liger, use_kernels
from ds_sft.model.loss import LogitTerms, _by_kernel, _by_torch
from ds_sft.plan.activations import layer_activations
from tests.test_fused import IN_TORCH
from tests.test_plan_activations import kept_by_autograd, planned

LOSSES = [  # rows, vocabulary, dtype, terms, logits of a block
    (5, 160, torch.float32, LogitTerms(), 64),
    (3, 4096, torch.float32, LogitTerms(), 1024),
    (1, 1000, torch.float32, LogitTerms(scale=0.25), 16_384),
    (4, 1000, torch.float32, LogitTerms(cap=3.0), 256),
    (4, 1000, torch.float32, LogitTerms(scale=2.0, cap=5.0), 256),
    (6, 3001, torch.bfloat16, LogitTerms(), 1024),
    (6, 3001, torch.bfloat16, LogitTerms(cap=30.0), 1024),
]


def compare_losses(rows: int, vocab: int, dtype: torch.dtype, terms: LogitTerms, block: int) -> dict[str, Any]:
    loss_kernel.BLOCK = block
    generator = torch.Generator().manual_seed(rows * vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * 10).to(dtype)
    logits[0, 0] = 200.0  # its exponential is infinite where no maximum is subtracted
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    slopes, found_slopes, untouched = logits.clone(), logits.clone(), logits.clone()
    expected = _by_torch(slopes, targets, terms, learn=True)
    found = _by_kernel(found_slopes, targets, terms, learn=True)
    only_loss = _by_kernel(untouched, targets, terms, learn=False)
    assert torch.equal(untouched, logits)
    assert torch.equal(only_loss, found)
    return {
        "dtype": str(dtype).split(".")[1],
        "loss": ((found - expected).abs() / expected.abs()).item(),
        "slopes": (found_slopes.float() - slopes.float()).abs().max().item(),
    }


class Scalar(float):
    """A number as a compiled kernel gets it: Liger's cast theirs, which Triton's interpreter hands over as Python's."""

    def to(self, dtype: Any) -> Scalar:
        return self


@triton.jit  # type: ignore[untyped-decorator]
def _rsqrt(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return tl.rsqrt(x)


@triton.jit  # type: ignore[untyped-decorator]
def _tanh(x):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return 2 * tl.sigmoid(2 * x) - 1


liger_kernel.ops.swiglu.float = Scalar  # it makes plain numbers of its factors
# Liger takes these from CUDA's library, which the interpreter has not.
liger_kernel.ops.rms_norm.rsqrt, liger_kernel.ops.geglu.tanh = _rsqrt, _tanh


def interpreted() -> Kernels:
    """Liger's, as we call them but for the type of numbers."""
    kernels = liger()
    return replace(
        kernels, norm=lambda x, w, eps, offset, *rest: kernels.norm(x, w, Scalar(eps), Scalar(offset), *rest)
    )


def compare_fused() -> dict[str, float]:
    """Largest differences of outputs and gradients, relative to the largest value; float32."""
    torch.manual_seed(0)
    x, gate, up = (torch.randn(3, 5, 48) for _ in range(3))
    q, k = torch.randn(1, 5, 4, 16).transpose(1, 2), torch.randn(1, 5, 2, 16).transpose(1, 2)
    angles = torch.randn(1, 5, 8).repeat(1, 1, 2)
    norms = [(x, torch.randn(48), 1e-6, offset, casting, False) for offset, casting in
             ((0.0, "llama"), (1.0, "gemma"))]  # fmt: skip
    kernels = interpreted()
    return {
        **{f"norm {case[4]}": _apart(lambda of, c=case: of.norm(*c), kernels, case[:2]) for case in norms},
        "silu_mul": _apart(lambda of: of.silu_mul(gate, up), kernels, (gate, up)),
        "gelu_mul": _apart(lambda of: of.gelu_mul(gate, up), kernels, (gate, up)),
        "rotate": _apart(
            lambda of: torch.cat(of.rotate(q.clone(), k.clone(), angles.cos(), angles.sin(), None, 1), 1), kernels, ()
        ),
    }


def _apart(compute: Any, kernels: Kernels, leaves: tuple[torch.Tensor, ...]) -> float:
    results = []
    for of in (IN_TORCH, kernels):
        for leaf in leaves:
            leaf.requires_grad_().grad = None
        output = compute(of)
        if leaves:
            output.square().sum().backward()
        results.append([output.detach().clone(), *(leaf.grad.clone() for leaf in leaves)])
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True))


def compare_memory(family: str) -> float:
    """Bytes that a layer keeps for its backward, over what the planner says."""
    layout: Any = {"kind": "bf16", "padded": False, "attention": "sdpa"}
    kept = [kept_by_autograd(family, layers, **layout, prepare=_use_liger) for layers in (2, 3)]
    return (kept[1] - kept[0]) / layer_activations(planned(family, **layout, fused=True))


def _use_liger(model: Any) -> None:
    use_kernels(model, interpreted(), "Liger")


if __name__ == "__main__":
    print(json.dumps({"losses": [compare_losses(*case) for case in LOSSES], "fused": compare_fused(),
                      "memory": {family: compare_memory(family) for family in ("llama", "qwen3")}}))  # fmt: skip
