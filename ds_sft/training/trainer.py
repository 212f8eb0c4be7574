"""The thin Trainer subclass: batches that no world size changes, an exact validation loss, all of it timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, TrainerControl
from transformers.trainer_utils import EvalLoopOutput

from ds_sft.config.keys import OUR_ORDERS
from ds_sft.data.batch import METADATA
from ds_sft.data.loader import Ahead, GlobalBatches, RowsOrNothing, TrainLoader
from ds_sft.model.offload import InputOffload
from ds_sft.model.working_copy import LentCopy, WorkingCopy
from ds_sft.ranks.collectives import sum_over_ranks
from ds_sft.training.clock import EVALUATION, Clock
from ds_sft.training.measuring import Measuring
from ds_sft.training.metrics import Throughput
from ds_sft.training.nonfinite import FiniteTrainer
from ds_sft.training.progress import ProgressLine
from ds_sft.training.resumable import StepBoundary
from ds_sft.training.timers import Timers
from ds_sft.training.validation import EvaluateAtEnd, RankRows, loss_sum
from ds_sft.training.workers import loader_options


def without_metadata(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A batch's metadata is for hooks: no model knows it."""
    return args, {name: value for name, value in kwargs.items() if name != METADATA}


class SFTTrainer(FiniteTrainer):
    """Trainer whose `eval_loss` is the mean over all supervised tokens of the validation set, whatever the world size.

    Trainer's own is a mean of batch means, and wrong when ranks x batch does not divide the set (transformers#39241).
    """

    def __init__(self, *args: Any, read_ahead: bool | None = None, **kwargs: Any) -> None:
        """`read_ahead`: the micro batches of the next step are made beside this one; None: where a GPU computes it."""
        super().__init__(*args, **kwargs)
        self.reads_ahead = self.args.device.type == "cuda" if read_ahead is None else read_ahead
        self.clock = Clock(self.args.device.type, self.args.world_size)
        self.timers = Timers(self.clock)
        self.throughput = Throughput(
            self.model, self.args.device, self.clock, head_everywhere=self.parts.supervised_loss is None
        )
        self.model.register_forward_pre_hook(without_metadata, with_kwargs=True)  # after those that want it
        self.ahead: Ahead | None = None
        masters = any(p.requires_grad and p.dtype == torch.float32 for p in self.model.parameters())
        if not masters and self.accelerator.ddp_handler is not None:  # DDP's buckets are a second copy of gradients
            self.accelerator.ddp_handler.gradient_as_bucket_view = True
        if self.is_deepspeed_enabled:  # else accelerate warns that Trainer says 1, and takes this number
            self.accelerator.gradient_accumulation_steps = self.args.gradient_accumulation_steps
        for upstream in (ProgressCallback, PrinterCallback):
            self.remove_callback(upstream)
        for callback in (
            ProgressLine(),
            EvaluateAtEnd(self.run.stop),
            Measuring(self.throughput, self.timers, self.run.site.launch),
            StepBoundary(self),
        ):
            self.add_callback(callback)

    # ---- Measuring: see clock.py, timers.py, metrics.py and measuring.py

    def begin_training(self) -> None:
        super().begin_training()
        if isinstance(self.parts.offload, InputOffload):
            self.parts.offload.wrap(self.model)  # checkpointing was just switched on
        if self.is_deepspeed_enabled:
            self.timers.time_engine(self.model_wrapped)
        elif self.args.world_size > 1:
            self.timers.time_reduction(self.model_wrapped, self.accelerator)
        if self.parts.attention is not None and self.parts.attention.group is not None:
            self.timers.time_exchange(self.parts.attention.group)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """The micro batches of a step, on the device, and what their losses are divided by."""
        with self.clock.part("data_wait"):
            batches = islice(self._read_ahead(epoch_iterator, num_batches), num_batches)
            step = [self._to_device(batch) for batch in batches]
            return step, self._count_supervised(step, device)

    def _read_ahead(self, epoch_iterator: Iterator[Any], num_batches: int) -> Iterator[Any]:
        """The micro batches of an epoch; `num_batches`: of a step."""
        if not self.reads_ahead:
            return epoch_iterator
        if self.ahead is None:
            self.ahead = Ahead(epoch_iterator, num_batches, self.args.device)
        return self.ahead

    def _run_epoch(self, **kwargs: Any) -> None:
        # What is there by now stays: to search these half a million objects for garbage takes longer than a small step,
        # and Python would do it every few steps, for each leaves thousands of new ones. What is garbage by now would
        # stay as well, of one epoch after the other.
        gc.collect()
        gc.freeze()
        try:
            super()._run_epoch(**kwargs)
        finally:
            gc.unfreeze()
            # However it ended: no thread stays, and the next epoch may have the same iterator
            if self.ahead is not None:
                self.ahead.close()
            self.ahead = None

    def _count_supervised(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Any:
        """Supervised tokens of a step, over all ranks: the host counts them, and waits for no device."""
        if not (batch_samples and self.model_accepts_loss_kwargs):
            return None
        with self.clock.part(self.clock.talking):
            supervised, tokens = (
                torch.full((), sum(getattr(batch[METADATA], name) for batch in batch_samples), device=device)
                for name in ("supervised", "tokens_of_rows")
            )
            counts = torch.stack([supervised, tokens])
            if self.args.world_size > 1:
                dist.all_reduce(counts)
            if self.parts.routing is not None:
                self.parts.routing.begin_step(counts[1])
            return counts[0]

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.args.device, non_blocking=True) for name, value in inputs.items()}

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.clock.part("forward_backward"), self._in_16_bits(keep=not self.accelerator.sync_gradients):
            self.throughput.count(inputs[METADATA])
            self.tokens_seen += inputs[METADATA].tokens
            loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss

    def _in_16_bits(self, *, keep: bool = False) -> AbstractContextManager[None]:
        copy = self.parts.working_copy
        return copy.lent(keep=keep) if isinstance(copy, WorkingCopy | LentCopy) else nullcontext()

    def _clip_grad_norm(self, model: Any) -> Any:
        with self.clock.part("optimizer"):
            return None if self.is_deepspeed_enabled else super()._clip_grad_norm(model)  # DeepSpeed has clipped

    def meet(self, control: TrainerControl) -> tuple[str | None, bool]:
        with self.clock.part(self.clock.talking):
            return super().meet(control)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self.clock.part("save"):
            super()._save_checkpoint(*args, **kwargs)

    def finish_save(self) -> None:
        with self.clock.part("save"):
            super().finish_save()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.clock.part(EVALUATION):
            return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # what all ranks log, at the same steps
            logs |= self.throughput.logged() | (self.parts.routing.logged() if self.parts.routing is not None else {})
        elif "train_loss" in logs:  # the end
            self.throughput.interval()
        super().log(logs, start_time)

    # ---- Batches

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        args = self.args
        if args.train_sampling_strategy not in OUR_ORDERS:
            loader: DataLoader[dict[str, Any]] = super().get_train_dataloader()
            return loader
        return TrainLoader(
            RowsOrNothing(self.train_dataset),
            batch_sampler=GlobalBatches(self.batching, args.process_index),
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # its own: making an iterator must not move the state that dropout draws from
            **loader_options(args),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, Any]]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            RankRows(rows, self.args.process_index // self.batching.group, self.args.world_size // self.batching.group),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
            **loader_options(self.args),
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Token mean of the cross-entropy alone, without what a model adds to it; with Trainer's progress bar."""
        self.callback_handler.eval_dataloader = dataloader
        metrics = {f"{metric_key_prefix}_loss": self.token_mean(dataloader, self._show_progress)}
        num_rows = len(dataloader.dataset.rows)  # type: ignore[attr-defined]
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=num_rows)

    def _show_progress(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    @torch.no_grad()
    def token_mean(self, dataloader: DataLoader[Any], after_batch: Callable[[], None] = lambda: None) -> float:
        """Mean cross-entropy over all ranks' supervised tokens; keeps no logits beyond a batch. All ranks call it."""
        self.model.eval()  # also switches gradient checkpointing off
        total = torch.zeros((), dtype=torch.float64, device=self.args.device)
        count = 0
        stop = self.run.stop.paced()
        with self._in_16_bits():
            for batch in dataloader:
                stop.check()
                inputs = self._to_device(batch)
                total += self._loss_sum(inputs)
                count += inputs[METADATA].supervised
                after_batch()
        loss, tokens = sum_over_ranks(total.item(), count, device=self.args.device)
        return loss / max(tokens, 1)

    def _loss_sum(self, inputs: dict[str, Any]) -> torch.Tensor:
        supervised = self.parts.supervised_loss
        if supervised is None:
            return loss_sum(self.model(**{**inputs, "labels": None}, use_cache=False).logits, inputs["labels"])
        self.model(**inputs, use_cache=False)
        assert supervised.total is not None
        return supervised.total
