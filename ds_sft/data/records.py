"""Rows of a JSON Lines file -> questions and answers. Errors carry FILE:LINE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_sft.config import REFERENCE_PROMPT
from ds_sft.errors import UserError

EXPECTED = "expected question and answer, or instruction, input and output"


@dataclass(frozen=True)
class Record:
    """One dialogue: what the user says, and the answer to learn."""

    question: str
    answer: str


class BadRow(ValueError):
    """A row that cannot be used. `reason` is a fixed phrase to count by, the text says what was found."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def read_records(path: Path, *, system_prompt: str) -> Iterator[tuple[int, Record | BadRow]]:
    """Yield the line number and the record, or what is wrong with the row, for each line that is not blank.

    Raises:
        UserError: no such file, or not a file that can be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    yield number, _record_or_error(line, system_prompt)
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; give a JSON Lines file") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (the current directory is {Path.cwd()})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _record_or_error(line: bytes, system_prompt: str) -> Record | BadRow:
    try:
        return to_record(_parse(line), system_prompt=system_prompt)
    except BadRow as error:
        return error


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise BadRow("not UTF-8", f"not UTF-8: {found}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        text = f"not JSON: {error.msg} at column {error.colno}; expected one JSON object a line"
        raise BadRow("not JSON", text) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise BadRow("not JSON", f"not JSON: {type(error).__name__}; expected one JSON object a line") from None


def to_record(row: Any, *, system_prompt: str) -> Record:
    """Turn a parsed row into a record.

    `{"question", "answer"}` is taken as it is. In `{"instruction", "input", "output"}` the instruction is dropped where
    it is a system prompt (this run's, or the one that the reference script's converter wrote into every row), else it
    and the input, where there is one, on a line of its own, are the question: the convention of Alpaca data.

    Raises:
        BadRow: not an object, a field missing, or one that is not text.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {_json_type(row)}; expected one JSON object a line")
    if "output" in row and "answer" not in row:
        instruction, extra = _text(row, "instruction"), _text(row, "input") if "input" in row else ""
        if "input" in row and instruction in (system_prompt, REFERENCE_PROMPT):
            return Record(extra, _text(row, "output"))
        return Record(f"{instruction}\n{extra}" if extra else instruction, _text(row, "output"))
    return Record(_text(row, "question"), _text(row, "answer"))


def _text(row: dict[str, Any], field: str) -> str:
    if field not in row:
        found = ", ".join(sorted(map(str, row))) or "no field at all"
        raise BadRow(f"no field {field!r}", f"no field {field!r} (found: {found[:80]}); {EXPECTED}")
    value = row[field]
    if not isinstance(value, str):
        found = "null" if value is None else f"{_json_type(value)}: {json.dumps(value)[:40]}"
        raise BadRow(f"field {field!r} is not a string", f"field {field!r} is {found}; expected a string")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise BadRow("not Unicode text", f"field {field!r} holds half of a surrogate pair; expected Unicode text")
    return value


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
