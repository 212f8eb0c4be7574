"""How rows become steps and checkpoints: the arithmetic that Trainer does, without Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The batch of one step, and how many steps there are."""

    micro: int  # rows of a rank in one forward pass
    accumulation: int
    ranks: int
    num_rows: int
    epochs: float
    max_steps: int = -1
    drop_last: bool = False

    @property
    def rows_per_step(self) -> int:
        return self.micro * self.accumulation * self.ranks

    @property
    def steps_per_epoch(self) -> int:
        if self.drop_last:  # whole steps only, so that it does not depend on the number of ranks
            return max(1, self.num_rows // self.rows_per_step)
        return math.ceil(self.num_rows / self.rows_per_step)

    @property
    def steps(self) -> int:
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def describe(self) -> str:
        """The arithmetic in one line."""
        return (
            f"Batch: {self.micro} rows x {self.accumulation} accumulated x {self.ranks} "
            f"rank{'s' if self.ranks > 1 else ''} = {self.rows_per_step} rows a step; {self.num_rows:,} rows => "
            f"{self.steps_per_epoch:,} steps an epoch, {self.steps:,} steps in all."
        )

    def checkpoints(self, training: Mapping[str, Any]) -> list[int]:
        """The steps after which a checkpoint is written, by `save_strategy` and `save_steps`."""
        strategy = training.get("save_strategy", "steps")
        if strategy not in ("steps", "epoch"):
            return []
        given = training.get("save_steps", 500)
        every = math.ceil(self.steps * given) if given < 1 else int(given)
        if strategy == "epoch":
            every = self.steps_per_epoch
        return sorted({*range(every, self.steps + 1, every), self.steps})  # the last step counts in any case


def steps_of(training: Mapping[str, Any], micro: int, accumulation: int, ranks: int, num_rows: int) -> Steps:
    """The steps of a run with these keys of TrainingArguments."""
    return Steps(
        micro=micro,
        accumulation=accumulation,
        ranks=ranks,
        num_rows=num_rows,
        epochs=training.get("num_train_epochs", 3.0),
        max_steps=training.get("max_steps", -1),
        drop_last=training.get("dataloader_drop_last", False),
    )
