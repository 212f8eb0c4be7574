#!/usr/bin/env bash
# save_checkpoint(exclude_frozen_parameters=True) of DeepSpeed writes a frozen output projection that is tied.
# Why one would guess otherwise: with a head of its own every frozen weight is left out. A tied head is the embedding
# under a second name; the frozen parameters are collected by their first names, so the second stays in the state.
# Where it hurts: each checkpoint of an adapter has the whole embedding, the largest matrix of a small model: 311 MB of
# Qwen3-0.6B beside an adapter of 40 MB.
# What this project does: ds_sft/checkpoints/trained.py leaves frozen weights out under all their names.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 ninja setuptools wheel
"$work/venv/bin/pip" install --quiet transformers==5.23.0 accelerate==1.15.0 deepspeed==0.19.8
export HOME="$work" PATH="$work/venv/bin:$PATH" CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1
MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export MASTER_PORT
cd "$work"
python -I - <<'EOF' >"$work/out" 2>&1 || { cat "$work/out" >&2; exit 1; }
import sys
from importlib.metadata import version

import deepspeed
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM


def saved(tied):
    """Names of the weights in a checkpoint of a model of which the query projection alone is trained."""
    model = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=16, tie_word_embeddings=tied)
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj" in name)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2},
              "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.save_checkpoint(f"tied-{tied}", tag="step", exclude_frozen_parameters=True)
    states = torch.load(f"tied-{tied}/step/mp_rank_00_model_states.pt", weights_only=False)
    return sorted(states["module"])


own, tied = saved(tied=False), saved(tied=True)
print("Versions: deepspeed", version("deepspeed"), "transformers", version("transformers"))
trained = ["model.layers.0.self_attn.q_proj.weight"]
print("Saved, expected:", *trained)
print("Saved, seen with a head of its own:", *own)
print("Saved, seen with a tied head:", *tied)
if own != trained:
    sys.exit("Changed: with a head of its own something else is saved.")
if tied != ["lm_head.weight", *trained]:
    sys.exit("Changed: with a tied head it is not saved.")
print("As described: the frozen tied head is saved.")
EOF
grep -E "^(Versions|Saved|As described)" "$work/out"
