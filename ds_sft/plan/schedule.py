"""Steps, tokens, arithmetic and time of a whole run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.cost import Hardware, model_flops_per_token, step_time
from ds_sft.plan.run import Run
from ds_sft.plan.steps import Steps, steps_of

COUNTED = 256 * 2**20  # bytes of a file that are searched for line ends; the rest is estimated from them


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A run from its first step to its last."""

    rows: int | None  # of training, or what they fill: packed sequences, micro batches; None: not to be counted here
    tokens_per_row: float
    tokens_known: bool  # measured, or full whatever fills them; else every row is taken to be `max_length` long
    steps: int | None
    tokens: float | None
    flops: float | None  # of the model: recomputation is not counted
    seconds: float | None
    rate: float | None  # tokens a second of all GPUs; None: nothing tells
    rate_measured: bool
    checkpoints: int | None  # written in all


def schedule(config: Config, run: Run, hardware: Hardware, *, rows: int | None, mean_tokens: float | None,
             rate: float | None) -> Schedule:  # fmt: skip
    """How long a run of `rows` an epoch takes: at `rate` tokens a second, else at the step time that was estimated."""
    training = config.training
    known = mean_tokens or mean_tokens_of(config)
    per_row = min(known or config.max_length, config.max_length)
    length = int(per_row)  # that attention sees: rows do not see each other
    size = run.batch_tokens if config.fills_batches else config.max_length if config.packing != "none" else None
    if size is not None:
        rows, per_row = None if rows is None else sequences(rows, per_row, size), size
    micro = 1 if config.fills_batches else run.micro_batch
    per_step = micro * run.accumulation * run.groups
    counted = steps_of(training, micro, run.accumulation, run.groups, rows or 0)
    steps = counted.steps if rows or counted.max_steps > 0 else None
    tokens = None if steps is None else steps * per_step * per_row
    # Shorter rows compute less, but what a step sends and updates stays the same.
    mean = run if size is not None else replace(run, length=max(length, 1))
    estimated = mean.batch_tokens * run.accumulation * run.groups / step_time(mean, hardware).total
    used = rate or estimated
    return Schedule(
        rows=rows,
        tokens_per_row=per_row,
        tokens_known=known is not None or (size is not None and rows is None),
        steps=steps,
        tokens=tokens,
        flops=None if tokens is None else tokens * model_flops_per_token(run.shape, length, run.choice),
        seconds=None if tokens is None else tokens / used,
        rate=used,
        rate_measured=rate is not None,
        checkpoints=_checkpoints(counted, training, rows),
    )


def _checkpoints(steps: Steps, training: Mapping[str, Any], rows: int | None) -> int | None:
    """How many a run writes; None where that depends on rows which cannot be counted."""
    strategy = training.get("save_strategy", "steps")
    if not rows and (strategy == "epoch" or (strategy == "steps" and steps.max_steps <= 0)):
        return None
    return len(steps.checkpoints(training))


def sequences(rows: int, mean_tokens: float, max_length: int) -> int:
    """Packed sequences of so many rows: full, near enough."""
    return max(round(rows * min(mean_tokens, max_length) / max_length), 1)


def count_lines(path: str) -> int | None:
    """Lines of a file that are not blank; of a large one an estimate from its first part. None where there is none."""
    lines = read = 0
    try:
        total = os.stat(path).st_size
        with open(path, "rb") as file:
            for line in file:
                lines += not line.isspace()
                read += len(line)
                if read >= COUNTED:
                    break
    except OSError:
        return None
    return lines if read >= total else round(lines * total / read)


def slurm_seconds(text: str) -> int:
    """Slurm's notations of a time in seconds: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises:
        UserError: it is none of them.
    """
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        raise UserError(f"time limit {text!r}: expected a time such as 30 (minutes), 24:00:00 or 2-12:00:00")
    days, *numbers = match.groups()
    values = [int(number) for number in numbers if number is not None]
    units = (3600, 60, 1) if days is not None or len(values) == 3 else (60, 1, 0)
    return int(days or 0) * 86400 + sum(v * unit for v, unit in zip(values, units, strict=False))


def mean_tokens_of(config: Config) -> float | None:
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
