"""One run on more and more nodes: memory of a GPU, time of a step, efficiency."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ds_sft.errors import UserError
from ds_sft.plan.cost import Hardware, Step, step_time
from ds_sft.plan.memory import peak
from ds_sft.plan.run import Run


@dataclass(frozen=True)
class Point:
    """A layout on a number of nodes."""

    layout: str
    nodes: int
    gpu_bytes: int
    step: Step
    efficiency: float  # tokens a second and GPU, relative to computation alone
    unhidden: float  # seconds of the step if nothing hides behind computation


def node_counts(text: str) -> list[int]:
    """`nodes=1..128`: 1, 2, 4 ... 128.

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"nodes=(\d+)\.\.(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise UserError(f"--sweep {text}: expected nodes=FIRST..LAST, such as nodes=1..128")
    first, last = int(found[1]), int(found[2])
    doubled = [first * 2**i for i in range((last // first).bit_length())]
    return doubled if doubled[-1] == last else [*doubled, last]


def sweep(base: dict[str, Run], hardware: Hardware, nodes: list[int]) -> list[Point]:
    """ZeRO-2, ZeRO-3, and ZeRO-3 with a second copy of the weights in each node (hierarchical partitioning).

    Each GPU keeps its micro batch and accumulation: the global batch grows with the nodes (weak scaling).
    """
    runs: dict[str, Run] = {name: base[name] for name in ("ZeRO-2", "ZeRO-3") if name in base}
    if divided := base.get("ZeRO-3"):
        within = replace(divided.engine, hierarchical=hardware.gpus_per_node)
        runs["hierarchical"] = replace(divided, engine=within)
    points = []
    for layout, run in runs.items():
        for number in nodes:
            there = replace(hardware, nodes=number)
            scaled = replace(run, ranks=there.ranks)
            step = step_time(scaled, there)
            unhidden = step_time(scaled, there, overlap=0).total
            size = peak(scaled, loading=False).device_bytes
            points.append(Point(layout, number, size, step, step.efficiency, unhidden))
    return points
