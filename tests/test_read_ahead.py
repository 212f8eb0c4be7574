"""The micro batches of the next step are made by a thread: nobody but the clock may notice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.data.loader import Ahead
from ds_sft.errors import UserError
from ds_sft.training.trainer import SFTTrainer
from tests.test_trainer import make_trainer

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


# ---- By itself


def test_batches_are_read_ahead_in_order() -> None:
    """As many as asked while the first is computed, by one thread, to the end and no further."""
    read_by: list[tuple[int, int]] = []
    third = threading.Event()

    def batches() -> Iterator[int]:
        for number in range(1, 6):
            read_by.append((number, threading.get_ident()))
            if number == 3:
                third.set()
            yield number

    ahead = Ahead(batches(), 2, CPU)
    assert next(ahead) == 1
    assert third.wait(60)  # read, though only the first was asked for
    assert list(ahead) == [2, 3, 4, 5]
    assert list(ahead) == []
    assert [number for number, _ in read_by] == [1, 2, 3, 4, 5]
    assert len({thread for _, thread in read_by} - {threading.get_ident()}) == 1


def test_an_error_in_reading_ahead_comes_where_its_batch_would() -> None:
    def batches() -> Iterator[int]:
        yield 1
        raise OSError("the disk is gone")

    ahead = Ahead(batches(), 2, CPU)
    assert next(ahead) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)


def test_the_thread_reads_for_the_ranks_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning opens the thread's device: by itself every rank of a node would open the first one."""
    devices: list[tuple[Any, int]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: devices.append((device, threading.get_ident())))
    gpu = torch.device("cuda", 3)
    assert list(Ahead(iter([1]), 1, gpu)) == [1]
    assert [device for device, _ in devices] == [gpu]
    assert devices[0][1] != threading.get_ident()


def test_a_closed_one_has_ended_its_thread_and_reads_no_more() -> None:
    """The batch that it is at comes to its end; what waits behind it is not begun."""
    begun, go_on, read = threading.Event(), threading.Event(), []

    def batches() -> Iterator[int]:
        for number in range(9):
            begun.set()
            assert go_on.wait(60)
            read.append(number)
            yield number

    ahead = Ahead(batches(), 4, CPU)
    assert begun.wait(60)
    threading.Timer(0.05, go_on.set).start()
    ahead.close()
    assert read in ([0], [0, 1, 2, 3])  # the thread may have had them all before
    assert reading_threads() == []


# ---- In a run


@dataclass
class Learned:
    """What a trainer was given, and what it made of it."""

    batches: list[dict[str, list[list[int]]]]
    losses: list[float]
    states: list[torch.Tensor]  # weights, the optimizer's, the schedule's, and what dropout draws from


class Asks(TrainerCallback):
    """For a stop while a step is computed: the run ends after it."""

    def __init__(self, trainer: SFTTrainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.trainer.run.stop.reason = "SIGTERM"


def learn(folder: Path, *, until: int = 0, resumed: bool = False, **changes: Any) -> Learned:
    """Nine steps of two micro batches of rows that fill 5.5 steps an epoch, with dropout.

    Args:
        until: the step after which the run is asked to stop.
        resumed: from the newest checkpoint.
    """
    start = newest_complete(folder, resumable=True) if resumed else None
    keys = {"max_steps": 9, "logging_steps": 1, "save_strategy": "steps", "save_steps": 100} | changes
    trainer = make_trainer(folder, rows=22, dropout=0.2, resumed=start, **keys)
    trainer.add_callback(Asks(trainer, until))
    trainer.add_callback(trainer.pop_callback(type(trainer.step_boundary)))  # the last one
    batches: list[dict[str, list[list[int]]]] = []
    names = ("input_ids", "labels", "position_ids")
    trainer.model.register_forward_pre_hook(
        lambda model, args, kwargs: batches.append({name: kwargs[name].tolist() for name in names}), with_kwargs=True
    )
    trainer.train(resume_from_checkpoint=str(start.path) if start else None)
    optimizer = [value for state in trainer.optimizer.state.values() for value in state.values()]
    rates = torch.tensor(trainer.lr_scheduler.get_last_lr())
    states = [*trainer.model.state_dict().values(), *optimizer, rates, torch.get_rng_state()]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Learned(batches, losses, [torch.as_tensor(state).clone() for state in states])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Learned:
    """By the thread that computes, in one piece."""
    return learn(tmp_path_factory.mktemp("whole"), read_ahead=False)


def assert_same(found: Learned, expected: Learned) -> None:
    assert found.batches == expected.batches
    assert found.losses == expected.losses
    assert len(found.states) == len(expected.states) > 20
    assert all(torch.equal(one, other) for one, other in zip(found.states, expected.states, strict=True))


@pytest.mark.parametrize("until", [2, 5, 6, 8])
def test_stopped_and_resumed_it_is_the_same_run(until: int, whole: Learned, tmp_path: Path) -> None:
    """In the middle of an epoch, before its last step, at its end and in the next one; batches and states, bit for
    bit: what was read ahead of the stop is read again, and nothing is left out."""
    assert len(whole.batches) == 11 + 6  # a whole epoch, whose last step has one micro batch, and three steps
    first = learn(tmp_path, until=until, read_ahead=True)
    assert newest_complete(tmp_path, resumable=True).path.name == f"checkpoint-{until}"  # type: ignore[union-attr]
    second = learn(tmp_path, resumed=True, read_ahead=True)
    assert 0 < len(second.batches) < len(whole.batches)
    assert second.losses == whole.losses  # its history has those of before the stop
    second.batches = first.batches + second.batches
    assert_same(second, whole)
    assert reading_threads() == []


@pytest.mark.parametrize(
    "changes", [{}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}], ids=["thread", "workers"]
)
def test_over_the_end_of_an_epoch(changes: dict[str, Any], whole: Learned, tmp_path: Path) -> None:
    """With workers that stay: the second epoch's batches come from the iterator of the first."""
    assert_same(learn(tmp_path, read_ahead=True, **changes), whole)
    assert reading_threads() == []


def test_only_a_gpu_is_read_ahead_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = iter([1])
    trainer = make_trainer(tmp_path)
    assert trainer._read_ahead(batches, 2) is batches
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    trainer = make_trainer(tmp_path, read_ahead=True)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("cuda", 0))
    ahead = trainer._read_ahead(batches, 2)
    assert trainer._read_ahead(batches, 2) is ahead
    assert list(ahead) == [1]


@pytest.mark.parametrize("error", [UserError("rows.jsonl:7: gone"), OSError(5, "Input/output error")], ids=str)
def test_what_fails_in_the_thread_ends_the_run_as_it_would_without(error: Exception, tmp_path: Path) -> None:
    said = []
    for read_ahead in (False, True):
        trainer = make_trainer(tmp_path, read_ahead=read_ahead)
        collate, calls = trainer.data_collator, iter(range(99))

        def fail(features: Any, collate: Any = collate, calls: Iterator[int] = calls) -> Any:
            if next(calls) == 4:
                raise error
            return collate(features)

        trainer.data_collator = fail
        with pytest.raises(type(error)) as raised:
            trainer.train()
        said.append((raised.value, trainer.state.global_step))
        assert reading_threads() == []
    assert said == [(error, 2), (error, 2)]


def test_ctrl_c_leaves_no_thread_behind(tmp_path: Path) -> None:
    class Interrupts(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert len(reading_threads()) == 1
            raise KeyboardInterrupt

    trainer = make_trainer(tmp_path, read_ahead=True)
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert reading_threads() == []


WORKING = """
import os, signal, sys
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from ds_sft.training.workers import loader_options

args = TrainingArguments("out", use_cpu=True, report_to="none", dataloader_num_workers=1, dataloader_pin_memory=False,
                         dataloader_persistent_workers=True)
loader = DataLoader(range(9), **loader_options(args))
batches = iter(loader)
loader.itself = loader  # as a Trainer refers to itself: nothing is freed at the end
next(batches)
(worker,) = loader._iterator._workers
os.kill(worker.pid, signal.SIGTERM)
print([int(batch) for batch in batches], worker.is_alive())
sys.exit(3)
"""


def test_workers_outlive_a_signal_to_all_and_end_with_their_parent(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", WORKING], cwd=tmp_path, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)  # fmt: skip
    assert (done.stdout, done.returncode) == ("[1, 2, 3, 4, 5, 6, 7, 8] True\n", 3), done.stderr
