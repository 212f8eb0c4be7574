"""MLPs in tiles: the same outputs and gradients, no more products under checkpointing, and what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.integrations import deepspeed as deepspeed_integration

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model import tiling
from ds_sft.model.offload import InputOffload
from ds_sft.model.tiling import TiledMLP, pays, tile_mlps, tiles
from ds_sft.model.working_copy import LentCopy, WorkingCopy
from tests.test_adapters import choose
from tests.test_offload import BUFFER, LateCopies

TILE = 4  # tokens
TOKENS = 18  # so tiles of 3, 4, 4, 3 and 4
RECOMPUTED = pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "graph", "reentrant"])


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", TILE)


def make_model(*, tiled: bool, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 100, "attention_dropout": 0.1}  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).train()
    return tile(model) if tiled else model


def tile(model: LlamaForCausalLM) -> LlamaForCausalLM:
    for layer in model.model.layers:
        layer.mlp.forward = TiledMLP(layer.mlp)
    return model


def loss_of(model: Any, rows: int = 1) -> torch.Tensor:
    torch.manual_seed(1)  # of dropout
    ids = torch.arange(TOKENS).view(rows, -1)
    loss: torch.Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float) -> None:
    """Each gradient, relative to its norm."""
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= bound * gradient.norm(), name


def test_tiles_are_about_equal() -> None:
    assert list(tiles(4)) == [slice(0, 4)]
    assert list(tiles(TOKENS)) == [slice(0, 3), slice(3, 7), slice(7, 10), slice(10, 14), slice(14, 18)]


@RECOMPUTED
@pytest.mark.parametrize("rows", [1, 2])
def test_the_same_losses_and_gradients(rows: int, reentrant: bool | None) -> None:
    found = []
    for tiled in (False, True):
        model = make_model(tiled=tiled)
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        loss = loss_of(model, rows)
        loss.backward()
        found.append((loss, gradients(model)))
    (expected, of_whole), (loss, of_tiled) = found
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert_near(of_tiled, of_whole, 1e-6)


def seen_by(model: LlamaForCausalLM) -> list[int]:
    """Tokens of each product of the first layer's gate, as they come."""
    seen: list[int] = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.shape[:-1].numel())
    )
    return seen


@pytest.mark.parametrize(("reentrant", "times"), [(None, 2), (False, 2), (True, 3)], ids=["kept", "graph", "reentrant"])
def test_a_tile_at_a_time_and_no_more_products_than_checkpointing_costs(reentrant: bool | None, times: int) -> None:
    model = make_model(tiled=True)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    seen = seen_by(model)
    loss = loss_of(model)
    assert seen == [3, 4, 3, 4, 4]
    loss.backward()
    assert seen == [3, 4, 3, 4, 4] * times
    del seen[:]
    with torch.no_grad():
        loss_of(model)
    assert seen == [3, 4, 3, 4, 4]


def test_what_fits_in_a_tile_is_the_modules_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiling, "TILE", TOKENS)
    model = make_model(tiled=True)
    seen = seen_by(model)
    loss_of(model).backward()
    assert seen == [TOKENS]


def test_each_weight_gets_its_gradient_once() -> None:
    """Who reduces gradients counts on it: DistributedDataParallel, ZeRO."""
    model, times = make_model(tiled=True), dict[str, int]()
    for name, weight in model.named_parameters():
        weight.register_post_accumulate_grad_hook(
            lambda weight, name=name: times.update({name: times.get(name, 0) + 1})
        )
    loss_of(model).backward()
    assert times == dict.fromkeys(dict(model.named_parameters()), 1)


def test_sums_over_tiles_lose_nothing_in_bfloat16() -> None:
    """They are as near to the exact gradient as that of all tokens at once."""

    def of_mlp(dtype: torch.dtype, *, tiled: bool) -> torch.Tensor:
        torch.manual_seed(3)
        mlp = make_model(tiled=False, intermediate_size=64).to(dtype).model.layers[0].mlp
        if tiled:
            mlp.forward = TiledMLP(mlp)
        states = torch.randn(1, 4096, 32, dtype=torch.bfloat16).to(dtype)
        mlp(states).backward(torch.randn(1, 4096, 32, dtype=torch.bfloat16).to(dtype))
        return mlp.down_proj.weight.grad.double()

    exact = of_mlp(torch.float64, tiled=False)
    whole, tiled = ((of_mlp(torch.bfloat16, tiled=tiled) - exact).norm() for tiled in (False, True))
    assert tiled <= 1.1 * whole


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_adapters_inside(adapter: str) -> None:
    found = []
    for tiled in (False, True):
        model: Any = make_model(tiled=False)
        choose(model, adapter=adapter).double()
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        model.activation_checkpointing_enable({"use_reentrant": False})
        loss_of(tile(model) if tiled else model).backward()
        found.append(gradients(model))
    assert_near(found[1], found[0], 1e-12)
    assert any("mlp" in name for name in found[0])


@pytest.mark.parametrize("kind", [WorkingCopy, LentCopy])
@RECOMPUTED
def test_bfloat16_copies_of_the_weights(kind: Any, reentrant: bool | None) -> None:
    """Under autocast, as the Trainer has it; two micro batches."""
    found = []
    for tiled in (False, True):
        model = make_model(tiled=tiled)
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        copy = kind(model)
        for keep in (True, False):
            with copy.lent(keep=keep):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model)
                loss.backward()
        found.append(gradients(model))
    assert all(gradient.dtype == torch.float32 for gradient in found[1].values())
    assert_near(found[1], found[0], 0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_on_in_backward_too(dtype: torch.dtype) -> None:
    found = []
    for tiled in (False, True):
        model = make_model(tiled=tiled)
        seen: list[torch.dtype] = []
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given, seen=seen: seen.append(given[-1].dtype))
        with torch.autocast("cpu", dtype):
            loss = loss_of(model)
        loss.backward()
        assert set(seen) == {dtype}
        found.append(gradients(model))
    assert_near(found[1], found[0], 0.02)


def test_offloaded_inputs_beside_tiles_are_the_same_bits() -> None:
    found = []
    for away in (False, True):
        model = make_model(tiled=True)
        model.activation_checkpointing_enable({"use_reentrant": False})
        if away:
            InputOffload(LateCopies(), BUFFER).wrap(model)
        loss = loss_of(model)
        loss.backward()
        found.append([loss, *gradients(model).values()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# ---- Where


def asked(tiled_mlp: str = "auto", **training: Any) -> Config:
    return Config(model_name_or_path="m", train_file="t", tiled_mlp=tiled_mlp, training={"output_dir": "o", **training})


def trained(**changes: Any) -> Any:
    keys = {"activation_checkpointing": True, "torch_compile": False,
            "activation_checkpointing_kwargs": {"use_reentrant": False}}  # fmt: skip
    return SimpleNamespace(**{**keys, **changes})


@pytest.mark.parametrize(
    ("largest", "inner", "changes", "expected"),
    [
        (16_384, 74, {}, True),
        (16_383, 74, {}, False),
        (16_384, 73, {}, False),  # 16 / 7 of the hidden size
        (16_384, 74, {"activation_checkpointing": False}, False),
        (16_384, 74, {"activation_checkpointing_kwargs": {"use_reentrant": True}}, False),
        (16_384, 74, {"activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}}, False),
        (16_384, 74, {"torch_compile": True}, False),
    ],
)
def test_where_tiles_pay(largest: int, inner: int, changes: dict[str, Any], expected: bool) -> None:
    assert pays(make_model(tiled=False, intermediate_size=inner), asked(), trained(**changes), largest) is expected


def test_what_is_said() -> None:
    model: Any = make_model(tiled=False, intermediate_size=96)
    for config, largest, tiled, said in (
        (asked("no"), 10**6, 0, "None"),
        (asked(), 100, 0, "None"),
        (asked(), 20_000, 2, "2, of at most 4 tokens at a time (micro batches have up to 20,000)"),
        (asked("yes"), 100, 2, "2, of at most 4 tokens at a time (micro batches have up to 100)"),
    ):
        for layer in model.model.layers:
            vars(layer.mlp).pop("forward", None)
        tiling = tile_mlps(model, config, trained(), largest=largest)
        found = sum(isinstance(module.forward, TiledMLP) for module in model.modules())
        assert (found, str(tiling)) == (tiled, said)


def test_under_zero_3_an_mlp_is_gathered_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many tiles it has, which differ between ranks."""
    from deepspeed.utils import z3_leaf_module

    for enabled in (False, True):
        monkeypatch.setattr(deepspeed_integration, "is_deepspeed_zero3_enabled", lambda enabled=enabled: enabled)
        model = make_model(tiled=False)
        tile_mlps(model, asked("yes"), trained(), largest=100)
        assert [z3_leaf_module(module) for module in model.modules()].count(True) == (2 if enabled else 0)


def test_mlps_that_cannot_be_tiled() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=9))
    dropping = make_model(tiled=False, intermediate_size=96)
    for layer in dropping.model.layers:
        layer.mlp.gate_proj = nn.Sequential(nn.Dropout(0.1), layer.mlp.gate_proj)
    for model, why in (
        (mixture, "a mixture of experts computes few tokens at a time"),
        (dropping, "LlamaForCausalLM has no gated MLP without dropout"),
    ):
        assert str(tile_mlps(model, asked(), trained(), largest=20_000)) == f"none ({why})"
        with pytest.raises(UserError) as caught:
            tile_mlps(model, asked("yes"), trained(), largest=20_000)
        assert str(caught.value) == f"tiled_mlp: yes: {why}: write auto or no"
