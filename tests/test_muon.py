"""Muon for hidden matrices, AdamW for the rest: torch's own two, as one optimizer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, get_scheduler

from ds_sft.engine.builds import import_muon
from ds_sft.errors import UserError
from ds_sft.training.muon import hidden_matrices, muon_of, partitioned_muon_of

OPTIONS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MATRICES = [
    f"model.layers.{layer}.{name}.weight"
    for layer in (0, 1)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
                 "mlp.up_proj", "mlp.down_proj")
]  # fmt: skip


@pytest.fixture
def model(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


def learn(model: Any, optimizers: list[Any], steps: range) -> None:
    """The same gradients in the same step; the rate is halved from step 2 on."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 if step < 2 else 5e-4
            optimizer.step()


def test_its_matrices_are_those_of_the_layers(model: Any) -> None:
    """Not the embedding, which is the output projection, too."""
    inside = hidden_matrices(model)
    assert [name for name, parameter in model.named_parameters() if parameter in inside] == MATRICES


def test_it_is_torchs_two(model: Any) -> None:
    """Bit for bit; norms without decay."""
    other = copy.deepcopy(model)
    named = dict(other.named_parameters())
    rest = [parameter for name, parameter in named.items() if name not in MATRICES]
    two = [
        torch.optim.Muon([named[name] for name in MATRICES], 1e-3, 0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": [p for p in rest if p.ndim > 1]},
                           {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}], fused=True, **OPTIONS),
    ]  # fmt: skip
    learn(model, [muon_of(model, **OPTIONS)], range(4))
    learn(other, two, range(4))
    assert all(torch.equal(found, named[name]) for name, found in model.named_parameters())


def test_deepspeeds_is_the_same(model: Any) -> None:
    """But for roundings of its Newton-Schulz iteration; with a decay that would be seen."""
    import_muon({})
    options = {**OPTIONS, "weight_decay": 20.0}
    other, before = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    wanted, found = muon_of(model, **options), partitioned_muon_of(other, **options)
    for optimizer, learner in ((wanted, model), (found, other)):
        schedule = get_scheduler("linear", optimizer, 0, 8)
        for step in range(4):
            draw = torch.Generator().manual_seed(step)
            for parameter in learner.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=draw)
            optimizer.step()
            schedule.step()
    inside = hidden_matrices(model)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        off = torch.linalg.norm(two - one) / torch.linalg.norm(one - before[name])
        assert off < (2e-2 if one in inside else 1e-6), name
    assert found.param_groups[0]["lr"] == wanted.param_groups[-1]["lr"]  # what is logged


def test_a_loaded_state_goes_on_bit_for_bit(model: Any) -> None:
    whole, again = copy.deepcopy(model), copy.deepcopy(model)
    learn(whole, [muon_of(whole, **OPTIONS)], range(4))
    first = muon_of(model, **OPTIONS)
    learn(model, [first], range(2))
    again.load_state_dict(model.state_dict())
    second = muon_of(again, **OPTIONS)
    second.load_state_dict(first.state_dict())
    learn(again, [second], range(2, 4))
    assert all(torch.equal(found, whole.state_dict()[name]) for name, found in again.state_dict().items())


def test_a_schedule_reaches_both(model: Any) -> None:
    optimizer = muon_of(model, **OPTIONS)
    schedule = get_scheduler("linear", optimizer, 0, 4)
    learn(model, [optimizer], range(1))
    schedule.step()
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [7.5e-4] * 3


def test_nothing_for_one_of_the_two_is_refused(model: Any) -> None:
    inside = hidden_matrices(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter not in inside)
    with pytest.raises(UserError, match="optim: muon: it wants hidden matrices and other weights to train: write"):
        muon_of(model, **OPTIONS)
