"""The thin Trainer subclass: batches that do not depend on the world size, an exact validation loss, tokens counted."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy

from ds_sft.data.batches import GlobalBatches, Rows, TrainLoader
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.runtime.checkpoint import OUR_ORDERS
from ds_sft.runtime.distributed import sum_over_ranks
from ds_sft.training.resumable import ResumableTrainer, StepBoundary


class RankRows(Dataset[dict[str, list[int]]]):
    """Every `world_size`-th row from `rank` on. Ranks without a last row get one that counts nothing.

    All ranks so run the same number of forward passes, which ZeRO-3 needs, and no row is measured twice.
    """

    def __init__(self, rows: Any, rank: int, world_size: int) -> None:
        self.rows, self.rank, self.world_size = rows, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.world_size)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        position = index * self.world_size + self.rank
        if position < len(self.rows):
            return dict(self.rows[position])
        first = self.rows[0]
        return {**first, "labels": [IGNORE_INDEX] * len(first["labels"])}


def loss_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the cross-entropy over supervised tokens, in float32, row by row to keep one row's float32 logits only.

    Args:
        logits: [batch, seq, vocab], position t predicts token t + 1.
        labels: [batch, seq], `IGNORE_INDEX` where nothing counts.
    """
    rows = [
        F.cross_entropy(row[:-1].float(), target[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        for row, target in zip(logits, labels, strict=True)
    ]
    return torch.stack(rows).sum()


class SFTTrainer(ResumableTrainer):
    """Trainer whose `eval_loss` is the mean over all supervised tokens of the validation set, whatever the world size.

    Trainer's own is a mean of batch means, and wrong when ranks x batch does not divide the set (transformers#39241).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(EvaluateAtEnd())
        self.add_callback(StepBoundary(self))

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")  # rows laid end to end have neither mask nor padding
        self.tokens_seen += inputs["labels"].numel() if mask is None else mask.sum().to(self.tokens_seen.device)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def get_train_dataloader(self) -> DataLoader[dict[str, list[int]]]:
        args = self.args
        if args.train_sampling_strategy not in OUR_ORDERS:
            loader: DataLoader[dict[str, list[int]]] = super().get_train_dataloader()
            return loader
        return TrainLoader(
            Rows(self.train_dataset),
            batch_sampler=GlobalBatches(self.batching, args.process_index),
            collate_fn=self.data_collator,
            generator=torch.Generator(),  # its own: making an iterator must not move the state that dropout draws from
            **_loader_options(args),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[dict[str, list[int]]]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            RankRows(rows, self.args.process_index, self.args.world_size),
            batch_size=self.args.eval_batch_size,
            collate_fn=self.data_collator,
            generator=torch.Generator(),
            **_loader_options(self.args),
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        *args: Any,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> EvalLoopOutput:
        """Token mean of the cross-entropy, with Trainer's progress bar."""
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
        count = torch.zeros((), dtype=torch.int64, device=self.args.device)
        for batch in dataloader:
            self.run.stop.check()
            inputs = self._prepare_inputs(batch)
            labels = inputs.pop("labels")
            total += loss_sum(self.model(**inputs, use_cache=False).logits, labels)
            count += (labels[:, 1:] != IGNORE_INDEX).sum()
            after_batch()
        loss, tokens = sum_over_ranks(total.item(), count.item(), device=self.args.device)
        return loss / max(tokens, 1)


def _loader_options(args: TrainingArguments) -> dict[str, Any]:
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "worker_init_fn": _ignore_stop_signals,
    }


def _ignore_stop_signals(worker: int) -> None:
    """Whoever signals all processes of a job must not kill the loader's workers before their parent has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


class EvaluateAtEnd(TrainerCallback):
    """Measure the final model too: the last step is rarely a multiple of `eval_steps`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True
