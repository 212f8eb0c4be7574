"""Steps, tokens, arithmetic and time of a whole run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_sft.config import Config
from ds_sft.plan.cost import model_flops_per_token
from ds_sft.plan.memory import Run
from ds_sft.plan.steps import steps_of

COUNTED = 256 * 2**20  # bytes of a file that are searched for line ends; the rest is estimated from them


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run from its first step to its last."""

    rows: int | None  # of training, or sequences of packed rows; None: not to be counted from here
    tokens_per_row: float
    tokens_known: bool  # measured; else every row is taken to be `max_length` long
    steps: int | None
    tokens: float | None
    flops: float | None  # of the model: recomputation is not counted
    seconds: float | None
    rate: float  # tokens a second of all GPUs
    rate_measured: bool
    checkpoints: int  # written in all


def schedule(config: Config, run: Run, step_seconds: float, *, rows: int | None, mean_tokens: float | None,
             rate: float | None) -> Schedule:  # fmt: skip
    """How long a run takes: at `rate` tokens a second, else at the step time that was estimated."""
    training = config.training
    rows = rows or rows_of(config.train_file)
    known = mean_tokens or _mean_tokens(config)
    per_row = min(known or config.max_length, config.max_length)
    per_step = run.micro_batch * run.accumulation * run.ranks
    if run.packed and rows is not None:  # sequences that are full, near enough
        rows, per_row = max(round(rows * per_row / config.max_length), 1), config.max_length
    counted = steps_of(training, run.micro_batch, run.accumulation, run.ranks, rows or 0)
    steps = counted.steps if rows or counted.max_steps > 0 else None
    tokens = None if steps is None else steps * per_step * per_row
    # Estimated steps are of rows as long as max_length: shorter ones are padded or take less time, none takes more.
    estimated = per_step * run.length / step_seconds
    used = rate or estimated
    return Schedule(
        rows=rows,
        tokens_per_row=per_row,
        tokens_known=known is not None,
        steps=steps,
        tokens=tokens,
        flops=None if tokens is None else tokens * model_flops_per_token(run.shape, int(per_row)),
        seconds=None if tokens is None else tokens / used,
        rate=used,
        rate_measured=rate is not None,
        checkpoints=0 if steps is None else len(counted.checkpoints(training)),
    )


def rows_of(given: str | list[Any]) -> int | None:
    """Rows of `train_file` where that names JSON Lines files; None for what only reading it would tell."""
    names = [given] if isinstance(given, str) else given
    counts = [count_rows(Path(name)) if isinstance(name, str) and name.endswith(".jsonl") else None for name in names]
    return None if None in counts else sum(filter(None, counts))


def count_rows(path: Path) -> int | None:
    """Lines of a JSON Lines file; of a large one an estimate from its first part. None where there is no file."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(COUNTED)
    except OSError:
        return None
    lines = head.count(b"\n") + (total <= COUNTED and not head.endswith(b"\n") and bool(head))
    return lines if total <= COUNTED else round(lines * total / COUNTED)


def _mean_tokens(config: Config) -> float | None:
    """Tokens of a row, from the report of an earlier run into the same folder."""
    try:
        report = json.loads((config.output_dir / "data_report.json").read_text(encoding="utf-8"))
        return float(report["train"]["tokens"] / report["train"]["rows_kept"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def measured_rate(config: Config, ranks: int) -> float | None:
    """Tokens a second of an earlier run into the same folder with as many ranks."""
    try:
        found = json.loads((config.output_dir / "run.json").read_text(encoding="utf-8"))
        return float(found["tokens_per_second"]) if found["world_size"] == ranks else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
