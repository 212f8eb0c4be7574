"""A step of the Trainer: what the host knows it does not ask the device for."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from ds_sft.checkpoints.manifest import Checkpoint
from ds_sft.checkpoints.storage import Site
from ds_sft.data.batch import METADATA, collate_flat, collate_padded
from ds_sft.data.micro_batches import Batching
from ds_sft.data.rows import lengths_of
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.loss import supervise
from ds_sft.model.padding import know_padding
from ds_sft.model.parts import parts_of
from ds_sft.model.working_copy import copy_weights
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import StopRequests
from ds_sft.training.continuity import Continuity
from ds_sft.training.trainer import SFTTrainer
from tests.dispatch import NoReads

ALONE = Launch(launcher="python")
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "vocab_size": 100}  # fmt: skip


def make_trainer(
    folder: Path,
    *,
    padded: bool = False,
    ours: bool = True,
    rows: int = 24,
    dropout: float = 0.0,
    read_ahead: bool | None = None,
    resumed: Checkpoint | None = None,
    model: Any = None,
    patience: int | None = None,
    **arguments: Any,
) -> SFTTrainer:
    """Of a tiny model and rows of 3 to 14 tokens; `ours`: with our attention and loss, unless `model` has its own."""
    torch.manual_seed(0)
    ours = ours and model is None
    model = model or LlamaForCausalLM(LlamaConfig(**SIZES, attention_dropout=dropout)).train()
    parts = parts_of(model)
    if ours:
        if padded:
            parts.padding = know_padding(model)
        else:
            parts.attention = keep_rows_apart(model)
        parts.loss = supervise(model)
    data = Dataset.from_list(
        [{"input_ids": [n + i for i in range(n % 12 + 3)], "labels": [-100, *range(n + 1, n + n % 12 + 3)]}
         for n in range(rows)])  # fmt: skip
    keys = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4, "logging_steps": 4,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": True, "learning_rate": 1e-3,
            "dataloader_pin_memory": False, "logging_nan_inf_filter": False, **arguments}  # fmt: skip
    args = TrainingArguments(str(folder), **keys)
    parts.working_copy = copy_weights(model, args)
    model.ds_sft = parts
    batching = Batching(lengths=lengths_of(data), micro_batch=2, accumulation=2, ranks=1, padded=padded, seed=1)
    collate = (lambda features: collate_padded(features, pad_token_id=0)) if padded else collate_flat
    run = Continuity(stop=StopRequests(ALONE), site=Site(ALONE, shared=True), resumed=resumed,
                     identity={"zero_stage": None, "config": {}, "data": {}})  # fmt: skip
    return SFTTrainer(model=model, args=args, train_dataset=data, eval_dataset=data.select(range(5)),
                      data_collator=collate, batching=batching, run=run, patience=patience,
                      read_ahead=read_ahead)  # fmt: skip


def batch_of(trainer: SFTTrainer) -> dict[str, Any]:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_reads_nothing(checkpointing: bool, padded: bool, tmp_path: Path) -> None:
    trainer, operations = make_trainer(tmp_path, padded=padded), NoReads()
    if checkpointing:
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    with operations:
        loss = trainer.training_step(trainer.model, batches[0], count)
    assert loss.item() > 0
    assert operations.counted["aten::mm"] > 10


class Between(TrainerCallback):
    """Refuses reads from the second step's begin to the one before the logging step's end."""

    def __init__(self) -> None:
        self.refusing = NoReads()
        self.steps = 0
        self.on = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.refusing.__enter__()
            self.on = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps += 1
        if state.global_step == 3:
            self.end()

    def end(self) -> None:
        if self.on:
            self.refusing.__exit__(None, None, None)
        self.on = False


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_read_between_two_logging_steps(padded: bool, tmp_path: Path) -> None:
    """Trainer's own loop, the optimizer, clipping and the making of batches are part of it."""
    trainer, between = make_trainer(tmp_path, padded=padded), Between()
    trainer.add_callback(between)
    try:
        trainer.train()
    finally:
        between.end()
    assert between.steps == 4
    assert between.refusing.counted["aten::_fused_adamw_"] == 4  # two groups, two steps
    (logged,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert logged["supervised_tokens_per_second"] > 0


class Frozen(TrainerCallback):
    """Objects that Python does not search for garbage, at the end of each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counts.append(gc.get_freeze_count())


def test_while_it_trains_python_searches_new_objects_alone(tmp_path: Path) -> None:
    trainer, frozen = make_trainer(tmp_path), Frozen()
    trainer.add_callback(frozen)
    trainer.train()
    assert len(frozen.counts) == 4
    assert min(frozen.counts) > 100_000
    assert gc.get_freeze_count() == 0


class Litter(TrainerCallback):
    """Leaves an object that refers to itself at the end of an epoch."""

    def __init__(self) -> None:
        self.left: Any = None
        self.gone: list[bool] = []

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        litter = TrainerCallback()
        litter.itself = litter  # type: ignore[attr-defined]
        self.left = weakref.ref(litter)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.left is not None:
            self.gone.append(self.left() is None)


def test_what_one_epoch_leaves_is_not_kept_through_the_next(tmp_path: Path) -> None:
    trainer, litter = make_trainer(tmp_path, rows=8, max_steps=6), Litter()
    trainer.add_callback(litter)
    trainer.train()
    assert litter.gone == [True] * 4


def test_a_read_would_be_seen() -> None:
    for read in (torch.nonzero, torch.Tensor.item, torch.is_nonzero, lambda t: t.to("meta")):
        with pytest.raises(AssertionError), NoReads():
            read(torch.ones(1))


@pytest.mark.parametrize("padded", [False, True])
def test_what_the_host_counts_is_what_trainer_would(padded: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, padded=padded)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    assert count == sum((batch["labels"][..., 1:] != -100).sum() for batch in batches)
    assert trainer.get_batch_samples(iter([]), 2, torch.device("cpu")) == ([], None)
    for batch in batches:
        trainer.training_step(trainer.model, batch, count)
    assert (
        trainer.tokens_seen == trainer.throughput.counts["tokens"] == sum(batch[METADATA].tokens for batch in batches)
    )
    assert trainer.throughput.counts["supervised"] == count


@pytest.mark.parametrize("padded", [False, True])
def test_a_layout_changes_nothing_but_who_looks(padded: bool, tmp_path: Path) -> None:
    """Loss and gradients with it, without it, and of a model that keeps its own attention and loss: it gets none."""
    found: list[tuple[torch.Tensor, ...]] = []
    for ours, known in ((True, True), (True, False), (False, True)):
        trainer = make_trainer(tmp_path, padded=padded, ours=ours, bf16=False)
        batch = batch_of(trainer)
        seen: list[set[str]] = []
        trainer.model.model.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append(set(kwargs)), with_kwargs=True
        )
        inputs = {name: value for name, value in batch.items() if known or name != METADATA}
        loss = trainer.model(**inputs, use_cache=False, num_items_in_batch=9).loss
        loss.backward()
        assert METADATA not in seen[0]
        found.append((loss, *(p.grad for p in trainer.model.parameters())))
    for with_layout, without, own in zip(*found, strict=True):
        assert torch.equal(with_layout, without)
        torch.testing.assert_close(with_layout, own, rtol=1e-4, atol=1e-6)


def test_supervised_positions_come_from_the_layout(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    batch, supervised = batch_of(trainer), trainer.parts.supervised_loss
    assert supervised is not None
    batch["labels"] = batch["labels"].to("meta")  # whoever reads them fails
    with torch.no_grad():
        trainer.model(**batch, use_cache=False)
    assert supervised.count == batch[METADATA].supervised
    assert supervised.total is not None


def test_deepspeeds_gradient_norm_is_not_read(tmp_path: Path) -> None:
    """It stays a tensor until it is logged."""
    trainer = make_trainer(tmp_path)
    norm = torch.ones(())
    trainer.is_deepspeed_enabled = True
    trainer.model_wrapped = type("Engine", (), {"get_global_grad_norm": lambda self: norm})()
    trainer.micro_losses = [torch.ones(())]
    assert trainer._clip_grad_norm(trainer.model) is None
    assert trainer._get_grad_norm(trainer.model) is norm
