"""What the exact validation loss is made of: the rows of a rank, the loss of a batch, and a measurement at the end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.data.rows import lengths_of, views_of
from ds_sft.ranks.stop import StopRequests


class RankRows(Dataset[dict[str, Any]]):
    """Every `ranks`-th row from `rank` on, longest first. Ranks without a last row get one that counts nothing.

    All ranks so run the same number of forward passes, which ZeRO-3 needs, of about as many tokens each, and no row is
    measured twice. Where ranks share rows, their groups count as ranks.
    """

    def __init__(self, rows: Any, rank: int, ranks: int) -> None:
        self.rows, self.rank, self.ranks = views_of(rows), rank, ranks
        self.order = np.argsort(-lengths_of(rows), kind="stable")

    def __len__(self) -> int:
        return -(-len(self.rows) // self.ranks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        position = index * self.ranks + self.rank
        if position < len(self.rows):
            return dict(self.rows[int(self.order[position])])
        shortest = self.rows[int(self.order[-1])]
        return {**shortest, "labels": [IGNORE_INDEX] * len(shortest["labels"])}


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy over supervised tokens, of a model that keeps its own loss.

    In float32, row by row to keep one row's float32 logits only.

    Args:
        logits: [batch, seq, vocab], position t predicts token t + 1.
        labels: [batch, seq], `IGNORE_INDEX` where nothing counts.
    """
    rows = [
        F.cross_entropy(row[:-1].float(), target[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows).sum()


class EvaluateAtEnd(TrainerCallback):
    """Measure the final model too: the last step, or that which a callback ends at, is rarely one of `eval_steps`."""

    def __init__(self, stop: StopRequests) -> None:
        self.stop = stop
        self.measured = -1  # after this step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True
        self.on_log(args, state, control)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the user's callbacks; what they say of a validation comes after that one."""
        ended = control.should_training_stop and self.stop.decided is None
        lacking = args.eval_strategy == IntervalStrategy.STEPS and self.measured != state.global_step
        control.should_evaluate |= ended and lacking
        if args.load_best_model_at_end and args.save_strategy == SaveStrategy.STEPS:  # `best` saves by itself
            control.should_save |= ended and lacking  # it may be the best one

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.measured = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.on_log(args, state, control)
