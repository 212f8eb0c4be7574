#!/usr/bin/env bash
# AutoModelForCausalLM.from_pretrained loads a DoRA adapter that peft has saved without the magnitudes that it learned.
# Why one would guess otherwise: transformers documents that a folder with adapter_config.json loads as base + adapter,
# a LoRA adapter of the same library versions loads exactly, and PeftModel.from_pretrained loads this one exactly.
# peft writes the magnitudes without the last part of their name; transformers looks for the whole name. Its report
# lists them as UNEXPECTED and, one line each, as MISSING and "newly initialized", and the model answers all the same.
# Where it hurts: whoever evaluates or serves the adapter's folder by transformers has other answers than in training.
# What this project does: ds_sft/model/adapter_files.py writes the whole name, which both libraries read.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2 accelerate==1.15.0
export HOME="$work" CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF' 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
import sys
from importlib.metadata import version

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16)
torch.manual_seed(0)
Qwen3ForCausalLM(config).save_pretrained("base")
ids = torch.arange(16)[None]


def differences(dora):
    """Largest difference of logits from the saved model's, loaded by peft and by transformers."""
    adapter = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=dora)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), adapter).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # as if it had learned
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(2)
    model.save_pretrained("adapter")
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
    by_transformers = AutoModelForCausalLM.from_pretrained("adapter").eval()
    with torch.no_grad():
        saved = model(ids).logits
        return [(saved - other(ids).logits).abs().max().item() for other in (by_peft, by_transformers)]


print("peft", version("peft"), "transformers", version("transformers"))
lora, dora = differences(dora=False), differences(dora=True)
print("largest difference of logits from the model that was saved, loaded by peft and by transformers; expected: 0")
print("seen with LoRA:", *lora)
print("seen with DoRA:", *dora)
if max(*lora, dora[0]) > 1e-5:
    sys.exit("Changed: one of those that were exact is not.")
if dora[1] < 0.01:
    sys.exit("Changed: transformers loads the magnitudes, too.")
print("As described: by transformers DoRA's magnitudes are lost.")
EOF
