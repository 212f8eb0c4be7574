"""What an evaluation found: numbers with their intervals, per source of the data and in all; JSON and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from ds_sft.evaluation.bootstrap import (
    LEVEL,
    LOWER_IS_BETTER,
    RESAMPLES,
    difference,
    estimate,
    resampled,
)
from ds_sft.evaluation.measure import Item, Result, Subject, numbers_of
from ds_sft.training.report import METRICS, short_number

ALL = "all"
SHOWN = 12  # tables
OF_LOSS = ("loss", "perplexity")
Found = Mapping[str, Sequence[Result]]  # name of a model -> its results, item by item


def evaluation_numbers(subjects: Sequence[Subject], items: Sequence[Item], found: Found, seed: int) -> dict[str, Any]:
    """All numbers of an evaluation; of two models also their difference, the second less the first.

    Args:
        items: of the first subject; the results of all are in their order.
    """
    files = [item.place[0] for item in items]
    groups = {ALL: list(range(len(items)))}
    if len(set(files)) > 1:
        groups |= {name: [i for i, file in enumerate(files) if file == name] for name in dict.fromkeys(files)}
    names, comparable = [subject.name for subject in subjects], same_tokens(subjects, found)
    sources = {}
    for source, group in groups.items():
        results = {name: [found[name][i] for i in group] for name in names}
        sources[source] = _group_numbers(results, seed, comparable=comparable)
    return {
        "models": {subject.name: _subject_settings(subject) for subject in subjects},
        "data": list(dict.fromkeys(files)),
        "seed": seed,
        "resamples": RESAMPLES,
        "interval": LEVEL,
        "difference": f"{names[1]} - {names[0]}" if len(names) == 2 else None,
        "sources": sources,
    }


def _subject_settings(subject: Subject) -> dict[str, Any]:
    config = subject.config
    return {
        "path": subject.path,
        "template": config.template,
        "system_prompt": config.system_prompt,
        "max_new_tokens": config.predict_max_new_tokens or config.max_length,
    }


def _group_numbers(results: Found, seed: int, *, comparable: bool) -> dict[str, Any]:
    """Rows of one source, or all; `comparable`: whether the losses of two models are."""
    names = list(results)
    numbers = {name: numbers_of(results[name]) for name in names}
    draws = {name: resampled(numbers[name], seed) for name in names}  # of one seed: the same rows for all
    metrics = tuple(METRICS) if any(result.answer for result in results[names[0]]) else OF_LOSS
    described: dict[str, Any] = {"rows": len(results[names[0]]), "models": {}}
    for name in names:
        estimates = {metric: asdict(estimate(metric, numbers[name], draws[name])) for metric in metrics}
        described["models"][name] = _counts(results[name]) | estimates
    if len(names) == 2:
        first, second = ((numbers[name], draws[name]) for name in names)
        described["difference"] = {
            metric: asdict(difference(metric, first, second))
            for metric in metrics
            if comparable or metric not in OF_LOSS
        }
    return described


def same_tokens(subjects: Sequence[Subject], found: Found) -> bool:
    """Whether all models learn the same tokens of every row: else nothing compares their losses."""
    first, *others = ([result.tokens for result in found[subject.name]] for subject in subjects)
    vocab, *vocabs = (subject.tokenizer.get_vocab() for subject in subjects)
    return all(other == first for other in others) and all(other == vocab for other in vocabs)


def _counts(results: Sequence[Result]) -> dict[str, int]:
    answers = [result.answer for result in results if result.answer is not None]
    return {
        "supervised_tokens": sum(result.tokens for result in results),
        "answered": len(answers),
        "cut": sum(answer["cut"] for answer in answers),
    }


# ---- Answers


def answer_line(name: str, item: Item, answer: Mapping[str, Any]) -> str:
    """One answer as a line of JSON."""
    file, line = item.place
    row = {"model": name, "source": f"{file}:{line}", "question": item.question, "reference": item.reference,
           "prediction": answer["text"], "tokens": answer["tokens"], "cut": answer["cut"],
           **{metric: round(answer[metric], 4) for metric in ("exact_match", "chrf", "rouge_l")}}  # fmt: skip
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_answers(path: Path, subjects: Sequence[Subject], items: Mapping[str, Sequence[Item]], found: Found) -> None:
    """All answers, model by model, in the order of the data."""
    with path.open("w", encoding="utf-8") as file:
        for subject in subjects:
            for item, result in zip(items[subject.name], found[subject.name], strict=True):
                if result.answer is not None:
                    file.write(answer_line(subject.name, item, result.answer))


# ---- Table


def print_tables(described: Mapping[str, Any]) -> None:
    """For each source a table: metrics down, models across, their difference last, intervals below the numbers."""
    from rich.console import Console
    from rich.table import Table

    names, console = list(described["models"]), Console(markup=False)
    for source, part in islice(described["sources"].items(), SHOWN):
        rows = "1 row" if part["rows"] == 1 else f"{part['rows']:,} rows"
        table = Table(title=f"{source}: {rows}", title_justify="left")
        table.add_column("", no_wrap=True)
        for column in (*names, *(["difference", "better in"] if "difference" in part else [])):
            table.add_column(column, justify="right", overflow="fold")
        for row in _table_rows(part, names):
            table.add_row(*row)
        console.print(table)
    if len(described["sources"]) > SHOWN:
        console.print(f"{len(described['sources']) - SHOWN:,} more sources are not shown; the JSON has them.")
    told = f"[..] has {described['interval']:.0f} % of {described['resamples']:,} bootstrap samples"
    if described["difference"]:
        told += f", of the same rows for both; the difference is {described['difference']}"
    console.print(f"{told}.", soft_wrap=True)


def _table_rows(part: Mapping[str, Any], names: Sequence[str]) -> list[list[str]]:
    rows, models = [], part["models"]
    for metric in (name for name in METRICS if name in models[names[0]]):
        cells = [_with_interval(metric, models[name][metric]) for name in names]
        if "difference" in part:
            apart = part["difference"].get(metric)
            cells += [_with_interval(metric, apart, sign="+"), _share(apart)] if apart else ["", ""]
        rows.append([f"{METRICS[metric]} {'↓' if metric in LOWER_IS_BETTER else '↑'}", *cells])
    if any(models[name]["answered"] for name in names):
        rows.append(["answers cut", *(f"{models[name]['cut']:,} of {models[name]['answered']:,}" for name in names)])
    return rows


def _with_interval(metric: str, found: Mapping[str, float], sign: str = "") -> str:
    value, low, high = (short_number(metric, found[name], sign) for name in ("value", "low", "high"))
    return f"{value}\n[{low}, {high}]"


def _share(apart: Mapping[str, float]) -> str:
    """In how many of the draws the second model is better."""
    return f"{apart['better']:.0%}" if apart["better"] or apart["worse"] else "equal"
