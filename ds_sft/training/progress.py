"""What rank 0 shows while it trains: a bar in a terminal, a line for each logging step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.ranks.launch import print_line

EVALUATION_LINES = 30.0  # seconds from one line of an evaluation to the next


class ProgressLine(ProgressCallback):
    """Trainer's bars with our figures behind them; without a terminal (or with `disable_tqdm`) lines and no bars."""

    def __init__(self) -> None:
        super().__init__()
        self.evaluated = 0  # batches of the evaluation under way
        self.evaluating = self.said = 0.0  # since when, and when its last line was

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bars = sys.stderr.isatty() and not args.disable_tqdm
        self.started, self.first_step = time.monotonic(), state.global_step
        if self.bars:
            super().on_train_begin(args, state, control, **kwargs)
            if state.is_world_process_zero:
                self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bars:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.bars:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)
        elif state.is_world_process_zero:
            self._count_evaluated(len(eval_dataloader))

    def _count_evaluated(self, batches: int) -> None:
        """After each batch of an evaluation; a line now and then, so that a long one does not look like a hanging."""
        now = time.monotonic()
        if not self.evaluated:
            self.evaluating = self.said = now
        self.evaluated += 1
        if self.evaluated < batches and now - self.said >= EVALUATION_LINES:
            self.said = now
            left = round((now - self.evaluating) / (self.evaluated - 1) * (batches - self.evaluated))
            print_line(f"Evaluating: batch {self.evaluated:,} of {batches:,}; {timedelta(seconds=left)} left")

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.evaluated = 0
        if self.bars:
            super().on_evaluate(args, state, control, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        text = logs_in_words(logs or {})
        if not (state.is_world_process_zero and text):
            return
        step = f"Step {state.global_step:,} of {state.max_steps:,}: "
        if not self.bars:
            print_line(f"{step}{text}{self._time_left(state) if logs and 'loss' in logs else ''}")
        elif logs and "loss" in logs:
            self.training_bar.set_postfix_str(text)
        else:
            self.training_bar.write(step + text)

    def _time_left(self, state: TrainerState) -> str:
        done, left = state.global_step - self.first_step, state.max_steps - state.global_step
        if not (done and left):
            return ""
        return f"; {timedelta(seconds=round((time.monotonic() - self.started) / done * left))} left"

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bars:
            super().on_train_end(args, state, control, **kwargs)


def logs_in_words(logs: Mapping[str, float]) -> str:
    """A log entry in one short line; empty for the summary of a run, which is printed elsewhere."""
    if "eval_loss" in logs:
        return f"validation loss {logs['eval_loss']:.4f}"
    if "loss" not in logs:
        return ""
    parts = [f"loss {logs['loss']:.4f}"]
    if "tokens_per_second" in logs:
        parts += [f"{logs['tokens_per_second']:,.0f} tokens/s"]
        parts += [f"MFU {logs['mfu']:.1%}"] if "mfu" in logs else []
        parts += [f"{name} {logs[f'{name}_share']:.0%}" for name in ("waiting", "padding")]
    if "expert_share_max" in logs:
        parts += [f"experts {logs['expert_share_min']:.1%} to {logs['expert_share_max']:.1%} of tokens"]
    return ", ".join(parts)
