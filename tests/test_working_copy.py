"""16-bit weights made once a step: what a bfloat16 model computes, with gradients summed in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ds_sft.model import working_copy
from ds_sft.model.working_copy import LentCopy, NoCopy, WorkingCopy, copy_weights

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


@pytest.mark.parametrize("kind", [WorkingCopy, LentCopy])
@pytest.mark.parametrize("waiting", [0, 10**6])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_a_bfloat16_model_with_gradients_in_float32(
    kind: Any, waiting: int, tied: bool, reentrant: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, over two micro batches, under autocast as Trainer has it; `reentrant` is a way to recompute.

    `waiting`: gradients are cast as they come, as on a CPU, or together, as on a GPU.
    """
    monkeypatch.setattr(working_copy, "_waiting_limit", lambda master: waiting)
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
    copy = kind(whole)
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


@pytest.mark.parametrize("kind", [WorkingCopy, LentCopy])
def test_evaluation_between_micro_batches_and_frozen_weights(kind: Any) -> None:
    whole = model(tied=False)
    whole.model.embed_tokens.requires_grad_(False)
    copy = kind(whole)
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


def test_a_layer_that_two_recomputed_parts_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpointing brings its gradient twice before others were worth a call: it counts once for each."""
    from torch.utils.checkpoint import checkpoint

    found: list[torch.Tensor] = []
    for waiting in (0, 10**6):
        monkeypatch.setattr(working_copy, "_waiting_limit", lambda master, waiting=waiting: waiting)
        torch.manual_seed(0)
        shared = torch.torch.nn.Linear(8, 8)
        copy = WorkingCopy(shared)
        for number in (1, 2):
            x = torch.ones(2, 8, dtype=torch.bfloat16, requires_grad=True)
            with copy.lent(keep=True):
                for _ in range(2):
                    x = checkpoint(shared, x, use_reentrant=True)
                x.sum().backward()
            if number == 1:
                once = shared.weight.grad.clone()
        torch.testing.assert_close(shared.weight.grad, 2 * once)
        found.append(shared.weight.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=0.0)


def test_made_once_a_step() -> None:
    """The copies are the same tensors in every step, with the weights' values of that step."""
    whole = model(tied=True)
    parameters = dict(whole.named_parameters())
    copy = WorkingCopy(whole)
    with copy.lent(keep=True):
        loss(whole, batches()[0])
        assert whole.lm_head.weight is whole.model.embed_tokens.weight
        assert whole.lm_head.weight.dtype == torch.bfloat16
        made = {master: (id(values), values.clone()) for master, values in copy.copies.items()}
    assert len(made) == len(parameters)
    for parameter in parameters.values():
        parameter.data += 1
    for keep, plus in ((False, 0), (True, 1)):  # not before the next step, then at once
        with copy.lent(keep=keep):
            for master, (identity, values) in made.items():
                assert id(copy.copies[master]) == identity
                expected = values if not plus else master.detach().bfloat16()
                assert torch.equal(copy.copies[master], expected)
        held = sum(values.untyped_storage().nbytes() for values in copy.copies.values())
        assert (held > 0) == keep  # on a CPU the memory is given back between two steps
    assert dict(whole.named_parameters()) == parameters
    assert loss(whole, batches()[0]).dtype == torch.float32  # outside nothing is lent


def test_what_is_not_given_back_stays_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere but on a CPU; there `resize_` takes new memory even for the size that it has."""
    resized: list[int] = []
    resize = torch.UntypedStorage.resize_
    monkeypatch.setattr(torch.UntypedStorage, "resize_", lambda self, size: (resized.append(size), resize(self, size)))
    for device, calls in (("meta", 0), ("cpu", 3)):  # a CPU gives back, takes again and gives back
        whole = model(tied=True).to(device)
        copy = WorkingCopy(whole)
        with copy.lent():
            resized.clear()
        with copy.lent():
            pass
        assert len(resized) == calls * len(list(whole.parameters()))


def test_loans_are_given_back() -> None:
    whole = model(tied=True)
    parameters = dict(whole.named_parameters())
    copy = LentCopy(whole)
    with copy.lent(keep=True):
        loss(whole, batches()[0])
    made = dict(copy.values)
    assert len(made) == len(parameters)
    with copy.lent():
        loss(whole, batches()[1])
        assert all(copy.values[master] is values for master, values in made.items())
    assert not copy.values
    assert dict(whole.named_parameters()) == parameters


@pytest.mark.parametrize("kind", [WorkingCopy, LentCopy])
def test_an_error_leaves_the_weights_in_place(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model(tied=False)
    parameters = {name: id(parameter) for name, parameter in whole.named_parameters()}
    copy = kind(whole)
    monkeypatch.setattr(working_copy, "_waiting_limit", lambda master: 10**6)  # gradients wait when it comes
    with pytest.raises(IndexError), copy.lent():
        loss(whole, batches()[0] + 1000 * (loss(whole, batches()[0]).backward() is None))
    assert {name: id(parameter) for name, parameter in whole.named_parameters()} == parameters
    if kind is LentCopy:
        assert not copy.values
        assert not copy.loans
    else:
        assert not copy.fresh
        assert all(values.grad is None for values in copy.copies.values())


def test_gradients_in_16_bits_wait_for_few_others() -> None:
    """On a GPU until they are worth a call, on a CPU not at all: they would lie twice in memory."""
    whole = model(tied=False)
    copy = WorkingCopy(whole)
    most = 0

    def look(*given: Any) -> None:
        nonlocal most
        most = max(most, sum(values.grad is not None for values in copy.copies.values()))

    for parameter in whole.model.layers:
        parameter.register_full_backward_hook(look)
    with copy.lent():
        loss(whole, batches()[0]).backward()
        assert most == 0
        assert all(parameter.grad is not None for parameter in copy.copies)


def test_gradients_arrive_while_backward_goes_on() -> None:
    """Not all at its end: DistributedDataParallel sends them meanwhile, and they would lie twice in memory."""
    whole = model(tied=False)
    order: list[str] = []
    for name, parameter in whole.named_parameters():
        parameter.register_hook(lambda _, name=name: order.append(name))
    first = whole.model.layers[0]
    first.register_forward_hook(lambda *given: given[-1].register_hook(lambda _: order.append("first layer")) and None)
    copy = LentCopy(whole)
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "3 weights in bfloat16 for each step (what is trained stays float32)"),
        (
            {"world_size": 2},
            "weights in bfloat16 for each step, lent at their first use (what is trained stays float32)",
        ),
        ({"bf16": False}, "none (computed in float32)"),
        ({"bf16": False, "fp16": True}, "none (autocast casts weights to float16)"),
        ({"deepspeed": {}}, "none (DeepSpeed's engine has 16-bit weights)"),
        ({"torch_compile": True}, "none (autocast casts weights in what is compiled)"),
    ],
)
def test_which_training_has_copies(changes: dict[str, Any], said: str) -> None:
    given = {"bf16": True, "fp16": False, "deepspeed": None, "torch_compile": False, "world_size": 1, **changes}
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False))
    args: Any = SimpleNamespace(**given)
    assert str(copy_weights(model, args)) == said
    assert str(copy_weights(model.bfloat16(), args)).startswith("none")


def test_compiled_layers_have_copies_on_one_rank_alone() -> None:
    args: Any = SimpleNamespace(bf16=True, fp16=False, deepspeed=None, torch_compile=False, world_size=1)
    assert isinstance(copy_weights(torch.nn.Linear(2, 2), args, compiles_layers=True), WorkingCopy)
    args.world_size = 2
    assert isinstance(copy_weights(torch.nn.Linear(2, 2), args, compiles_layers=True), NoCopy)
