"""The run's own plan: what it should need, said before the model is loaded, and what it needed, said after training."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.layouts import engine_of, name_of, run_of
from ds_sft.plan.memory import Memory, peak
from ds_sft.plan.run import Engine, planned_weights
from ds_sft.plan.shape import shape_of_run
from ds_sft.plan.size import in_units
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch
from ds_sft.results import peak_memory

GIB = 2**30
TOLERANCE = 0.15  # of the plan, or this much where models are tiny:
FLOOR = 0.5  # GiB: modules imported late


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
        shape = shape_of_run(config)
        states = Engine(stage=None) if engine is None else engine_of(engine.get("zero_optimization", {}), shape)
        run = run_of(config, shape, states, ranks, lazy=not on_gpu)
    except UserError as error:
        launch.say(f"No memory plan: {error}")
        return None
    try:
        planned_weights(shape, run.choice)
    except UserError as error:  # the model itself knows better, and says so of what it does not know either
        launch.say(f"No memory plan: it cannot follow {str(error).partition(':')[0]}.")
        return None
    micro = math.ceil(largest / longest)
    run = replace(run, micro_batch=micro, length=longest, max_tokens=largest, padded=padded and micro > 1,
                  flat=not padded)  # fmt: skip
    found = Expectation(name_of(states), peak(run), on_gpu, before_gib=resident_gib())
    kind = "GPU memory" if on_gpu else "memory"
    parts = ", ".join(f"{part} {in_units(size)}" for part, size in found.memory.device.items())
    all_parts = in_units(found.gib * GIB)
    launch.say(f"Plan ({found.layout}): {all_parts} of {kind} a rank, at the {found.memory.moment}: {parts}.")
    return found


def compare_with_plan(expected: Expectation | None, launch: Launch) -> dict[str, float | str] | None:
    """What training took beside what was planned; says it at once where they part and freed blocks, which the summary
    of the run names, do not explain it. All ranks must call it.
    """
    if expected is None:
        return None
    now = peak_memory()
    mine = (now["gpu_gib"], 0.0) if expected.on_gpu else (now["host_gib"] - expected.before_gib, freed_gib())
    measured, freed = max(gather(mine))
    difference = measured - expected.gib
    tolerance = max(TOLERANCE * expected.gib, FLOOR)
    if not -tolerance <= difference <= tolerance + freed:
        launch.say(f"Training took {measured:.2f} GiB of a rank's memory, {expected.gib:.2f} were planned: the plan of "
                   "a longer or larger run would be as wrong; please report it with run.json.")  # fmt: skip
    return {"layout": expected.layout, "moment": expected.memory.moment, "planned_gib": round(expected.gib, 6),
            "measured_gib": round(measured, 6), "freed_gib": round(freed, 3)}  # fmt: skip


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, malloc.h: `fordblks` are the bytes in free blocks, of all arenas."""

    _fields_ = [(name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks",
                                                     "fsmblks", "uordblks", "fordblks", "keepcost")]  # fmt: skip


def freed_gib() -> float:
    """Freed blocks that the C library has not given back to the system; 0 where it does not tell (glibc 2.33 does).

    The plan counts what is in use. Blocks of up to 32 MiB (`model/load.py` sets that, as training is twice as slow
    where each is mapped anew) are kept when they are freed, activations above all, and what
    a later moment of the step takes in larger blocks comes on top: SmolLM2-135M without checkpointing under ZeRO-3 had
    2.42 GiB in use at most (2.50 planned), 1.56 at the optimizer step, when 1.48 of freed blocks beside them made 3.04
    resident. The same run with every freed block given back at once: 2.43.
    """
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0.0
    mallinfo2.restype = MallInfo
    return float(mallinfo2().fordblks) / GIB


def resident_gib() -> float:
    """This process's resident memory now; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / GIB
