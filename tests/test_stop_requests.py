"""A rank that is asked to stop before it reaches a block that a request ends."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ds_sft.runtime.distributed import Launch
from ds_sft.runtime.preempt import Stopped, watch_for_stop


def test_asked_before_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks the block is entered and left at once; the ranks meet after it."""
    monkeypatch.setenv("DS_SFT_STOP_FILE", str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    with watch_for_stop(Launch(launcher="slurm", world_size=2)) as stop:
        while stop.reason is None:
            time.sleep(0.01)
        started, reached = time.monotonic(), False
        with stop.until_ranks_meet():
            while time.monotonic() < started + 30:
                time.sleep(0.01)
            reached = True
        assert not reached
        assert stop.reason == f"stop file {tmp_path / 'stop'}"


def test_asked_before_the_block_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_SFT_STOP_FILE", str(tmp_path / "stop"))
    (tmp_path / "stop").touch()
    with watch_for_stop(Launch(launcher="python")) as stop:
        while stop.reason is None:
            time.sleep(0.01)
        with pytest.raises(Stopped), stop.until_ranks_meet():
            raise AssertionError("not reached")
