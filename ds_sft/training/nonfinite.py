"""Losses and gradients that are no numbers: the first step that has one ends the run, or is left out.

A loss that is not finite makes every gradient of its backward NaN (`spread`), so the norm of the reduced gradients,
which all ranks have, says of each step whether it was sound, and no rank has to ask another. When the host reads it:

- ZeRO-1, 2 and 3 read it in every step by themselves, and leave out an update whose norm is not finite. ZeRO-0 does
  not: there it is as without DeepSpeed.
- Without, `on_nonfinite: stop` waits for nothing: the norm is copied to the host beside the next step and read when
  that one's is due, or before anything is logged, measured, saved or exported, whichever comes first. Until then a bad
  step has changed weights in memory that end with the process.
- Without, `on_nonfinite: skip` has to know before the optimizer's step: the host waits for the device once a step.

A step that is left out changes neither weights nor optimizer, and the learning rate's schedule does not count it: what
accelerate and DeepSpeed do when a scaler overflows. float16 has such a scaler, which expects norms that are not finite
and leaves these steps out by itself: nothing is watched there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.data.batch import METADATA, BatchMetadata
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.data.loader import single_rows
from ds_sft.errors import RunError
from ds_sft.ranks.collectives import gather
from ds_sft.training.resumable import ResumableTrainer

MAX_IN_A_ROW = 5  # steps left out one after the other: then `skip` ends the run, too
ROWS_NAMED = 4  # of a micro batch
MICRO_BATCHES_NAMED = 4


def spread(loss: torch.Tensor) -> torch.Tensor:
    """The loss, []; where it is not finite one whose gradients are all NaN: those of an infinite loss may be finite."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan).to(loss.dtype)


@dataclass(frozen=True)
class StepValues:
    """What a step has computed, on its way to the host."""

    step: int
    norm: torch.Tensor | float  # of the gradients of all ranks
    losses: torch.Tensor  # [micro batches] of this rank
    arrived: torch.cuda.Event | None

    @classmethod
    def begin(cls, step: int, norm: torch.Tensor | float, losses: Sequence[torch.Tensor]) -> StepValues:
        """Copy without waiting for the device."""
        on_gpu = losses[0].is_cuda
        coming = torch.stack(list(losses)).to("cpu", non_blocking=True)
        if isinstance(norm, torch.Tensor):  # bfloat16 of such gradients, which numpy does not read
            norm = norm.detach().float().to("cpu", non_blocking=True)
        event = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if event is not None:
            event.record()
        return cls(step, norm, coming, event)

    @property
    def sound(self) -> bool:
        """Whether the norm is finite; waits until it is here."""
        if self.arrived is not None:
            self.arrived.synchronize()
        norm = self.norm.numpy() if isinstance(self.norm, torch.Tensor) else self.norm  # on the host by now
        return math.isfinite(float(norm))

    def bad_losses(self) -> list[tuple[int, float]]:
        """Number, from 0, and loss of the micro batches of this rank whose loss is not finite."""
        return [(number, loss) for number, loss in enumerate(self.losses.tolist()) if not math.isfinite(loss)]


def trouble_in_words(reading: StepValues, bad: Sequence[tuple[int, float, Sequence[str]]]) -> str:
    """What is wrong with a step.

    Args:
        bad: rank, loss and rows as FILE:LINE of each micro batch whose loss is not finite; no rows where nobody knows.
    """
    step = f"step {reading.step:,}"
    if not bad:
        return f"{step}: all losses are finite, the norm of the gradients is {float(reading.norm)}"
    said = [f"{loss} on rank {rank}{_named(rows)}" for rank, loss, rows in bad[:MICRO_BATCHES_NAMED]]
    more = len(bad) - len(said)
    return f"{step}: the loss is {'; '.join(said)}" + (f"; and in {more} more micro batches" if more else "")


def _named(rows: Sequence[str]) -> str:
    more = len(rows) - ROWS_NAMED
    named = ", ".join(rows[:ROWS_NAMED]) + (f" and {more} more" if more > 0 else "")
    return f" ({named})" if rows else ""


class FiniteTrainer(ResumableTrainer):
    """Trainer that neither keeps nor saves a step whose loss or gradients are not finite; see the module."""

    def __init__(
        self,
        *args: Any,
        on_nonfinite: str = "stop",
        where: Callable[[int], str] = str,
        own_code: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`where` gives FILE:LINE of a row of the training set; `own_code`: what a user has written -> its key."""
        super().__init__(*args, **kwargs)
        self.on_nonfinite, self.where, self.own_code = on_nonfinite, where, own_code or {}
        self.micro_losses: list[torch.Tensor] = []  # of the step under way, on the device
        self.loss_before: torch.Tensor | None = None  # `_tr_loss` when the step under way began
        self.unclipped_norm: torch.Tensor | None = None  # of a step under ZeRO-0, whose engine does not tell it
        self.reading: StepValues | None = None  # of a step that is not known to be sound
        self.skipped_in_a_row = 0
        self.steps_to_log = 0

    # ---- Watching

    def begin_training(self) -> None:
        super().begin_training()
        if self.is_deepspeed_enabled and self.model_wrapped.zero_optimization_stage() == 0:
            self.model_wrapped.step = self._measured(self.model_wrapped.step)

    def _measured(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The engine's step, after the norm of the gradients that it clips and deletes."""

        def measured(*args: Any, **kwargs: Any) -> Any:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.unclipped_norm = torch.nn.utils.get_total_norm(gradients)
            return step(*args, **kwargs)

        return measured

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        learns = self._learns(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        # A mean over no token, of a model that keeps its own loss, is NaN; its gradients are 0.
        loss = torch.where(learns | torch.isfinite(loss.detach()), loss, 0.0)
        if self.args.fp16:
            return loss
        if not self.micro_losses and self.on_nonfinite == "skip":
            self.loss_before = self._tr_loss.clone()
        self.micro_losses.append(loss.detach())
        return spread(loss)

    def _learns(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Whether a batch supervises a token, [] bool on the device; a part of a row may predict one of the next."""
        metadata: BatchMetadata | None = inputs.get(METADATA)
        if metadata is not None and metadata.share is not None:
            return torch.full((), metadata.supervised > 0, device=inputs["labels"].device)
        learns: torch.Tensor = (inputs["labels"][..., 1:] != IGNORE_INDEX).any()
        return learns

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Called after the gradients were reduced; under DeepSpeed after the engine's step, else before it."""
        if self.is_deepspeed_enabled:  # as Trainer's, but on the device until it is logged: reading it would wait
            norm = self.model_wrapped.get_global_grad_norm()
        else:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.args.fp16:
            return norm
        norm = self.unclipped_norm if norm is None else norm
        assert norm is not None, "DeepSpeed was told not to compute it"
        self.settle()
        self.reading = StepValues.begin(self.state.global_step + 1, norm, self.micro_losses)
        self.micro_losses = []
        if self.on_nonfinite == "skip":
            self._keep_or_leave_out(model, self.reading)
        elif isinstance(norm, float):  # the host has it
            self.settle()
        return norm

    # ---- Ending

    def settle(self) -> None:
        """End the run if a step of which the host did not know yet was not sound; the same on all ranks."""
        reading, self.reading = self.reading, None
        if reading is not None and not reading.sound:
            what, every_loss = self._trouble(reading)
            remedy = "would leave out every step" if every_loss else "would leave the step out"
            self._end(what, f"on_nonfinite: skip {remedy}", every_loss)

    def _end(self, what: str, remedy: str, every_loss: bool) -> None:
        self.finish_save()  # of a sound step
        newest = newest_complete(Path(self.args.output_dir))
        kept = f"{newest.path} is complete" if newest else "no checkpoint was saved before it"
        where = ["learning_rate", *(f"{key}: {name}" for name, key in self.own_code.items())]
        why = " All losses of the step are none: the weights were no numbers before it, as a rule." * every_loss
        look = ", and at ".join(where if every_loss else ["its rows", *where])
        raise RunError(f"{what}. Nothing of this step is kept; {kept}.{why} Look at {look}; {remedy}")

    def _trouble(self, reading: StepValues) -> tuple[str, bool]:
        """What is wrong with a step, on which ranks, and whether no loss of several is finite; all ranks must call
        it."""
        ranks = gather(reading.bad_losses())
        found = [
            (rank, loss, self._rows(reading.step, rank, number))
            for rank, bad in enumerate(ranks)
            for number, loss in bad
        ]
        several = len(reading.losses) * len(ranks) > self.batching.group  # ranks of a group share one
        return trouble_in_words(reading, found), several and len(found) == len(reading.losses) * len(ranks)

    def _rows(self, step: int, rank: int, micro_batch: int) -> list[str]:
        """FILE:LINE of the rows in a micro batch; none where Trainer chose them by itself."""
        if not self.deals_rows:
            return []
        epoch, before = self.position(step - 1)
        number = (before * self.batching.accumulation + micro_batch) * self.batching.ranks + rank // self.batching.group
        rows = single_rows(self.train_dataset, self.batching.epoch(epoch).micro_batch(number))
        return [self.where(row) for row in rows]

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.settle()
        self.steps_to_log = self.state.global_step - self._globalstep_last_logged
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self._globalstep_last_logged == self.state.global_step:
            self._tr_loss.zero_()  # Trainer subtracts it from itself, and NaN would stay

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self.settle()
        return super()._finalize_training(*args, **kwargs)

    # ---- Leaving out

    def _keep_or_leave_out(self, model: Any, reading: StepValues) -> None:
        self.reading = None
        sound = reading.sound
        if not self.is_deepspeed_enabled:
            self.optimizer._is_overflow = not sound  # what accelerate notes of a scaler: the schedule stays, too
        if sound:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        what, every_loss = self._trouble(reading)
        if self.skipped_in_a_row == MAX_IN_A_ROW:
            remedy = f"it is step {MAX_IN_A_ROW} of this kind in a row, where on_nonfinite: skip ends, too"
            self._end(what, remedy, every_loss)
        if self.is_deepspeed_enabled:
            assert self.accelerator.optimizer_step_was_skipped, "DeepSpeed applied a norm that is not finite"
        else:
            model.zero_grad()  # an optimizer passes over parameters without a gradient
        assert self.loss_before is not None
        self._tr_loss.copy_(self.loss_before)
        self.skipped_steps += 1
        self.skipped_unlogged += 1
        self.run.site.launch.say(f"Warning: {what}. Its update is left out; {self.skipped_steps:,} so far.")

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.skipped_steps:
            applied = self.steps_to_log - self.skipped_unlogged
            logs["loss"] = logs["loss"] * self.steps_to_log / applied if applied else math.nan
            logs["skipped_steps"] = self.skipped_steps
            self.skipped_unlogged = 0
        super().log(logs, start_time)

    # ---- Validation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if not math.isfinite(metrics.get("eval_loss", 0.0)):
            self.run.site.launch.say(
                f"Warning: the validation loss after step {self.state.global_step:,} is {metrics['eval_loss']}."
            )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; what is not finite is never the best, in whichever direction."""
        name = self.args.metric_for_best_model or "loss"
        value = metrics.get(name if name.startswith("eval_") else f"eval_{name}", 0.0)
        return math.isfinite(value) and bool(super()._determine_best_metric(metrics, trial))
