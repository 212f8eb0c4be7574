"""The rows of one file, or of one hub data set, as they stand in it: one at a time, in bounded memory.

A file is JSON Lines, a JSON array (alone or as {"data": [...]}), CSV, TSV or Parquet, each also compressed (.gz, .zst).
No row decides what is opened.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from ds_sft.data.bad_row import BadRow
from ds_sft.errors import UserError

MAX_ROW_BYTES = 16 * 2**20  # a longer row is refused unread: a line without an end must not fill the memory
CHUNK = 1 << 20  # bytes read at a time
BATCH_ROWS, BATCH_BYTES = 256, 8 * 2**20  # of a Parquet file, read at a time
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".jsonl": "lines", ".ndjson": "lines", ".json": "json", ".csv": "csv", ".tsv": "tsv",
         ".parquet": "parquet"}  # fmt: skip
ROWS_UNDER = ("data", "rows", "examples", "instances", "records", "items", "samples", "train")  # {"data": [...]}
TOO_LARGE = "a row is too large"
# Fields that need not be there: what a CSV file says of them with an empty cell.
OPTIONAL = frozenset(["system", "input", "history", "tools", "reasoning_content", "reasoning", "thinking"])
BLANK = re.compile(r"[ \t\r\n]*")
OBJECT_BEGINS, FIELD_BEGINS, COLON = (re.compile(rf"\s*{mark}\s*") for mark in ("{", ",", ":"))
ROWS_BEGIN = re.compile(r"\[\s*[{\]]")
# Fields that make a row of an object, whatever lists it has besides.
A_ROW = ({"question", "answer"}, {"messages"}, {"conversations"}, {"output"}, {"prompt", "completion"})

Raw = bytes | dict[str, Any] | BadRow  # a row in JSON, a row in Python values, or what is wrong with it


@dataclass
class BytesRead:
    """How much of a file has been read, for whoever shows it."""

    count: int = 0  # of the file as it is on disk


def kind_of(path: Path) -> str | None:
    """lines, json, csv, tsv or parquet by a file's name; None where it does not tell."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return KINDS.get(name.suffix.lower())


class readable:
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


def file_rows(path: Path, bytes_read: BytesRead | None = None) -> Iterator[tuple[int, Raw]]:
    """Yield the line number (the row number in Parquet) and the row.

    Raises:
        UserError: the file as a whole cannot be read, from here on.
    """
    with readable(path), path.open("rb") as raw:
        kind = kind_of(path) or "json"
        if kind == "parquet":
            yield from _parquet_rows(path, raw)
            return
        with _uncompressed(path, _Counted(raw, bytes_read or BytesRead())) as stream:
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
    """A file that counts the bytes that are read from it."""

    def __init__(self, file: IO[bytes], bytes_read: BytesRead) -> None:
        self.file, self.bytes_read = file, bytes_read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.file.readinto(buffer)  # type: ignore[attr-defined]
        self.bytes_read.count += count
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


def hub_rows(name: str, config: str | None, split: str) -> Iterator[tuple[int, Raw]]:
    """Yield the row number and the row of one split of a data set of the Hugging Face hub.

    Raises:
        UserError: the data set cannot be read, from here on.
    """
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            large = _size(row) > MAX_ROW_BYTES
            yield number, BadRow(TOO_LARGE, f"a row of more than {MAX_ROW_BYTES:,} bytes") if large else row
    except (OSError, ValueError, ImportError, RuntimeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"hub data set {name!r}, split {split!r}: {type(error).__name__}: {reason}") from None
