"""16-bit weights made once a step: what a bfloat16 model computes, with gradients summed in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_sft.training.working_copy import WorkingCopy

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip


def model(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).train()


def batches() -> list[torch.Tensor]:
    return [torch.randint(0, 100, (2, n), generator=torch.Generator().manual_seed(n)) for n in (5, 9)]


def loss(of: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = of(input_ids=ids, labels=ids, use_cache=False).loss
    return result


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_bfloat16_model_with_gradients_in_float32(tied: bool, reentrant: bool | None) -> None:
    """Bit for bit, over two micro batches, under autocast as Trainer has it; `reentrant` is a way to recompute."""
    expected: dict[str, torch.Tensor] = {}
    for ids in batches():
        half = model(tied=tied)
        for parameter in half.parameters():  # not the rotation's buffers, which from_pretrained leaves in float32 too
            parameter.data = parameter.data.bfloat16()
        loss(half, ids).backward()
        for name, parameter in half.named_parameters():
            expected[name] = expected.get(name, torch.zeros(())) + parameter.grad.float()
    whole = model(tied=tied)
    if reentrant is not None:
        whole.activation_checkpointing_enable({"use_reentrant": reentrant})
    copy = WorkingCopy(whole)
    for number, ids in enumerate(batches()):
        with copy.lent(keep=number == 0):
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(whole, ids)
            value.backward()
    found = dict(whole.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, expected[name]), name


def test_evaluation_between_micro_batches_and_frozen_weights() -> None:
    whole = model(tied=False)
    whole.model.embed_tokens.requires_grad_(False)
    copy = WorkingCopy(whole)
    expected: dict[str, torch.Tensor] = {}
    for evaluate in (False, True):
        whole.zero_grad()
        for ids in batches():
            if evaluate:
                with torch.no_grad(), copy.lent(keep=True):
                    assert not loss(whole, ids).requires_grad
            with copy.lent(keep=True):
                loss(whole, ids).backward()
        found = {name: parameter.grad for name, parameter in whole.named_parameters()}
        assert found.pop("model.embed_tokens.weight") is None
        expected = expected or found
        assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_made_once_and_given_back() -> None:
    whole = model(tied=True)
    parameters = dict(whole.named_parameters())
    copy = WorkingCopy(whole)
    with copy.lent(keep=True):
        loss(whole, batches()[0])
        assert whole.lm_head.weight is whole.model.embed_tokens.weight
        assert whole.lm_head.weight.dtype == torch.bfloat16
    made = dict(copy.values)
    assert len(made) == len(parameters)
    with copy.lent():
        loss(whole, batches()[1])
        assert all(copy.values[master] is values for master, values in made.items())
    assert not copy.values
    assert dict(whole.named_parameters()) == parameters
    assert loss(whole, batches()[0]).dtype == torch.float32  # outside nothing is lent


def test_an_error_leaves_the_weights_in_place() -> None:
    whole = model(tied=False)
    parameters = {name: id(parameter) for name, parameter in whole.named_parameters()}
    copy = WorkingCopy(whole)
    with pytest.raises(IndexError), copy.lent():
        loss(whole, torch.full((1, 4), 1000))
    assert {name: id(parameter) for name, parameter in whole.named_parameters()} == parameters
    assert not copy.values
    assert not copy.loans


def test_gradients_arrive_while_backward_goes_on() -> None:
    """Not all at its end: DistributedDataParallel sends them meanwhile, and they would lie twice in memory."""
    whole = model(tied=False)
    order: list[str] = []
    for name, parameter in whole.named_parameters():
        parameter.register_hook(lambda _, name=name: order.append(name))
    first = whole.model.layers[0]
    first.register_forward_hook(lambda *given: given[-1].register_hook(lambda _: order.append("first layer")) and None)
    copy = WorkingCopy(whole)
    for number, ids in enumerate(batches()):
        order.clear()
        with copy.lent(keep=number == 0):
            loss(whole, ids).backward()
        before = order[: order.index("first layer")]
        assert before[0] == "lm_head.weight"
        assert {
            name for name, _ in whole.named_parameters() if name.startswith(("model.layers.1", "model.layers.2"))
        } < {*before}
        assert order[-1] == "model.embed_tokens.weight"
