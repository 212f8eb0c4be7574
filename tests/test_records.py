"""Rows of files become questions and answers, or say what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_sft.config import REFERENCE_PROMPT
from ds_sft.data.files import BadRow, DataFile
from ds_sft.data.records import Dialogue, Reading, read_dialogues, to_dialogue
from ds_sft.data.shapes import Message
from ds_sft.errors import UserError

SYSTEM = "Answer."
READING = Reading(SYSTEM)


def read(path: Path) -> list[tuple[int, str | Dialogue]]:
    rows = read_dialogues(DataFile(str(path)), READING)
    return [(number, str(row) if isinstance(row, BadRow) else row) for number, row in rows]


def talk(*texts: str) -> Dialogue:
    """User and assistant in turn."""
    return Dialogue(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"question": "q", "answer": "a", "id": 7}, "q", "a"),
        ({"question": " q ", "answer": ""}, " q ", ""),
        # The reference's converter wrote its prompt into `instruction`: the rows are taken as the reference took them.
        ({"instruction": REFERENCE_PROMPT, "input": "q", "output": "a"}, "q", "a"),
        ({"instruction": SYSTEM, "input": "q", "output": "a"}, "q", "a"),
        ({"instruction": "Translate.", "input": "hello", "output": "привет"}, "Translate.\nhello", "привет"),
        ({"instruction": "Tell a joke.", "input": "", "output": "a"}, "Tell a joke.", "a"),
        ({"instruction": "Tell a joke.", "output": "a"}, "Tell a joke.", "a"),
        ({"instruction": SYSTEM, "output": "a"}, SYSTEM, "a"),
    ],
)
def test_shapes(row: dict[str, Any], question: str, answer: str) -> None:
    assert to_dialogue(row, READING) == talk(question, answer)


EXPECTED = "expected question and answer; instruction and output; conversations; messages; or prompt and completion"


@pytest.mark.parametrize(
    ("line", "reason", "text"),
    [
        (
            b"{'question'",
            "not JSON",
            "not JSON: Expecting property name enclosed in double quotes at column 2",
        ),
        (b'{"question": "q"}', "no field 'answer'", f"no field 'answer' (found: question); {EXPECTED}"),
        (b"{}", "no field 'question'", f"no field 'question' (found: no field at all); {EXPECTED}"),
        (
            b'{"question": 42, "answer": "a"}',
            "field 'question' is not a string",
            "field 'question' is a number: 42; expected a string",
        ),
        (
            b'{"question": "q", "answer": null}',
            "field 'answer' is not a string",
            "is null; expected a string",
        ),
        (
            b'{"question": ["q"], "answer": "a"}',
            "field 'question' is not a string",
            'is an array: ["q"]; expected',
        ),
        (b'["q", "a"]', "not an object", "found an array; expected one JSON object a line"),
        (b'"text"', "not an object", "found a string; expected one"),
        (b"[" * 100_000, "not JSON", "not JSON: RecursionError"),
        (b'{"question": ' + b"9" * 5000 + b"}", "not JSON", "not JSON: ValueError"),
        (
            b'{"question": "\xff", "answer": "a"}',
            "not UTF-8",
            "not UTF-8: byte 0xff at column 15; save the file as",
        ),
        (
            b'{"question": "\\ud83d", "answer": "a"}',
            "not Unicode text",
            "field 'question' holds half of a surrogate",
        ),
    ],
)
def test_bad_rows(tmp_path: Path, line: bytes, reason: str, text: str) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "q", "answer": "a"}\n' + line + b"\n" + b'{"question": "r", "answer": "b"}\n')
    first, bad, last = read_dialogues(DataFile(str(file)), READING)
    assert (first, last) == ((1, talk("q", "a")), (3, talk("r", "b")))
    assert isinstance(bad[1], BadRow)
    assert (bad[0], bad[1].reason) == (2, reason)
    assert text in str(bad[1])
    assert "\n" not in str(bad[1])


def test_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"question": "q", "answer": "a"}\r\n\n  \n{"question": "r", "answer": "b"}')
    assert read(file) == [(1, talk("q", "a")), (4, talk("r", "b"))]


def test_a_surrogate_pair_is_one_character(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "\\ud83d\\udc4b", "answer": "a"}\n')
    assert read(file) == [(1, talk("👋", "a"))]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl: no such file \(the current directory is "):
        read(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match=r"is a directory; give a file of it$"):
        read(tmp_path)
