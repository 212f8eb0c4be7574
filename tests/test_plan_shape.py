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
        ({"model_type": "qwen3_moe", "num_experts": 8}, "config.json: model_type qwen3_moe: a mixture of experts; "
                                                        "only dense models can be planned"),
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
