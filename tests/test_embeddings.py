"""New rows of embeddings are the mean of the others, in every engine the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.embeddings import make_room, resize_embeddings


def make(model_dir: Path, **keys: Any) -> Config:
    return Config(model_name_or_path=str(model_dir), train_file="t", training={"output_dir": "o"}, **keys)


def load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("llama", {"tie_word_embeddings": False}),
        ("phi", {"tie_word_embeddings": False}),  # its projection has a bias
        ("gpt2", {}),
    ],
)
def test_new_rows_are_the_mean_of_the_others(family: str, keys: dict[str, Any], dtype: torch.dtype) -> None:
    """Rounded to bfloat16, so that they are the same whatever is trained in; the rest of the model is untouched."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=90, **small, **keys), dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resize_embeddings(model, 128)
    assert model.config.vocab_size == 128
    grown = []
    for name, value in model.state_dict().items():
        known = before[name]
        assert value.dtype == known.dtype
        torch.testing.assert_close(value[: len(known)], known, rtol=0, atol=0)
        if len(value) != len(known):
            grown.append(name)
            mean = known.double().mean(0).to(torch.bfloat16).to(dtype)
            torch.testing.assert_close(value[90:], mean.expand_as(value[90:]), rtol=0, atol=0)
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    assert len(grown) == (3 if family == "phi" else 2)
    assert (head.weight is tokens.weight) == (family in ("qwen3", "gpt2"))
    assert (head.out_features, tokens.num_embeddings) == (128, 128)
    assert model(input_ids=torch.tensor([[127, 0]]), use_cache=False).logits.shape == (1, 2, 128)


def test_rows_are_never_taken_away(model_dir: Path, tokenizer: Any) -> None:
    model = load(model_dir)
    weight = model.get_input_embeddings().weight
    resize_embeddings(model, 64)
    make_room(model, tokenizer, make(model_dir, resize_embeddings=True))  # 400 tokens, 400 rows
    assert model.get_input_embeddings().weight is weight
    assert len(weight) == 400


def test_a_model_that_cannot_be_resized(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(model_dir)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("has embeddings of its own")

    monkeypatch.setattr(type(model), "resize_token_embeddings", refuse)
    with pytest.raises(UserError, match=r"^resize_embeddings: Qwen3ForCausalLM: has embeddings of its own$"):
        resize_embeddings(model, 448)


def test_rows_are_added_where_asked(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["<|a|>"])
    model = load(model_dir)
    make_room(model, tokenizer, make(model_dir))
    assert len(model.get_input_embeddings().weight) == 400
    make_room(model, tokenizer, make(model_dir, resize_embeddings=True))
    assert len(model.get_input_embeddings().weight) == 448
