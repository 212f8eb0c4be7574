"""The figures of `ds-sft report`, drawn by plotly.js in the page.

Why plotly and not an SVG of matplotlib's: who compares runs asks for the value below the pointer, a part of the axis,
a logarithm, a smoother curve, and for some of the runs alone, as W&B, TensorBoard and SwanLab let them. It costs 4.8 MB
a page, whatever the number of runs, and two packages of Python alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import plotly.graph_objects as go

from ds_sft.commands.plan_tables import duration
from ds_sft.commands.report_runs import OF_ALL, ReportedRun, is_number

COLORS = ("#4c8dd6", "#e8833a", "#3aa76d", "#d65a5a", "#9a78d1", "#a9765f", "#dd7fbd", "#8a8f98", "#b3ad2e", "#2fb3c4")
POINTS = 1500  # of a curve; where more was logged, a point is the mean of several
AXES = {"step": "step", "epoch": "epoch", "tokens": "tokens", "hours": "hours of training"}  # of `Run.places` -> label
CURVES = {  # of metrics.jsonl -> title; the validation loss is drawn beside the loss
    "loss": "Loss",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens per second",
    "mfu": "Model FLOPs utilization",
    "peak_memory_gib": "Peak memory of a rank, GiB",
}
FORMATS = {"learning_rate": "~e", "mfu": "~%"}  # d3's
COMPARED = 8  # runs, whose values are shown together below the pointer
SMOOTHED = ("loss", "grad_norm", "tokens_per_second", "mfu")
LOGARITHMIC = ("loss", "grad_norm")  # where the page's switch says so
NOT_DRAWN = ("step", "epoch", "changed", "eval_loss", "supervised_tokens_per_second", "interval_seconds", *OF_ALL)
NOT_DRAWN_ENDS = ("_share", "_runtime", "samples_per_second", "steps_per_second", "total_flos", "train_loss")


@dataclass(frozen=True)
class Picture:
    """A figure and what stands above and below it."""

    title: str
    figure: go.Figure
    note: str = ""


def color_of(number: int) -> str:
    """The color of a run; behind the chosen ones, as far from each other as hues can be."""
    return COLORS[number] if number < len(COLORS) else f"hsl({number * 137.5 % 360:.0f}, 55%, 55%)"


def figure(traces: Sequence[Any], *, height: int = 300) -> go.Figure:
    """A figure without colors of its own, but for the runs': the page's style says what the rest has."""
    return go.Figure(
        traces,
        go.Layout(
            template="none", height=height, margin={"l": 56, "r": 20, "t": 30, "b": 44}, font={"size": 12},
            paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", showlegend=False, hovermode="closest",
            hoverlabel={"bgcolor": "#1c2430", "font": {"color": "#ffffff"}, "namelength": 24},
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
            modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#8a8f98", "activecolor": COLORS[0]},
            xaxis={"automargin": True}, yaxis={"automargin": True},
        ),
    )  # fmt: skip


# ---- What was logged


def curves(runs: Sequence[ReportedRun]) -> Iterator[Picture]:
    """A figure for each curve that a run has, ours first; all runs in each."""
    logged = dict.fromkeys(name for run in runs for entry in run.entries for name in entry if is_number(entry[name]))
    others = [name for name in logged if name not in NOT_DRAWN and not name.endswith(NOT_DRAWN_ENDS)]
    for name in dict.fromkeys([*CURVES, *others]):
        traces = [trace for number, run in enumerate(runs) for trace in _curve(run, number, name)]
        if traces:
            drawn = figure(traces).update_layout(meta={"log": name in LOGARITHMIC}).update_xaxes(title="step")
            drawn.update_layout(hovermode="x unified" if len(runs) <= COMPARED else "closest")
            drawn.update_yaxes(tickformat=FORMATS.get(name))
            validated = any(trace.line.dash == "dot" for trace in traces)
            yield Picture(CURVES.get(name, name), drawn, "solid: training, dotted: validation" if validated else "")


def _curve(run: ReportedRun, number: int, name: str) -> Iterator[go.Scatter]:
    """What a run has in one figure: the curve, before it what smoothing hides, validation, and where it went on."""
    if name in SMOOTHED and run.values(name):
        yield _line(run, number, name).update(opacity=0.25, hoverinfo="skip")
    if run.values(name):
        yield _line(run, number, name, smooth=name in SMOOTHED)
    if name == "loss":
        if run.values("eval_loss"):
            yield _line(run, number, "eval_loss").update(
                mode="lines+markers", line_dash="dot", name=f"{escape(run.name)}, validation"
            )
        yield from _seams(run, number)


def _line(run: ReportedRun, number: int, name: str, *, smooth: bool = False) -> go.Scatter:
    """What was logged under a name. `meta` tells the page's script: the run, every axis, whether it may be smoothed."""
    logged = [(entry[name], where) for entry, where in zip(run.entries, run.places, strict=True) if name in entry]
    values, places = thinned(logged)
    return go.Scatter(
        name=escape(run.name),
        mode="lines" if len(values) > 1 else "markers",
        x=[place["step"] for place in places],
        y=values,
        meta={"run": number, "smooth": smooth, "x": {axis: [place[axis] for place in places] for axis in AXES}},
        line={"color": color_of(number), "width": 1.6},
        marker={"color": color_of(number), "size": 6},
    )


def _seams(run: ReportedRun, number: int) -> Iterator[go.Scatter]:
    """Where a run went on with other keys, and with which."""
    height = None
    for entry, place in zip(run.entries, run.places, strict=True):
        height = entry.get("loss", height)
        if isinstance(changed := entry.get("changed"), dict):
            said = [f"{name}: {' -> '.join(map(str, values))}" for name, values in changed.items()]
            yield go.Scatter(
                name="<br>".join(escape(line) for line in [f"{run.name} went on with", *said]),
                mode="markers", x=[place["step"]], y=[height],
                hovertemplate="%{fullData.name}<extra></extra>",
                meta={"run": number, "x": {axis: [place[axis]] for axis in AXES}},
                marker={"color": color_of(number), "size": 11, "symbol": "diamond-open", "line": {"width": 2}},
            )  # fmt: skip


def thinned(
    logged: Sequence[tuple[Any, dict[str, float | None]]],
) -> tuple[list[float | None], list[dict[str, float | None]]]:
    """At most POINTS values, each the mean of several that follow each other, and the place of the last of them.

    None, a gap in the curve, where one of them was no number.
    """
    together = -(-len(logged) // POINTS) or 1
    values: list[float | None] = []
    for start in range(0, len(logged), together):
        group = [value for value, _ in logged[start : start + together]]
        values.append(float(f"{sum(group) / len(group):.6g}") if all(map(is_number, group)) else None)
    places = [logged[min(start + together, len(logged)) - 1][1] for start in range(0, len(logged), together)]
    return values, places


# ---- Rows, time and memory


def lengths(runs: Sequence[ReportedRun]) -> Picture | None:
    """Tokens of a row below which a share of the rows is; runs with the same rows are one line."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, run in enumerate(runs):
        for split, told in run.data.items():
            if percentiles := told.get("length_percentiles"):
                found.setdefault((split, *percentiles.items()), []).append(number)
    if not found:
        return None
    traces = [
        go.Scatter(
            name=escape(split) if len(numbers) == len(runs) else f"{escape(split)}: {_names(runs, numbers)}",
            mode="lines+markers",
            x=[name for name, _ in points],
            y=[tokens for _, tokens in points],
            line={"color": color_of(numbers[0]), "dash": "solid" if split == "train" else "dot"},
        )
        for (split, *points), numbers in found.items()
    ]
    drawn = figure(traces).update_layout(showlegend=True).update_xaxes(type="category").update_yaxes(title="tokens")
    drawn.update_yaxes(rangemode="tozero")
    return Picture("Tokens a row", drawn, "p90: 90 % of the rows are as long or shorter, before any was cut")


def _names(runs: Sequence[ReportedRun], numbers: Sequence[int]) -> str:
    return short_name(", ".join(runs[number].name for number in numbers), limit=40)


def time_by_part(runs: Sequence[ReportedRun]) -> Picture | None:
    """A bar for each run: the shares of its training time."""
    timed = [run for run in runs if run.parts]
    names = dict.fromkeys(part for run in timed for part in run.parts)
    traces = [
        go.Bar(
            name=name.replace("_", " "),
            orientation="h",
            y=[*range(len(timed))],
            x=[run.parts.get(name, 0.0) / run.speed["seconds"] for run in timed],
            customdata=[duration(run.parts.get(name, 0.0)) for run in timed],
            hovertemplate="%{x:.1%}, %{customdata}",
        )
        for name in names
    ]
    return _bars("Time by part", traces, timed, "share of training; evaluation is left out", tickformat=".0%")


def memory(runs: Sequence[ReportedRun]) -> Picture | None:
    """Two bars for each run: what training took of its fullest rank, and what was planned."""
    known = [run for run in runs if run.results.get("plan")]
    traces = [
        go.Bar(
            name=label,
            orientation="h",
            y=[*range(len(known))],
            x=[run.results["plan"].get(key) for run in known],
            customdata=[f"{run.results['plan'].get('layout')}, {run.results['plan'].get('moment')}" for run in known],
            hovertemplate="%{x:.4g} GiB" + (" (%{customdata})" if key == "planned_gib" else ""),
            marker={"color": color},
        )
        for key, label, color in (("planned_gib", "planned", "#8a8f98"), ("measured_gib", "measured", COLORS[0]))
    ]
    note = "of the fullest rank, in training; on a CPU without Python and its libraries"
    return _bars("Memory against plan, GiB", traces, known, note)


def _bars(
    title: str, traces: Sequence[go.Bar], runs: Sequence[ReportedRun], note: str, tickformat: str = ""
) -> Picture | None:
    """A figure of bars, the first run's at the top; shares on top of each other, what has a unit side by side."""
    if not runs or not traces:
        return None
    drawn = figure(traces, height=150 + 40 * len(runs)).update_xaxes(tickformat=tickformat)
    drawn.update_yaxes(
        tickvals=[*range(len(runs))], ticktext=[short_name(run.name) for run in runs], autorange="reversed"
    )
    drawn.update_layout(barmode="stack" if tickformat else "group", showlegend=True, colorway=COLORS)
    return Picture(title, drawn, note)


def short_name(name: str, limit: int = 22) -> str:
    """A run's name beside a bar, for plotly, which reads HTML; the end of a path is what tells runs apart."""
    return escape(name if len(name) <= limit else "…" + name[1 - limit :])
