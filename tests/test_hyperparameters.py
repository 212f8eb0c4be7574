"""What a checkpoint brings of its own and what was asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.lr_schedules import WarmupDecayLR
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import get_scheduler

from ds_sft.training.hyperparameters import Asked

ASKED = {"lr": 1e-2, "betas": (0.8, 0.9), "eps": 1e-6}


def wrapped(lr: float, decay: float, **options: Any) -> Any:
    """AdamW with a group that decays and one that does not, in a wrapper as accelerate's."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": each} for each in (decay, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=lr, **options)
    return SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups)


def learn(optimizer: Any, scheduler: Any, steps: int) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.ones(2)
        optimizer.optimizer.step()
        scheduler.step()


def resumed(old: Any, new: Any, old_schedule: Any, new_schedule: Any) -> list[dict[str, Any]]:
    """The groups of `new` after the states of the old ones were loaded into the new ones."""
    asked = Asked.of(new, new_schedule)
    new.optimizer.load_state_dict(old.optimizer.state_dict())
    new_schedule.load_state_dict(old_schedule.state_dict())
    new.param_groups = new.optimizer.param_groups
    asked.apply(new, new_schedule)
    return list(new.optimizer.param_groups)


def test_what_was_asked_for_is_in_every_group() -> None:
    old, new = wrapped(1e-3, 0.5), wrapped(decay=0.1, **ASKED)
    schedules = [get_scheduler("linear", optimizer.optimizer, 0, steps) for optimizer, steps in ((old, 2), (new, 8))]
    learn(old, schedules[0], 2)
    assert old.param_groups[0]["lr"] == 0
    groups = resumed(old, new, *schedules)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {(group["lr"], group["initial_lr"], group["betas"], group["eps"]) for group in groups} == {
        (1e-2 * 6 / 8, 1e-2, (0.8, 0.9), 1e-6)
    }
    assert schedules[1].get_last_lr() == [1e-2 * 6 / 8] * 2
    learn(new, schedules[1], 1)
    assert groups[0]["lr"] == 1e-2 * 5 / 8
    assert [state["step"].item() for state in new.optimizer.state.values()] == [3, 3]  # states are the checkpoint's


def test_steps_are_where_a_fused_kernel_reads_them() -> None:
    """A checkpoint from before it was fused has them on the host, where a GPU's kernel would read memory of others."""
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    bare = torch.optim.AdamW([weight])
    bare.state[weight] = {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, device="meta")}
    optimizer = SimpleNamespace(optimizer=bare, param_groups=bare.param_groups, state=bare.state)
    schedule = get_scheduler("constant", bare)
    Asked.of(optimizer, schedule).apply(optimizer, schedule)
    assert bare.state[weight]["step"].device.type == "cpu"
    asked = Asked([{**Asked.of(optimizer, schedule).groups[0], "fused": True}], [1e-3], None)
    asked.apply(optimizer, schedule)
    assert bare.state[weight]["step"].device.type == "meta"


def test_deepspeeds_own_schedule() -> None:
    old, new = wrapped(1e-3, 0.0), wrapped(decay=0.0, **ASKED)
    schedules = [
        WarmupDecayLR(optimizer.optimizer, steps, warmup_max_lr=rate, warmup_num_steps=2)
        for optimizer, steps, rate in ((old, 4, 1e-3), (new, 12, 1e-2))
    ]
    learn(old, schedules[0], 4)
    groups = resumed(old, new, schedules[0], SimpleWrapper(schedules[1]))
    assert [group["lr"] for group in groups] == [pytest.approx(1e-2 * 9 / 10)] * 2


class SimpleWrapper:
    """As accelerate's, around a schedule of DeepSpeed's."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.load_state_dict = scheduler.load_state_dict


def test_a_rate_that_the_run_came_to_is_kept() -> None:
    old, new = wrapped(1e-2, 0.5, betas=(0.8, 0.9), eps=1e-6), wrapped(decay=0.1, **ASKED)
    schedules = [ReduceLROnPlateau(optimizer.optimizer, factor=0.5, patience=0) for optimizer in (old, new)]
    for loss in (1.0, 2.0):
        schedules[0].step(loss)
    groups = resumed(old, new, *schedules)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(5e-3, 0.1), (5e-3, 0.0)]


def test_clipping_that_zero_loads() -> None:
    optimizer = wrapped(1e-3, 0.0)
    optimizer.optimizer.clip_grad = 0.5
    schedule = get_scheduler("constant", optimizer.optimizer)
    asked = Asked.of(optimizer, schedule)
    optimizer.optimizer.clip_grad = 1.0  # as `_load_global_state` of ZeRO-1 and 2
    asked.apply(optimizer, schedule)
    assert optimizer.optimizer.clip_grad == 0.5
