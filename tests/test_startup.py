"""benchmarks/startup.py: whose the seconds are."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import startup


def test_a_part_inside_another_stops_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 11.0, 13.0, 13.5, 14.0])
    monkeypatch.setattr(startup, "time", SimpleNamespace(time=lambda: next(now)))  # no other thread looks at it
    clock = startup.Clock(began=7.0)
    clock.start("rest")  # at 10
    clock.start("data")  # at 11
    clock.stop()  # at 13
    clock.start("model")  # at 13.5
    clock.stop()  # at 14
    assert {part: seconds for part, seconds in clock.seconds.items() if seconds} == {
        "launcher": 3.0,
        "rest": 1.5,
        "data": 2.0,
        "model": 0.5,
    }


def test_the_table_has_the_median_of_the_rounds() -> None:
    rounds = [dict.fromkeys(startup.PARTS, 0.0) | {"imports": imports, "model": 1.0} for imports in (2.0, 9.0, 3.0)]
    header, _, line = startup.table({"python": rounds}).splitlines()
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert (cells["imports"], cells["model"], cells["data"], cells["all |"]) == ("3.0", "1.0", "0.0", "4.0 |")


@pytest.mark.parametrize("place", [place for place, _, _ in startup.CALLS])
def test_what_is_timed_exists(place: str) -> None:
    names = [name for where, name, _ in startup.CALLS if where == place]
    assert all(callable(getattr(startup.find(place), name)) for name in names)
