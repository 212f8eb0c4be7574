"""Encoded files on disk: built by all cores in flat memory, continued where a build was interrupted, and checked.

A file is read in blocks; each becomes a part: rows in Arrow, figures of each row, and counts, written last and with the
hashes of the other two. What is whole is renamed into place. A folder with a byte changed or missing is built again.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash
from filelock import FileLock

from ds_sft.config.extension import is_dotted, source_hash
from ds_sft.config.keys import TEMPLATES, Config
from ds_sft.data.encode import Encoded, Encoder, use_threads
from ds_sft.data.files import BadRow, DataFile, Progress, Raw
from ds_sft.data.records import Dialogue, Reading, parse_row, reading_of
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch

MAX_BAD_ROWS_SHOWN = 20
MAX_FIELDS = 100  # names of fields that are counted; rows may bring names without end
OTHER_FIELDS = "(others)"
BLOCK_BYTES = 8 * 2**20  # of JSON in a block, about: what a process holds at a time
FIRST_BLOCKS, FIRST_ROWS, BLOCK_ROWS = 16, 2000, 16_000  # small blocks first, so that small files keep all cores busy
BATCH_ROWS, BATCH_BYTES = 1000, 2**20  # rows encoded together, at most; a longer one by itself
SAY_SECONDS = 10.0  # between two lines of progress in a log
STATS = np.dtype(
    [
        ("row", "<i8"),  # line in the file
        ("length", "<i4"),  # tokens before any was cut
        ("tokens", "<i4"),
        ("supervised", "<i4"),
        ("supervised_cut", "<i4"),
        ("hash", "<u8"),  # of the ids
        ("forged", "?"),  # whether text of it became special tokens
        ("textless", "?"),  # whether an answer in it has no text
    ]
)
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


@dataclass
class Counts:
    """What happened to the rows of a block or a file."""

    rows_read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    dropped_tokens: int = 0  # of rows left out because of their length
    dropped_supervised: int = 0
    rows_split: int = 0
    bad_rows: int = 0  # of those dropped, the ones that were no usable dialogue
    messages: list[str] = field(default_factory=list)  # the first bad rows: "LINE: what is wrong"
    lost: list[str] = field(default_factory=list)  # the first rows left out because of their length, likewise
    unread: dict[str, list[int]] = field(default_factory=dict)  # field nobody reads -> rows that have it, the first
    left_out: dict[str, list[int]] = field(default_factory=dict)  # likewise: what the template leaves out

    def add(self, other: Counts) -> None:
        self.rows_read += other.rows_read
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.dropped_tokens += other.dropped_tokens
        self.dropped_supervised += other.dropped_supervised
        self.rows_split += other.rows_split
        self.bad_rows += other.bad_rows
        self.messages = (self.messages + other.messages)[:MAX_BAD_ROWS_SHOWN]
        self.lost = (self.lost + other.lost)[:MAX_BAD_ROWS_SHOWN]
        for mine, others in ((self.unread, other.unread), (self.left_out, other.left_out)):
            for name, (rows, first) in others.items():
                count_field(mine, name, rows, first)


def count_field(counts: dict[str, list[int]], name: str, rows: int, first: int) -> None:
    """Add to the rows that a field was found in; of too many names the last ones are counted together."""
    if name not in counts and len(counts) >= MAX_FIELDS:
        name = OTHER_FIELDS
    known = counts.setdefault(name, [0, first])
    known[:] = known[0] + rows, min(known[1], first)


@dataclass(frozen=True)
class EncodedFile:
    """A file as it lies in the cache."""

    file: DataFile
    data: datasets.Dataset  # columns input_ids, labels
    stats: np.ndarray  # [rows] of STATS
    lost: np.ndarray  # [rows left out because of their length] of STATS
    counts: Counts


Block = tuple[int, list[tuple[int, Raw]]]  # number of the block, rows with their lines


@dataclass(frozen=True)
class Builder:
    """What the processes that encode share."""

    file: str
    encoder: Encoder
    reading: Reading
    on_bad_row: str
    overlong: str


def encode_file(file: DataFile, config: Config, settings: str, encoder: Encoder, launch: Launch) -> EncodedFile:
    """Encode a file, or find it in the cache. Local rank 0 builds; the others wait for a folder that is whole.

    Args:
        settings: what else than the file decides the rows, see `settings_key`.

    Raises:
        UserError: the file, or with `on_bad_row: error` a row of it, cannot be used.
    """
    word = _word(file, settings, launch, cache_dir(config))
    if launch.local_rank != 0 and word is not None:
        return _open(file, _heard(word))
    folder = cache_dir(config) / f"encoded-{_file_key(file, settings, cache_dir(config))}"
    if launch.local_rank != 0:
        _wait_for(folder)
    elif intact(folder):
        launch.say(f"{file.name}: already encoded in {folder}")
        _say_bad_rows(file, _open(file, folder).counts, launch)
    else:
        with FileLock(f"{folder}.lock"):
            if not intact(folder):  # another node may have built it meanwhile
                _build(file, config, encoder, folder, launch)
    if launch.local_rank == 0 and word is not None:
        _tell(word, folder)
    return _open(file, folder)


def cache_dir(config: Config) -> Path:
    """`cache_dir`, else DS_SFT_CACHE, else ds_sft under the user's cache; made if absent."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_sft"
    path = Path(config.cache_dir or os.environ.get("DS_SFT_CACHE") or home).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir: {path} cannot be made: {error.strerror}; name another folder") from None
    return path


def settings_key(config: Config, tokenizer: Any) -> str:
    """A hash of all but the file that decides the encoded rows: tokenizer, settings, and the code that encodes."""
    settings = [
        config.system_prompt, config.max_length, config.on_bad_row, shape_of(config.data_format), config.data_fields,
        config.template, config.mask, config.thinking, config.allow_special_tokens, config.overlong,
        str(tokenizer.pad_token), tokenizer.pad_token_id, tokenizer.special_tokens_map, tokenizer.chat_template,
        version("tokenizers"), version("transformers"), version("pyarrow"),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    if config.template not in TEMPLATES and Path(config.template).expanduser().is_file():
        digest.update(Path(config.template).expanduser().read_bytes())
    # The backend's own description holds vocabulary, merges, normaliser and special tokens.
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in (
        "cache",
        "content",
        "encode",
        "files",
        "hermes",
        "records",
        "rendered",
        "shapes",
        "templates",
        "turns",
        "values",
    ):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def shape_of(data_format: str | None) -> str | None:
    """A shape as a key of the cache: of a user's function with the source that it is in."""
    source = f" {source_hash(data_format, 'data_format')}" if data_format and is_dotted(data_format) else ""
    return data_format and data_format + source


def _file_key(file: DataFile, settings: str, memory: Path) -> str:
    read = (file.kind, file.limit, shape_of(file.data_format), file.data_fields)
    return hashlib.sha256(f"{file.digest(memory)} {read} {settings}".encode()).hexdigest()[:24]


# ---- What local rank 0 tells the others: it alone reads the file for its hash, and the folder to check it


def _word(file: DataFile, settings: str, launch: Launch, folder: Path) -> Path | None:
    """Where local rank 0 of this start of the run, and of no other, says which folder holds the encoded file.

    None where nothing tells which ranks were started together: then each finds out for itself.
    """
    if launch.launcher == "environment":
        return None
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    parent = os.getppid()
    start = [os.environ.get(name) for name in names] if launch.launcher == "slurm" else [parent, _started(parent)]
    stat = None if file.hub else _stat(file)
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT")
    read = (file.name, file.split, file.config, file.limit, shape_of(file.data_format), file.data_fields)
    known = [socket.gethostname(), start, restart, read, stat, settings]
    return folder / f"ready-{hashlib.sha256(repr(known).encode()).hexdigest()[:24]}"


def _started(process: int) -> str:
    """When it began, in ticks since boot: with its id it is itself and none before it."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _stat(file: DataFile) -> tuple[str, int, int] | None:
    try:
        stat = Path(file.name).stat()
    except OSError:
        return None  # reading it says what is wrong
    return str(Path(file.name).resolve()), stat.st_size, stat.st_mtime_ns


def _tell(word: Path, folder: Path) -> None:
    beside = word.with_name(f"{word.name}.{os.getpid()}")
    beside.write_text(folder.name, encoding="utf-8")
    os.replace(beside, word)
    atexit.register(word.unlink, missing_ok=True)


def _heard(word: Path) -> Path:
    """Wait for local rank 0's word; the launcher ends this rank if that one fails."""
    parent = os.getppid()
    while not word.is_file():
        _still_launched(parent, word)
        time.sleep(0.2)
    return word.with_name(word.read_text(encoding="utf-8"))


def _still_launched(parent: int, path: Path) -> None:
    if os.getppid() != parent:  # the launcher died: nobody is left to end this rank
        raise UserError(f"{path}: the launcher ended while this rank waited for the encoded data")


# ---- What is there


def intact(folder: Path) -> bool:
    """Whether a folder is complete and every file in it has the size and the hash it was written with."""
    try:
        names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parts"]
        return bool(names) and all(_part_intact(folder, name) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _part_intact(folder: Path, name: str) -> bool:
    try:
        files = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["files"]
        return all(_fingerprint(folder / file) == fingerprint for file, fingerprint in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fingerprint(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _wait_for(folder: Path) -> None:
    """Wait until local rank 0 has put a whole `folder` in place; the launcher ends this rank if that one fails."""
    parent = os.getppid()
    while not intact(folder):
        _still_launched(parent, folder)
        time.sleep(0.2)


def _open(file: DataFile, folder: Path) -> EncodedFile:
    names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parts"]
    counts, stats, lost, parts = Counts(), [], [], []
    for name in names:
        counts.add(Counts(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["counts"]))
        stats.append(np.load(folder / f"{name}.npy", mmap_mode="r"))
        lost.append(np.load(folder / f"{name}.lost.npy"))
        parts.append(datasets.Dataset.from_file(str(folder / f"{name}.arrow")))
    return EncodedFile(file, datasets.concatenate_datasets(parts), np.concatenate(stats), np.concatenate(lost), counts)


# ---- Building


def _build(file: DataFile, config: Config, encoder: Encoder, folder: Path, launch: Launch) -> None:
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
        _say_bad_rows(file, counts, launch)
        (building / "manifest.json").write_text(json.dumps({"parts": names}), encoding="utf-8")
        building.rename(folder)
    except UserError:  # the rows must change first, and with them the folder's name
        shutil.rmtree(building, ignore_errors=True)
        raise


def _say_bad_rows(file: DataFile, counts: Counts, launch: Launch) -> None:
    for message in counts.messages:
        launch.say(f"skipped {file.name}:{message}")
    rest = counts.bad_rows - len(counts.messages)
    if rest > 0:
        launch.say(f"{file.name}: {rest:,} more rows skipped")


def _encode_blocks(
    file: DataFile, builder: Builder, folder: Path, processes: int, launch: Launch
) -> tuple[Counts, list[str]]:
    """Encode block after block, several at a time; the counts of the file and the names of its parts."""
    progress, total, names = Progress(), Counts(), []
    meter = Meter(file, progress, launch)
    blocks = _blocks(file, progress)
    with _Pool(builder, folder, processes) as pool:
        for name, counts in pool.encode(blocks):
            total.add(counts)
            names.append(name)
            meter.show(total.rows_read)
    meter.done(total.rows_read)
    return total, names


def _blocks(file: DataFile, progress: Progress) -> Iterator[Block]:
    """Rows in blocks; the same for the same file, whatever the machine. A file without rows is one empty block."""
    number, rows, size = 0, [], 0
    for line, raw in file.rows(progress):
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
        if _part_intact(self.folder, name):
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
    files = {file: _fingerprint(folder / file) for file in (f"{name}.arrow", f"{name}.npy", f"{name}.lost.npy")}
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


class Meter:
    """Rows a second and the time left: on one line of a terminal, in a log every few seconds."""

    def __init__(self, file: DataFile, progress: Progress, launch: Launch) -> None:
        self.file, self.progress, self.launch = file, progress, launch
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
        share = self.progress.bytes_read / self.file.size if self.file.size else 0.0
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
