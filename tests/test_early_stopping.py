"""Training that ends when validation gets no better counts on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.checkpoints.rotate import remove
from ds_sft.training.report import best_checkpoint, best_loss
from tests.test_trainer import make_trainer

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "logging_steps": 1,
              "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "max_steps": 9}  # fmt: skip
NO_BETTER = {**EVERY_STEP, "learning_rate": 0.0}  # every validation is that after the first step
SAID = (
    "Training ends early, after step {} of 9: no validation was better than that after step 1 "
    "(early_stopping_patience: {}).\n"
)


def steps_of(folder: Path, keys: dict[str, Any], patience: int | None, *, resumed: bool = False) -> int:
    """After how many steps a run ends; its best checkpoint and, if it is the newest, its last are there."""
    start = newest_complete(folder, resumable=True) if resumed else None
    trainer = make_trainer(folder, rows=40, patience=patience, resumed=start, **keys)
    trainer.add_callback(trainer.pop_callback(type(trainer.step_boundary)))  # the last one
    trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    assert Path(str(trainer.state.best_model_checkpoint)).is_dir()
    return int(trainer.state.global_step)


@pytest.mark.parametrize("patience", [1, 2, 5])
def test_it_ends_after_so_many_validations(patience: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps_of(tmp_path, NO_BETTER, patience) == 1 + patience
    assert SAID.format(1 + patience, patience) in capsys.readouterr().out


def test_it_goes_on_while_it_gets_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert steps_of(tmp_path / "better", EVERY_STEP, 1) == 9
    assert steps_of(tmp_path / "none", NO_BETTER, None) == 9
    assert "early" not in capsys.readouterr().out


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    """From before the end it ends where it would have; from the end it trains nothing."""
    assert steps_of(tmp_path, NO_BETTER, 3) == 4
    for step in (3, 4):
        remove(tmp_path / f"checkpoint-{step}")
    assert steps_of(tmp_path, NO_BETTER, 3, resumed=True) == 4
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert steps_of(tmp_path, NO_BETTER, 3, resumed=True) == 4


class EndAt(TrainerCallback):
    """Ends training after so many steps, or in the middle of the next, where it is told."""

    def __init__(self, place: str, step: int) -> None:
        self.step = step
        setattr(self, place, self.end)

    def end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


@pytest.mark.parametrize(("place", "step", "logging_steps", "measured"), [
    ("on_step_end", 3, 1, [2, 3]),
    ("on_log", 3, 1, [2, 3]),
    ("on_substep_end", 2, 100, [2, 3]),
    ("on_epoch_end", 6, 100, [2, 4, 6]),  # once
])  # fmt: skip
def test_the_model_that_training_ends_with_is_measured(
    tmp_path: Path, place: str, step: int, logging_steps: int, measured: list[int]
) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=2, logging_steps=logging_steps, max_steps=9)
    trainer.callback_handler.callbacks.insert(1, EndAt(place, step))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == measured


def test_a_model_that_training_ends_with_after_an_epoch_is_measured(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, eval_strategy="steps", eval_steps=4, logging_steps=100, max_steps=9)
    trainer.callback_handler.callbacks.insert(1, EndAt("on_epoch_end", 6))
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [4, 6]


@pytest.mark.parametrize(("place", "step"), [("on_step_end", 3), ("on_epoch_end", 6)])
def test_a_best_model_that_a_callback_ends_with_is_saved(tmp_path: Path, place: str, step: int) -> None:
    """It was measured where no checkpoint was due: its loss stood beside the weights of an earlier one."""
    trainer = make_trainer(tmp_path, **EVERY_STEP | {"eval_steps": 4, "save_steps": 4})
    trainer.callback_handler.callbacks.insert(1, EndAt(place, step))
    trainer.train()
    assert best_checkpoint(trainer) == f"checkpoint-{step}"
    assert best_loss(trainer) == trainer.state.best_metric


def test_the_loss_of_the_best_checkpoint_is_its_own(tmp_path: Path) -> None:
    """Measured in every step, saved in every fourth: the step after the last save is better."""
    trainer = make_trainer(tmp_path, **EVERY_STEP | {"save_steps": 4})
    trainer.callback_handler.callbacks.insert(1, EndAt("on_log", 5))
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    assert losses[5] < losses[4]
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-4")
    assert best_loss(trainer) == losses[4]


class EndAndStop(TrainerCallback):
    """Ends training at an evaluation; in the same moment the run is asked to stop."""

    def __init__(self, trainer: Any) -> None:
        self.stop = trainer.run.stop

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True
        self.stop.reason = "SIGTERM"


@pytest.mark.parametrize("save_steps", [1, 100])
def test_a_callback_has_ended_a_run_that_was_stopped_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], save_steps: int
) -> None:
    """Resumed without its word it takes no step more, and says why."""
    keys = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": save_steps,
            "max_steps": 4}  # fmt: skip
    trainer = make_trainer(tmp_path, **keys)
    boundary = trainer.pop_callback(type(trainer.step_boundary))
    for callback in (EndAndStop(trainer), boundary):
        trainer.add_callback(callback)
    trainer.train()
    assert trainer.run.stop.decided == "SIGTERM"
    assert "A callback" not in capsys.readouterr().out  # who stops a run hears of a stop
    start = newest_complete(tmp_path, resumable=True)
    assert start is not None
    assert start.manifest["ended_early"]
    resumed = make_trainer(tmp_path, resumed=start, **keys)
    resumed.train(resume_from_checkpoint=str(start.path))
    assert resumed.state.global_step == 2
    assert "A callback has ended training, after step 2 of 4.\n" in capsys.readouterr().out


class StopAt(TrainerCallback):
    """The run is asked to stop in a step."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.stop, self.step = trainer.run.stop, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            self.stop.reason = "SIGTERM"


def test_a_run_that_saves_its_best_alone_saves_where_it_is_stopped(tmp_path: Path) -> None:
    """No step comes twice; of the places where it was stopped one stays."""
    keys = {**NO_BETTER, "save_strategy": "best", "save_total_limit": 1}
    start, steps = None, []
    for stop_at, found in ((3, [1, 3]), (5, [1, 5]), (None, [1, 5])):
        trainer = make_trainer(tmp_path, rows=40, resumed=start, **keys)
        if stop_at:
            trainer.callback_handler.callbacks.insert(0, StopAt(trainer, stop_at))
        trainer.train(resume_from_checkpoint=str(start.path) if start else None)
        steps.append(trainer.state.global_step)
        assert sorted(int(path.parent.name[11:]) for path in tmp_path.glob("checkpoint-*/manifest.json")) == found
        start = newest_complete(tmp_path, resumable=True)
    assert steps == [3, 5, 9]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, 10))
    assert str(trainer.state.best_model_checkpoint) == str(tmp_path / "checkpoint-1")
