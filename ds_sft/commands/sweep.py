"""`ds-sft plan --sweep nodes=1..128`: the table and the plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ds_sft.commands.plan_tables import in_seconds
from ds_sft.errors import UserError
from ds_sft.plan.cost import Hardware
from ds_sft.plan.run import Run
from ds_sft.plan.sweep import Point, node_counts, sweep

GB, GIB = 1e9, 2**30  # of links; of memory


def show_sweep(base: dict[str, Run], hardware: Hardware, text: str, plot: Path | None, *, as_json: bool) -> int:
    """Print the scaling table, draw it where `plot` is given.

    Raises:
        UserError: `text` is no range, or there is no matplotlib to draw with.
    """
    points = sweep(base, hardware, node_counts(text))
    if as_json:
        print(json.dumps([asdict(point) for point in points], indent=2))
    else:
        console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 130)
        console.print(sweep_table(points, hardware))
        console.print(f"At {hardware.flops / 1e12:.3g} TFLOP/s a GPU, {hardware.inside / GB:.0f} GB/s inside a node, "
                      f"{hardware.between / GB:.0f} GB/s a GPU between nodes, all of it reached; the same rows for "
                      "each GPU. A step lasts from `step`, where all communication hides that can, to `none hidden`; "
                      "published runs are found at both ends. Arithmetic, not a measurement.")  # fmt: skip
    if plot:
        draw(points, plot)
        Console(stderr=True).print(f"Drew {plot}")
    return 0


def sweep_table(points: list[Point], hardware: Hardware) -> Table:
    made = Table(title=f"{hardware.gpus_per_node} GPUs a node")
    for name in ("layout", "nodes", "GPU, GiB", "computes", "communicates", "step", "none hidden", "efficiency"):
        made.add_column(name, justify="left" if name == "layout" else "right")
    last = points[0].layout
    for p in points:
        if p.layout != last:
            made.add_section()
        last = p.layout
        made.add_row(p.layout, str(p.nodes), f"{p.gpu_bytes / GIB:.1f}",
                     *map(in_seconds, (p.step.compute, p.step.communication, p.step.total, p.unhidden)),
                     f"{p.efficiency:.0%}")  # fmt: skip
    return made


def draw(points: list[Point], path: Path) -> None:
    """Three panels over the number of nodes, as PNG.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot: needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    panels: dict[str, Callable[[Point], float]] = {
        "GPU memory, GiB": lambda p: p.gpu_bytes / GIB,
        "step, s": lambda p: p.step.total,
        "efficiency": lambda p: p.efficiency,
    }
    for axis, (title, value) in zip(axes, panels.items(), strict=True):
        for layout in dict.fromkeys(p.layout for p in points):
            line = [p for p in points if p.layout == layout]
            axis.plot([p.nodes for p in line], [value(p) for p in line], marker="o", label=layout)
        axis.set(title=title, xlabel="nodes", xscale="log", ylim=(0, None))
        axis.set_xticks(ticks := sorted({p.nodes for p in points}), [str(tick) for tick in ticks])
        axis.minorticks_off()
    axes[0].legend()
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise UserError(f"--plot: {path}: cannot be written: {error.strerror}") from None
