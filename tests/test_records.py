"""Rows of files become questions and answers, or say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_sft.config.keys import REFERENCE_PROMPT
from ds_sft.data.bad_row import BadRow
from ds_sft.data.records import Dialogue, Reading, read_dialogues, to_dialogue
from ds_sft.data.shapes import Message
from ds_sft.data.sources import DataFile
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


EXPECTED = (
    "expected question and answer; instruction and output; conversations; messages; prompt and completion; or write "
    "what fields are called: data_fields: {question: NAME, answer: NAME}"
)


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
    "typed parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}], "loss_weight": 0.0},
            {"role": "user", "content": [{"type": "text", "text": {"value": "h", "annotations": []}},
                                         {"type": "input_text", "text": "i"}], "loss_weight": 0},
            {"role": "assistant", "content": [
                {"type": "reasoning", "value": "r"}, {"type": "thinking", "thinking": "s", "text": None},
                {"type": "text", "value": "b"}, {"type": "text", "text": "c", "value": None},
            ], "loss_weight": 1.0},
        ]},
        (message("user", "q", train=False), message("assistant", "a", train=False), message("user", "hi", train=False),
         message("assistant", "bc", train=True, extra={"reasoning_content": "rs"})),
    ),
    "typed parts with calls": (
        {"messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": [
                {"type": "text", "value": ""},
                {"type": "tool_call", "value": '{"name": "weather", "arguments": {"at": "Paris"}}', "id": "1"},
                {"type": "function_call", "function_call": CALL["function"]},
                {"type": "tool_call", "name": "weather", "arguments": {"at": "Paris"}},
            ]},
            {"role": "tool", "content": [{"type": "text", "value": "20"}]},
            {"role": "assistant", "content": "a"},
        ], "tools": [TOOL]},
        (ASKED[0], message("assistant", "", tool_calls=({"id": "1", **CALL}, CALL, CALL)),
         message("tool", "20"), ASKED[1]),
    ),
    "a call as OpenAI had it first": (
        {"messages": [{"role": "user", "content": "q"},
                      {"role": "assistant", "content": None, "function_call": CALL["function"]}]},
        (ASKED[0], message("assistant", "", tool_calls=(CALL,))),
    ),
    "fields that are null are absent": (
        {"question": None, "answer": None, "messages": None, "conversations": [
            {"role": None, "content": None, "from": "human", "value": "q", "tool_calls": None},
            {"role": "assistant", "content": "a", "from": None, "value": None, "reasoning": None}]},
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
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is of type image_url: only text is trained on; leave the row out (on_bad_row: skip "
            "does), or take this part out of it",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
            "messages[0].content[1] is of type image: only text is trained on",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "imagine"}]}]},
            'messages[0].content[0].type is a string: "imagine"; expected text',
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0] has no text; expected text or value",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None, "value": None}]}]}, "has no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "value": "b"}]}]},
            "messages[0].content[0] has text and value; expected text or value",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": {"annotations": []}}]}]},
            "messages[0].content[0].text is null; expected a string",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content is an array: []; expected a string"),
        ({"messages": [{"role": "user", "content": ["a"]}]}, 'messages[0].content is an array: ["a"]; expected a'),
        (
            {"messages": [{"role": "user", "content": [{"type": "reasoning", "value": "r"}]}]},
            'messages[0].content[0].type is a string: "reasoning"; expected text',
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "audio", "audio": "x"}]}]},
            "messages[0].content[0] is of type audio: only text is trained on",
        ),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "content": [{"type": "text", "value": "a"}, {"type": "reasoning", "value": "r"}],
                    }
                ]
            },
            "messages[0].content[1] is reasoning; expected reasoning first, then text, then calls",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "reasoning", "value": "r"}]}]},
            'messages[0].content has no text beside the reasoning; expected the answer, or "" for none',
        ),
        ({"messages": [{"role": "assistant", "content": None, "thinking": "r"}]}, "has no text beside the reasoning"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_call", "value": "{}"}]}]}, "is no call"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": [{"type": "tool_call", "value": CALL}], "tool_calls": [CALL]}
                ]
            },
            "messages[0] has calls in two places; expected them in tool_calls alone",
        ),
        ({"conversations": [{"from": "function_call", "value": None}]}, "[0].value is null; expected a call"),
        ({"question": "q", "answer": "a", "reasoning": ["r"]}, 'reasoning is an array: ["r"]; expected a string'),
        (
            {"question": "q", "answer": "a", "reasoning": "r", "thinking": "s"},
            "the row has two that differ; expected one of reasoning_content, reasoning, thinking",
        ),
        (
            {"question": "q", "answer": "<think>\ns\n</think>\n\na", "reasoning": "r"},
            "the row has one in its text and another beside it; expected one",
        ),
        (
            {"messages": [{"role": "assistant", "content": " <think></think>a", "reasoning_content": "r"}]},
            "messages[0] has one in its text and another beside it",
        ),
        (
            {"question": "<image>q", "answer": "a", "images": ["x.png"]},
            'images is an array: ["x.png"]; only text can be learned from',
        ),
        ({"messages": [{"role": "user", "content": "q", "audio": {"id": "x"}}]}, "messages[0].audio is an object"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content is null; expected a string"),
        ({"messages": [{"role": "user", "content": "q", "train": True}]}, "messages[0].train: only assistant messages"),
        (
            {"messages": [{"role": "assistant", "content": "a", "train": "yes"}]},
            'train is a string: "yes"; expected true',
        ),
        (
            {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
            "weight is a number: 0.5; expected 0 or 1",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"x": 1}]}]}, "is no call; expected name and arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": " ", "arguments": {}}]}]}, "is no call; expected"),
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


REASONED = (message("user", "q"), message("assistant", "a", extra={"reasoning_content": "r"}))


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "answer": "a", "HERE": "r"},
        {"instruction": "q", "input": "", "output": "a", "HERE": "r"},
        {"prompt": "q", "completion": "a", "HERE": "r"},
        {"prompt": [{"role": "user", "content": "q"}], "completion": "a", "HERE": "r"},
        {"prompt": "q", "completion": "a", "HERE": "r", "reasoning_content": "r"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "HERE": "r"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "HERE": "r"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "HERE": "r"}]},
    ],
)
def test_reasoning_is_read_under_its_three_names(row: dict[str, Any], name: str) -> None:
    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        return {name if k == "HERE" else k: named(v) for k, v in value.items()} if isinstance(value, dict) else value

    dialogue = to_dialogue(named(row), READING)
    assert (dialogue.messages, dialogue.unread) == (REASONED, ())


def test_reasoning_that_the_answer_says_itself_is_not_said_twice() -> None:
    row = {"question": "q", "answer": "<think>\nr\n</think>\n\na", "reasoning": "r\n"}
    assert to_dialogue(row, READING) == talk("q", row["answer"])


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "q", "answer": "a", "id": 7, "tags": [], "meta": {"by": None}, "note": ""}, ["id"]),
        ({"question": "q", "answer": "a", "weight": 0, "input": "x", "messages": [1]}, ["input", "messages", "weight"]),
        ({"question": "q", "answer": "a", "reasoning": "off", "thinking": True}, ["reasoning", "thinking"]),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2, "reasoning": "r"},
         ["reasoning"]),  # of which answer?
        ({"messages": [{"role": "system", "content": "T"}, {"role": "user", "content": "q"},
                       {"role": "assistant", "content": "a"}], "system": "S"}, ["system"]),
        ({"messages": [{"role": "user", "content": "q", "reasoning": "r", "from": "x", "tool_calls": [CALL]},
                       {"role": "assistant", "content": "a", "weight": 1, "train": True, "name": 7}]},
         ["messages[].from", "messages[].name", "messages[].reasoning", "messages[].tool_calls", "messages[].weight"]),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "text", "text": {"value": "a", "annotations": ["n"]}, "at": 1},
            {"type": "tool_call", "value": {"name": "f", "parameters": {"x": 1}}}], "index": 0}]},
         ["messages[].content[].at", "messages[].content[].text.annotations",
          "messages[].content[].value.parameters", "messages[].index"]),
        ({"messages": [{"role": "assistant",
                        "tool_calls": [{**CALL, "index": 0}, {"function": {"name": "f", "x": 1}}]}]},
         ["messages[].tool_calls[].function.x", "messages[].tool_calls[].index"]),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": "a", "history": [["h", "i"]]}, ["history"]),
        ({"question": "q", "answer": "a", "a\nb\x1b" + "c" * 99: 1}, [r"a\nb\x1b" + "c" * 52]),
    ],
)  # fmt: skip
def test_what_nobody_reads_is_named(row: dict[str, Any], unread: list[str]) -> None:
    assert list(to_dialogue(row, READING).unread) == unread


def test_reasoning_may_have_a_name_of_its_own() -> None:
    row = {"question": "q", "answer": "a", "cot": "r"}
    dialogue = to_dialogue(row, Reading(SYSTEM, "auto", {"reasoning": "cot"}))
    assert (dialogue.messages, dialogue.unread) == (REASONED, ())


def test_a_field_that_another_one_replaces_is_not_read() -> None:
    row = {"question": "x", "answer": "a", "prompt": "q", "text": "t"}
    dialogue = to_dialogue(row, Reading(SYSTEM, "auto", {"question": "prompt", "content": "text"}))
    assert (dialogue, dialogue.unread) == (talk("q", "a"), ("question", "text"))


def test_nulls_of_arguments_and_tools_are_left_out() -> None:
    """Of objects, whatever the file; items of lists stay, and so do arguments that are a text."""
    odd = {"at": "Paris", "zone": None, "more": {"x": None, "y": [None, {"z": None}]}}
    clean = {"at": "Paris", "more": {"y": [None, {}]}}
    tool = {"name": "f", "strict": None, "parameters": {"default": None, "enum": ["a", None]}}
    calls = [{"function": {"name": "f", "arguments": arguments}, "id": None} for arguments in (odd, json.dumps(odd))]
    dialogue = to_dialogue({"messages": [{"role": "assistant", "tool_calls": calls}], "tools": [tool]}, READING)
    assert [call["function"]["arguments"] for call in dialogue.messages[0].tool_calls] == [clean, json.dumps(odd)]
    assert dialogue.tools == ({"type": "function", "function": {"name": "f", "parameters": {"enum": ["a", None]}}},)


@pytest.mark.parametrize("arguments", [None, "", " \n", {}])
def test_a_call_without_arguments(arguments: Any) -> None:
    """As servers of many models write it: an empty text."""
    calls = [{"function": {"name": "now", "arguments": arguments}}]
    dialogue = to_dialogue({"messages": [{"role": "assistant", "tool_calls": calls}]}, READING)
    assert dialogue.messages[0].tool_calls == ({"type": "function", "function": {"name": "now", "arguments": {}}},)


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
