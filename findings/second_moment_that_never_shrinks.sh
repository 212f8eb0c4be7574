#!/usr/bin/env bash
# torch.optim.AdamW on bfloat16 weights remembers the largest gradient for good: its second moment grows, and never
# shrinks.
# Why one would guess otherwise: that small updates of bfloat16 weights get lost is well known, and one keeps a float32
# copy of the weights, or rounds them at random, for it. The states are thought to be averages that forget, of
# 1 / (1 - beta2) = 1,000 steps, and merely less exact. But the optimizer keeps them in the dtype of the weights, and a
# bfloat16 number that is multiplied by beta2 = 0.999 is rounded back to itself: the next smaller one is 0.2 to 0.4 %
# away. (With beta2 = 0.95, as many pre-train with, it shrinks.)
# Where it hurts: one large gradient, as at the start of a run or at a bad batch, makes all later updates of a weight too
# small, here 30 times, and the loss only learns slowly. Stochastic rounding or compensation of the weights alone does
# not help.
# What this project does: ds_sft/training/optimizer.py rounds weights and second moments at random.
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

LARGE, SMALL = 1.0, 1e-3  # the gradient of the first step, and of all behind it
STEPS = 10_000


def trained(dtype, **options):
    """Second moment after all steps, and the size of the last update, with the defaults of AdamW."""
    weight = torch.nn.Parameter(torch.zeros(1, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, **options)
    for step in range(STEPS):
        weight.grad = torch.full_like(weight, SMALL if step else LARGE)
        weight.data.zero_()  # where no update is too small to be seen
        optimizer.step()
    return optimizer.state[weight]["exp_avg_sq"].item(), -weight.item()


of_float32, of_bfloat16 = trained(torch.float32), trained(torch.bfloat16)
shorter = trained(torch.bfloat16, betas=(0.9, 0.95))
print("torch", torch.__version__)
print(f"a gradient of {LARGE:g}, then {STEPS - 1:,} of {SMALL:g}: the second moment, the last update at a rate of 0.001")
print(f"float32: {of_float32[0]:.2e}, {of_float32[1]:.1e}")
print(f"bfloat16, expected: about as much; seen: {of_bfloat16[0]:.2e}, {of_bfloat16[1]:.1e}")
print(f"bfloat16, beta2 0.95: {shorter[0]:.2e}, {shorter[1]:.1e}")
if not (0.9 * SMALL**2 < of_float32[0] < 1.1 * SMALL**2 and 9e-4 < of_float32[1] < 1.1e-3):
    sys.exit("Changed: in float32 the second moment is not that of the last gradients.")
if not (of_bfloat16[0] > 0.9e-3 * LARGE**2 and of_bfloat16[1] < 1e-4):
    sys.exit("Changed: the second moment of bfloat16 weights shrinks.")
if shorter[0] > 1e-5:
    sys.exit("Changed: with beta2 0.95 it does not shrink either.")
print("As described: in bfloat16 the second moment stays at what the largest gradient made of it.")
EOF
