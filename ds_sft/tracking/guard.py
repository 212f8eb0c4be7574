"""Calls of a tracker, none of which may end a run, or hold it up for long."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ds_sft.config.extension import said
from ds_sft.ranks.launch import print_line

START_SECONDS, LOG_SECONDS = 60.0, 30.0  # without a network SwanLab gives up after 15 s by itself
FINISH_SECONDS = 120.0  # the last points may need the network; after that the run ends without them


class TimeUp(BaseException):
    """No Exception, so that no handler between here and `time_limit` takes it for one of its own."""


class Guard:
    """The calls of one tracker."""

    def __init__(self, name: str, metrics: Path) -> None:
        """`metrics`: the file that has every metric in any case, for what is said."""
        self.name, self.metrics = name, metrics
        self.answers = True  # in time, so far: else each entry would hold training up for LOG_SECONDS
        self.troubles: set[str] = set()  # what was said to fail; each is said once
        self.failed: set[type[BaseException]] = set()  # errors whose text may change from entry to entry

    def call(self, action: Callable[[], Any], seconds: float) -> bool:
        """Whether a tracker could do something in time; what went wrong is said once for each kind of error."""
        try:
            with time_limit(seconds):
                action()
        except (Exception, SystemExit, TimeUp) as error:
            self.answers = not isinstance(error, TimeUp)
            if type(error) not in self.failed:
                self.failed.add(type(error))
                print_line(f"{self.name} failed ({said(error)}); {self.metrics} has every metric.")
            return False
        self.answers = True
        return True

    def say_once(self, message: str) -> None:
        if message not in self.troubles:
            self.troubles.add(message)
            print_line(message)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block after `seconds`; unlimited outside the main thread, where no signal arrives.

    An alarm and no thread: SwanLab sets signal handlers, which only the main thread may.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeUp(f"no answer after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
