"""What a row is: a dialogue of messages, or what is wrong with it. Errors carry FILE:LINE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ds_sft.config.extension import is_dotted, load, require_call
from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import as_object
from ds_sft.data.readers import ROWS_UNDER, Raw
from ds_sft.data.shapes import Message, to_messages
from ds_sft.data.sources import DataFile
from ds_sft.errors import UserError


@dataclass(frozen=True)
class Dialogue:
    """The messages of one row and the tools that the assistant may call (JSON schemas, as in OpenAI's API)."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    unread: tuple[str, ...] = field(default=(), compare=False)  # fields of the row that hold something nobody reads

    @property
    def last_answer(self) -> int:
        """Index of the last assistant message; every dialogue has one."""
        return max(i for i, message in enumerate(self.messages) if message.role == "assistant")

    @property
    def question(self) -> str:
        """The message that the last answer answers."""
        return self.messages[self.last_answer - 1].content if self.last_answer else ""

    @property
    def answer(self) -> str:
        """The last answer, with the calls it makes in JSON."""
        message = self.messages[self.last_answer]
        functions = [call["function"] for call in message.tool_calls]
        calls = [json.dumps({**f, "arguments": as_object(f["arguments"])}, ensure_ascii=False) for f in functions]
        return "\n".join([message.content, *calls] if message.content else calls)


@dataclass(frozen=True)
class Reading:
    """How rows are read: what the run's keys say of it."""

    system_prompt: str  # an Alpaca instruction that is this prompt is not repeated in the question
    shape: str = "auto"  # one of `DATA_FORMATS`, or a user's function
    fields: Mapping[str, str] = field(default_factory=dict)  # our name of a field -> the file's


def reading_of(config: Config, file: DataFile | None = None) -> Reading:
    """What the keys say of how rows are read, or what is said for this file alone.

    Raises:
        UserError: a function of the user's that cannot be had, or that is to read fields by other names.
    """
    shape = (file and file.data_format) or config.data_format
    own = file.data_fields if file else None
    names = dict(config.data_fields or {}) if own is None else dict(own)
    if is_dotted(shape):
        require_call(load(shape, "data_format"), shape, "data_format", "row")
        if names:
            raise UserError(f"data_fields: {names}: {shape} reads a row's own fields: leave data_fields out")
    return Reading(config.system_prompt, shape, names)


def read_dialogues(file: DataFile, reading: Reading) -> Iterator[tuple[int, Dialogue | BadRow]]:
    """Yield line (or row) number and dialogue, or what is wrong with the row, for each row of a file.

    Raises:
        UserError: no such file, or not a file that can be read.
    """
    for number, raw in file.rows():
        yield number, parse_row(raw, reading)


def parse_row(raw: Raw, reading: Reading) -> Dialogue | BadRow:
    """A row as it stands in a file -> dialogue."""
    if isinstance(raw, BadRow):
        return raw
    try:
        return to_dialogue(parse_json(raw) if isinstance(raw, bytes) else raw, reading)
    except BadRow as error:
        return error


def parse_json(line: bytes) -> Any:
    """Raises BadRow: not UTF-8, not JSON."""
    try:
        return json.loads(line.decode("utf-8").rstrip("\r\n"))  # else a missing brace is found on the next line
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise BadRow("not UTF-8", f"not UTF-8: {found}; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if line.strip() in (b"{", b"["):
            text = f'not JSON: it goes over several lines; expected one object a line, or {{"{ROWS_UNDER[0]}": [...]}}'
            raise BadRow("not JSON", text) from None
        what = error.msg.removesuffix(" at")
        text = f"not JSON: {what} at column {error.colno}; expected one JSON object a line"
        raise BadRow("not JSON", text) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets nested without end
        raise BadRow("not JSON", f"not JSON: {type(error).__name__}; expected one JSON object a line") from None


def to_dialogue(row: Any, reading: Reading) -> Dialogue:
    """A parsed row of any shape -> dialogue.

    Raises:
        BadRow: not an object, a field missing or of another type, or nothing to learn in it.
    """
    messages, tools, unread = to_messages(row, reading.shape, reading.fields, reading.system_prompt)
    return Dialogue(tuple(messages), tuple(tools), unread)
