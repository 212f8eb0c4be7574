"""Layers' inputs that wait on the host: what is freed when, in which order it is copied, and that nothing changes."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model import offload
from ds_sft.model.offload import InputOffload, offload_inputs
from ds_sft.ranks.launch import Launch
from tests.test_trainer import make_trainer

ALONE = Launch(launcher="python")
LAYERS = 4
ROW = 10  # tokens; of 32 numbers each a layer's input has 1,280 bytes
BUFFER = 512  # so three buffers hold one
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["graph", "reentrant"])


class LateCopies:
    """Copies between two places of a CPU that happen as late as they may: when they are waited for.

    Until then their targets have bytes that are no numbers, and whoever frees one of their tensors is found out.
    """

    def __init__(self) -> None:
        self.made: list[torch.Tensor] = []
        self.log: list[str] = []
        self.queue: list[tuple[int, tuple[StorageWeakRef, ...], tuple[int, int, int]]] = []
        self.begun = 0
        self.back: list[StorageWeakRef] = []  # what copies from the host went into

    @property
    def back_there(self) -> int:
        """How many of these are still there."""
        return sum(not storage.expired() for storage in self.back)

    def buffer(self, size: int) -> torch.Tensor:
        self.made.append(torch.empty(size, dtype=torch.uint8))
        return self.made[-1]

    def begin(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> int:
        self.begun += 1
        homes = {buffer.untyped_storage().data_ptr() for buffer in self.made}
        away = False
        for number, (target, source) in enumerate(pairs):
            away = target.untyped_storage().data_ptr() in homes
            if not away and number == 0:
                self.back.append(StorageWeakRef(target.untyped_storage()))
            storages = tuple(StorageWeakRef(tensor.untyped_storage()) for tensor in (target, source))
            self.queue.append((self.begun, storages, (target.data_ptr(), source.data_ptr(), target.numel())))
            target.fill_(255)
        self.log.append("to the host" if away else "back")
        return self.begun

    def wait(self, mark: int) -> None:
        while self.queue and self.queue[0][0] <= mark:
            _, storages, places = self.queue.pop(0)
            assert not any(storage.expired() for storage in storages), "freed before it was copied"
            ctypes.memmove(*places)


def make_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 100, "attention_dropout": 0.1}  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).train()


def checkpointing(*, reentrant: bool = False, away: bool, **options: Any) -> tuple[LlamaForCausalLM, LateCopies]:
    """A model that computes its layers again in backward; `away`: their inputs wait on the host."""
    model, copies = make_model(), LateCopies()
    model.activation_checkpointing_enable({"use_reentrant": reentrant}, **options)
    if away:
        InputOffload(copies, BUFFER).wrap(model)
    return model, copies


def owner(model: nn.Module) -> InputOffload:
    layer: Any = model.model.layers[0]  # type: ignore[union-attr, index]
    found = layer._gradient_checkpointing_func.func.__self__
    assert isinstance(found, InputOffload)
    return found


def loss_of(model: Any, tokens: int = ROW) -> torch.Tensor:
    torch.manual_seed(1)  # of dropout
    ids = torch.arange(tokens)[None]
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is freed here is freed because nobody has it any more."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@REENTRANT
@pytest.mark.parametrize("options", [{}, {"every_n_layers": 2}], ids=["all", "every second"])
def test_losses_and_gradients_are_the_same_bits(reentrant: bool, options: dict[str, int]) -> None:
    found = []
    for away in (False, True):
        model, _ = checkpointing(reentrant=reentrant, away=away, **options)
        losses = [loss_of(model, tokens) for tokens in (ROW,)]
        losses[0].backward()
        losses += [loss_of(model, 17)]  # another micro batch, of another size, adds its gradients
        losses[1].backward()
        found.append([*losses, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class Inputs:
    """Whether the memory of what went into each layer, in their order, is still there."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.seen: list[StorageWeakRef] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(
                lambda layer, args: self.seen.append(StorageWeakRef(args[0].untyped_storage()))
            )

    @property
    def there(self) -> list[bool]:
        return [not storage.expired() for storage in self.seen]


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("away", [False, True])
def test_the_device_keeps_the_last_layers_input_alone(away: bool) -> None:
    model, copies = checkpointing(away=away)
    live: list[int] = []
    inputs = Inputs(model)
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, args, output: live.append(sum(inputs.there)))
    loss = loss_of(model)
    # Behind the first layer its input alone; then the one under way and the one that leaves.
    assert live == ([1, 2, 2, 2] if away else [1, 2, 3, 4])
    assert inputs.there == ([False, False, False, True] if away else [True] * LAYERS)
    assert len(copies.made) == (9 if away else 0)
    loss.backward()
    del loss
    if away:
        assert len(owner(model).free) == len(copies.made)
    assert not any(inputs.there)


@pytest.mark.usefixtures("no_collector")
def test_a_layers_input_comes_back_while_the_layer_above_is_computed() -> None:
    model, copies = checkpointing(away=True)
    there: list[int] = []
    for number, layer in enumerate(model.model.layers):
        # Not of the layer, whose hooks know nothing of its recomputation.
        layer.input_layernorm.register_forward_hook(lambda *_, number=number: copies.log.append(f"layer {number}"))
        layer.input_layernorm.register_forward_hook(lambda *_: there.append(copies.back_there))
    loss = loss_of(model)
    forward = ["to the host", "layer 0", "to the host", "layer 1", "to the host", "layer 2", "layer 3"]
    assert copies.log == forward
    loss.backward()
    assert copies.log[len(forward) :] == ["back", "layer 3", "back", "layer 2", "back", "layer 1", "layer 0"]
    # Of the last layer that of the one below; then a layer's own as well; of the first its own alone.
    assert there[LAYERS:] == [1, 2, 2, 1]
    assert (copies.queue, copies.back_there) == ([], 0)


@pytest.mark.usefixtures("no_collector")
def test_a_graph_that_is_kept_goes_backward_again() -> None:
    model, copies = checkpointing(away=True)
    loss = loss_of(model)
    loss.backward(retain_graph=True)
    assert copies.back_there == 0
    once = [parameter.grad.clone() for parameter in model.parameters()]
    loss.backward()
    assert all(torch.equal(parameter.grad, 2 * one) for parameter, one in zip(model.parameters(), once, strict=True))


@REENTRANT
@pytest.mark.usefixtures("no_collector")
def test_buffers_serve_again(reentrant: bool) -> None:
    model, copies = checkpointing(reentrant=reentrant, away=True)
    for tokens, buffers in ((ROW, 9), (ROW, 9), (4, 9), (13, 12), (ROW, 12)):  # 3 layers x 1,280, 512, 1,664 bytes
        loss_of(model, tokens).backward()
        assert (len(copies.made), len(owner(model).free)) == (buffers, buffers)
    with torch.no_grad():
        loss_of(model, 99)
    model.eval()
    loss_of(model, 99).backward()
    assert len(copies.made) == 12


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("fails_in", ["forward", "backward"])
def test_a_pass_that_fails_leaves_nothing(fails_in: str) -> None:
    model, copies = checkpointing(away=True)
    inputs = Inputs(model)

    def fail(*_: Any) -> None:
        if copies.begun == (3 if fails_in == "forward" else 5):  # the third layer; the second one on its way back
            raise ZeroDivisionError

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(fail)
    try:
        loss_of(model).backward()
    except ZeroDivisionError as error:
        assert copies.begun == (3 if fails_in == "forward" else 5)
        error.__traceback__ = None
    else:
        pytest.fail("nothing failed")
    gc.collect()  # frames of the traceback refer to each other
    assert owner(model).leaving is None
    assert len(owner(model).free) == len(copies.made) == 9
    assert copies.queue == []
    assert not any(inputs.there)
    copies.begun = -100
    loss_of(model).backward()  # the next is as the first
    assert len(copies.made) == 9


def test_a_layer_that_changes_its_input_in_place_is_found_out() -> None:
    model, _ = checkpointing(away=True)

    def add(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        with torch.no_grad():
            args[0].add_(1)

    model.model.layers[1].input_layernorm.register_forward_pre_hook(add)
    with pytest.raises(AssertionError, match="in place"):
        loss_of(model)


@REENTRANT
def test_a_training_learns_the_same(reentrant: bool, tmp_path: Path) -> None:
    """With the Trainer, which switches checkpointing on: accumulation, dropout, evaluation, bfloat16 copies."""
    learned = []
    for away in (False, True):
        trainer = make_trainer(tmp_path, dropout=0.1, activation_checkpointing=True, eval_strategy="steps",
                               activation_checkpointing_kwargs={"use_reentrant": reentrant}, eval_steps=2)  # fmt: skip
        copies = LateCopies()
        if away:
            trainer.parts.offload = InputOffload(copies, BUFFER)
        trainer.train()
        assert (copies.begun > 0) is away
        learned.append([parameter.detach() for parameter in trainer.model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*learned, strict=True))


def asked(**training: Any) -> Config:
    keys = {"output_dir": "o", "activation_checkpointing": "offload", **training}
    return Config(model_name_or_path="m", train_file="t", training=keys)


def on(device: str, **changes: Any) -> Any:
    return SimpleNamespace(device=torch.device(device), bf16=True, fp16=False, deepspeed=None, **changes)


def test_what_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "StreamCopies", lambda device: LateCopies())
    model: Any = make_model()
    found = offload_inputs(model, asked(), on("cpu"), ALONE, largest=2**20)
    assert str(found) == "none (activations are in host memory already: the same as yes here)"
    assert offload_inputs(model, asked(activation_checkpointing=True), on("cuda"), ALONE, largest=2**20) is None
    monkeypatch.setattr(offload, "free_memory_here", lambda: 2**30)
    found = offload_inputs(model, asked(), on("cuda"), ALONE, largest=2**20 + 1)  # of 32 numbers in bfloat16
    assert isinstance(found, InputOffload)
    assert str(found) == (
        "the inputs of 3 layers, up to 64.0 MiB each, wait in pinned host memory: 288.0 MiB a rank at most; the last "
        "layer's stays"
    )
    assert found.buffer_bytes == 32 * 2**20
    found = offload_inputs(model, asked(), on("cuda"), ALONE, largest=100)  # small ones have small buffers
    assert "3 layers, up to 6.2 KiB each, wait in pinned host memory: 24.0 KiB a rank" in str(found)


def test_a_model_that_checkpoints_by_itself_is_refused() -> None:
    with pytest.raises(UserError) as caught:
        offload_inputs(nn.Linear(1, 1), asked(), on("cuda"), ALONE, largest=1)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "activation_checkpointing: offload: Linear checkpoints its layers in its own code, where their inputs cannot "
        "be taken: write yes"
    )


def test_host_memory_that_is_too_small_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "free_memory_here", lambda: 500 * 2**20)
    two = Launch(launcher="torchrun", local_world_size=2)
    with pytest.raises(UserError) as caught:
        offload_inputs(make_model(), asked(), on("cuda"), two, largest=2**20 + 1)
    assert str(caught.value) == (
        "activation_checkpointing: offload: the layers' inputs take 288.0 MiB of pinned host memory for each of 2 "
        "ranks, the machine of rank 0 has 500.0 MiB free: write a smaller micro batch (max_tokens_per_batch, "
        "max_length), or yes"
    )
