"""What happened to every row: `data_report.json` and the table that every run prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ds_sft.data.counts import Counts
from ds_sft.data.encode import LONGER, TOO_LONG
from ds_sft.ranks.launch import Launch

LONGEST = 10  # rows named with their lengths
ROUND = 64  # tokens: recommended lengths are multiples, as GPUs like them
FIELDS_SHOWN = 5  # names of fields in a line
PERCENTILES = {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}


@dataclass
class Report:
    """What happened to the rows of one split."""

    file: str
    rows_read: int = 0
    rows_kept: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    rows_truncated: int = 0
    rows_split: int = 0  # cut between turns into several
    rows_set_aside: int = 0  # `val_size`: they are the other split's
    rows_per_epoch: int = 0  # after weights
    duplicates: int = 0  # rows that are, token for token, rows of train
    rows_with_special_tokens: int = 0  # of which text became special tokens
    rows_with_empty_answers: int = 0  # kept: of these answers only the end of turn is learned
    first_empty_answer: str | None = None  # FILE:LINE
    tokens: int = 0
    tokens_cut: int = 0  # lost to max_length
    supervised_tokens: int = 0
    supervised_tokens_cut: int = 0
    answers_cut: int = 0  # rows whose answer lost its end
    tokens_dropped: int = 0  # of rows left out because of their length
    supervised_tokens_dropped: int = 0
    # Of these and the rows left out because of their length: tokens a row, before any was cut
    length_percentiles: dict[str, int] = field(default_factory=dict)
    recommended_max_length: int = 0  # holds 99 % of the rows whole
    longest: list[list[Any]] = field(default_factory=list)  # [FILE:LINE, tokens]
    dropped_examples: list[str] = field(default_factory=list)  # "FILE:LINE: why", the first of them
    fields_not_read: dict[str, list[Any]] = field(default_factory=dict)  # name -> [rows that hold some, FILE:LINE]
    left_out_by_template: dict[str, list[Any]] = field(default_factory=dict)  # likewise: "user name", as an example
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # where there are several
    hub_datasets: list[str] = field(default_factory=list)  # OWNER/NAME of those that rows come from


def make_report(
    file: str, counts: Counts, stats: np.ndarray, names: Sequence[str], left_out: np.ndarray | None = None
) -> Report:
    """The report over rows that are kept; lengths are told over those `left_out` for their length, too.

    Args:
        stats, left_out: [rows] of `store.STATS` with a field `file`: index into `names`.
    """

    def where(row: np.void) -> str:
        return f"{names[row['file']]}:{row['row']}"

    lost, textless = stats["length"] - stats["tokens"], stats[stats["textless"]]
    report = Report(
        file=file,
        rows_read=counts.rows_read,
        rows_kept=len(stats),
        rows_dropped=counts.dropped,
        rows_truncated=int((lost > 0).sum()),
        rows_split=counts.rows_split,
        rows_per_epoch=len(stats),
        rows_with_special_tokens=int(stats["forged"].sum()),
        rows_with_empty_answers=len(textless),
        first_empty_answer=where(textless[0]) if len(textless) else None,
        tokens=int(stats["tokens"].sum(dtype=np.int64)),
        tokens_cut=int(lost.sum(dtype=np.int64)),
        supervised_tokens=int(stats["supervised"].sum(dtype=np.int64)),
        supervised_tokens_cut=int(stats["supervised_cut"].sum(dtype=np.int64)),
        answers_cut=int((stats["supervised_cut"] > 0).sum()),
        tokens_dropped=counts.dropped_tokens,
        supervised_tokens_dropped=counts.dropped_supervised,
        dropped_examples=counts.messages + counts.lost,
    )
    stats = stats if left_out is None else np.concatenate([stats, left_out])
    if len(stats):
        values = np.percentile(stats["length"], list(PERCENTILES.values()), method="inverted_cdf")
        report.length_percentiles = {name: int(value) for name, value in zip(PERCENTILES, values, strict=True)}
        report.recommended_max_length = -(-report.length_percentiles["p99"] // ROUND) * ROUND
        order = np.argsort(-stats["length"].astype(np.int64), kind="stable")[:LONGEST]
        report.longest = [[where(stats[i]), int(stats["length"][i])] for i in order]
    return report


def print_report(report: dict[str, dict[str, Any]], launch: Launch) -> None:
    """Say on rank 0 what happened to every row, and what to do about it."""
    if not launch.is_main:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for split in report:
        table.add_column(split, justify="right")
    rows = {split: _table_rows(counts) for split, counts in report.items()}
    for name in dict.fromkeys(name for counts in rows.values() for name in counts):
        table.add_row(name, *(counts.get(name, "0") for counts in rows.values()))
    console = Console(markup=False)
    for split, counts in report.items():  # in a column of the table a terminal would break a path
        console.print(f"{split}: {counts['file']}", soft_wrap=True)
    console.print(table)
    for split, counts in report.items():
        for line in advice(split, counts):
            console.print(line, soft_wrap=True)


def _table_rows(counts: dict[str, Any]) -> dict[str, str]:
    share = counts["supervised_tokens"] / max(1, counts["tokens"])
    rows = {"rows read": f"{counts['rows_read']:,}", "rows kept": f"{counts['rows_kept']:,}"}
    rows |= {f"rows dropped: {reason}": f"{n:,}" for reason, n in counts["rows_dropped"].items()}
    if counts["rows_set_aside"]:
        rows["rows set aside (val_size)"] = f"{counts['rows_set_aside']:,}"
    if counts["rows_per_epoch"] != counts["rows_kept"]:
        rows["rows an epoch (weights)"] = f"{counts['rows_per_epoch']:,}"
    rows["rows cut at max_length"] = f"{counts['rows_truncated']:,} ({counts['tokens_cut']:,} tokens lost)"
    if counts["rows_split"]:
        rows["rows split between turns"] = f"{counts['rows_split']:,}"
    rows["tokens"] = f"{counts['tokens']:,}"
    rows["supervised tokens"] = f"{counts['supervised_tokens']:,} ({share:.1%})"
    if counts["tokens_dropped"]:
        rows["tokens left out because of length"] = f"{counts['tokens_dropped']:,}"
    lost = counts["supervised_tokens_cut"] + counts["supervised_tokens_dropped"]
    if lost:
        rows["supervised tokens lost to length"] = f"{lost:,}"
    percentiles = counts["length_percentiles"].items()
    rows["tokens a row"] = "  ".join(f"{name} {value:,}" for name, value in percentiles)
    rows["max_length for 99 % whole"] = f"{counts['recommended_max_length']:,}"
    return rows


def advice(split: str, counts: dict[str, Any]) -> list[str]:
    """What a user should know before the run goes on, a line each."""
    lines = []
    if counts["answers_cut"]:
        longest = ", ".join(f"{where} ({tokens:,})" for where, tokens in counts["longest"][:3])
        lines.append(
            f"{split}: {counts['answers_cut']:,} answers lost their end at max_length, and with it the end of turn: a "
            f"model that learns this stops late. max_length: {counts['recommended_max_length']:,} holds 99 % of the "
            f"rows whole; or overlong: drop or split. Longest: {longest}."
        )
    left_out = sum(counts["rows_dropped"].get(reason, 0) for reason in (LONGER, TOO_LONG))
    if left_out:
        longest = ", ".join(f"{where} ({tokens:,})" for where, tokens in counts["longest"][:3])
        lines.append(
            f"{split}: {left_out:,} rows are left out because of their length. max_length: "
            f"{counts['recommended_max_length']:,} holds 99 % of the rows whole. Longest: {longest}."
        )
    if counts["rows_with_special_tokens"]:
        lines.append(
            f"{split}: in {counts['rows_with_special_tokens']:,} rows text such as <|im_end|> becomes special tokens, "
            "as in the reference script; under template: tokenizer it stays text."
        )
    if counts["rows_with_empty_answers"]:
        lines.append(
            f"{split}: rows with an answer without text: {counts['rows_with_empty_answers']:,}, the first in "
            f"{counts['first_empty_answer']}: a model learns from them to end its turn at once."
        )
    if counts["fields_not_read"]:
        lines.append(f"{split}: fields not read: {_fields(counts['fields_not_read'])}.")
    if counts["left_out_by_template"]:
        lines.append(f"{split}: left out or rewritten by the template: {_fields(counts['left_out_by_template'])}.")
    if counts["duplicates"]:
        lines.append(f"{split}: {counts['duplicates']:,} rows are also in train, token for token: the loss on them "
                     "says nothing about new dialogues.")  # fmt: skip
    return lines


def _fields(found: dict[str, list[Any]]) -> str:
    shown = [f"{name} ({rows:,} rows, first {where})" for name, (rows, where) in list(found.items())[:FIELDS_SHOWN]]
    more = f" and {len(found) - FIELDS_SHOWN:,} more in data_report.json" if len(found) > FIELDS_SHOWN else ""
    return ", ".join(shown) + more
