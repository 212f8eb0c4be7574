"""Files -> the data sets of a run and the report of what happened to every row.

Encoding happens once per file system and before any process group exists; see `handover.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ds_sft.config.keys import Config
from ds_sft.config.values import is_repo
from ds_sft.data.bad_row import BadRow
from ds_sft.data.counts import MAX_BAD_ROWS_SHOWN as MAX_EXAMPLES
from ds_sft.data.counts import Counts
from ds_sft.data.encode import Encoder
from ds_sft.data.handover import encode_file
from ds_sft.data.records import Dialogue, read_dialogues, reading_of
from ds_sft.data.report import Report, make_report, print_report
from ds_sft.data.sources import DataFile, find_files
from ds_sft.data.store import STATS, EncodedFile, settings_key
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch, print_line

__all__ = ["Data", "Measured", "load_data", "load_measured", "print_report", "read_rows"]
ROWS = np.dtype([*STATS.descr, ("file", "<i4")])


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured by."""

    train: datasets.Dataset  # columns input_ids, labels: [tokens] each
    eval: datasets.Dataset | None
    report: dict[str, dict[str, Any]]  # split -> `Report`
    samples: list[Dialogue]  # the first `num_predictions` rows of the validation set
    rows: dict[str, np.ndarray]  # split -> [rows] of ROWS, in the order of the data set
    files: dict[str, list[DataFile]]  # split -> files, as `rows["file"]` counts them

    def where(self, split: str, row: int) -> str:
        """FILE:LINE that a row of a data set comes from."""
        found = self.rows[split][row]
        return f"{self.files[split][found['file']].name}:{found['row']}"


@dataclass(frozen=True)
class Measured:
    """Rows to measure a model with, each once, whatever the weight of its file."""

    data: datasets.Dataset  # columns input_ids, labels: [tokens] each
    rows: np.ndarray  # [rows] of ROWS
    files: list[DataFile]  # as `rows["file"]` counts them
    report: dict[str, dict[str, Any]]  # "eval" -> `Report`


@dataclass
class Split:
    """The encoded files of a key, end to end."""

    key: str
    files: list[EncodedFile]
    rows: np.ndarray  # [rows] of ROWS
    lost: np.ndarray  # likewise, of the rows left out because of their length
    counts: Counts

    @property
    def names(self) -> list[str]:
        return [encoded.file.name for encoded in self.files]

    @property
    def title(self) -> str:
        return ", ".join(self.names[:3]) + (f" and {len(self.names) - 3} more" if len(self.names) > 3 else "")

    def select(self, rows: np.ndarray) -> datasets.Dataset:
        """The rows with these numbers."""
        data = datasets.concatenate_datasets([encoded.data for encoded in self.files])
        whole = len(rows) == len(data) and bool((rows == np.arange(len(rows))).all())
        return data if whole else data.select(rows)


def load_data(config: Config, tokenizer: Any, launch: Launch) -> Data:
    """Encode the train and validation files, or find them in the cache.

    Raises:
        UserError: a file or a row is unusable, or no row is left to train on.
    """
    encoder, settings = Encoder(tokenizer, config), settings_key(config, tokenizer)
    if encoder.template.note:
        launch.say(encoder.template.note)
    train = _load(config.train_file, "train_file", config, settings, encoder, launch)
    seed = int(config.training.get("seed", 42))
    if config.eval_file is not None:
        held = _load(config.eval_file, "eval_file", config, settings, encoder, launch)
        learned, measured = np.arange(len(train.rows)), np.arange(len(held.rows))
    else:
        held = train
        learned, measured = set_aside(train.rows["hash"], config.val_size, seed)
        _check_val_size(config.val_size, train.rows["hash"], len(measured), launch)
    report = {"train": _report(train, learned)}
    chosen = weighted(train, learned, seed)
    report["train"].rows_per_epoch = len(chosen)
    rows, files = {"train": train.rows[chosen]}, {"train": [encoded.file for encoded in train.files]}
    evaluation = None
    if config.eval_file is not None or len(measured):
        evaluation = held.select(measured)
        report["eval"] = _report(held, measured, set_aside=held is train)
        rows["eval"], files["eval"] = held.rows[measured], [encoded.file for encoded in held.files]
        report["eval"].duplicates = int(np.isin(rows["eval"]["hash"], train.rows["hash"][learned]).sum())
    if held is train:
        report["train"].rows_set_aside = len(measured)
    samples = read_rows(rows["eval"], files["eval"], config, config.num_predictions) if evaluation is not None else []
    reports = {split: asdict(found) for split, found in report.items()}
    return Data(train.select(chosen), evaluation, reports, samples, rows, files)


def load_measured(config: Config, tokenizer: Any, launch: Launch, *, key: str = "eval_file") -> Measured | None:
    """The validation rows of a run, alone; None where it has none. `key`: how errors call `eval_file`.

    Raises:
        UserError: a file or a row is unusable, or no row is left.
    """
    if config.eval_file is None:
        data = load_data(config, tokenizer, launch) if config.val_size else None
        if data is None or data.eval is None:
            return None
        return Measured(data.eval, data.rows["eval"], data.files["eval"], {"eval": data.report["eval"]})
    encoder, settings = Encoder(tokenizer, config), settings_key(config, tokenizer)
    if encoder.template.note:
        launch.say(encoder.template.note)
    held = _load(config.eval_file, key, config, settings, encoder, launch)
    every = np.arange(len(held.rows))
    report = {"eval": asdict(_report(held, every))}
    return Measured(held.select(every), held.rows, [encoded.file for encoded in held.files], report)


def _load(value: Any, key: str, config: Config, settings: str, encoder: Encoder, launch: Launch) -> Split:
    files = [encode_file(file, config, settings, encoder, launch) for file in find_files(value, key)]
    counts = Counts()
    for encoded in files:
        counts.add(encoded.counts)
    counts.messages = [f"{e.file.name}:{message}" for e in files for message in e.counts.messages][:MAX_EXAMPLES]
    counts.lost = [f"{e.file.name}:{message}" for e in files for message in e.counts.lost][:MAX_EXAMPLES]
    rows = _numbered([encoded.stats for encoded in files])
    split = Split(key, files, rows, _numbered([encoded.lost for encoded in files]), counts)
    if not len(rows):
        raise UserError(f"{split.title}: {_why_empty(counts)}")
    return split


def _numbered(stats: Sequence[np.ndarray]) -> np.ndarray:
    """STATS of each file -> [rows] of ROWS."""
    rows = np.zeros(sum(map(len, stats)), ROWS)
    rows[list(STATS.names or ())] = np.concatenate(stats)
    rows["file"] = np.repeat(np.arange(len(stats)), [len(part) for part in stats])
    return rows


def _why_empty(counts: Counts) -> str:
    if not counts.rows_read:
        return "the file has no rows; expected one JSON object a line"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in counts.dropped.items())
    return f"none of the {counts.rows_read} rows can be used ({reasons})"


def _report(split: Split, rows: np.ndarray, *, set_aside: bool = False) -> Report:
    """The report on `rows`. What was dropped or split is told of train_file, not again of rows `set_aside` from it."""
    counts = Counts(rows_read=len(rows)) if set_aside else split.counts
    report = make_report(split.title, counts, split.rows[rows], split.names, None if set_aside else split.lost)
    if not set_aside:
        named = {encoded.file.name for encoded in split.files if encoded.file.hub and is_repo(encoded.file.name)}
        report.hub_datasets = sorted(name for name in named if not Path(name).exists())  # hub:FOLDER is a folder
        report.fields_not_read = _fields([(e.file.name, e.counts.unread) for e in split.files])
        report.left_out_by_template = _fields([(e.file.name, e.counts.left_out) for e in split.files])
    if len(split.files) > 1:
        kept = np.bincount(split.rows["file"][rows], minlength=len(split.files))
        report.files = {
            encoded.file.name: {
                "rows_read": int(kept[i]) if set_aside else encoded.counts.rows_read,
                "rows_kept": int(kept[i]),
                "rows_dropped": {} if set_aside else encoded.counts.dropped,
                "weight": encoded.file.weight,
                "limit": encoded.file.limit,
            }
            for i, encoded in enumerate(split.files)
        }
    return report


def _fields(found: Sequence[tuple[str, dict[str, list[int]]]]) -> dict[str, list[Any]]:
    """Counts of fields in each file -> name: [rows, FILE:LINE of the first], the most frequent first."""
    total: dict[str, list[Any]] = {}
    for file, counts in found:
        for name, (rows, first) in counts.items():
            known = total.setdefault(name, [0, f"{file}:{first}"])
            known[0] += rows
    return dict(sorted(total.items(), key=lambda item: -item[1][0]))


def _shuffled(hashes: np.ndarray, seed: int) -> np.ndarray:
    """A number for each row that depends on its content and the seed alone (the finaliser of splitmix64)."""
    mixed = hashes ^ np.uint64((seed * 0x9E3779B97F4A7C15 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def set_aside(hashes: np.ndarray, size: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to learn from and of those set aside: a share of the rows below 1, else a number of them.

    Which rows depends on their content and the seed, not on their order; equal rows go the same way.
    """
    order = _shuffled(hashes, seed)
    wanted = _number_of(size, len(hashes))
    if wanted == 0:
        return np.arange(len(hashes)), np.zeros(0, np.int64)
    limit = np.sort(order)[wanted - 1]
    return np.flatnonzero(order > limit), np.flatnonzero(order <= limit)


def _check_val_size(size: float, hashes: np.ndarray, measured: int, launch: Launch) -> None:
    """See that `val_size` leaves rows to learn from and rows to measure, and say where equal rows made these many.

    Raises:
        UserError: it leaves none.
    """
    rows, wanted = len(hashes), _number_of(size, len(hashes))
    if size and not measured:
        raise UserError(f"val_size: {size:g} of {rows:,} rows is none: write a number of rows, such as 1")
    equal = f"equal rows are set aside together, and only {len(np.unique(hashes)):,} of {rows:,} rows differ"
    if size and measured == rows:
        why = f" ({equal})" if wanted < rows else ""
        raise UserError(f"val_size: {size:g} leaves none of {rows:,} rows to learn from{why}: write less, or eval_file")
    if size and measured >= 2 * wanted:
        launch.say(f"val_size: {size:g} is {measured:,} rows and not {wanted:,}: {equal}.")


def _number_of(size: float, rows: int) -> int:
    return min(rows, round(size * rows) if size < 1 else int(size))


def weighted(split: Split, rows: np.ndarray, seed: int) -> np.ndarray:
    """Row numbers, each as often as its file's weight says; of a fraction the same rows in every run."""
    weights = np.array([encoded.file.weight for encoded in split.files])[split.rows["file"][rows]]
    if (weights == 1).all():
        return rows
    share = _shuffled(split.rows["hash"][rows], seed + 1) / 2.0**64
    return np.repeat(rows, np.floor(weights + share).astype(np.int64))


def read_rows(rows: np.ndarray, files: Sequence[DataFile], config: Config, count: int) -> list[Dialogue]:
    """The dialogues of the first `count` of these rows, read again from their files."""
    wanted = [(int(row["file"]), int(row["row"])) for row in rows[:count]]
    found: dict[tuple[int, int], Dialogue] = {}
    for file in {file for file, _ in wanted}:
        lines = {line for number, line in wanted if number == file}
        for line, dialogue in _lines(files[file], lines, config):
            found[file, line] = dialogue
    return [found[key] for key in wanted if key in found]


def _lines(file: DataFile, lines: set[int], config: Config) -> Iterator[tuple[int, Dialogue]]:
    try:
        for line, dialogue in read_dialogues(file, reading_of(config, file)):
            if line in lines and not isinstance(dialogue, BadRow):
                yield line, dialogue
            if line >= max(lines):
                return
    except UserError as error:
        if not file.hub:
            raise
        # The rows are encoded; only what is shown beside the model's answers is not here.
        print_line(f"{error}: its rows are not shown with the model's answers")
