"""Parameters counted from `config.json` against transformers' models, built without memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_sft.errors import UserError
from ds_sft.plan.shape import read_shape, shape_of

SMALL = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"tie_word_embeddings": False}),
    ("llama", {"tie_word_embeddings": False}),
    ("llama", {"num_key_value_heads": None, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24, "tie_word_embeddings": True}),
    ("mistral", {"tie_word_embeddings": False}),
    ("smollm3", {"tie_word_embeddings": True}),
]
MIXED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 20, "qk_rope_head_dim": 16, "qk_nope_head_dim": 24, "v_head_dim": 40, "n_group": 2,
          "topk_group": 1}  # fmt: skip
MIXTURES: list[tuple[str, dict[str, Any]]] = [
    ("qwen3_moe", {**MIXED, "head_dim": 32}),
    ("qwen3_moe", {**MIXED, "mlp_only_layers": [0], "attention_bias": True}),
    ("qwen3_moe", {**MIXED, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    ("qwen3_moe", {**MIXED, "mlp_only_layers": [0, 1, 2]}),
    ("qwen2_moe", {**MIXED, "shared_expert_intermediate_size": 40}),
    ("qwen2_moe", {**MIXED, "shared_expert_intermediate_size": 40, "qkv_bias": False}),
    ("mixtral", {"num_local_experts": 8}),
    ("glm4_moe", {**ROUTED, "n_shared_experts": 2, "use_qk_norm": True, "attention_bias": True, "head_dim": 24}),
    ("glm4_moe", {**ROUTED, "first_k_dense_replace": 2}),
    ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    ("gpt_oss", {"num_local_experts": 8, "head_dim": 16, "attention_bias": False}),
    ("deepseek_v3", {**ROUTED, **LATENT, "first_k_dense_replace": 1, "q_lora_rank": 28}),
    ("deepseek_v3", {**ROUTED, **LATENT, "n_shared_experts": 2, "q_lora_rank": None, "attention_bias": True}),
]


def build(family: str, keys: dict[str, Any]) -> tuple[Any, Any]:
    """The configuration, and the model on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SMALL | keys)
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("family", "keys"), FAMILIES)
def test_tensors_are_those_of_the_model(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    config, model = build(family, keys)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    assert sorted(shape.tensors()) == sorted(p.numel() for p in model.parameters())
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    matrices = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    assert shape.multiplied == matrices  # the output projection is a Linear, tied or not


@pytest.mark.parametrize(("family", "keys"), MIXTURES)
def test_tensors_are_those_of_the_mixture(tmp_path: Path, family: str, keys: dict[str, Any]) -> None:
    config, model = build(family, keys)
    config.save_pretrained(tmp_path)
    shape = read_shape(str(tmp_path))
    # In the model's order: that of what ZeRO divides.
    assert [*shape.shapes().items()] == [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert shape.active == shape.parameters - experts + experts * config.num_experts_per_tok // 8
    routers = sum(m.weight.numel() for m in model.modules() if type(m).__name__.lower().endswith("topkrouter"))
    matrices = sum(m.weight.numel() for m in model.modules() if type(m).__name__ == "Linear")
    chosen = sum(p.numel() for p in model.parameters() if p.dim() == 3) * config.num_experts_per_tok // 8
    assert shape.multiplied == matrices + routers + chosen


QWEN3_30B_A3B = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
    "tie_word_embeddings": False, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True, "attention_bias": False,
}  # fmt: skip
MIXTRAL_8X7B = {
    "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
GPT_OSS_20B = {
    "model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "attention_bias": True, "tie_word_embeddings": False, "num_local_experts": 32, "num_experts_per_tok": 4,
}  # fmt: skip
QWEN15_MOE = {
    "model_type": "qwen2_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "tie_word_embeddings": False,
    "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
}  # fmt: skip
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "tie_word_embeddings": False,
    "n_routed_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "n_shared_experts": 1,
    "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip
GLM_45_AIR = {
    "model_type": "glm4_moe", "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944,
    "num_hidden_layers": 46, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128,
    "attention_bias": True, "use_qk_norm": False, "tie_word_embeddings": False, "n_routed_experts": 128,
    "num_experts_per_tok": 8, "moe_intermediate_size": 1408, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("published", "parameters", "active"),
    [
        (QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704),
        (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248),
        (GPT_OSS_20B, 20_914_757_184, 4_187_440_704),
        (QWEN15_MOE, 14_315_784_192, 2_689_173_504),
        (DEEPSEEK_V3, 671_026_404_352, 37_552_282_624),
        (GLM_45_AIR, 106_852_245_504, 13_424_123_904),
    ],
    ids=lambda given: given["model_type"] if isinstance(given, dict) else "",
)
def test_published_mixtures(published: dict[str, Any], parameters: int, active: int) -> None:
    """From the keys of their published `config.json`, and as transformers counts them."""
    shape = shape_of(published)
    assert (shape.parameters, shape.active) == (parameters, active)  # embeddings are met by every token, too
    _, model = build(published["model_type"], {key: value for key, value in published.items() if key != "model_type"})
    assert model.num_parameters() == parameters


def test_published_sizes() -> None:
    """Qwen3-0.6B and Llama-3.1-8B, from the keys of their published `config.json`."""
    qwen = {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "tie_word_embeddings": True}  # fmt: skip
    assert shape_of(qwen).parameters == 596_049_920
    llama = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
             "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
    assert shape_of(llama).parameters == 8_030_261_248


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model_type": "olmoe", "num_experts": 8},
         "config.json: model_type olmoe: a mixture of experts that cannot be planned; these can: qwen3_moe, qwen2_moe, "
         "mixtral, glm4_moe, gpt_oss, deepseek_v3"),
        ({"model_type": "mixtral", **SMALL},
         "config.json: num_local_experts: expected a whole number above 0, found None"),
        ({"model_type": "deepseek_v3", **SMALL, **ROUTED},
         "config.json: kv_lora_rank: expected a whole number above 0, found None"),
        ({"model_type": "gpt2"}, "config.json: model_type gpt2: cannot be planned; these can: llama, mistral, qwen2, "
                                 "qwen3, smollm3"),
        ({"model_type": "llama", **SMALL, "hidden_size": None},
         "config.json: hidden_size: expected a whole number above 0, found None"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        shape_of(keys)
    assert str(error.value) == said


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"this folder has no config\.json"):
        read_shape(str(tmp_path))
    with pytest.raises(UserError, match=r"no such folder .*, and not a hub id"):
        read_shape("./nothing/here")
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        read_shape(str(tmp_path))
