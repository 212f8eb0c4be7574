#!/usr/bin/env bash
# The gradient of `x[0]`, where x is a batch of one, is written into zeros of x's size; that of `x.squeeze(0)` is a view.
# Why one would guess otherwise: both are views of the same numbers forward, and here the gradient of x is the gradient
# of x[0] in another shape. But autograd knows `x[0]` as a choice of one of several: backward fills a tensor with zeros
# and copies the gradient into it, whatever the size of the batch.
# Where it hurts: kernels for rows laid end to end, as torch's varlen_attn, take [tokens, heads, size], and models give
# [1, heads, tokens, size]. Taken by [0], each layer's backward fills and copies queries, keys and values: as many bytes
# again as the kernel itself writes.
# What this project does: ds_sft/model/attention_kernels.py squeezes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
export HOME="$work" CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

VIEWS = {"aten.detach.default", "aten.select.int", "aten.squeeze.dim", "aten.unsqueeze.default", "aten.alias.default"}


class Written(TorchDispatchMode):
    """Bytes that operations write, views left out, and which operations those are."""

    def __init__(self):
        super().__init__()
        self.bytes, self.names = 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        if str(operation) not in VIEWS and isinstance(made, torch.Tensor):
            self.bytes += made.numel() * made.element_size()
            self.names.append(str(operation).removeprefix("aten.").partition(".")[0])
        return made


def backward_of(first):
    x = torch.randn(1, 16, 1024, 128, requires_grad=True)
    rows = first(x)
    gradient = torch.randn(rows.shape)
    with Written() as written:
        (found,) = torch.autograd.grad(rows, x, gradient)
    assert torch.equal(found[0], gradient)
    return written, x.numel() * x.element_size()


indexed, size = backward_of(lambda x: x[0])
squeezed, _ = backward_of(lambda x: x.squeeze(0))
print("torch", torch.__version__)
print(f"x: [1, 16, 1024, 128], {size:,} bytes. Written in backward; expected: nothing by either")
print(f"  x[0]         {indexed.bytes:,} bytes: {', '.join(indexed.names)}")
print(f"  x.squeeze(0) {squeezed.bytes:,} bytes")
if squeezed.bytes:
    sys.exit("Changed: backward of squeeze writes something, too.")
if indexed.bytes < size:
    sys.exit("Changed: backward of x[0] writes less than x.")
print("As described: x[0] of a batch of one is copied in backward, x.squeeze(0) is not.")
EOF
