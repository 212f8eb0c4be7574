"""The page of `ds-sft preview --html`: one file, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from ds_sft.commands.page import frame
from ds_sft.commands.preview_tokens import Shown, Token, left_out_in_words, sequence_title
from ds_sft.config.keys import Config

BARS = 40
STYLE = """
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


def preview_html(
    config: Config, report: Mapping[str, Mapping[str, Any]], rows: Mapping[str, Any], shown: Sequence[Shown]
) -> str:
    """The whole page."""
    splits = "".join(_split(name, counts, rows[name]["length"], config.max_length) for name, counts in report.items())
    sequences = "".join(_sequence(sequence) for sequence in shown)
    keys = ("template", "mask", "thinking", "max_length", "overlong", "packing")
    facts = [f"{name}: {getattr(config, name)}" for name in keys]
    body = f"""<h1>What the model sees</h1>
<p>{escape(config.model_name_or_path)} · {escape(" · ".join(facts))}</p>
{splits}
<h2>Tokens</h2>
<p class="key"><span><span class="t l">learned</span></span><span><span class="t">not learned</span></span>
<span><span class="t s">special token</span></span><span><span class="t s l">special, learned</span></span>
<span class="p">padding</span> <span>↵ line end; hover for the id</span></p>
{sequences}"""
    return frame("What the model sees", body, style=STYLE)


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
    tokens = "".join(_token(token, first=i == 0) for i, token in enumerate(sequence.tokens))
    header = f"<header>{escape(sequence_title(sequence))}</header>"
    return f'<section class="row">{header}<div class="text">{tokens}</div></section>'


def _token(token: Token, *, first: bool) -> str:
    if token.left_out:
        return f'<span class="next">{left_out_in_words(token)}</span>'
    classes = "t" + " l" * token.learned + " s" * token.special + " p" * token.padding
    ids = " ".join(map(str, token.ids))
    text = escape(token.text)
    if not token.special:
        text = text.replace("\n", '<span class="e">↵</span>\n')
    next_row = '<span class="next">next row, position 0</span>' if token.starts_row and not first else ""
    return f'{next_row}<span class="{classes}" title="{ids}">{text}</span>'
