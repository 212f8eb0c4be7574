"""Norms, rotations and gates by other functions: the same model, and no other model of the process changed."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model import fused
from ds_sft.model.fused import Kernels, compile_layers, fuse, require_kernels, use_kernels
from ds_sft.model.working_copy import WorkingCopy
from ds_sft.plan.layouts import run_of
from ds_sft.plan.run import Engine
from ds_sft.plan.shape import read_shape
from tests.distributed.harness import check_apart
from tests.test_adapters import choose

LAYERS = 2
SMALL = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
# family -> norms and gates of a layer, rotations of one, norms beside the layers. What is not known stays as it is:
# phi3's gates lie in one matrix, olmo2 rounds after the weight, cohere centres its norms and rotates pairs.
FAMILIES = {
    "llama": (2, 1, 1, 1),
    "mistral": (2, 1, 1, 1),
    "qwen2": (2, 1, 1, 1),
    "qwen3": (4, 1, 1, 1),
    "smollm3": (2, 1, 1, 1),
    "gemma": (2, 1, 1, 1),
    "gemma3_text": (6, 1, 1, 1),
    "phi3": (2, 0, 0, 1),
    "olmo2": (0, 1, 0, 0),
    "cohere": (0, 1, 0, 0),
}


def halves(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rotate(q: Any, k: Any, cos: Any, sin: Any, _: Any, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = cos.unsqueeze(dim), sin.unsqueeze(dim)
    return q * cos + halves(q) * sin, k * cos + halves(k) * sin


IN_TORCH = Kernels(  # what Liger's functions compute
    norm=lambda x, w, eps, offset, *_: (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)) * (offset + w),
    silu_mul=lambda gate, up: F.silu(gate) * up,
    gelu_mul=lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    rotate=rotate,
)


def make(family: str = "qwen3", layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, **{**SMALL, "num_hidden_layers": layers}, bos_token_id=None, eos_token_id=None
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def forward_backward(model: Any, tokens: int = 20) -> float:
    ids = torch.randint(1, 128, (2, tokens), generator=torch.Generator().manual_seed(tokens))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.item())


def learn(model: Any) -> tuple[float, torch.Tensor]:
    """Loss, and all gradients in one."""
    model.zero_grad()
    return forward_backward(model), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_model_with_other_functions(family: str) -> None:
    model = make(family)
    loss, gradient = learn(model)
    norms, gates, rotations, beside = FAMILIES[family]
    found = use_kernels(model, IN_TORCH, "PyTorch")
    assert (found.norms, found.gates, found.rotations) == (norms * LAYERS + beside, gates * LAYERS, rotations * LAYERS)
    fused_loss, fused_gradient = learn(model)
    assert fused_loss == pytest.approx(loss, rel=1e-6)
    assert ((fused_gradient - gradient).norm() / gradient.norm()).item() < 1e-6


def test_other_models_stay_as_they_are() -> None:
    """Not the classes change, as by Liger's own functions: a model made before and one made after compute as ever."""
    before = make()
    calls: list[str] = []
    counting = Kernels(**{name: lambda *given, n=name: calls.append(n) or getattr(IN_TORCH, n)(*given)
                          for name in ("norm", "silu_mul", "gelu_mul", "rotate")})  # fmt: skip
    model = make()
    use_kernels(model, counting, "PyTorch")
    learn(model)
    assert {name: calls.count(name) for name in calls} == {"norm": 9, "silu_mul": 2, "rotate": 2}
    for other in (before, make()):
        calls.clear()
        learn(other)
        assert not calls


def test_lent_weights_are_used() -> None:
    """A fused norm asks for its weight at each call: between two it may be the copy in 16 bits, or gathered."""
    model = make()
    dtypes: set[torch.dtype] = set()
    noting = Kernels(
        **{**vars(IN_TORCH), "norm": lambda x, w, *rest: dtypes.add(w.dtype) or IN_TORCH.norm(x, w, *rest)}
    )
    use_kernels(model, noting, "PyTorch")
    with WorkingCopy(model).lent():
        forward_backward(model)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "installed", "expected"),
    [
        ("auto", False, True, "none (they are for GPUs)"),
        ("none", True, True, "none (as fused_kernels says)"),
        (
            "auto",
            True,
            False,
            "none (pip install liger-kernel brings Liger's, with which an H200 was 1.6 times as fast)",
        ),
        ("auto", True, True, "9 norms, 2 gates, 2 rotations (Liger 1.2.3)"),
        ("liger", True, True, "9 norms, 2 gates, 2 rotations (Liger 1.2.3)"),
    ],
)
def test_what_is_used(
    wanted: str, on_gpu: bool, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, installed=installed)
    model = make()
    found = fuse(model, wanted, on_gpu=on_gpu)
    assert str(found) == expected
    assert bool(found) == (not expected.startswith("none"))


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("wanted", ["auto", "none"])
def test_the_plan_knows_what_is_used(
    wanted: str, on_gpu: bool, compiled: bool, installed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _pretend(monkeypatch, installed=installed)
    model = make()
    fused = fuse(model, wanted, on_gpu=on_gpu, compiled=compiled)
    model.config.save_pretrained(tmp_path)
    config = Config(model_name_or_path=str(tmp_path), train_file="t", fused_kernels=wanted,
                    training={"gradient_accumulation_steps": 1, "activation_checkpointing": False,
                              "torch_compile": compiled})  # fmt: skip
    planned = run_of(config, read_shape(str(tmp_path)), Engine(stage=None), 1, lazy=not on_gpu)
    assert planned.fused == bool(fused)


@pytest.mark.parametrize(
    ("wanted", "on_gpu", "compiled", "message"),
    [
        ("liger", False, False, "fused_kernels: liger: its kernels run on GPUs only; write auto, compile or none"),
        (
            "liger",
            True,
            False,
            r"fused_kernels: liger: it is not installed: pip install liger-kernel, or write none",
        ),
        ("compile", True, True, "fused_kernels: compile: torch_compile compiles the whole model already"),
    ],
)
def test_what_cannot_be(
    wanted: str, on_gpu: bool, compiled: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _pretend(monkeypatch, installed=False)
    with pytest.raises(UserError, match=message):
        require_kernels(wanted, on_gpu=on_gpu, compiled=compiled)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_layers_are_compiled_once(adapter: str) -> None:
    check_apart(check_compiled_layers, adapter)


def check_compiled_layers(adapter: str) -> None:
    """However many there are, whatever the number of tokens, with weights lent for each step; the same loss.

    Beside an adapter the first layer once more: its input wants no gradient.
    """
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def compile_it(layer: Any, **given: Any) -> None:
        nn.Module.compile(layer, backend=backend, **given)

    model = make(layers=6)
    if adapter != "none":
        choose(model, adapter=adapter)
    loss, gradient = learn(model)
    for layer in model.model.layers:
        layer.compile = partial(compile_it, layer)
    assert compile_layers(model).layers == 6
    found, found_gradient = learn(model)
    assert found == pytest.approx(loss, rel=1e-6)
    assert ((found_gradient - gradient).norm() / gradient.norm()).item() < 1e-6
    assert graphs == (1 if adapter == "none" else 2)
    made = graphs
    for tokens in (23, 31, 44):
        forward_backward(model, tokens)
    assert graphs <= made + 1  # the second length tells that it varies
    copy = WorkingCopy(model)
    for tokens in (23, 31):
        with copy.lent():
            forward_backward(model, tokens)
    with_copies = graphs
    for tokens in (37, 52):
        with copy.lent():
            forward_backward(model, tokens)
    assert graphs == with_copies > 0


def _pretend(monkeypatch: pytest.MonkeyPatch, *, installed: bool) -> None:
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: SimpleNamespace() if installed else None)
    monkeypatch.setattr(fused.importlib.metadata, "version", lambda name: "1.2.3")
    monkeypatch.setattr(fused, "liger", lambda: IN_TORCH)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
