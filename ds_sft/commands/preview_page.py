"""The page of `ds-sft preview --html`: one file, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from ds_sft.config import Config

if TYPE_CHECKING:
    from ds_sft.commands.preview import Shown, Token

BARS = 40
STYLE = """
:root { --ink: #1c2430; --soft: #64707f; --line: #dfe4ea; --learned: #c9f0d3; --learned-ink: #0b5a28;
  --special: #6d28d9; --paper: #ffffff; --back: #f5f7f9; --bar: #7aa7d9; --warn: #b45309; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e9ef; --soft: #97a3b2; --line: #333d49;
  --learned: #14532d; --learned-ink: #bbf7d0; --special: #c4a5ff; --paper: #1a212a; --back: #11161c;
  --bar: #4b7fb8; --warn: #fbbf24; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 24px; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; }
h1 { font-size: 22px; margin: 0 0 4px; }
h2 { font-size: 17px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 8px 0 4px; }
p, .soft { color: var(--soft); margin: 0 0 12px; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px;
  min-width: 150px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); }
.two { display: grid; align-items: start; margin-top: 12px; grid-template-columns: 1fr 1fr; gap: 16px; }
@media (max-width: 800px) { .two { grid-template-columns: 1fr; }
}
.box { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
td { padding: 3px 8px 3px 0; vertical-align: top; overflow-wrap: anywhere; }
td.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.warn { color: var(--warn); margin: 6px 0; }
.row { background: var(--paper); border: 1px solid var(--line); border-radius: 8px; margin: 0 0 16px; }
.row header { padding: 8px 16px; border-bottom: 1px solid var(--line); color: var(--soft); font-size: 14px;
  overflow-wrap: anywhere; }
.text { padding: 12px 16px; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.75;
  font-family: ui-monospace, "DejaVu Sans Mono", "Noto Sans Mono", "Noto Sans CJK SC", monospace;
  font-size: 13.5px; }
.t { border-radius: 2px; box-shadow: inset -1px 0 0 var(--line); }
.t:hover { outline: 2px solid var(--bar); }
.l { background: var(--learned); color: var(--learned-ink); }
.s { font-weight: 700; color: var(--special); border: 1px solid; border-radius: 4px; padding: 0 3px;
  font-size: 12px; }
.s.l { color: var(--learned-ink); }
.p { opacity: .45; }
.e { opacity: .5; }
.next { display: block; border-top: 2px dashed var(--bar); margin: 10px 0 6px; color: var(--soft);
  font-size: 12px; }
.key span { margin-right: 14px; }
"""


def page(
    config: Config, report: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Any], shown: Sequence[Shown]
) -> str:
    """The whole page."""
    splits = "".join(_split(name, counts, rows[name]["length"], config.max_length) for name, counts in report.items())
    sequences = "".join(_sequence(sequence) for sequence in shown)
    keys = ("template", "mask", "thinking", "max_length", "overlong", "packing")
    facts = [f"{name}: {getattr(config, name)}" for name in keys]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>What the model sees</title><style>{STYLE}</style></head><body>
<h1>What the model sees</h1>
<p>{escape(config.model_name_or_path)} · {escape(" · ".join(facts))}</p>
{splits}
<h2>Tokens</h2>
<p class="key"><span><span class="t l">learned</span></span><span><span class="t">not learned</span></span>
<span><span class="t s">special token</span></span><span><span class="t s l">special, learned</span></span>
<span class="p">padding</span> <span>↵ line end; hover for the id</span></p>
{sequences}
</body></html>
"""


def _split(name: str, counts: Mapping[str, Any], lengths: np.ndarray, max_length: int) -> str:
    from ds_sft.data.report import advice

    share = counts["supervised_tokens"] / max(1, counts["tokens"])
    lost = counts["supervised_tokens_cut"] + counts["supervised_tokens_dropped"]
    cards = [
        (f"{counts['rows_kept']:,}", f"of {counts['rows_read']:,} rows"),
        (f"{counts['tokens']:,}", "tokens"),
        (f"{share:.1%}", "of them learned"),
        (f"{sum(counts['rows_dropped'].values()):,}", "rows dropped"),
        (f"{counts['rows_truncated']:,}", f"rows cut, {lost:,} learned tokens lost"),
    ]
    shown = "".join(f'<div class="card"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in cards)
    warnings = "".join(f'<div class="warn">▲ {escape(line)}</div>' for line in advice(name, dict(counts)))
    return f"""<h2>{escape(name)}: {escape(counts["file"])}</h2>
<div class="cards">{shown}</div>{warnings}
<div class="two"><div class="box"><h3>Tokens a row</h3>{_histogram(lengths, max_length)}{_percentiles(counts)}</div>
<div class="box"><h3>Rows left out</h3>{_dropped(counts)}<h3>Longest rows</h3>{_table(counts["longest"])}</div></div>"""


def _dropped(counts: Mapping[str, Any]) -> str:
    if not counts["rows_dropped"]:
        return '<p class="soft">none</p>'
    examples = [[text, ""] for text in counts["dropped_examples"]]
    return _table(list(counts["rows_dropped"].items())) + _table(examples)


def _table(rows: Sequence[Sequence[Any]]) -> str:
    lines = (
        f'<tr><td>{escape(str(name))}</td><td class="n">{value:,}</td></tr>'
        if isinstance(value, int)
        else f'<tr><td class="soft" colspan="2">{escape(str(name))}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(lines)}</table>"


def _percentiles(counts: Mapping[str, Any]) -> str:
    found = " · ".join(f"{name} {value:,}" for name, value in counts["length_percentiles"].items())
    return f'<div class="soft">{found}<br>99 % of the rows whole: max_length {counts["recommended_max_length"]:,}</div>'


def _histogram(lengths: np.ndarray, max_length: int) -> str:
    """Bars of the rows' lengths before any is cut, and a line at `max_length` where it is in sight."""
    top = max(int(lengths.max()), 1)
    heights, _ = np.histogram(lengths, bins=BARS, range=(0, top))
    width, height = 440, 150
    step = width / BARS
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height - h:.1f}" width="{step - 1:.1f}" height="{h:.1f}">'
        f"<title>{count:,} rows of {i * top // BARS:,} to {(i + 1) * top // BARS:,} tokens</title></rect>"
        for i, count in enumerate(heights.tolist())
        for h in [count / max(1, int(heights.max())) * (height - 6)]
    )
    limit = ""
    if max_length <= top:
        x = max_length / top * width
        limit = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" stroke="var(--warn)" stroke-width="2"/>'
    y = height + 16
    labels = f'<text x="0" y="{y}">0</text><text x="{width}" y="{y}" text-anchor="end">{top:,}</text>'
    if limit:
        labels += f'<text x="{width / 2}" y="{y}" text-anchor="middle">orange: max_length {max_length:,}</text>'
    return (f'<svg viewBox="0 0 {width} {height + 20}" width="100%" role="img" aria-label="histogram of lengths" '
            f'style="fill:var(--bar);margin-top:8px"><g>{bars}</g>{limit}<g style="fill:var(--soft);font-size:12px">'
            f"{labels}</g></svg>")  # fmt: skip


def _sequence(sequence: Shown) -> str:
    from ds_sft.commands.preview import describe

    tokens = "".join(_token(token, first=i == 0) for i, token in enumerate(sequence.tokens))
    return (
        f'<section class="row"><header>{escape(describe(sequence))}</header><div class="text">{tokens}</div></section>'
    )


def _token(token: Token, *, first: bool) -> str:
    classes = "t" + " l" * token.learned + " s" * token.special + " p" * token.padding
    ids = " ".join(map(str, token.ids))
    text = escape(token.text)
    if not token.special:
        text = text.replace("\n", '<span class="e">↵</span>\n')
    next_row = '<span class="next">next row, position 0</span>' if token.starts_row and not first else ""
    return f'{next_row}<span class="{classes}" title="{ids}">{text}</span>'
