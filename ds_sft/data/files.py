"""Files, folders, globs and hub data sets -> rows as they stand in them, one at a time, in bounded memory.

JSON Lines, a JSON array (alone or as {"data": [...]}), CSV, TSV and Parquet, each also compressed (.gz, .zst), and data
sets of the Hugging Face hub. No row decides what is opened: only what the keys `train_file` and `eval_file` name is
read.
"""

from __future__ import annotations

import codecs
import csv
import glob
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ds_sft.config.extension import is_dotted
from ds_sft.config.keys import DATA_FORMATS
from ds_sft.errors import UserError

MAX_ROW_BYTES = 16 * 2**20  # a longer row is refused unread: a line without an end must not fill the memory
CHUNK = 1 << 20  # bytes read at a time
BATCH_ROWS, BATCH_BYTES = 256, 8 * 2**20  # of a Parquet file, read at a time
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "tsv",
         ".parquet": "parquet"}  # fmt: skip
ROWS_UNDER = ("data", "rows", "examples", "instances", "records", "items", "samples", "train")  # {"data": [...]}
HUB = re.compile(r"hub:(?P<name>.+)|(?P<bare>[A-Za-z0-9][\w.-]*/[\w.-]+)")
TOO_LARGE = "a row is too large"
# Fields that need not be there: what a CSV file says of them with an empty cell.
OPTIONAL = frozenset(["system", "input", "history", "tools", "reasoning_content", "reasoning", "thinking"])
BLANK = re.compile(r"[ \t\r\n]*")
OBJECT_BEGINS, FIELD_BEGINS, COLON = (re.compile(rf"\s*{mark}\s*") for mark in ("{", ",", ":"))
ROWS_BEGIN = re.compile(r"\[\s*[{\]]")
# Fields that make a row of an object, whatever lists it has besides.
A_ROW = ({"question", "answer"}, {"messages"}, {"conversations"}, {"output"}, {"prompt", "completion"})


class BadRow(ValueError):
    """A row that cannot be used. `reason` is a fixed phrase to count by, the text says what was found."""

    def __init__(self, reason: str, text: str) -> None:
        # What a row holds must not break the line, nor command the terminal.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.reason, str(self))  # rows travel between processes


Raw = bytes | dict[str, Any] | BadRow  # a row in JSON, a row in Python values, or what is wrong with it


@dataclass(frozen=True)
class DataFile:
    """One file, or one split of a hub data set, and how much of it is wanted."""

    name: str  # a path, or a hub data set's name
    weight: float = 1.0  # how often each row is learned from in an epoch; 0.5 takes half of the rows
    limit: int | None = None  # rows read at most
    hub: bool = False
    split: str = "train"  # of a hub data set, as is `config`
    config: str | None = None
    data_format: str | None = None  # of this file; None: what the run's key says, as with `data_fields`
    data_fields: tuple[tuple[str, str], ...] | None = None

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where it is not known."""
        return None if self.hub else Path(self.name).stat().st_size

    @property
    def kind(self) -> str:
        """How its bytes are read: the same ones may be a JSON array, or lines, or compressed."""
        path = Path(self.name)
        return "hub" if self.hub else f"{kind_of(path) or 'json'} {COMPRESSED.get(path.suffix.lower())}"

    def rows(self, progress: Progress | None = None) -> Iterator[tuple[int, Raw]]:
        """Yield the line number (the row number in Parquet and on the hub) and the row.

        Raises:
            UserError: the file as a whole cannot be read, from here on.
        """
        rows = _hub_rows(self) if self.hub else _file_rows(Path(self.name), progress or Progress())
        yield from islice(rows, self.limit)  # and not a row further: what comes next may be broken

    def digest(self, memory: Path | None = None) -> str:
        """A hash of the bytes; of the commit for a hub data set.

        Args:
            memory: folder where commits are written down, for nodes that cannot ask the hub.
        """
        if self.hub:
            return _hub_digest(self, memory)
        with _readable(Path(self.name)), open(self.name, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(CHUNK):
                digest.update(block)
            return digest.hexdigest()


@dataclass
class Progress:
    """How far a file has been read, for whoever wants to show it."""

    bytes_read: int = 0  # of the file as it is on disk


# ---- What a key names


def find_files(value: Any, key: str) -> list[DataFile]:
    """The files that a key names: a path, a glob, a folder, a hub data set, or a list of these.

    In a list, an item may be a mapping of `path` and any of weight, limit, data_format, data_fields, split, config.

    Raises:
        UserError: nothing there, or an item that is not understood.
    """
    items = value if isinstance(value, list) else [value]
    found = [file for item in items for file in _find(item, key)]
    if not found:
        raise UserError(f"{key}: expected at least one file")
    return found


def _find(item: Any, key: str) -> list[DataFile]:
    options = dict(item) if isinstance(item, dict) else {"path": item}
    path, weight, limit = options.pop("path", None), options.pop("weight", 1), options.pop("limit", None)
    split, config = options.pop("split", "train"), options.pop("config", None)
    shape, names = options.pop("data_format", None), options.pop("data_fields", None)
    if not isinstance(path, str) or not path or options:
        found = json.dumps(item, ensure_ascii=False, default=str)[:80]
        keys = "weight, limit, split, config, data_format, data_fields"
        raise UserError(f"{key}: {found}: expected a path, or a mapping of path and any of {keys}")
    weight, limit = _number(weight, f"{key}: {path}: weight"), limit and _number(limit, f"{key}: {path}: limit")
    if limit is not None and (limit != int(limit) or limit < 1):
        raise UserError(f"{key}: {path}: limit: expected a whole number of rows, found {limit}")
    limit = None if limit is None else int(limit)
    read: dict[str, Any] = {
        "data_format": _shape(shape, f"{key}: {path}"),
        "data_fields": _fields(names, f"{key}: {path}"),
    }
    if (name := hub_name(path)) is not None:
        return [DataFile(name, weight, limit, hub=True, split=str(split), config=config, **read)]
    return [DataFile(str(file), weight, limit, **read) for file in _paths(path, key)]


def _shape(value: Any, where: str) -> Any:
    if value is not None and value not in DATA_FORMATS and not is_dotted(value):
        known = ", ".join(DATA_FORMATS)
        raise UserError(f"{where}: data_format: expected one of {known}, or my.module:function, found {value!r}")
    return value


def _fields(value: Any, where: str) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise UserError(f"{where}: data_fields: expected our names and the file's: {{question: prompt}}")
    return tuple(value.items())


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1e9:
        raise UserError(f"{where}: expected a number above 0, found {value!r}")
    return number


def hub_name(path: str) -> str | None:
    """The data set that a text names: hub:NAME, or OWNER/NAME where no such file is here."""
    match = HUB.fullmatch(path)
    if match is None:
        return None
    if match["name"]:
        return match["name"]
    here = Path(path).exists() or Path(path).parent.is_dir() or kind_of(Path(path)) is not None
    return None if here else path


def _paths(text: str, key: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        return _inside(path, key)
    if path.exists() or not glob.has_magic(text):
        return [path]  # reading says what is wrong with it
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise UserError(f"{key}: {text}: no file matches (the current directory is {Path.cwd()})")
    return [file for name in found for file in ([name] if name.is_file() else _inside(name, key))]


def _inside(folder: Path, key: str) -> list[Path]:
    """The data files of a folder and those below it; links that lead out of it are not followed."""
    root = folder.resolve()
    found = [path for path in sorted(folder.rglob("*")) if kind_of(path) is not None and path.is_file()]
    inside = [path for path in found if path.resolve().is_relative_to(root)]
    if not inside:
        raise UserError(f"{key}: {folder}: no data in it; expected {', '.join(KINDS)}, or these with .gz, .zst")
    return inside


def kind_of(path: Path) -> str | None:
    """lines, json, csv, tsv or parquet by a file's name; None where it does not tell."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return KINDS.get(name.suffix.lower())


# ---- Reading


class _readable:
    """Turn what a file that cannot be read raises into one line that names it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        if self.path.is_dir():
            raise UserError(f"{self.path}: is a directory; give a file of it")
        if self.path.exists() and not self.path.is_file():
            raise UserError(f"{self.path}: is not a regular file")

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{self.path}: no such file (the current directory is {Path.cwd()})") from None
        if isinstance(error, (OSError, pa.ArrowException)):
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            raise UserError(f"{self.path}: cannot be read: {reason}") from None


def _file_rows(path: Path, progress: Progress) -> Iterator[tuple[int, Raw]]:
    with _readable(path), path.open("rb") as raw:
        kind = kind_of(path) or "json"
        if kind == "parquet":
            yield from _parquet_rows(path, raw)
            return
        with _uncompressed(path, _Counted(raw, progress)) as stream:
            yield from _text_rows(path, kind, stream)


def _text_rows(path: Path, kind: str, stream: io.BufferedReader) -> Iterator[tuple[int, Raw]]:
    if stream.peek(3)[:3] == codecs.BOM_UTF8:
        stream.read(3)
    if kind in ("csv", "tsv"):
        yield from _csv_rows(path, stream, "," if kind == "csv" else "\t")
        return
    head = _head(path)
    if head[:1] == b"[" and not _begins_with_a_row(head):
        yield from _array_rows(_Text(path, stream))
    elif _holds_rows(head) and not _begins_with_a_row(head):
        yield from _held_rows(_Text(path, stream))
    else:
        for number, line in _lines(stream):
            if isinstance(line, BadRow) or line.strip():
                yield number, line


def holds_lines(path: Path) -> bool:
    """Whether a file is JSON Lines, whatever its name says; one that cannot be read is not."""
    try:
        head = _head(path)
    except (OSError, pa.ArrowException):
        return False
    return _begins_with_a_row(head) or not (head[:1] == b"[" or _holds_rows(head))


def _head(path: Path) -> bytes:
    """The first line that is not blank, up to MAX_ROW_BYTES of it, and some of what follows: a part of a line would not
    tell a long row, which may have a list of rows among its fields, from an object that holds rows."""
    with path.open("rb") as raw, _uncompressed(path, raw) as stream:
        line = stream.readline(MAX_ROW_BYTES + 1).removeprefix(codecs.BOM_UTF8)
        while line and not line.strip():
            line = stream.readline(MAX_ROW_BYTES + 1)
        return line.lstrip() + stream.read(CHUNK)


def _begins_with_a_row(head: bytes) -> bool:
    """Whether the first line is JSON in itself and others follow: JSON Lines, though they begin like a list."""
    line, _, rest = head.partition(b"\n")
    if not rest.strip():
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _holds_rows(head: bytes) -> bool:
    """Whether a text, the end of which may be missing, is an object that holds rows in a list and is none itself."""
    names: dict[str, bool] = {}  # of the fields that have begun, and whether each is a list of rows
    with suppress(ValueError, RecursionError):  # broken, or cut off
        _read_names(head.decode("utf-8", "ignore"), names)
    return any(names.values()) and not any(fields <= names.keys() for fields in A_ROW)


def _read_names(text: str, names: dict[str, bool]) -> None:
    """Raises ValueError, RecursionError: where the text is no object any more."""
    decode, at = json.JSONDecoder().raw_decode, 0
    while begin := (FIELD_BEGINS if names else OBJECT_BEGINS).match(text, at):
        name, at = decode(text, begin.end())
        value = COLON.match(text, at)
        if not value or not isinstance(name, str):
            return
        names[name] = name in ROWS_UNDER and ROWS_BEGIN.match(text, value.end()) is not None
        _, at = decode(text, value.end())


class _Counted(io.RawIOBase):
    """A file that tells a `Progress` how much of it was read."""

    def __init__(self, file: IO[bytes], progress: Progress) -> None:
        self.file, self.progress = file, progress

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.progress.bytes_read += count
        return count


def _uncompressed(path: Path, raw: io.RawIOBase | io.BufferedReader) -> io.BufferedReader:
    codec = COMPRESSED.get(path.suffix.lower())
    stream = raw if codec is None else pa.CompressedInputStream(io.BufferedReader(raw, CHUNK), codec)
    return io.BufferedReader(stream, CHUNK)


def _lines(stream: io.BufferedReader) -> Iterator[tuple[int, bytes | BadRow]]:
    """Lines with their numbers; of one that is too long no more than MAX_ROW_BYTES are ever held."""
    number = 0
    while line := stream.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) <= MAX_ROW_BYTES:
            yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(CHUNK)
        yield number, BadRow(TOO_LARGE, f"a line of more than {MAX_ROW_BYTES:,} bytes; expected one row a line")


def _array_rows(text: _Text) -> Iterator[tuple[int, bytes]]:
    """The items of one JSON array, as JSON, with the number of the line on which each begins."""
    yield from text.items()
    if text.peek():
        text.fail("expected nothing after the array")


def _held_rows(text: _Text) -> Iterator[tuple[int, Raw]]:
    """The rows that an object holds in a list; other fields of it, which belong to no row, are bad rows."""
    rows_under = ""
    text.take("{")
    while text.peek() != "}":
        line, name = text.line, text.item()
        text.take(":")
        if text.peek() == "[" and json.loads(name) in ROWS_UNDER:
            if rows_under:
                text.fail(f"{rows_under} and {name}: two lists of rows")
            rows_under = name
            yield from text.items()
        elif json.loads(text.item()) not in (None, "", [], {}):
            yield line, BadRow("a field beside the rows", f"field {name[:40]} stands beside the rows, in none of them; "
                               "remove it, or write it into the rows")  # fmt: skip
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if text.peek():
        text.fail("expected nothing after the object that holds the rows")


class _Text:
    """A window over the text of a file that grows no larger than an item."""

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self.path, self.stream = path, stream
        self.decode = codecs.getincrementaldecoder("utf-8")().decode
        self.parse = json.JSONDecoder().raw_decode
        self.window, self.at, self.line, self.whole = "", 0, 1, False

    def more(self) -> bool:
        """Drop what was taken and read on; False at the end of the file."""
        if self.whole:
            return False
        block = self.stream.read(max(CHUNK, len(self.window) - self.at))  # doubles: an item is parsed again each time
        self.whole = not block
        try:
            self.window = self.window[self.at :] + self.decode(block, final=self.whole)
        except UnicodeDecodeError as error:
            self.fail(f"not UTF-8: {error.reason}; save the file as UTF-8")
        self.at = 0
        return True

    def peek(self) -> str:
        """Pass over white space; the next character, or nothing at the end of the file."""
        while True:
            match = BLANK.match(self.window, self.at)
            self.advance(match.end() - self.at if match else 0)
            if self.at < len(self.window):
                return self.window[self.at]
            if not self.more():
                return ""

    def advance(self, count: int) -> None:
        self.line += self.window.count("\n", self.at, self.at + count)
        self.at += count

    def take(self, character: str) -> None:
        """Pass over white space and this character.

        Raises:
            UserError: another one is here.
        """
        if self.peek() != character:
            self.fail(f"expected {character}")
        self.advance(1)

    def items(self) -> Iterator[tuple[int, bytes]]:
        """The values of the array that begins here, each with the number of its line."""
        self.take("[")
        closed = self.peek() == "]"
        while not closed:
            self.peek()
            number, item = self.line, self.item()
            yield number, item.encode("utf-8", "surrogatepass")
            closed = self.peek() == "]"
            if not closed and self.peek() != ",":
                self.fail("expected a comma or ] after an item")
            self.advance(0 if closed else 1)
        self.advance(1)

    def item(self) -> str:
        """The JSON value that begins here."""
        while True:
            try:
                _, end = self.parse(self.window, self.at)
                if end < len(self.window) or self.whole:
                    break
                problem = "the list is not closed"
            except json.JSONDecodeError as error:
                problem = error.msg
                end = len(self.window)
            except (ValueError, RecursionError) as error:
                self.fail(f"{type(error).__name__} in an item")
            if len(self.window) - self.at > MAX_ROW_BYTES:
                self.fail(f"{problem}, or an item of more than {MAX_ROW_BYTES:,} bytes")
            if not self.more():
                self.fail(problem)
        text = self.window[self.at : end]
        self.advance(end - self.at)
        return text

    def fail(self, problem: str) -> Any:
        raise UserError(f"{self.path}:{self.line}: not JSON: {problem}; expected an array of objects")


def _csv_rows(path: Path, stream: io.BufferedReader, delimiter: str) -> Iterator[tuple[int, Raw]]:
    """Rows of a CSV or TSV file whose first line names the fields. An optional one that is empty is absent."""
    csv.field_size_limit(MAX_ROW_BYTES)
    lines = _CsvLines(path, stream)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    number = 1
    try:
        header = next(reader, [])
        if len(set(header)) < len(header) or not all(header):
            raise UserError(f"{path}:1: field names {', '.join(header)[:80]!r}: expected each once")
        number = reader.line_num + 1
        lines.held = 0
        for row in reader:
            lines.held = 0
            if row and len(row) != len(header):
                text = f"{len(row)} fields; expected {len(header)}: {', '.join(header)[:80]}"
                yield number, BadRow("another number of fields", text)
            elif row:
                cells = zip(header, row, strict=True)
                yield number, {name: cell for name, cell in cells if cell or name not in OPTIONAL}
            number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{number}: not CSV: {error}") from None


class _CsvLines:
    """Lines of a CSV file; a record, which may go over many of them, holds no more than MAX_ROW_BYTES."""

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self.path, self.lines = path, _lines(stream)
        self.held = 0  # bytes of the record so far; whoever takes the record sets it back

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        number, line = next(self.lines)
        if isinstance(line, BadRow):
            raise UserError(f"{self.path}:{number}: {line}")
        self.held += len(line)
        if self.held > MAX_ROW_BYTES:
            raise UserError(f"{self.path}:{number}: a record of more than {MAX_ROW_BYTES:,} bytes; is a quote missing?")
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
            raise UserError(f"{self.path}:{number}: not UTF-8: {found}; save the file as UTF-8") from None


def _parquet_rows(path: Path, raw: IO[bytes]) -> Iterator[tuple[int, Raw]]:
    import pyarrow.parquet as pq

    with tempfile.TemporaryFile() as plain:
        source: IO[bytes] = raw
        if path.suffix.lower() in COMPRESSED:  # Parquet is read from its end: it must lie open
            stream = _uncompressed(path, raw)  # type: ignore[arg-type]
            while block := stream.read(CHUNK):
                plain.write(block)
            source = plain
        number, file = 0, pq.ParquetFile(source, pre_buffer=False)
        for group in range(file.num_row_groups):
            known = file.metadata.row_group(group)
            rows = BATCH_BYTES * known.num_rows // max(1, known.total_byte_size)  # as rows of this group are on average
            for batch in file.iter_batches(batch_size=min(max(1, rows), BATCH_ROWS), row_groups=[group]):
                for row in _parquet_batch(batch):
                    number += 1
                    yield number, row


def _parquet_batch(batch: pa.RecordBatch) -> Iterator[Raw]:
    """The rows of a batch; those too large, or with values that Python has no form for, are bad."""
    if batch.nbytes <= MAX_ROW_BYTES:
        try:
            yield from batch.to_pylist(maps_as_pydicts="strict")
            return
        except (ValueError, OverflowError, LookupError):  # a date in the year 300,000; bytes that are no text
            pass
    for i in range(len(batch)):
        row = batch.slice(i, 1)
        if row.nbytes > MAX_ROW_BYTES:
            yield BadRow(TOO_LARGE, f"a row of more than {MAX_ROW_BYTES:,} bytes")
            continue
        try:
            yield row.to_pylist(maps_as_pydicts="strict")[0]
        except (ValueError, OverflowError, LookupError) as error:
            yield BadRow("not readable", f"a value that cannot be read: {str(error)[:150] or type(error).__name__}")


def _size(value: Any) -> int:
    """Characters and bytes in a value, about."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_size, value))
    return len(value) if isinstance(value, (str, bytes)) else 8


# ---- The hub


def _hub_rows(file: DataFile) -> Iterator[tuple[int, Raw]]:
    import datasets

    try:
        rows = datasets.load_dataset(file.name, file.config, split=file.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            large = _size(row) > MAX_ROW_BYTES
            yield number, BadRow(TOO_LARGE, f"a row of more than {MAX_ROW_BYTES:,} bytes") if large else row
    except (OSError, ValueError, ImportError, RuntimeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"hub data set {file.name!r}, split {file.split!r}: {type(error).__name__}: {reason}") from None


def _hub_digest(file: DataFile, memory: Path | None) -> str:
    """Its commit; for a folder given as hub:FOLDER the names, sizes and times of what is in it."""
    folder = Path(file.name)
    if folder.is_dir():
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
        return repr((stats, file.split, file.config))
    from huggingface_hub import HfApi

    note = memory and memory / f"hub-{hashlib.sha256(file.name.encode()).hexdigest()[:24]}.commit"
    try:
        commit = HfApi().dataset_info(file.name).sha
        if note:
            beside = note.with_name(f"{note.name}.{os.getpid()}")
            beside.write_text(str(commit), encoding="utf-8")
            os.replace(beside, note)
        return repr((commit, file.split, file.config))
    except Exception as error:
        unreachable = isinstance(error, (OSError, RuntimeError)) and getattr(error, "response", None) is None
        if note and unreachable and note.is_file():  # as on a node without network: what `prepare` saw
            return repr((note.read_text(encoding="utf-8"), file.split, file.config))
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"hub data set {file.name!r}: {type(error).__name__}: {reason}") from None
