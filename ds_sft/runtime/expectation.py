"""The run's own plan: what it should need, said before the model is loaded, and what it needed, said after training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_sft.config import Config
from ds_sft.errors import UserError
from ds_sft.plan.layouts import engine_of, name_of, run_of
from ds_sft.plan.memory import Engine, Memory, peak
from ds_sft.plan.shape import read_shape
from ds_sft.runtime.distributed import Launch, gather
from ds_sft.runtime.results import peak_memory

GIB = 2**30
TOLERANCE = 0.15  # of the plan, or this much where models are tiny:
FLOOR = 0.5  # GiB: modules imported late, blocks that the C library keeps


@dataclass(frozen=True)
class Expectation:
    """The plan of this run."""

    layout: str
    memory: Memory
    on_gpu: bool
    before_gib: float  # resident in this process before the model is loaded

    @property
    def gib(self) -> float:
        """Of the fullest rank: on a GPU what torch allocates there, else resident memory above `before_gib`."""
        return (self.memory.device_bytes + (0 if self.on_gpu else self.memory.host_bytes)) / GIB


def expect_memory(
    config: Config,
    engine: Mapping[str, Any] | None,
    *,
    longest: int,
    largest: int,
    padded: bool,
    ranks: int,
    on_gpu: bool,
    launch: Launch,
) -> Expectation | None:
    """Plan this run and say it once; None, with the reason, where the planner does not know the model.

    Args:
        longest: tokens of the longest row, or packed sequence, that will be trained on.
        largest: tokens of the largest micro batch, padding included.
        padded: whether rows are.
    """
    try:
        shape = read_shape(config.model_name_or_path)
        states = Engine(stage=None) if engine is None else engine_of(engine.get("zero_optimization", {}), shape)
    except UserError as error:
        launch.say(f"No memory plan: {error}")
        return None
    run = run_of(config, shape, states, ranks, lazy=not on_gpu)
    micro = math.ceil(largest / longest)
    run = replace(run, micro_batch=micro, length=longest, max_tokens=largest, padded=padded and micro > 1,
                  flat=not padded)  # fmt: skip
    found = Expectation(name_of(states), peak(run), on_gpu, before_gib=resident_gib())
    kind = "GPU memory" if on_gpu else "memory"
    parts = ", ".join(f"{part} {size / GIB:.2f}" for part, size in found.memory.device.items())
    launch.say(f"Plan ({found.layout}): {found.gib:.2f} GiB of {kind} a rank, at the {found.memory.moment}: {parts}.")
    return found


def compare_with_plan(expected: Expectation | None, launch: Launch) -> dict[str, float | str] | None:
    """What training took beside what was planned, said once; a warning where they part. All ranks must call it."""
    if expected is None:
        return None
    now = peak_memory()
    mine = now["gpu_gib"] if expected.on_gpu else now["host_gib"] - expected.before_gib
    measured = max(gather(mine))
    difference = measured - expected.gib
    line = f"Memory of a rank: {expected.gib:.2f} GiB planned, {measured:.2f} measured ({difference:+.2f})."
    if abs(difference) > max(TOLERANCE * expected.gib, FLOOR):
        line += " They part: the plan of a longer or larger run would be as wrong; please report it with run.json."
    launch.say(line)
    return {"layout": expected.layout, "moment": expected.memory.moment, "planned_gib": round(expected.gib, 3),
            "measured_gib": round(measured, 3)}  # fmt: skip


def resident_gib() -> float:
    """This process's resident memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB
