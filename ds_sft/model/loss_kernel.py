"""Cross-entropy of a chunk of logits and its gradient in two passes over them, by a Triton kernel.

`model/loss.py` does the same in ten: on a GPU each of them reads or writes the whole chunk. Here a program reads a
row for its largest logit and the sum of exponentials (Milakov and Gimelshein, arXiv 1805.02867), then once more to
write the gradient over it. CUDA builds of PyTorch bring Triton with them. `TRITON_INTERPRET=1` runs the kernel on a
CPU, for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Logits in registers at once, 16 a thread of a program. In bfloat16 it takes 40 registers, so that on an H100 three
# programs share a multiprocessor: one loads while another one adds up. With 32 a thread it took 80, and had it alone.
BLOCK = 8192
WARPS = 16


@triton.jit  # type: ignore[untyped-decorator]
def _bent(x, scale, cap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """`cap * tanh(scale * x / cap)`, without a cap `scale * x`."""
    x = x * scale
    if CAPPED:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def _rows(  # type: ignore[no-untyped-def]  # noqa: ANN202
    logits, stride, targets, losses, vocab, scale, cap,  # noqa: ANN001
    CAPPED: tl.constexpr, LEARN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row)
    of_target = _bent(tl.load(logits + target).to(tl.float32), scale, cap, CAPPED)
    top, whole = float("-inf"), 0.0
    for start in range(0, vocab, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocab, other=0.0).to(tl.float32)
        x = tl.where(place < vocab, _bent(x, scale, cap, CAPPED), float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        whole = whole * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    tl.store(losses + row, top + tl.log(whole) - of_target)
    if LEARN:
        for start in range(0, vocab, BLOCK):
            place = start + tl.arange(0, BLOCK)
            x = tl.load(logits + place, mask=place < vocab, other=0.0).to(tl.float32)
            x = _bent(x, scale, cap, CAPPED)
            slope = tl.exp(x - top) / whole - tl.where(place == target, 1.0, 0.0)
            if CAPPED:
                slope = slope * (1 - (x / cap) * (x / cap))
            slope = slope * scale
            tl.store(logits + place, slope.to(logits.dtype.element_ty), mask=place < vocab)


def loss_and_slopes(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, cap: float | None, *, learn: bool
) -> torch.Tensor:
    """Sum of the cross-entropy, float32, []; with `learn` the gradient takes the place of the logits.

    Args:
        logits: [n, vocab], each row contiguous.
        targets: [n], indices below vocab.
        scale: as `cap` in `loss.LogitTerms`.
        cap: None leaves logits as they are.
        learn: whether a gradient is wanted.
    """
    assert logits.stride(1) == 1
    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(logits.shape[1]))
    _rows[(len(logits),)](
        logits, logits.stride(0), targets, losses, logits.shape[1], float(scale), float(cap or 1),
        CAPPED=cap is not None, LEARN=learn, BLOCK=block, num_warps=WARPS,
    )  # fmt: skip
    return losses.sum()
