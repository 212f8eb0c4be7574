#!/usr/bin/env bash
# peft trains other modules than were named: modules_to_save=["norm"] all norms, and target_modules of the MLP in a
# mixture of experts not the dense layers.
# Why one would guess otherwise: target_modules matches whole parts of a name, so "norm" there would be the last norm
# alone; modules_to_save matches any end of a name, without a dot. And "gate_proj", "up_proj", "down_proj" are
# the names of the matrices in a mixture's dense layers, too (the first of Qwen3-MoE, DeepSeek-V3 or GLM-4 MoE by
# mlp_only_layers or first_k_dense_replace); peft moves these names to target_parameters, for experts that
# transformers 5 keeps in one tensor, and the dense layers of the same names get no adapter.
# Where it hurts: a run trains and saves some hundred tensors that nobody asked for, or leaves out the layers that were
# named; nothing fails.
# What this project does: ds_sft/model/targets.py chooses the modules first, gives peft their whole names, and says
# how many of each there are.
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

from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

shape = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16)


def trained(model, **named):
    """Modules that have trained weights."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **named))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    cut = (name.removeprefix("base_model.model.model.").split(".lora_")[0].split(".modules_to_save")[0] for name in names)
    return sorted(set(cut))


print("peft", version("peft"), "transformers", version("transformers"))
norms = trained(Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=1, **shape)),
                target_modules=["q_proj"], modules_to_save=["norm"])
print('modules_to_save=["norm"]: expected: norm; seen:', *(name for name in norms if "norm" in name))
mixture = Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0], num_experts=4, num_experts_per_tok=2,
                         moe_intermediate_size=16, **shape)
experts = trained(Qwen3MoeForCausalLM(mixture), target_modules=["gate_proj", "up_proj", "down_proj"])
print("target_modules of the MLP, layer 0 is dense: expected: layers.0.mlp.gate_proj and others; seen:", *experts)
if [name for name in norms if name.endswith("norm")] == ["norm"]:
    sys.exit("Changed: the norm that was named is trained alone.")
if any(name.startswith("layers.0.") for name in experts) or not experts:
    sys.exit("Changed: the dense layer has adapters, or nothing has.")
print("As described: other modules are trained than were named.")
EOF
