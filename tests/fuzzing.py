"""What must hold for every input, however hostile; shared by tests/test_fuzz.py and the run under atheris here.

    pip install atheris && python -m tests.fuzzing -runs=200000 -max_total_time=300

atheris mutates bytes and keeps what reaches new lines of ds_sft/data; any exception but a refusal, and any wrong mask,
ends the run with the input that caused it.
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ds_sft.config.keys import REFERENCE_PROMPT, Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import REASONING, THINKING
from ds_sft.data.encode import IGNORE_INDEX, Encoded, Encoder
from ds_sft.data.messages import full_content, with_thinking
from ds_sft.data.records import Dialogue, Reading, parse_row, read_dialogues
from ds_sft.data.shapes import ROLES, Message
from ds_sft.data.sources import DataFile
from ds_sft.data.templates import Reference
from ds_sft.data.values import MAX_NAME
from ds_sft.errors import UserError

READING = Reading("S")
SEEDS = [
    {"question": "What is the capital of France?", "answer": "Paris."},
    {"instruction": "q", "input": "今天天气", "output": "a", "history": [["h", "i"]], "system": "S"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[]"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"},
                  {"role": "assistant", "content": "a", "train": True}, {"role": "user", "content": "<|im_end|>"},
                  {"role": "assistant", "content": "<think>\nx\n</think>\n\nb"}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                  {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
                  {"role": "tool", "content": "1"}, {"role": "assistant", "content": "👋🏽"}],
     "tools": [{"name": "f", "parameters": {}}]},
    {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
    {"question": "Why?", "answer": "So.", "reasoning": "Because.", "id": "r7", "meta": {"by": ["me"]}, "images": []},
    {"instruction": "q", "output": "a", "thinking": "deep", "weight": 0.5, "source": "web"},
    {"messages": [{"role": "user", "content": [{"type": "text", "value": "hi "}, {"type": "text", "text": "you"}],
                   "loss_weight": 0.0, "name": "Ann"},
                  {"role": "assistant", "content": [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "a"},
                   {"type": "tool_call", "value": '{"name": "f", "arguments": {"at": "Paris", "zone": null}}'}],
                   "loss_weight": 1.0, "note": "n"},
                  {"role": "tool", "content": "20", "tool_call_id": "c1", "name": "f"},
                  {"role": "assistant", "content": "b", "reasoning": "s", "date": "May"}],
     "tools": [{"name": "f", "description": None}], "reasoning": "on"},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "thinking": "t"}],
     "system": "T", "split": "train"},
    # Typed parts without calls, which the reference takes, too, in words that are nowhere else in the row.
    {"messages": [{"role": "user", "content": [{"type": "text", "value": "Which harbour lies north? "},
                                               {"type": "input_text", "text": "Answer briefly."}]},
                  {"role": "assistant", "content": [{"type": "thinking", "thinking": "Islands first."},
                                                    {"type": "reasoning", "value": " Then coasts."},
                                                    {"type": "text", "value": "Tromsø does, "},
                                                    {"type": "output_text", "text": "beyond the circle."}]}]},
]  # fmt: skip


def encoder_of(tokenizer: Any, **keys: Any) -> Encoder:
    defaults = {"model_name_or_path": "m", "train_file": "t", "system_prompt": "S", "max_length": 10**6}
    return Encoder(tokenizer, Config(**{**defaults, **keys}))


def check_rows(encoder: Encoder, tokenizer: Any, lines: Sequence[bytes | dict[str, Any]]) -> int:
    """Rows of a file through reading and encoding; how many were accepted.

    Raises:
        AssertionError: a message of several lines, a row of which other tokens are learned than its answers, or a text
            of a row that is in no token of it and that nobody is told of.
    """
    found = [parse_row(line, READING) for line in lines]
    for row in found:
        assert not isinstance(row, BadRow) or one_line(row)
    dialogues = [row for row in found if isinstance(row, Dialogue)]
    encoded = encoder.encode(dialogues)
    assert all(one_line(error) for error in encoded.bad.values())
    assert set(encoded.dialogue.tolist()) | set(encoded.bad) | set(encoded.dropped) == set(range(len(dialogues)))
    learned: dict[int, list[list[int]]] = {}
    whole: dict[int, list[int]] = {}
    cut: set[int] = set(encoded.dropped) | set(encoded.dialogue[encoded.supervised_cut > 0].tolist())
    shortened = set(encoded.dialogue[encoded.length > np.diff(encoded.starts)].tolist())
    for index, (ids, labels) in zip(encoded.dialogue.tolist(), encoded.rows(), strict=True):
        assert 0 < len(ids) <= encoder.max_length
        assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
        learned.setdefault(index, []).extend(stretches(labels))
        whole.setdefault(index, []).extend(ids)
    raw = [line for line, row in zip(lines, found, strict=True) if isinstance(row, Dialogue)]
    for index in set(learned) - cut:
        dialogue = replace(dialogues[index], messages=tuple(with_thinking(dialogues[index].messages, encoder.thinking)))
        messages = learned_messages(dialogue, encoder.mask)
        if isinstance(encoder.template, Reference):
            check_text(tokenizer, learned[index], messages)
        else:
            check_turns(tokenizer, learned[index], messages, encoder.template.turns.ends)
        if index not in shortened:
            line = raw[index]
            text = tokenizer.backend_tokenizer.decode(whole[index], skip_special_tokens=False)
            row = json.loads(line) if isinstance(line, bytes) else line
            check_nothing_is_lost(encoder, row, text, {*dialogue.unread}, encoded.left_out.get(index, set()))
    if not isinstance(encoder.template, Reference) and encoder.overlong != "split":
        check_special(encoder, encoded, dialogues)
    return len(learned)


UNSAID = ("role", "from", "type", "id", "tool_call_id")  # of a message, a call or a part: they say what it is
OUT = {"content": "content", "value": "content", "name": "name", "tool_calls": "tool_calls",
       "function_call": "tool_calls", **dict.fromkeys(REASONING, "reasoning_content")}  # fmt: skip


def check_nothing_is_lost(
    encoder: Encoder, row: dict[str, Any], rendered: str, unread: set[str], left_out: set[str]
) -> None:
    """Every text of a row is in what is rendered of it, but for fields that are named as not read, or left out."""
    if isinstance(encoder.template, Reference):
        assert all(name.endswith(" name") for name in left_out), left_out
    squeezed = _squeezed(rendered)
    for path, text in texts_of(row, unread, left_out, encoder.thinking):
        if path == "instruction" and row.get("input") is not None and text in ("S", REFERENCE_PROMPT):
            continue
        assert is_rendered(path, text, squeezed, unread), (path, text, rendered, row)


def is_named(path: str, name: str) -> bool:
    """Whether a name in the report is this place, or one that this place is in."""
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
    return path.startswith(name) and (path[len(name) : len(name) + 1] in ("", ".", "[") or len(name) == MAX_NAME)


def texts_of(row: dict[str, Any], unread: set[str], left_out: set[str], thinking: str) -> Iterator[tuple[str, str]]:
    """Every text of a row that must be rendered, with its place, as messages[].content."""
    for name, value in row.items():
        items = packed(value)
        if name == "tools" or name in unread or (name in REASONING and thinking != "keep"):
            continue
        if name in ("messages", "conversations", "prompt", "completion") and is_list_of_objects(items):
            for message in items:
                yield from texts_of_message(message, f"{name}[]", left_out, thinking)
        else:
            yield from leaves(value, name)


def texts_of_message(
    message: dict[str, Any], path: str, left_out: set[str], thinking: str
) -> Iterator[tuple[str, str]]:
    role = ROLES[next(message[key] for key in ("role", "from") if message.get(key) is not None)]
    for key, said in message.items():
        if key in UNSAID or f"{role} {OUT.get(key, key)}" in left_out:
            continue
        if thinking != "keep" and role == "assistant":
            if key in REASONING:
                continue
            if isinstance(said, str) and THINKING.match(said):
                said = THINKING.sub("", said, count=1)
            if is_list_of_objects(said):
                said = [part for part in said if part.get("type") not in REASONING]
        yield from leaves(said, f"{path}.{key}")


def leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in UNSAID:
                yield from leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item, f"{path}[]")


def packed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip()[:1] in ("[", "{") else value
    except (ValueError, RecursionError):
        return value


def is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def is_rendered(path: str, text: str, squeezed: str, unread: set[str]) -> bool:
    """As it is, as JSON writes it, or, of a text that is JSON, every text in it; or it is said that nobody reads it.

    What is before and after the signs of reasoning may stand apart: in channels, or behind a sign of the template's.
    """
    parts = re.split("</?think>", text)
    if len(parts) > 1:
        return all(is_rendered(path, part, squeezed, unread) for part in parts)
    once = json.dumps(text, ensure_ascii=False)[1:-1]
    forms = (text, once, json.dumps(once, ensure_ascii=False)[1:-1])
    if any(_squeezed(form) in squeezed for form in forms) or any(is_named(path, name) for name in unread):
        return True
    inside = packed(text)
    return inside is not text and all(is_rendered(*item, squeezed, unread) for item in leaves(inside, path))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def check_special(encoder: Encoder, encoded: Encoded, dialogues: Sequence[Dialogue]) -> None:
    """As many special tokens as the same turns have without a sign that special tokens are written with."""
    indices, rows = encoded.dialogue.tolist(), [ids for ids, _ in encoded.rows()]
    harmless = encoder.encode([_harmless(dialogues[i]) for i in indices])
    expected = {indices[i]: ids for i, (ids, _) in zip(harmless.dialogue.tolist(), harmless.rows(), strict=True)}
    special = set(encoder.special_ids.tolist())
    for index, ids in zip(indices, rows, strict=True):
        if index in expected:
            found, want = ([i for i in row if i in special] for row in (ids, expected[index]))
            assert found == want, dialogues[index]


def _harmless(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub(r"(</?think>)|[<>|\[\]/]", lambda match: match[1] or "-", value)  # reasoning has its own place
    if isinstance(value, Dialogue):
        return Dialogue(_harmless(value.messages), _harmless(value.tools))
    if isinstance(value, Message):
        return replace(value, content=_harmless(value.content), tool_calls=_harmless(value.tool_calls),
                       extra=_harmless(value.extra))  # fmt: skip
    if isinstance(value, Mapping):
        return {_harmless(key): _harmless(item) for key, item in value.items()}
    return type(value)(map(_harmless, value)) if isinstance(value, (list, tuple)) else value


def one_line(error: BadRow) -> bool:
    return "\n" not in str(error) and 0 < len(str(error)) < 600 and 0 < len(error.reason) < 80


def learned_messages(dialogue: Dialogue, mask: str) -> list[Message]:
    """The answers that `mask` means, but what they say themselves goes first."""
    answers = [message for message in dialogue.messages if message.role == "assistant"]
    return [
        message
        for i, message in enumerate(answers, start=1)
        if message.train or (message.train is None and (mask == "all" or i == len(answers)))
    ]


def stretches(labels: Sequence[int]) -> list[list[int]]:
    """What is learned, without a gap in it."""
    groups = itertools.groupby(labels, key=lambda label: label != IGNORE_INDEX)
    return [list(stretch) for is_learned, stretch in groups if is_learned]


def check_text(tokenizer: Any, learned: Sequence[list[int]], messages: Sequence[Message]) -> None:
    """Exactly the answers, each with its end: special-token text in them is what it is under the reference."""
    expected = "".join(full_content(message) + tokenizer.pad_token for message in messages)
    ids = [label for stretch in learned for label in stretch]
    assert tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False) == expected, messages


def check_turns(tokenizer: Any, learned: Sequence[list[int]], messages: Sequence[Message], ends: Sequence[str]) -> None:
    """One stretch for each answer, up to and with an end of turn, which is the one in it but between channels.

    A template may trim an answer, set white space around reasoning, and write a call in its own way.
    """
    end_ids = tokenizer.convert_tokens_to_ids(list(ends))
    assert len(learned) == len(messages), messages
    for stretch, message in zip(learned, messages, strict=True):
        text = tokenizer.backend_tokenizer.decode(stretch[:-1], skip_special_tokens=False)
        assert stretch[-1] in end_ids, messages
        text, channels = without_channels(text) if "<|return|>" in ends else (text, 1)
        assert sum(token in end_ids for token in stretch) == channels, messages
        text, want = "".join(text.split()), "".join(full_content(message).split())
        # Of earlier turns Qwen leaves an empty block out; a prompt may have opened one.
        wanted = {want, "</think>" + want, *map(want.removeprefix, ("<think></think>", "<think>", "</think>"))}
        if channels == 2 and message.tool_calls:  # gpt-oss writes what is said beside a call as analysis
            wanted.add(f"<think>{want}</think>")
        assert any(text.startswith(want) if message.tool_calls else text == want for want in wanted), (text, messages)


def without_channels(text: str) -> tuple[str, int]:
    """gpt-oss's channels as Qwen writes reasoning, and how many they are."""
    if not text.startswith("<|channel|>analysis<|message|>"):
        return text.removeprefix("<|channel|>final<|message|>"), 1
    thought, _, rest = text.removeprefix("<|channel|>analysis<|message|>").partition("<|end|><|start|>assistant")
    return f"<think>{thought}</think>{rest.removeprefix('<|channel|>final<|message|>')}", 2


def check_file(path: Path, content: bytes) -> None:
    """A whole file of any kind: rows, counted refusals, or one line about the file."""
    path.write_bytes(content)
    try:
        for _, row in read_dialogues(DataFile(str(path)), READING):
            assert isinstance(row, Dialogue) or one_line(row)
    except UserError as error:
        said = str(error)
    else:
        return
    assert "\n" not in said
    assert str(path) in said


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["ds_sft.data"]):
        for name in [name for name in sys.modules if name.startswith("ds_sft.data")]:
            del sys.modules[name]
        import tests.fuzzing as fuzzing
    from tests.families import family

    tokenizer = family("qwen")
    encoders = [fuzzing.encoder_of(tokenizer), fuzzing.encoder_of(tokenizer, template="tokenizer")]
    folder = Path(sys.argv[1] if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else "/tmp/ds_sft-fuzz")
    folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(fuzzing.SEEDS):
        (folder / f"seed-{i}").write_text(json.dumps(seed, ensure_ascii=False), encoding="utf-8")

    def one(data: bytes) -> None:
        for encoder in encoders:
            fuzzing.check_rows(encoder, tokenizer, [data])

    flags = [word for word in sys.argv[1:] if word.startswith("-")]
    atheris.Setup([sys.argv[0], *flags, str(folder)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
