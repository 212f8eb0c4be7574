"""Files -> encoded, cached data sets and the report of what happened to every row.

Encoding happens once per file system and before any process group exists: on each node local rank 0 builds (nodes that
share the disk take turns through a lock), the others wait for the finished folder. The cache is keyed by content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from ds_sft.config import Config
from ds_sft.data.encode import IGNORE_INDEX, encode_rows
from ds_sft.data.records import BadRow, Record, read_records
from ds_sft.errors import UserError
from ds_sft.runtime.distributed import Launch

MAX_BAD_ROWS_SHOWN = 20
ROWS_PER_PROCESS = 2000  # fewer rows are encoded sooner by one process than a second one starts
TOO_LONG = "the prompt alone fills max_length"
TEXT = datasets.Features({"question": datasets.Value("string"), "answer": datasets.Value("string")})
ENCODED = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "supervised": datasets.Value("int32"),  # tokens whose label counts
        "cut": datasets.Value("int32"),  # tokens lost to max_length
    }
)


@dataclass(frozen=True)
class Data:
    """What a run learns from and is measured by."""

    train: datasets.Dataset  # columns input_ids, labels: [tokens] each
    eval: datasets.Dataset | None
    report: dict[str, dict[str, Any]]  # split -> counts, see `Report`
    samples: list[Record]  # the first `num_predictions` rows of the validation file


@dataclass
class Report:
    """What happened to the rows of one file."""

    file: str
    rows_read: int = 0
    rows_kept: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    rows_truncated: int = 0
    tokens: int = 0
    tokens_cut: int = 0  # lost to max_length
    supervised_tokens: int = 0
    length_percentiles: dict[str, int] = field(default_factory=dict)  # tokens a row


def load_data(config: Config, tokenizer: Any, launch: Launch) -> Data:
    """Encode the train and validation files, or find them in the cache.

    Raises:
        UserError: a file or a row is unusable, or no row is left to train on.
    """
    train, train_report = _load_split(config, Path(config.train_file), tokenizer, launch)
    report = {"train": train_report}
    if config.eval_file is None:
        return Data(train, None, report, [])
    path = Path(config.eval_file)
    evaluation, report["eval"] = _load_split(config, path, tokenizer, launch)
    return Data(train, evaluation, report, read_samples(path, config))


def read_samples(path: Path, config: Config) -> list[Record]:
    """The first `num_predictions` usable rows of a file, to show what the model answers."""
    rows = (row for _, row in read_records(path, system_prompt=config.system_prompt) if isinstance(row, Record))
    return [row for row, _ in zip(rows, range(config.num_predictions), strict=False)]


def _load_split(config: Config, path: Path, tokenizer: Any, launch: Launch) -> tuple[datasets.Dataset, dict[str, Any]]:
    folder = cache_dir(config) / f"encoded-{_cache_key(config, path, tokenizer)}"
    if launch.local_rank == 0:
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                _build(config, path, tokenizer, folder, launch)
            else:
                launch.say(f"{path}: already encoded in {folder}")
    else:
        _wait_for(folder)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    # The same bytes under another name share the cache, not the name in the report.
    return datasets.load_from_disk(str(folder / "data")), report | {"file": str(path)}


def cache_dir(config: Config) -> Path:
    """`cache_dir`, else DS_SFT_CACHE, else ds_sft under the user's cache; made if absent."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_sft"
    path = Path(config.cache_dir or os.environ.get("DS_SFT_CACHE") or home).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir: {path} cannot be made: {error.strerror}; name another folder") from None
    return path


def _cache_key(config: Config, path: Path, tokenizer: Any) -> str:
    """A hash of all that decides the encoded rows: file bytes, tokenizer, settings, and the code that encodes."""
    digest = hashlib.sha256()
    digest.update(_hash_file(path))
    settings = (config.system_prompt, config.max_length, config.on_bad_row, tokenizer.pad_token_id)
    digest.update(repr((settings, version("datasets"), version("tokenizers"))).encode())
    # The backend's own description holds vocabulary, merges, normaliser and special tokens.
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:24]


def _hash_file(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest() if hasattr(hashlib, "file_digest") else _digest(file)
    except OSError:
        # The reader says what is wrong with the file, in one place.
        next(read_records(path, system_prompt=""), None)
        raise


def _digest(file: Any) -> bytes:
    """`hashlib.file_digest` of Python 3.11, for 3.10."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.digest()


def _wait_for(folder: Path) -> None:
    """Wait until local rank 0 has put `folder` in place; the launcher ends this rank if that one fails."""
    parent = os.getppid()
    while not folder.exists():
        if os.getppid() != parent:  # the launcher died: nobody is left to end this rank
            raise UserError(f"{folder}: the launcher ended while this rank waited for the encoded data")
        time.sleep(0.2)


def _build(config: Config, path: Path, tokenizer: Any, folder: Path, launch: Launch) -> None:
    """Encode into a folder beside the final one and rename it, so that what has the name is whole."""
    building = folder.with_name(folder.name + ".building")  # ours alone: the caller holds the lock
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    report = Report(file=str(path))
    try:
        launch.say(f"{path}: reading and encoding into {folder}")
        rows = _read(path, config, report, building, launch)
        data = _keep_supervised(_encode(rows, config, tokenizer), report) if len(rows) else rows
        if len(data) == 0:
            raise UserError(f"{path}: {_why_empty(report)}")
        data.save_to_disk(str(building / "data"))
        (building / "report.json").write_text(json.dumps(vars(report), ensure_ascii=False), encoding="utf-8")
        shutil.rmtree(building / "rows")
        building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _why_empty(report: Report) -> str:
    if not report.rows_read:
        return "the file has no rows; expected one JSON object a line"
    reasons = ", ".join(f"{reason}: {count}" for reason, count in report.rows_dropped.items())
    return f"none of the {report.rows_read} rows can be used ({reasons})"


def _read(path: Path, config: Config, report: Report, building: Path, launch: Launch) -> datasets.Dataset:
    """Stream the file's good rows into an Arrow file, counting the others; memory stays flat."""
    dropped: Counter[str] = Counter()

    def good_rows() -> Iterator[dict[str, str]]:
        for number, row in read_records(path, system_prompt=config.system_prompt):
            report.rows_read += 1
            if isinstance(row, Record):
                yield {"question": row.question, "answer": row.answer}
                continue
            _refuse(f"{path}:{number}: {row}", row, config, dropped, launch)

    rows = _write_arrow(good_rows(), building / "rows")
    if dropped.total() > MAX_BAD_ROWS_SHOWN:
        launch.say(f"{path}: {dropped.total() - MAX_BAD_ROWS_SHOWN} more rows skipped")
    report.rows_dropped = dict(dropped)
    return rows


def _refuse(message: str, row: BadRow, config: Config, dropped: Counter[str], launch: Launch) -> None:
    if config.on_bad_row == "error":
        raise UserError(f"{message} (on_bad_row: skip leaves such rows out)")
    dropped[row.reason] += 1
    if dropped.total() <= MAX_BAD_ROWS_SHOWN:
        launch.say(f"skipped {message}")


def _write_arrow(rows: Iterator[dict[str, str]], folder: Path) -> datasets.Dataset:
    """What `Dataset.from_generator` does, without hashing the generator and wrapping its errors."""
    from datasets.arrow_writer import ArrowWriter

    folder.mkdir()
    file = folder / "rows.arrow"
    with ArrowWriter(path=str(file), features=TEXT) as writer:
        for row in rows:
            writer.write(row)
        num_rows, _ = writer.finalize()
    return (
        datasets.Dataset.from_file(str(file))
        if num_rows
        else datasets.Dataset.from_dict({"question": [], "answer": []}, features=TEXT)
    )


def _encode(rows: datasets.Dataset, config: Config, tokenizer: Any) -> datasets.Dataset:
    processes = config.preprocessing_num_workers or len(os.sched_getaffinity(0))
    processes = max(1, min(processes, len(rows) // ROWS_PER_PROCESS))
    # Processes are the parallelism here; threads inside them would only compete (and warn after the fork).
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if processes > 1 else "true"

    def encode(batch: dict[str, list[str]]) -> dict[str, list[Any]]:
        encoded = encode_rows(
            tokenizer,
            batch["question"],
            batch["answer"],
            system_prompt=config.system_prompt,
            max_length=config.max_length,
        )
        return {
            "input_ids": [row.input_ids for row in encoded],
            "labels": [row.labels for row in encoded],
            "supervised": [sum(label != IGNORE_INDEX for label in row.labels) for row in encoded],
            "cut": [row.cut for row in encoded],
        }

    return rows.map(
        encode,
        batched=True,
        num_proc=processes if processes > 1 else None,
        remove_columns=rows.column_names,
        features=ENCODED,
        desc="encoding",
        load_from_cache_file=False,
        new_fingerprint="encoded",  # the folder's name is the key; no need to hash the tokenizer again
    )


def _keep_supervised(data: datasets.Dataset, report: Report) -> datasets.Dataset:
    """Drop the rows with nothing to learn and fill in the report's figures."""
    columns = data.with_format("numpy")
    supervised, cut = np.asarray(columns["supervised"][:]), np.asarray(columns["cut"][:])
    lengths = pc.list_value_length(data.data.column("input_ids")).to_numpy()
    keep = supervised > 0
    if not keep.all():
        report.rows_dropped[TOO_LONG] = int((~keep).sum())
    report.rows_kept = int(keep.sum())
    report.rows_truncated = int((cut[keep] > 0).sum())
    report.tokens_cut = int(cut[keep].sum())
    report.tokens = int(lengths[keep].sum())
    report.supervised_tokens = int(supervised[keep].sum())
    if report.rows_kept:
        quantiles = np.percentile(lengths[keep], (50, 90, 95, 99, 100), method="inverted_cdf")
        names = ("p50", "p90", "p95", "p99", "max")
        report.length_percentiles = {n: int(q) for n, q in zip(names, quantiles, strict=True)}
    return data.select(np.flatnonzero(keep)).select_columns(["input_ids", "labels"])


def print_report(report: dict[str, dict[str, Any]], launch: Launch) -> None:
    """Say on rank 0 what happened to every row."""
    if not launch.is_main:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Data", title_justify="left")
    table.add_column("")
    for split, counts in report.items():
        table.add_column(f"{split}: {counts['file']}", justify="right", overflow="fold")
    rows = {split: _report_rows(counts) for split, counts in report.items()}
    for name in dict.fromkeys(name for counts in rows.values() for name in counts):
        table.add_row(name, *(counts.get(name, "0") for counts in rows.values()))
    Console().print(table)


def _report_rows(counts: dict[str, Any]) -> dict[str, str]:
    share = counts["supervised_tokens"] / max(1, counts["tokens"])
    rows = {"rows read": f"{counts['rows_read']:,}", "rows kept": f"{counts['rows_kept']:,}"}
    rows |= {f"rows dropped: {reason}": f"{n:,}" for reason, n in counts["rows_dropped"].items()}
    rows["rows cut at max_length"] = f"{counts['rows_truncated']:,} ({counts['tokens_cut']:,} tokens lost)"
    rows["tokens"] = f"{counts['tokens']:,}"
    rows["supervised tokens"] = f"{counts['supervised_tokens']:,} ({share:.1%})"
    percentiles = counts["length_percentiles"].items()
    rows["tokens a row"] = "  ".join(f"{name} {value:,}" for name, value in percentiles)
    return rows
