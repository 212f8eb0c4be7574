#!/usr/bin/env bash
# A mixture of experts' router loss is added whole to every micro batch, so a step's loss depends on how it was split.
# Why one would guess otherwise: num_items_in_batch exists so that gradient accumulation changes nothing, and the
# cross-entropy is divided by it. The auxiliary loss in the same forward is not, and nothing is said.
# Where it hurts: the router is pulled towards balance N times as hard with N micro batches a step. Who halves the micro
# batch to save memory and doubles the accumulation trains with twice the router_aux_loss_coef of config.json.
# What this project does: SharedAuxiliary in ds_sft/model/loss.py weighs the auxiliary loss by the micro batch's
# share of the step's supervised tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0
export HOME="$work" CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import sys
from importlib.metadata import version

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

torch.manual_seed(0)
config = Qwen3MoeConfig(vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=32, num_experts=4,
                        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                        head_dim=16, output_router_logits=True, router_aux_loss_coef=0.1)
model = Qwen3MoeForCausalLM(config)
row = torch.randint(64, (1, 16))
rows, items = row.repeat(2, 1), 2 * 15  # equal rows route alike, however they are split; a row predicts 15 tokens


def step(micro_batches):
    """The loss of one optimizer step, as gradient accumulation adds it up: all of it, and its router's part."""
    outputs = [model(input_ids=x, labels=x, num_items_in_batch=items) for x in micro_batches]
    router = sum(config.router_aux_loss_coef * output.aux_loss for output in outputs)
    return sum(output.loss for output in outputs).item(), router.item()


whole, router_of_whole = step([rows])
halves, router_of_halves = step([row, row])

print("transformers", version("transformers"), "torch", torch.__version__, "Qwen3Moe, router_aux_loss_coef 0.1")
print("expected: one loss for the same two rows, as one micro batch or as two")
print(f"seen: one micro batch of two rows   {whole:.4f}, of it router {router_of_whole:.4f}")
print(f"      two micro batches of one row  {halves:.4f}, of it router {router_of_halves:.4f}")
if abs(whole - router_of_whole - (halves - router_of_halves)) > 1e-4:
    sys.exit("Changed: the cross-entropy depends on the split, too.")
if abs(halves - whole - router_of_whole) > 1e-4 or abs(router_of_halves - 2 * router_of_whole) > 1e-4:
    sys.exit("Changed: the router's loss does not double.")
print("As described: the cross-entropy is the same, the router's loss doubles.")
EOF
