"""TrainingArguments of a run in one process."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset

from ds_sft.config.keys import TRAINING_DEFAULTS, Config
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from ds_sft.training.arguments import batching_of, run_steps, training_arguments

ALONE = Launch(launcher="python")


def make(folder: Path, **training: Any) -> Config:
    keys = {**TRAINING_DEFAULTS, "output_dir": str(folder), **training}
    return Config(model_name_or_path="m", train_file="t", training=keys)


@pytest.mark.parametrize("given", ["none", [], "all", ["tensorboard"]])
def test_trainer_itself_has_no_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    """They are asked by tracking/, and Kubeflow's, which transformers adds where it finds its cluster, is not."""
    monkeypatch.setattr("transformers.integrations.is_kubeflow_available", lambda: True)
    assert training_arguments(make(tmp_path, report_to=given), None, ALONE).report_to == []


def test_defaults_reach_trainer(tmp_path: Path) -> None:
    args = training_arguments(make(tmp_path), None, ALONE)
    assert (args.learning_rate, args.gradient_accumulation_steps, args.save_on_each_node) == (1e-4, 4, True)
    assert (args.bf16, args.gradient_checkpointing or args.activation_checkpointing) == (True, True)
    assert args.deepspeed is None
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    kept = training_arguments(make(tmp_path, activation_checkpointing_kwargs={"use_reentrant": True}), None, ALONE)
    assert kept.activation_checkpointing_kwargs == {"use_reentrant": True}
    offloaded = training_arguments(make(tmp_path, activation_checkpointing="offload"), None, ALONE)
    assert offloaded.activation_checkpointing is True


def test_what_transformers_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^TrainingArguments: .*") as caught:
        training_arguments(make(tmp_path, load_best_model_at_end=True, eval_strategy="no"), None, ALONE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("epochs", "max_steps", "rows", "said"),
    [
        (2.0, -1, 17, "17 rows => 3 steps an epoch, 6 steps in all."),
        (0.5, -1, 16, "16 rows => 2 steps an epoch, 1 steps in all."),
        (2.0, 5, 16, "16 rows => 2 steps an epoch, 5 steps in all."),
    ],
)
def test_batch_arithmetic(epochs: float, max_steps: int, rows: int, said: str) -> None:
    args: Any = SimpleNamespace(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        world_size=1,
        num_train_epochs=epochs,
        max_steps=max_steps,
        dataloader_drop_last=False,
        seed=42,
        data_seed=None,
        train_sampling_strategy="random",
    )
    data = Dataset.from_dict({"input_ids": [[1, 2]] * rows})
    batching = batching_of(args, make(Path("o"), per_device_train_batch_size=2), data, padded=False)
    assert run_steps(args, batching).in_words() == f"Batch: 2 rows x 4 accumulated x 1 rank = 8 rows a step; {said}"
