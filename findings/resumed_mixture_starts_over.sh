#!/usr/bin/env bash
# Trainer resumes a mixture of experts with the experts that the model began with.
# Why one would guess otherwise: a dense model resumes with the weights of its checkpoint, from_pretrained reads the
# same folder right, and nothing is raised. But published files (and save_pretrained's) have one matrix an expert, the
# model in memory has one tensor for all of a layer, and Trainer loads the file's names into the model as they are: the
# missing names are a warning, and the optimizer's states are those of other weights.
# Where it hurts: every run of a mixture that goes on after an interruption, and load_best_model_at_end.
# What this project does: ds_sft/checkpoints/trained.py (load_converted) turns the names into those of the model.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
export HOME="$work" PATH="$work/venv/bin:$PATH" CUDA_VISIBLE_DEVICES=
cd "$work"
python -I - <<'EOF' >"$work/out" 2>&1 || { cat "$work/out" >&2; exit 1; }
import sys
from importlib.metadata import version

import torch
from transformers import (
    AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM, Trainer,
    TrainingArguments,
)

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
             num_key_value_heads=1, head_dim=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
ROWS = [{"input_ids": [i, i + 1, i + 2], "labels": [i, i + 1, i + 2]} for i in range(32)]


def trainer(kind, config, steps, folder):
    torch.manual_seed(0)  # the same weights to begin with
    args = TrainingArguments(folder, max_steps=steps, save_steps=4, learning_rate=0.05, use_cpu=True, report_to="none")
    return Trainer(kind(config(**SIZES, **(EXPERTS if config is Qwen3MoeConfig else {}))), args, train_dataset=ROWS)


def apart(one, other):
    """Names of the parameters that differ."""
    other = dict(other.named_parameters())
    return [name for name, value in one.named_parameters() if not torch.equal(value.float(), other[name].float())]


def resumed(kind, config, folder):
    """What differs from the checkpoint of step 4 when Trainer has loaded it, and when from_pretrained has."""
    first = trainer(kind, config, 4, folder)
    first.train()
    again = trainer(kind, config, 4, folder)  # all steps are done: it loads, and learns nothing
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-4")
    read = AutoModelForCausalLM.from_pretrained(f"{folder}/checkpoint-4")
    return apart(first.model, again.model), apart(first.model, read)


dense, dense_read = resumed(Qwen3ForCausalLM, Qwen3Config, "dense")
mixture, mixture_read = resumed(Qwen3MoeForCausalLM, Qwen3MoeConfig, "mixture")
print("Versions: transformers", version("transformers"), "torch", version("torch"))
print("Other weights than the checkpoint's, expected: none")
print("Other weights, seen of a dense model:", *dense, *dense_read or ["none"])
print("Other weights, seen of a mixture that from_pretrained reads:", *mixture_read or ["none"])
print("Other weights, seen of a mixture that Trainer resumes:", *mixture)
if dense or dense_read or mixture_read:
    sys.exit("Changed: a dense model, or from_pretrained, has other weights.")
if mixture != [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]:
    sys.exit("Changed: Trainer resumes a mixture otherwise.")
print("As described: a mixture is resumed with the experts of its start.")
EOF
grep -E "^(Versions|Other|As described)" "$work/out"
