"""Bytes alive at the fullest moment of a backward pass, and of a validation, counted in transformers' own models."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.model.experts import NAME
from ds_sft.plan.memory import Activations, _activations
from ds_sft.plan.run import Engine, Run
from ds_sft.plan.shape import shape_of
from ds_sft.plan.validation import validation
from tests.test_plan_activations import keys_of

LAYERS, TOKENS = 2, 256
# Hidden size, intermediate size, heads, key heads, their size: another moment is the fullest in each.
SHAPES = {
    "usual": (256, 768, 4, 2, 64),
    "wide MLP": (32, 1024, 2, 2, 16),
    "wide attention": (64, 64, 16, 16, 32),
    "wide hidden": (512, 64, 2, 2, 16),
    "few key heads": (64, 64, 16, 2, 32),
}
GPU = "grouped_mm"  # what a GPU computes experts by, here on a CPU


class Alive(TorchDispatchMode):
    """Counts the storages that are made within, as long as they live."""

    def __init__(self, counted: Sequence[torch.Tensor]) -> None:
        """`counted`: what is there before, and is no part of the count."""
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in counted}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata)
        self.most = max(self.most, self.now)
        return made

    def _forget(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def model_of(family: str, keys: dict[str, Any], *, half: bool, attention: str, experts: str | None) -> Any:
    config = AutoConfig.for_model(family, **keys, num_hidden_layers=LAYERS)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = model.bfloat16() if half else model.float()
    if experts:
        model.set_experts_implementation(experts)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


def alive(model: Any, *, attention: str, compute: Callable[[Any], Any], after: Callable[[Any], Any]) -> int:
    """The most bytes in `after`, which gets what `compute` made of the hidden states."""
    ids = torch.arange(TOKENS)[None] % 100
    mask = torch.ones_like(ids) if attention == "eager" else None
    states = [tensor for p in model.parameters() for tensor in (p, p.grad)]
    with Alive(states) as count:
        made = compute(model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state)
        count.most = count.most if made is None else 0
        after(made)
    return count.most


def backward(model: Any, *, attention: str, checkpointing: bool) -> int:
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return alive(model.train(), attention=attention, compute=torch.Tensor.sum, after=torch.Tensor.backward)


def run_of(family: str, keys: dict[str, Any], **given: Any) -> Run:
    shape = shape_of({"model_type": family, **keys, "num_hidden_layers": LAYERS, "tie_word_embeddings": False})
    return Run(shape=shape, engine=Engine(stage=None), ranks=1, micro_batch=1, length=TOKENS, accumulation=1, **given)


def planned_backward(run: Run) -> int:
    found: Activations = _activations(run)
    last_norm = found.below[LAYERS] + found.behind[3][0]
    return found.outside + max(last_norm, *(found.below[i] + found.backward[i] for i in range(LAYERS)))


def dense(family: str, shape: str) -> dict[str, Any]:
    hidden, intermediate, heads, key_heads, size = SHAPES[shape]
    return {"vocab_size": 128, "pad_token_id": 0, "hidden_size": hidden, "intermediate_size": intermediate,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": size}  # fmt: skip


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_backward(family: str, shape: str, checkpointing: bool, half: bool) -> None:
    keys = dense(family, shape)
    model = model_of(family, keys, half=half, attention="sdpa", experts=None)
    run = run_of(family, keys, checkpointing=checkpointing, half=half, attention="sdpa", lazy=True)
    measured = backward(model, attention="sdpa", checkpointing=checkpointing)
    alike = shape == "wide hidden" and checkpointing and not half  # the last layer's input is there twice in the plan
    assert planned_backward(run) == pytest.approx(measured, rel=0.08 if alike else 0.004)


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_backward_of_scores(family: str, half: bool) -> None:
    keys = dense(family, "wide attention")
    model = model_of(family, keys, half=half, attention="eager", experts=None)
    run = run_of(family, keys, checkpointing=True, half=half, attention="eager", lazy=True)
    measured = backward(model, attention="eager", checkpointing=True)
    assert 1 <= planned_backward(run) / measured < 1.06


@pytest.mark.parametrize("wider", [1, 6])
@pytest.mark.parametrize("experts", [NAME, GPU])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"])
def test_backward_of_experts(family: str, experts: str, wider: int) -> None:
    keys, attention = mixture(family, wider), "eager" if family == "gpt_oss" else "sdpa"
    model = model_of(family, keys, half=True, attention=attention, experts=experts)
    run = run_of(family, keys, checkpointing=True, half=True, attention=attention, lazy=experts == NAME)
    assert planned_backward(run) / backward(model, attention=attention, checkpointing=True) > 0.95


def mixture(family: str, wider: int) -> dict[str, Any]:
    keys = keys_of(family)
    return keys | {name: keys[name] * wider for name in ("intermediate_size", "moe_intermediate_size") if name in keys}


@pytest.mark.parametrize("half", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_validation(shape: str, half: bool) -> None:
    keys = dense("qwen3", shape)
    model = model_of("qwen3", keys, half=half, attention="sdpa", experts=None)
    run = run_of("qwen3", keys, checkpointing=True, half=half, attention="sdpa", lazy=True, eval_batch=1)
    measured = evaluation(model, attention="sdpa")
    assert sum(validation(run)) == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("wider", [1, 6])
@pytest.mark.parametrize("experts", [NAME, GPU])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"])
def test_validation_of_experts(family: str, experts: str, wider: int) -> None:
    keys, attention = mixture(family, wider), "eager" if family == "gpt_oss" else "sdpa"
    model = model_of(family, keys, half=True, attention=attention, experts=experts)
    run = run_of(family, keys, checkpointing=True, half=True, attention=attention, lazy=experts == NAME, eval_batch=1)
    measured = evaluation(model, attention=attention)
    assert 0.88 < sum(validation(run)) / measured < 1.15


@torch.no_grad()
def evaluation(model: Any, *, attention: str) -> int:
    return alive(model.eval(), attention=attention, compute=lambda states: None, after=lambda nothing: None)
