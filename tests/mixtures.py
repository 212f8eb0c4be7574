"""Small mixtures of experts in the files that such models are published in.

transformers 5 holds the experts of a layer in two tensors, most published folders have a matrix for each. The names
here are written from those folders (Qwen/Qwen3-30B-A3B, mistralai/Mixtral-8x7B-v0.1, zai-org/GLM-4.5-Air,
deepseek-ai/DeepSeek-V3, and openai/gpt-oss-20b as others publish it in bfloat16), not made by transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

EXPERTS = 4
SHAPE = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
         "tie_word_embeddings": False, "pad_token_id": 0, "eos_token_id": 2,
         "bos_token_id": None, "torch_dtype": "bfloat16"}  # fmt: skip
TWO = {"num_experts_per_tok": 2}
GROUPED = {**TWO, "n_routed_experts": EXPERTS, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 1,
           "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**TWO, "num_experts": EXPERTS, "moe_intermediate_size": 16},
    "mixtral": {**TWO, "num_local_experts": EXPERTS},
    "glm4_moe": GROUPED,
    "gpt_oss": {
        **TWO,
        "num_local_experts": EXPERTS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v3": {
        **GROUPED,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 4,
    },
}
PARTS = {"mixtral": ("w1", "w3", "w2")}  # gate, up, down


def make_mixture(folder: Path, family: str, tokenizer_dir: Path) -> Path:
    """A model folder in bfloat16, every weight of which is a number of its own; the correction of scores in float32."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family]})
    model: Any = AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, value in model.state_dict().items():
        changed = value + torch.randn_like(value, dtype=torch.float32) / 30
        weights[name] = changed.float() if name.endswith("e_score_correction_bias") else changed.bfloat16()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    save_file(dict(published(family, weights)), folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


def published(family: str, weights: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under the names of the family's published files."""
    gate, up, down = PARTS.get(family, ("gate_proj", "up_proj", "down_proj"))
    for own, value in weights.items():
        name = own.replace(".mlp.", ".block_sparse_moe.") if family == "mixtral" else own
        block = name.rpartition(".")[0]
        if family == "gpt_oss" or not block.endswith(".experts"):
            yield name, value.contiguous()
            continue
        for number, matrix in enumerate(value):
            halves = (
                zip((gate, up), matrix.chunk(2), strict=True) if name.endswith("gate_up_proj") else [(down, matrix)]
            )
            for part, half in halves:
                yield f"{block}.{number}.{part}.weight", half.contiguous()
