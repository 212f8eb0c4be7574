"""How far an evaluation is: a bar in a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from ds_sft.ranks.launch import Launch, print_line

LINE_SECONDS = 30.0  # from one line to the next


class Progress:
    """Counts rows. A line is printed where there is no bar."""

    def __init__(self, title: str, total: int, bar: Any = None) -> None:
        self.title, self.total, self.bar = title, total, bar
        self.done = 0
        self.started = self.said = time.monotonic()

    def advance(self, rows: int) -> None:
        self.done += rows
        if self.bar is not None:
            self.bar.update(0, advance=rows)
            return
        now = time.monotonic()
        if self.done == self.total or now - self.said >= LINE_SECONDS:
            self.said = now
            left = timedelta(seconds=round((now - self.started) / self.done * (self.total - self.done)))
            print_line(f"{self.title}: {self.done:,} of {self.total:,} rows{f'; {left} left' if left else ''}")


@contextmanager
def progress(title: str, total: int, launch: Launch) -> Iterator[Progress]:
    """Progress of `total` rows, shown on rank 0."""
    if not (launch.is_main and total and sys.stderr.isatty()):
        yield Progress(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=Console(stderr=True)) as bar:
        bar.add_task(title, total=total)
        yield Progress(title, total, bar)
