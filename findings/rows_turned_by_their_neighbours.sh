#!/usr/bin/env bash
# With rope_type dynamic or longrope a row's logits depend on the longest row of its batch; with dynamic also on the
# rows of earlier batches.
# Why one would guess otherwise: rotary positions look like a function of the position alone, and the attention mask
# keeps rows apart. But transformers computes one set of frequencies for a forward, from its largest position: longrope
# chooses between its short and its long factors by it, dynamic scales by it and keeps what it has scaled until a short
# row comes. A causal model is then not causal either: tokens behind a row change the logits of those before.
# Where it hurts: a loss that depends on how rows are batched, padded or packed; an evaluation whose result depends on
# its batch size and order; generation whose cached keys are turned otherwise than new queries. Here the model is random
# and small; what a trained one loses is not measured.
# What this project does: ds_sft/model/limits.py refuses rows longer than the model was made for with such
# positions, and the key rope_scaling offers the types that turn each row by itself.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
export HOME="$work" PATH="$work/venv/bin:$PATH" CUDA_VISIBLE_DEVICES=
cd "$work"
python -I - <<'EOF' >"$work/out" 2>&1 || { cat "$work/out" >&2; exit 1; }
import sys
from importlib.metadata import version

import torch
from transformers import LlamaConfig, LlamaForCausalLM

LENGTH = 32  # tokens that the model was made for
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": LENGTH}
KINDS = {"default": {}, "linear": {"factor": 4.0}, "yarn": {"factor": 4.0}, "dynamic": {"factor": 4.0},
         "longrope": {"factor": 4.0, **FACTORS}}


def make(kind):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LENGTH, initializer_range=0.2,
        rope_parameters={"rope_type": kind, "rope_theta": 10_000.0, **KINDS[kind]},
    )).eval()


def apart(one, other):
    """The largest difference of logits, as a share of the largest logit."""
    return float((one - other).abs().max() / other.abs().max())


short, middle, long = torch.arange(24)[None], torch.arange(48)[None], torch.arange(64).flip(0)[None]
beside = torch.cat([torch.nn.functional.pad(short, (0, 40)), long])
mask = torch.ones_like(beside)
mask[0, 24:] = 0

print("Versions: transformers", version("transformers"), "torch", version("torch"))
print("Expected: the same logits in all cases, so 0.0 %. Seen:")
seen = {}
with torch.no_grad():
    for kind in KINDS:
        alone = make(kind)(short).logits
        with_neighbour = make(kind)(beside, attention_mask=mask).logits[:1, :24]
        model = make(kind)
        before = model(middle).logits
        model(long)
        seen[kind] = apart(with_neighbour, alone), apart(model(middle).logits, before)
        print(f"{kind}: beside a longer row {seen[kind][0]:.1%}, after a longer row {seen[kind][1]:.1%}")
if any(value > 1e-5 for kind in ("default", "linear", "yarn") for value in seen[kind]):
    sys.exit("Changed: rows depend on others with other types, too.")
if min(*seen["dynamic"], seen["longrope"][0]) < 1e-3 or seen["longrope"][1] > 1e-5:
    sys.exit("Changed: dynamic or longrope turns a row otherwise.")
print("As described: dynamic and longrope turn a row by the longest of its batch, dynamic by earlier batches, too.")
EOF
grep -E "^(Versions|Expected|[a-z]+:|As described)" "$work/out"
