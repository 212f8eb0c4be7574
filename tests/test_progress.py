"""What is shown without a terminal while a long evaluation runs, before training, too."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ds_sft.training import progress
from ds_sft.training.progress import ProgressLine


class Clock:
    """A clock that is told the time."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setattr(progress, "time", Clock())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    return progress.time  # type: ignore[return-value, unused-ignore]


def evaluate(shown: ProgressLine, clock: Clock, batches: int, *, seconds: float, rank: int = 0) -> None:
    """Each batch takes so long; the first is done when the clock is first looked at."""
    state: Any = SimpleNamespace(is_world_process_zero=rank == 0, global_step=0, max_steps=5)
    args: Any = SimpleNamespace(disable_tqdm=False)
    shown.on_train_begin(args, state, None)  # type: ignore[arg-type]
    for _ in range(batches):
        shown.on_prediction_step(args, state, None, eval_dataloader=range(batches))  # type: ignore[arg-type]
        clock.now += seconds
    shown.on_evaluate(args, state, None)  # type: ignore[arg-type]


def test_a_long_evaluation_says_how_far_it_is(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = ProgressLine()
    for _ in range(2):  # each evaluation counts from its own start
        evaluate(shown, clock, 10, seconds=10)
        assert capsys.readouterr().out.splitlines() == [
            "Evaluating: batch 4 of 10; 0:01:00 left",
            "Evaluating: batch 7 of 10; 0:00:30 left",
        ]


def test_a_short_one_does_not(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(ProgressLine(), clock, 10, seconds=1)
    assert capsys.readouterr().out == ""


def test_the_other_ranks_are_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(ProgressLine(), clock, 10, seconds=10, rank=1)
    assert capsys.readouterr().out == ""
