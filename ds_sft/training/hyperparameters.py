"""What a run was asked for and a checkpoint brings its own of: rates, their schedule, decay, betas, clipping.

A checkpoint's states of optimizer and schedule hold the old values of them, and win when they are loaded. For a run
that goes on with the same keys setting them again changes nothing, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

# Of a parameter group: what is the run's state, and not an option of the optimizer. The rate is the schedule's to set.
STATE = ("params", "lr", "step")


@dataclass(frozen=True)
class Asked:
    """Options of a new optimizer and its schedule, taken before a checkpoint is loaded into them."""

    groups: list[dict[str, Any]]  # of each group of parameters, biases and norms without decay
    base_lrs: list[float]  # what the schedule multiplies, of each group; none where it is not a product
    clip: float | None  # of the norm of a gradient, where the optimizer does it: ZeRO-1 and 2 load it, too

    @classmethod
    def of(cls, optimizer: Any, scheduler: Any) -> Asked:
        """Take them, of Trainer's optimizer and schedule or of DeepSpeed's."""
        groups = [{name: option for name, option in group.items() if name not in STATE}
                  for group in optimizer.param_groups]  # fmt: skip
        clip = getattr(optimizer.optimizer, "clip_grad", None)
        return cls(groups, list(getattr(_bare(scheduler), "base_lrs", [])), clip)

    def apply(self, optimizer: Any, scheduler: Any) -> None:
        """Set them again; the rate is that of the schedule's next step."""
        for group, options in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(options)
            if group.get("fused"):
                _take_steps_to_device(optimizer.state, group["params"])
        if self.clip is not None:
            optimizer.optimizer.clip_grad = self.clip
        schedule = _bare(scheduler)
        if isinstance(schedule, LambdaLR):
            schedule.base_lrs = list(self.base_lrs)
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            schedule._last_lr = [lr * factor for lr, factor in zip(self.base_lrs, factors, strict=True)]
            for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
                group["lr"] = rate
        elif hasattr(schedule, "last_batch_iteration"):  # DeepSpeed's own
            schedule.step(schedule.last_batch_iteration)


def _take_steps_to_device(states: Any, parameters: Iterable[torch.Tensor]) -> None:
    """A fused kernel reads its counts of steps there; a checkpoint of an optimizer that was not fused has them on the
    host, and torch, which loads them, asks that checkpoint."""
    for parameter in parameters:
        if parameter in states and torch.is_tensor(states[parameter].get("step")):
            states[parameter]["step"] = states[parameter]["step"].to(parameter.device)


def _bare(scheduler: Any) -> Any:
    """The schedule in accelerate's wrapper, if it is in one."""
    return getattr(scheduler, "scheduler", scheduler)
