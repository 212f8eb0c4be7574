"""How many rows, or packed sequences, an epoch has, before a run has encoded them: for `ds-sft launch` and `plan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.readers import holds_lines
from ds_sft.data.records import read_dialogues, reading_of
from ds_sft.data.sources import DataFile, find_files
from ds_sft.errors import UserError
from ds_sft.plan.schedule import count_lines

Count = Callable[[DataFile, Config], int | None]


def rows_of_epoch(config: Config, count: Count) -> int | None:
    """Rows of an epoch: after limits, `val_size`, weights, before the length policy. None where `count` is at a loss.

    Raises:
        UserError: a file cannot be read.
    """
    weights, counts = [], []
    for file in find_files(config.train_file, "train_file"):
        found = count(file, config)
        if found is None:
            return None
        weights.append(file.weight)
        counts.append(found)
    rows = sum(counts)
    aside = round(config.val_size * rows) if config.val_size < 1 else int(config.val_size)
    chosen = sum(weight * found for weight, found in zip(weights, counts, strict=True))
    return round(chosen * max(0, rows - aside) / max(1, rows))


def count_usable(file: DataFile, config: Config) -> int:
    """Rows of a file that a run will use, by reading them all.

    Raises:
        UserError: a row is unusable and `on_bad_row` is error.
    """
    count = 0
    for number, row in read_dialogues(file, reading_of(config, file)):
        if not isinstance(row, BadRow):
            count += 1
        elif config.on_bad_row == "error":
            raise UserError(f"{file.name}:{number}: {row} (on_bad_row: skip leaves such rows out)")
    return count


def count_quickly(file: DataFile, config: Config) -> int | None:
    """Lines that are not blank of a JSON Lines file, unread; None for what only reading it would tell."""
    counted = file.kind == "lines None" and holds_lines(Path(file.name))
    lines = count_lines(file.name) if counted else None
    return lines if lines is None or file.limit is None else min(lines, file.limit)
