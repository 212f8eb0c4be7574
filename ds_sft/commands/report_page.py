"""The page of `ds-sft report`: its tables and texts, the frame of its figures, and the script behind its switches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from plotly.io import to_html
from plotly.offline import get_plotlyjs

from ds_sft import __version__
from ds_sft.commands.page import frame
from ds_sft.commands.plan_tables import duration
from ds_sft.commands.report_figures import AXES, Picture, color_of, curves, lengths, memory, time_by_part
from ds_sft.commands.report_runs import ReportedRun, is_number
from ds_sft.config.keys import STARTED_IN

SHOWN = 50  # questions
EMPTY = '<span class="soft">nothing</span>'
OF_THE_FOLDER = ("output_dir", "run_name", STARTED_IN)  # keys that differ wherever there are two runs
FACTS = ("launcher", "world_size", "zero_stage", "device", "parameters", "trained_parameters", "git_commit")
# Plotly would show a button that sends a figure with its data to its makers' server.
DRAWING = {"responsive": True, "displaylogo": False, "showSendToCloud": False, "plotlyServerURL": "",
           "modeBarButtonsToRemove": ["select2d", "lasso2d", "autoScale2d"]}  # fmt: skip
STYLE = """
body { max-width: 1280px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); gap: 16px; }
.charts .box { max-width: 640px; overflow: hidden; }
.charts .soft { margin: 0; font-size: 13px; }
.charts + p { margin-top: 12px; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: center; position: sticky; top: 0; z-index: 5;
  background: var(--back); padding: 8px 0; margin: 0 0 8px; max-height: 30vh; overflow-y: auto; }
#runs { display: contents; }
.controls label { white-space: nowrap; max-width: 100%; overflow: hidden; text-overflow: ellipsis; }
.dot { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin: 0 6px 0 2px; }
th { text-align: left; vertical-align: top; padding: 3px 12px 3px 0; font-weight: 600; }
td { padding-right: 12px; min-width: 64px; }
td:first-child { min-width: 130px; }
td.state { min-width: 110px; }
th.n { text-align: right; }
tr + tr td, tr + tr th { border-top: 1px solid var(--line); }
summary { cursor: pointer; padding: 6px 0; color: var(--soft); }
.answers th { width: 150px; color: var(--soft); font-weight: 400; }
.answers td, .question { white-space: pre-wrap; overflow-wrap: anywhere; }
header.question { color: var(--ink); font-weight: 600; }
.answers { padding: 4px 16px 8px; }
.best { font-weight: 700; }
.js-plotly-plot .infolayer text, .js-plotly-plot .xtick text, .js-plotly-plot .ytick text {
  fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path, .js-plotly-plot .zerolinelayer path { stroke: var(--line) !important; }
@media (max-width: 600px) { body { padding: 12px; } .controls { position: static; }
  .answers th, .answers td { display: block; width: auto; } .answers tr td { border-top: 0; }
}
@media print { .controls, .modebar { display: none !important; } .box, .row { break-inside: avoid; }
  body { background: none; padding: 0; } .charts { grid-template-columns: 1fr; } h2 { break-after: avoid; }
  table { font-size: 10.5px; } td, th { min-width: 0; padding-right: 8px; }
  td:first-child, td.state { min-width: 60px; overflow-wrap: normal; }
}
"""
# One state for all curves: which runs are shown, over what, how smooth. `smooth` is TensorBoard's exponential mean,
# which starts without a bias to 0.
SCRIPT = """
const plots = [...document.querySelectorAll('.curve .js-plotly-plot')];
const logged = new Map(plots.map(plot => [plot, plot.data.map(trace => trace.y)]));
const of = id => document.getElementById(id);
function smooth(values, weight) {
  let mean = 0, number = 0;
  return values.map(value => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    return mean / (1 - weight ** ++number);
  });
}
function draw() {
  const axis = of('axis'), weight = Number(of('smoothing').value), scale = of('log').checked ? 'log' : 'linear';
  const hidden = new Set([...document.querySelectorAll('#runs input:not(:checked)')].map(box => Number(box.value)));
  of('weight').textContent = weight.toFixed(2);
  return Promise.all(plots.map(plot => {
    const metas = plot.data.map(trace => trace.meta);
    return Plotly.update(plot, {
      x: metas.map(meta => meta.x[axis.value]),
      y: metas.map((meta, i) => meta.smooth ? smooth(logged.get(plot)[i], weight) : logged.get(plot)[i]),
      visible: metas.map(meta => !hidden.has(meta.run)),
    }, {'xaxis.title.text': axis.selectedOptions[0].text, 'yaxis.type': plot.layout.meta.log ? scale : 'linear'});
  }));
}
document.querySelectorAll('.controls input, .controls select').forEach(control => {
  control.addEventListener('input', draw);
});
// A figure is drawn when it is read, and what is read later may leave it less room.
addEventListener('load', () => document.querySelectorAll('.js-plotly-plot').forEach(plot => Plotly.Plots.resize(plot)));
of('axis').addEventListener('change', () => plots.forEach(plot => Plotly.relayout(plot, {'xaxis.autorange': true})));
"""


def report_html(runs: Sequence[ReportedRun]) -> str:
    """The whole page."""
    title = f"Training report: {runs[0].name}" if len(runs) == 1 else f"Training report: {len(runs)} runs"
    now = time.strftime("%Y-%m-%d %H:%M %Z")
    keys, others = compare_tables([run.config for run in runs]), compare_tables([facts(run) for run in runs])
    differ, equal = keys[0] | others[0], keys[1] | others[1]
    pictures = time_by_part(runs), memory(runs), lengths(runs)
    body = f"""<h1>{escape(title)}</h1>
<p>As of {now}, by ds_sft {__version__}.</p>
<noscript><p class="warn">The figures need JavaScript; tables and predictions do not.</p></noscript>
<script>{get_plotlyjs()}</script>
{_results(runs)}
{_missing(runs)}
{_differences(runs, differ) if len(runs) > 1 else ""}
<h2>Curves</h2>
{_controls(runs)}
{_curves(runs)}
<h2>Time, memory, rows</h2>
<div class="charts">{"".join(_chart(found) for found in pictures if found)}</div>
{_rows(runs)}
<h2>Predictions</h2>
{_predictions(runs)}
<h2>{"What the run was" if len(runs) == 1 else "What is the same in all runs"}</h2>
<details class="box"{" open" if len(runs) == 1 else ""}><summary>{len(equal)} keys, facts and versions</summary>
{_table({name: values[:1] for name, values in equal.items()})}</details>
<script>{SCRIPT}</script>"""
    return frame(title, body, style=STYLE, scripts=True)


# ---- How it went


def _results(runs: Sequence[ReportedRun]) -> str:
    """What came of each run, the lowest validation loss in bold."""
    losses = [run.eval_loss for run in runs if run.eval_loss is not None]
    table = [labelled_numbers(run) for run in runs]
    labels = [name for name in table[0] if any(found[name] for found in table)]
    head = "".join(f'<th class="{_kind(name)}">{name}</th>' for name in ("run", *labels))
    lines = []
    for number, (run, found) in enumerate(zip(runs, table, strict=True)):
        best = "validation loss" if len(runs) > 1 and run.eval_loss == min(losses, default=None) else None
        cells = (
            f'<td class="{_kind(name)}{" best" * (name == best)}">{escape(found[name] or "–")}</td>' for name in labels
        )
        lines.append(f"<tr><td>{_dot(number)}{escape(run.name)}</td>{''.join(cells)}</tr>")
    return f'<div class="box"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def labelled_numbers(run: ReportedRun) -> dict[str, str]:
    """Label -> value; nothing of what is not known."""
    speed, tokens = run.speed, run.places[-1]["tokens"] if run.places else None
    found: dict[str, tuple[Any, str]] = {
        "steps": (run.step, ",.0f"),
        "epochs": (run.last("epoch"), ".2f"),
        "loss": (run.last("loss"), ".4f"),
        "validation loss": (run.eval_loss, ".4f"),
        "tokens": (run.results.get("tokens", tokens), ",.0f"),
        "tokens/s": (speed.get("tokens_per_second"), ",.0f"),
        "MFU": (speed.get("mfu"), ".1%"),
        "padding": (speed.get("padding_share"), ".1%"),
        "waiting": (speed.get("waiting_share"), ".1%"),
        "memory, GiB": (run.memory_gib, ".2f"),
    }
    found |= {name: (value, ".1f") for name, value in run.scores.items()}
    texts = {name: "" if value is None else format(value, spec) for name, (value, spec) in found.items()}
    return {"state": run.state, **texts, "training time": duration(speed["seconds"]) if run.parts else ""}


def _kind(label: str) -> str:
    """The class of a column: words, or numbers under each other."""
    return label if label in ("run", "state") else "n"


def _missing(runs: Sequence[ReportedRun]) -> str:
    said = (f"{run.name}: {'; '.join(run.missing)}." for run in runs if run.missing)
    return "".join(f'<p class="warn">▲ {escape(line)}</p>' for line in said)


def _dot(number: int) -> str:
    return f'<span class="dot" style="background:{color_of(number)}"></span>'


# ---- Figures


def _controls(runs: Sequence[ReportedRun]) -> str:
    """Which of several runs are shown, over what, how smooth."""
    boxes = "".join(
        f'<label><input type="checkbox" checked value="{number}">{_dot(number)}{escape(run.name)}</label>'
        for number, run in enumerate(runs if len(runs) > 1 else [])
    )
    axes = "".join(f'<option value="{name}">{label}</option>' for name, label in AXES.items())
    return f"""<div class="controls"><span id="runs">{boxes}</span>
<label>over <select id="axis">{axes}</select></label>
<label>smoothing <input id="smoothing" type="range" min="0" max="0.99" step="0.01" value="0">
<span id="weight">0.00</span></label><label><input id="log" type="checkbox"> logarithmic loss and norm</label></div>"""


def _curves(runs: Sequence[ReportedRun]) -> str:
    charts = "".join(_chart(picture, "curve") for picture in curves(runs))
    return f'<div class="charts">{charts}</div>' if charts else "<p>Nothing is logged yet.</p>"


def _chart(picture: Picture, kind: str = "") -> str:
    drawn = to_html(picture.figure, config=DRAWING, include_plotlyjs=False, full_html=False, default_width="100%",
                    default_height=f"{picture.figure.layout.height}px")  # fmt: skip
    note = f'<p class="soft">{escape(picture.note)}</p>' if picture.note else ""
    return f'<div class="box {kind}"><h3>{escape(picture.title)}</h3>{note}{drawn}</div>'


# ---- What it was


def _rows(runs: Sequence[ReportedRun]) -> str:
    """What happened to the rows, once for all runs that had the same."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for split, counts in run.data.items():
            found.setdefault(f"{split}, {rows_in_words(counts)}", []).append(run.name)
    lines = (said if len(names) == len(runs) else f"{', '.join(names)}: {said}" for said, names in found.items())
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def rows_in_words(counts: Mapping[str, Any]) -> str:
    """What `data_report.json` says of a split, in a sentence."""
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in (counts.get("rows_dropped") or {}).items())
    share = counts.get("supervised_tokens", 0) / max(1, counts.get("tokens", 0))
    return (f"{counts.get('file')}: {counts.get('rows_read', 0):,} rows read, {counts.get('rows_kept', 0):,} kept, "
            f"{counts.get('rows_truncated', 0):,} cut at max_length; dropped: {dropped or 'none'}; "
            f"{counts.get('tokens', 0):,} tokens, {share:.0%} of them learned.")  # fmt: skip


def _differences(runs: Sequence[ReportedRun], differ: Mapping[str, Sequence[str]]) -> str:
    names = "".join(f"<th>{_dot(number)}{escape(run.name)}</th>" for number, run in enumerate(runs))
    table = _table(differ, f"<tr><th></th>{names}</tr>") or "<p>In no key, and in no version.</p>"
    return f'<h2>In what the runs differ</h2><div class="box">{table}</div>'


def _table(rows: Mapping[str, Sequence[str]], head: str = "") -> str:
    lines = (
        f"<tr><td>{escape(name)}</td>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    )
    return f"<table>{head}{''.join(lines)}</table>" if rows else ""


def facts(run: ReportedRun) -> dict[str, Any]:
    """What `run.json` says of the run beside its keys."""
    versions = {f"version of {name}": version for name, version in (run.results.get("versions") or {}).items()}
    return {name: run.results.get(name) for name in FACTS} | versions if run.results else {}


def compare_tables(tables: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Name -> a text for each table: of names in which they differ, and of the others, where one value stands for all.

    An empty table is not known, and differs from nothing.
    """
    differ: dict[str, list[str]] = {}
    equal: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for table in tables for name in table if name not in OF_THE_FOLDER):
        texts = [value_as_text(table.get(name)) if table else "not known" for table in tables]
        known = [text for text, table in zip(texts, tables, strict=True) if table]
        if len(set(known)) > 1:
            differ[name] = texts
        else:
            equal[name] = known
    return differ, equal


def value_as_text(value: Any) -> str:
    """A value of a key; 2 and 2.0 are one."""
    if value is None:
        return "–"
    if is_number(value):
        return f"{value:.12g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- What the model says


def _predictions(runs: Sequence[ReportedRun]) -> str:
    """Each question once, with what every run answers to it."""
    asked: dict[tuple[str, str], list[tuple[ReportedRun, Mapping[str, Any]]]] = {}
    for run in runs:
        for row in run.predictions:
            asked.setdefault((str(row["question"]), str(row.get("reference", ""))), []).append((run, row))
    if not asked:
        return "<p>There are none: a run answers a few questions at its end (keys num_predictions, predict_before).</p>"
    more = f"<p>{len(asked) - SHOWN:,} questions more are in predictions.jsonl.</p>" if len(asked) > SHOWN else ""
    sections = (
        _answers(question, reference, rows, alone=len(runs) == 1)
        for (question, reference), rows in list(asked.items())[:SHOWN]
    )
    return "".join(sections) + more


def _answers(
    question: str, reference: str, rows: Iterable[tuple[ReportedRun, Mapping[str, Any]]], *, alone: bool
) -> str:
    """A question, the answer of the data, and what models say; before training once, where all say the same."""
    before: dict[str, list[str]] = {}
    after: list[tuple[str, str]] = []
    for run, row in rows:
        if "before" in row:
            before.setdefault(str(row["before"]), []).append(run.name)
        after.append(("after" if alone else run.name, str(row.get("prediction", ""))))
    said = [("reference", reference)]
    said += [("before" if len(before) == 1 else f"before ({', '.join(names)})", text) for text, names in before.items()]
    lines = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text) or EMPTY}</td></tr>" for name, text in said + after)
    return (f'<section class="row"><header class="question">{escape(question)}</header><div class="answers">'
            f"<table>{lines}</table></div></section>")  # fmt: skip
