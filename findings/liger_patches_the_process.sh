#!/usr/bin/env bash
# apply_liger_kernel_to_qwen3(model=one) changes every Qwen3 of the process, not the one model that it is given.
# Why one would guess otherwise: the function takes an instance, changes that instance's modules one by one, and binds
# the loss to it alone. But it also exchanges RMSNorm, the MLP and the rotation in transformers' module, for good.
# Where it hurts: a teacher, a reference model or a CPU evaluation in the same process gets kernels that nobody asked
# for. Made before or after, it rotates with a Triton kernel, which on a CPU fails; a comparison "with and without
# Liger" in one process compares Liger with Liger.
# What this project does: ds_sft/model/fused.py gives the modules of one model another forward, and exchanges no
# class or function of transformers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet transformers==5.23.0
"$work/venv/bin/pip" install --quiet --no-deps triton==3.9.0 liger-kernel==0.8.5
export HOME="$work" CUDA_VISIBLE_DEVICES=
cd "$work"
venv/bin/python -I - <<'EOF'
import sys
from importlib.metadata import version

from liger_kernel.transformers import apply_liger_kernel_to_qwen3
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3 import modeling_qwen3

config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16)


def parts(model):
    """The classes of a model's norm and MLP, and where the rotation comes from that its attention calls."""
    layer = model.model.layers[0]
    rotation = type(layer.self_attn).forward.__globals__["apply_rotary_pos_emb"].__module__
    return type(layer.input_layernorm).__name__, type(layer.mlp).__name__, rotation.partition(".")[0]


one, before = Qwen3ForCausalLM(config), Qwen3ForCausalLM(config)
stock = parts(before)
apply_liger_kernel_to_qwen3(model=one)
after = Qwen3ForCausalLM(config)

print("liger-kernel", version("liger-kernel"), "triton", version("triton"), "transformers", version("transformers"))
print("given to Liger: one model. Expected of the others:", *stock)
print("seen of one made before:", *parts(before))
print("seen of one made after: ", *parts(after))
if (parts(before), parts(after)) != ((*stock[:2], "liger_kernel"), ("LigerRMSNorm", "LigerSwiGLUMLP", "liger_kernel")):
    sys.exit("Changed: the other models are not as described.")
if modeling_qwen3.Qwen3RMSNorm.__name__ != "LigerRMSNorm":
    sys.exit("Changed: transformers' own name Qwen3RMSNorm is not Liger's class.")
print("As described: all models have Liger's rotation, and a new one its norms and MLP.")
EOF
