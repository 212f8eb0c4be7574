"""A clock of one rank that knows which part of training is going on; it waits for the device when it is read alone."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# The parts of training; "other" is what is none of the rest: callbacks, schedule, logging.
PARTS = ("data_wait", "forward_backward", "communication", "optimizer", "save", "other")
WORK = ("data_wait", "forward_backward", "optimizer", "other")  # what a rank does while others may wait for it
EVALUATION = "evaluation"  # no part of training: left out of every figure
WHOLE = ("save", EVALUATION)  # what happens inside them counts as them
MARKS_KEPT = 10_000


class Clock:
    """Seconds of each part, every moment in one: a part that begins inside another one interrupts it.

    A mark is a reading of the host's clock or, on a GPU, an event in the stream that computes: parts are then what
    passed in it, each after the other, and reading them waits for nothing until `settle`. What is sent in another
    stream beside the computation takes no time here, but for what the computation waits for it.
    """

    def __init__(self, device_type: str = "cpu", world_size: int = 1) -> None:
        self.on_gpu = device_type == "cuda"
        self.stream = torch.cuda.current_stream() if self.on_gpu else None  # DeepSpeed switches the current one
        self.talking = "communication" if world_size > 1 else "other"  # what ranks do together is nothing for one
        self.open = ["other"]  # parts begun and not ended
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self.marks: deque[tuple[Any, str, bool]] = deque()  # when, the part that was going on until then, end of a lap?
        self.last = self._now()
        self.seconds = dict.fromkeys((*PARTS, EVALUATION), 0.0)
        self.laps: list[float] = []  # seconds of work in each
        self.work = 0.0  # in the lap going on

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def begin(self, part: str) -> None:
        self._mark()
        self.open.append(self.open[-1] if self.open[-1] in WHOLE else part)

    def end(self) -> None:
        self._mark()
        self.open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        """The function, whose calls count as a part."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return timed

    def lap(self) -> None:
        """Ranks meet here: the work of each since the last meeting can be compared."""
        self._mark(lap=True)
        if len(self.marks) >= MARKS_KEPT:
            self.settle(wait=False)

    def _mark(self, *, lap: bool = False) -> None:
        self.marks.append((self._now(), self.open[-1], lap))

    def settle(self, *, wait: bool = True) -> None:
        """Turn marks into seconds; on a GPU this waits for the last of them, or takes those alone that have come."""
        if self.on_gpu and self.marks and wait:
            self.marks[-1][0].synchronize()
        while self.marks and (wait or not self.on_gpu or self.marks[0][0].query()):
            when, part, lap = self.marks.popleft()
            passed = self.last.elapsed_time(when) / 1000 if self.on_gpu else when - self.last
            self.last = when
            self.seconds[part] += passed
            self.work += passed if part in WORK else 0.0
            if lap:
                self.laps.append(self.work)
                self.work = 0.0

    def take(self) -> tuple[dict[str, float], list[float]]:
        """Seconds by part, and of work in each lap, since the last call."""
        taken = self.seconds, self.laps
        self.seconds, self.laps = dict.fromkeys(taken[0], 0.0), []
        return taken
