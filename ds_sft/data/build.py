"""A data file is encoded by all cores in flat memory, and a build that was interrupted goes on where it stopped.

A file is read in blocks. Each block becomes a part of the encoded file: rows in Arrow, figures of each row, and counts,
which are written last. The folder gets its name when all parts are there.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.counts import MAX_BAD_ROWS_SHOWN, Counts, count_field
from ds_sft.data.encode import Encoded, Encoder, use_threads
from ds_sft.data.readers import BytesRead, Raw
from ds_sft.data.records import Dialogue, Reading, parse_row, reading_of
from ds_sft.data.sources import DataFile
from ds_sft.data.store import SCHEMA, STATS, file_hash, part_intact
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch

BLOCK_BYTES = 8 * 2**20  # of JSON in a block, about: what a process holds at a time
FIRST_BLOCKS, FIRST_ROWS, BLOCK_ROWS = 16, 2000, 16_000  # small blocks first, so that small files keep all cores busy
BATCH_ROWS, BATCH_BYTES = 1000, 2**20  # rows encoded together, at most; a longer one by itself
SAY_SECONDS = 10.0  # between two lines of progress in a log


Block = tuple[int, list[tuple[int, Raw]]]  # number of the block, rows with their lines


@dataclass(frozen=True)
class Builder:
    """What the processes that encode share."""

    file: str
    encoder: Encoder
    reading: Reading
    on_bad_row: str
    overlong: str


def build(file: DataFile, config: Config, encoder: Encoder, folder: Path, launch: Launch) -> None:
    """Encode into a folder beside the final one and rename it, so that what has the name is whole."""
    if folder.exists():
        launch.say(f"{file.name}: the encoded data in {folder} is damaged: building it again")
        shutil.rmtree(folder)
    building = folder.with_name(folder.name + ".building")  # ours alone: the caller holds the lock
    building.mkdir(exist_ok=True)
    found = len(list(building.glob("part-*.json")))
    start = f"continuing an interrupted build with {found} parts done" if found else "reading and encoding"
    launch.say(f"{file.name}: {start} into {folder}")
    builder = Builder(file.name, encoder, reading_of(config, file), config.on_bad_row, config.overlong)
    processes = config.preprocessing_num_workers or len(os.sched_getaffinity(0))
    try:
        counts, names = _encode_blocks(file, builder, building, processes, launch)
        say_bad_rows(file, counts, launch)
        (building / "manifest.json").write_text(json.dumps({"parts": names}), encoding="utf-8")
        building.rename(folder)
    except UserError:  # the rows must change first, and with them the folder's name
        shutil.rmtree(building, ignore_errors=True)
        raise


def say_bad_rows(file: DataFile, counts: Counts, launch: Launch) -> None:
    """Say what is wrong with the first rows that were skipped, and how many others there are."""
    for message in counts.messages:
        launch.say(f"skipped {file.name}:{message}")
    rest = counts.bad_rows - len(counts.messages)
    if rest > 0:
        launch.say(f"{file.name}: {rest:,} more rows skipped")


def _encode_blocks(
    file: DataFile, builder: Builder, folder: Path, processes: int, launch: Launch
) -> tuple[Counts, list[str]]:
    """Encode block after block, several at a time; the counts of the file and the names of its parts."""
    bytes_read, total, names = BytesRead(), Counts(), []
    progress = EncodingProgress(file, bytes_read, launch)
    blocks = _blocks(file, bytes_read)
    with _Pool(builder, folder, processes) as pool:
        for name, counts in pool.encode(blocks):
            total.add(counts)
            names.append(name)
            progress.show(total.rows_read)
    progress.done(total.rows_read)
    return total, names


def _blocks(file: DataFile, bytes_read: BytesRead) -> Iterator[Block]:
    """Rows in blocks; the same for the same file, whatever the machine. A file without rows is one empty block."""
    number, rows, size = 0, [], 0
    for line, raw in file.rows(bytes_read):
        rows.append((line, raw))
        size += _rough_size(raw)
        if len(rows) >= (FIRST_ROWS if number < FIRST_BLOCKS else BLOCK_ROWS) or size >= BLOCK_BYTES:
            yield number, rows
            number, rows, size = number + 1, [], 0
    if rows or number == 0:
        yield number, rows


def _batches(rows: list[tuple[int, Raw]]) -> Iterator[list[tuple[int, Raw]]]:
    """A block's rows in batches: beside a block a process then needs a few times a batch, or its longest row."""
    start, size = 0, 0
    for end, (_, raw) in enumerate(rows):
        size += _rough_size(raw)
        if end > start and (end - start >= BATCH_ROWS or size > BATCH_BYTES):
            yield rows[start:end]
            start, size = end, _rough_size(raw)
    if rows:
        yield rows[start:]


def _rough_size(raw: Raw) -> int:
    """Bytes of JSON, about."""
    if isinstance(raw, bytes):
        return len(raw)
    return sum(map(len, map(str, raw.values()))) if isinstance(raw, dict) else 100


class _Pool:
    """Processes that encode blocks; one block alone is encoded here, by the tokenizer's threads."""

    def __init__(self, builder: Builder, folder: Path, processes: int) -> None:
        self.builder, self.folder, self.processes = builder, folder, processes
        self.executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self.executor is not None:
            self.executor.shutdown(cancel_futures=True)  # the blocks in hand are finished, and kept
        use_threads(enabled=True)

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[str, Counts]]:
        """Name and counts of each part, in order; at most two blocks a process are in memory."""
        waiting: deque[tuple[str, Future[Counts] | Counts]] = deque()
        first, second = next(blocks), next(blocks, None)
        several = self.processes > 1 and second is not None
        use_threads(enabled=not several)
        if several:
            self._start()
        for block in _chain(first, second, blocks):
            waiting.append(self._submit(block))
            while len(waiting) > (2 * self.processes if several else 0):
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())

    def _start(self) -> None:
        global _builder
        _builder = self.builder  # inherited by fork: a tokenizer takes a second to send
        self.executor = ProcessPoolExecutor(
            self.processes, mp_context=multiprocessing.get_context("fork"), initializer=_start_worker
        )

    def _submit(self, block: Block) -> tuple[str, Future[Counts] | Counts]:
        number, rows = block
        name = f"part-{number:06}"
        if part_intact(self.folder, name):
            done = json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))["counts"]
            return name, Counts(**done)
        if self.executor is None:
            return name, encode_block(self.builder, self.folder, name, rows)
        return name, self.executor.submit(_encode_in_worker, self.folder, name, rows)


_builder: Builder | None = None  # of the processes that encode


def _start_worker() -> None:
    gc.freeze()  # what was inherited need not be searched for garbage, nor its pages be copied for that
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody is left behind by a parent that was killed


def _encode_in_worker(folder: Path, name: str, rows: list[tuple[int, Raw]]) -> Counts:
    assert _builder is not None
    return encode_block(_builder, folder, name, rows)


def _chain(first: Block, second: Block | None, rest: Iterator[Block]) -> Iterator[Block]:
    yield first
    if second is not None:
        yield second
        yield from rest


def _result(name: str, counts: Future[Counts] | Counts) -> tuple[str, Counts]:
    return name, counts if isinstance(counts, Counts) else counts.result()


def encode_block(builder: Builder, folder: Path, name: str, rows: list[tuple[int, Raw]]) -> Counts:
    """Encode rows into a part: NAME.arrow, NAME.npy, NAME.lost.npy and, last, NAME.json.

    Raises:
        UserError: a row cannot be used and the keys say that this ends the run.
    """
    counts, stats, lost = Counts(), [np.zeros(0, STATS)], [np.zeros(0, STATS)]
    with pa.OSFile(str(folder / f"{name}.arrow"), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for batch in _batches(rows):
            encoded, lines = _encode_batch(builder, batch, counts)
            writer.write_batch(_record_batch(encoded))
            stats.append(_stats(encoded, lines))
            lost.append(_lost(encoded, lines))
    np.save(folder / f"{name}.npy", np.concatenate(stats))
    np.save(folder / f"{name}.lost.npy", np.concatenate(lost))
    files = {file: file_hash(folder / file) for file in (f"{name}.arrow", f"{name}.npy", f"{name}.lost.npy")}
    text = json.dumps({"files": files, "counts": asdict(counts)}, ensure_ascii=False)
    beside = folder / f"{name}.json.tmp"
    beside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(beside, folder / f"{name}.json")
    return counts


def _encode_batch(builder: Builder, rows: list[tuple[int, Raw]], counts: Counts) -> tuple[Encoded, list[int]]:
    dialogues: list[Dialogue] = []
    lines: list[int] = []
    bad: list[tuple[int, BadRow]] = []
    for line, raw in rows:
        found = parse_row(raw, builder.reading)
        if isinstance(found, BadRow):
            bad.append((line, found))
        else:
            dialogues.append(found)
            lines.append(line)
    encoded = builder.encoder.encode(dialogues)
    bad += [(lines[i], error) for i, error in encoded.bad.items()]
    _count(builder, counts, encoded, lines, sorted(bad, key=lambda item: item[0]))
    _count_fields(counts, encoded, dialogues, lines)
    counts.rows_read += len(rows)
    return encoded, lines


def _count(builder: Builder, counts: Counts, encoded: Encoded, lines: list[int], bad: list[tuple[int, BadRow]]) -> None:
    if bad and builder.on_bad_row == "error":
        raise UserError(f"{builder.file}:{bad[0][0]}: {bad[0][1]} (on_bad_row: skip leaves such rows out)")
    for line, error in bad:
        counts.dropped[error.reason] = counts.dropped.get(error.reason, 0) + 1
        counts.bad_rows += 1
        if len(counts.messages) < MAX_BAD_ROWS_SHOWN:
            counts.messages.append(f"{line}: {error}")
    kept = set(encoded.dialogue.tolist())
    for i, (reason, tokens, supervised) in sorted(encoded.dropped.items()):
        if builder.overlong == "error":
            raise UserError(f"{builder.file}:{lines[i]}: {tokens:,} tokens, more than max_length (overlong: truncate, "
                            "drop or split goes on)")  # fmt: skip
        if i not in kept:
            counts.dropped[reason] = counts.dropped.get(reason, 0) + 1
            counts.lost = [*counts.lost, f"{lines[i]}: {reason}: {tokens:,} tokens"][:MAX_BAD_ROWS_SHOWN]
        counts.dropped_tokens += tokens
        counts.dropped_supervised += supervised
    counts.rows_split += encoded.split


def _count_fields(counts: Counts, encoded: Encoded, dialogues: list[Dialogue], lines: list[int]) -> None:
    """Fields that nobody reads, and what the template leaves out, in rows that are not bad."""
    for i, dialogue in enumerate(dialogues):
        if dialogue.unread and i not in encoded.bad:
            for name in dialogue.unread:
                count_field(counts.unread, name, 1, lines[i])
    for i, names in encoded.left_out.items():
        for name in sorted(names) if i not in encoded.bad else ():
            count_field(counts.left_out, name, 1, lines[i])


def _record_batch(encoded: Encoded) -> pa.RecordBatch:
    offsets = pa.array(encoded.starts, pa.int32())
    columns = [pa.ListArray.from_arrays(offsets, pa.array(ids)) for ids in (encoded.input_ids, encoded.labels)]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _stats(encoded: Encoded, lines: list[int]) -> np.ndarray:
    stats = np.zeros(len(encoded.dialogue), STATS)
    stats["row"] = np.asarray(lines, np.int64)[encoded.dialogue] if lines else 0
    stats["length"] = encoded.length
    stats["tokens"] = np.diff(encoded.starts)
    stats["supervised"] = encoded.supervised
    stats["supervised_cut"] = encoded.supervised_cut
    stats["forged"] = np.isin(encoded.dialogue, list(encoded.forged_dialogues))
    stats["textless"] = np.isin(encoded.dialogue, list(encoded.textless_dialogues))
    data, starts = encoded.input_ids.tobytes(), (encoded.starts * 4).tolist()
    stats["hash"] = [xxhash.xxh3_64_intdigest(data[a:b]) for a, b in pairwise(starts)]
    return stats


def _lost(encoded: Encoded, lines: list[int]) -> np.ndarray:
    """Dialogues that gave no row because of their length; `tokens` is 0."""
    kept = set(encoded.dialogue.tolist())
    lost = [(lines[i], tokens) for i, (_, tokens, _) in sorted(encoded.dropped.items()) if i not in kept]
    stats = np.zeros(len(lost), STATS)
    stats["row"], stats["length"] = [row for row, _ in lost], [tokens for _, tokens in lost]
    return stats


class EncodingProgress:
    """Rows a second and the time left: on one line of a terminal, in a log every few seconds."""

    def __init__(self, file: DataFile, bytes_read: BytesRead, launch: Launch) -> None:
        self.file, self.bytes_read, self.launch = file, bytes_read, launch
        self.started = self.said = time.monotonic()
        self.terminal = launch.is_main and sys.stdout.isatty()

    def show(self, rows: int) -> None:
        now = time.monotonic()
        if not self.launch.is_main or now - self.said < (0.2 if self.terminal else SAY_SECONDS):
            return
        self.said = now
        text = self.text(rows, now - self.started)
        print(f"\r{text}\033[K" if self.terminal else f"{text}\n", end="", flush=True)  # one write

    def text(self, rows: int, seconds: float) -> str:
        rate = f"{self.file.name}: {rows:,} rows, {rows / max(seconds, 1e-9):,.0f} rows/s"
        share = self.bytes_read.count / self.file.size if self.file.size else 0.0
        if not 0 < share <= 1:
            return rate
        left = seconds * (1 - share) / share
        return f"{rate}, {share:.0%} read, {int(left) // 60}:{int(left) % 60:02} left"

    def done(self, rows: int) -> None:
        if self.terminal:
            print("\r\033[K", end="")
        seconds = time.monotonic() - self.started
        self.launch.say(f"{self.file.name}: {rows:,} rows encoded in {seconds:,.1f} s "
                        f"({rows / max(seconds, 1e-9):,.0f} rows/s)")  # fmt: skip
