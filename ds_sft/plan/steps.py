"""How rows become steps and checkpoints: the arithmetic that Trainer does, without Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The batch of one step, and how many steps there are."""

    micro: int | None  # rows of a rank in one forward pass; None: as many as `max_tokens` hold
    accumulation: int
    ranks: int  # that have rows of their own: groups of them where `group` ranks share theirs
    num_rows: int
    epochs: float
    max_steps: int = -1
    drop_last: bool = False
    max_tokens: int | None = None  # of a micro batch
    num_bins: int | None = None  # micro batches of an epoch that `max_tokens` fills
    group: int = 1  # ranks that share the rows of a micro batch

    @property
    def micro_batches_per_step(self) -> int:
        return self.accumulation * self.ranks

    @property
    def rows_per_step(self) -> int | None:
        return None if self.micro is None else self.micro * self.micro_batches_per_step

    @property
    def units(self) -> int:
        """What an epoch deals to the ranks: rows, or micro batches that tokens fill."""
        return self.num_rows if self.micro is not None else self.num_bins or 1

    @property
    def steps_per_epoch(self) -> int:
        units, a_step = self.units, self.rows_per_step or self.micro_batches_per_step
        if self.drop_last:  # whole steps only, so that it does not depend on the number of ranks
            return max(1, units // a_step)
        return math.ceil(units / a_step)

    @property
    def steps(self) -> int:
        return self.max_steps if self.max_steps > 0 else math.ceil(self.epochs * self.steps_per_epoch)

    def in_words(self) -> str:
        """The arithmetic in one line."""
        return self._batch() + self._idle()

    def _idle(self) -> str:
        """The loss is the same, as the mean is over the rows of a step; but more ranks are asked for than can help."""
        who = "Ranks" if self.group == 1 else "Groups"
        return f" {who} that have rows: {self.units} of {self.ranks}." if self.units < self.ranks else ""

    def _batch(self) -> str:
        who = "rank" if self.group == 1 else "group"
        shared = f" of {self.group} ranks" if self.group > 1 else ""
        times = f"{self.accumulation} accumulated x {self.ranks} {who}{'s' if self.ranks > 1 else ''}{shared}"
        in_all = f"{self.steps_per_epoch:,} steps an epoch, {self.steps:,} steps in all."
        if self.micro is None:
            tokens = self.max_tokens or 0
            return (
                f"Batch: at most {tokens:,} tokens x {times} = {tokens * self.micro_batches_per_step:,} tokens a step; "
                f"{self.num_rows:,} rows in {self.num_bins or 0:,} micro batches => {in_all}"
            )
        line = (
            f"Batch: {self.micro} rows x {times} = {self.rows_per_step} rows a step; {self.num_rows:,} rows => {in_all}"
        )
        if self.max_tokens is not None:
            line += (
                f" No micro batch has more than {self.max_tokens:,} tokens; to fill them leave "
                "per_device_train_batch_size out."
            )
        return line

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


def steps_of(
    training: Mapping[str, Any],
    micro: int | None,
    accumulation: int,
    ranks: int,
    num_rows: int,
    *,
    group: int = 1,
    **tokens: int | None,
) -> Steps:
    """The steps of a run with these keys of TrainingArguments; `tokens` are `Steps.max_tokens` and `num_bins`."""
    return Steps(
        micro=micro,
        accumulation=accumulation,
        ranks=ranks,
        group=group,
        num_rows=num_rows,
        epochs=training.get("num_train_epochs", 3.0),
        max_steps=training.get("max_steps", -1),
        drop_last=training.get("dataloader_drop_last", False),
        **tokens,
    )
