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
        (b'{"question": "q"', "not JSON", "not JSON: Expecting ',' delimiter at column 17"),
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


# ---- Shapes of several turns


def message(role: str, content: str, **fields: Any) -> Message:
    return Message(role, content, **fields)


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"at": "Paris"}}}
CALL_IN_TEXT = {"type": "function", "function": {"name": "weather", "arguments": '{"at": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "weather"}}
ASKED = (message("user", "q"), message("assistant", "a"))

SHAPES: dict[str, tuple[dict[str, Any], tuple[Message, ...]]] = {
    "qa with system and history": (
        {"system": "S", "history": [["h", "i"]], "question": "q", "answer": "a"},
        (message("system", "S"), message("user", "h"), message("assistant", "i"), *ASKED),
    ),
    "alpaca with history": (
        {"instruction": "q", "input": "", "output": "a", "history": [["h", "i"]], "system": None},
        (message("user", "h"), message("assistant", "i"), *ASKED),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "S"},
        (message("system", "S"), *ASKED),
    ),
    "sharegpt with a system turn of its own": (
        {"conversations": [{"from": "system", "value": "T"}, {"from": "human", "value": "q"},
                           {"from": "gpt", "value": "a"}], "system": "S"},
        (message("system", "T"), *ASKED),
    ),
    "sharegpt with calls": (
        {"conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"at": "Paris"}}'},
            {"from": "observation", "value": '{"t": 20}'},
            {"from": "gpt", "value": "a"},
        ], "tools": '[{"name": "weather"}]'},
        (ASKED[0], message("assistant", "", tool_calls=(CALL,)), message("tool", '{"t": 20}'), ASKED[1]),
    ),
    "openai": (
        {"messages": [{"role": "developer", "content": "S"},
                      {"role": "user", "content": [{"type": "text", "text": "q"}]},
                      {"role": "assistant", "content": "a", "train": False},
                      {"role": "assistant", "content": "b", "reasoning_content": "r"}]},
        (message("system", "S"), ASKED[0], message("assistant", "a", train=False),
         message("assistant", "b", extra={"reasoning_content": "r"})),
    ),
    "openai with calls": (
        {"messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"id": "1", "function": {"name": "weather", "arguments": '{"at": "Paris"}'}}]},
            {"role": "tool", "content": "20", "tool_call_id": "1", "name": "weather"},
            {"role": "assistant", "content": "a"},
        ], "tools": [TOOL]},
        (ASKED[0], message("assistant", "", tool_calls=({"id": "1", **CALL_IN_TEXT},)),
         message("tool", "20", extra={"tool_call_id": "1", "name": "weather"}), ASKED[1]),
    ),
    "messages in a text, as in CSV": (
        {"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'},
        ASKED,
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, ASKED),
    "prompt and completion that are JSON": (
        {"prompt": '{"a": 1}', "completion": "[1, 2]"},
        (message("user", '{"a": 1}'), message("assistant", "[1, 2]")),
    ),
    "prompt and completion as messages": (
        {"prompt": [{"role": "user", "content": "h"}, {"role": "assistant", "content": "i"},
                    {"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        (message("user", "h"), message("assistant", "i", train=False), *ASKED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_rows_of_several_turns(name: str) -> None:
    row, messages = SHAPES[name]
    dialogue = to_dialogue(row, READING)
    assert dialogue.messages == messages
    assert dialogue.tools == ((TOOL,) if "tools" in row else ())


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "no assistant message to learn; expected at least one"),
        ({"messages": [{"role": "user", "content": "q"}]}, "no assistant message to learn"),
        ({"messages": "hello"}, "field 'messages' is a string: \"hello\"; expected a list of messages"),
        ({"messages": ["a"]}, 'messages[0] is a string: "a"; expected role and content'),
        ({"messages": [{"content": "q"}]}, "messages[0].role is null; expected system, user, assistant or tool"),
        ({"messages": [{"role": "king", "content": "q"}]}, 'messages[0].role is a string: "king"; expected system'),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content is a number: 7; expected a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content is an array: ["),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content is null; expected a string"),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, "messages[0].train: only assistant messages"),
        (
            {"messages": [{"role": "assistant", "content": "a", "train": "yes"}]},
            'train is a string: "yes"; expected true',
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "weight is a number: 0.5; expected true",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "is no call; expected name and arguments"),
        ({"conversations": {"a": 1}}, "field 'conversations' is an object"),
        (
            {"question": "q", "answer": "a", "tools": "x"},
            "field 'tools' is a string: \"x\"; expected a list of objects",
        ),
        ({"question": "q", "answer": "a", "history": [["x"]]}, "field 'history': expected [[question, answer], ...]"),
        ({"question": "q", "answer": "a", "system": 1}, "field 'system' is a number: 1; expected a string"),
        ({"prompt": "p"}, f"no field 'question' (found: prompt); {EXPECTED}"),
    ],
)
def test_what_is_wrong_with_a_message(row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRow) as caught:
        to_dialogue(row, READING)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_shape_and_fields_can_be_named() -> None:
    row = {"question": "Q", "answer": "A", "prompt": "q", "response": "a"}
    reading = Reading(SYSTEM, "prompt_completion", {"completion": "response"})
    assert to_dialogue(row, reading) == talk("q", "a")
    assert to_dialogue(row, READING) == talk("Q", "A")
    renamed = {"dialog": [{"speaker": "user", "text": "q"}, {"speaker": "bot", "text": "a"}]}
    fields = {"messages": "dialog", "role": "speaker", "content": "text"}
    assert to_dialogue(renamed, Reading(SYSTEM, "auto", fields)) == talk("q", "a")


def test_question_and_answer_of_a_dialogue() -> None:
    dialogue = to_dialogue(SHAPES["openai with calls"][0], READING)
    assert (dialogue.question, dialogue.answer) == ("20", "a")
    calls = Dialogue(dialogue.messages[:2])
    assert (calls.question, calls.answer) == ("q", '{"name": "weather", "arguments": {"at": "Paris"}}')
