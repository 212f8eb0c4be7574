"""The shapes that dialogues come in -> messages.

| shape | fields |
|---|---|
| qa | question, answer; optional system, history |
| alpaca | instruction, output; optional input, system, history |
| sharegpt | conversations of from, value; optional system, tools |
| messages | messages of role, content (OpenAI); optional tools |
| prompt_completion | prompt, completion: two texts, or two lists of messages; optional system, tools |

A row is recognised by its fields; those that are null are absent. A message may also carry tool_calls, reasoning (as
reasoning_content, reasoning or thinking, which also stand beside the one answer of a row), and `train`: true or false.
Fields that nobody reads are named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ds_sft.config.keys import REFERENCE_PROMPT
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import REASONING, ContentParts, read_calls, read_content, read_reasoning, read_tools
from ds_sft.data.values import check_text, found, json_type, note_unread, unpacked

Shape = Literal["auto", "qa", "alpaca", "sharegpt", "messages", "prompt_completion"]
Calls = tuple[dict[str, Any], ...]
EXPECTED = (
    "expected question and answer; instruction and output; conversations; messages; prompt and completion; or write "
    "what fields are called: data_fields: {question: NAME, answer: NAME}"
)
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # ShareGPT's roles for an assistant's message that is a call
CALL_FIELDS = ("tool_calls", "function_call")  # a message's calls, as OpenAI has and had it
TRAIN = ("train", "weight", "loss_weight")  # whether a message is learned: ours, OpenAI's and LLaMA-Factory's name
EXTRA = ("name", "tool_call_id")  # texts of a message that a template may read
BESIDE = frozenset(["system", "tools", *REASONING])  # fields of every shape
READ = {
    "qa": BESIDE | {"question", "answer", "history"},
    "alpaca": BESIDE | {"instruction", "input", "output", "history"},
    "sharegpt": BESIDE | {"conversations"},
    "messages": BESIDE | {"messages"},
    "prompt_completion": BESIDE | {"prompt", "completion", "history"},
}


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds reasoning_content and the texts named in EXTRA."""

    role: str  # system, user, assistant or tool
    content: str
    train: bool | None = None  # whether it is learned; None: the key `mask` says
    tool_calls: tuple[dict[str, Any], ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)


def to_messages(
    row: Any, shape: Shape, fields: Mapping[str, str], system_prompt: str
) -> tuple[list[Message], list[dict[str, Any]], tuple[str, ...]]:
    """Messages and tools of a parsed row, and the names of the fields that hold something and were not read.

    Raises:
        BadRow: nothing that can be learned from.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {json_type(row)}; expected one JSON object a line")
    given, unread = row, set[str]()
    if fields:
        row = {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
    shape = recognise(row) if shape == "auto" else shape
    messages = _turns(row, shape, fields, system_prompt, unread)
    if not row.keys() <= READ[shape]:
        note_unread(given, _read_names(given, shape, fields), "", unread)
    if not row.keys().isdisjoint(REASONING):
        _add_reasoning(messages, row, shape, unread)
    _add_system(messages, row, unread)
    if not any(message.role == "assistant" and message.train is not False for message in messages):
        raise BadRow("no answer to learn", "no assistant message to learn; expected at least one")
    return messages, read_tools(row.get("tools")), tuple(sorted(unread))


def _turns(
    row: dict[str, Any], shape: Shape, fields: Mapping[str, str], system_prompt: str, unread: set[str]
) -> list[Message]:
    if shape == "messages":
        return _message_list(row, "messages", fields, unread)
    if shape == "sharegpt":
        return _message_list(row, "conversations", fields, unread)
    if shape == "prompt_completion":
        return _prompt_completion(row, fields, unread)
    return _alpaca(row, system_prompt) if shape == "alpaca" else _question_answer(row, "question", "answer")


def _read_names(given: Mapping[str, Any], shape: Shape, fields: Mapping[str, str]) -> frozenset[str]:
    """The names of the fields that this shape reads, as the file has them."""
    if not fields:
        return READ[shape]
    renamed = {ours: theirs for ours, theirs in fields.items() if ours in READ[shape] and theirs in given}
    return (READ[shape] - renamed.keys()) | frozenset(renamed.values())


def _add_reasoning(messages: list[Message], row: Mapping[str, Any], shape: Shape, unread: set[str]) -> None:
    """The reasoning that stands beside the answer of a row; where it is not one answer, nobody knows whose it is."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.train is not False]
    at = answers[-1] if answers and (len(answers) == 1 or shape in ("qa", "alpaca")) else None
    if at is None or "reasoning_content" in messages[at].extra:
        note_unread({name: row[name] for name in REASONING if name in row}, (), "", unread)
        return
    reasoning = read_reasoning(row, "", unread, text=messages[at].content)
    if reasoning:
        messages[at] = replace(messages[at], extra={**messages[at].extra, "reasoning_content": reasoning})


def _add_system(messages: list[Message], row: Mapping[str, Any], unread: set[str]) -> None:
    """`system` of a row, where no message is one already."""
    system = _optional_text(row, "system")
    if system is None:
        return
    if not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", system))
    elif system not in [message.content for message in messages if message.role == "system"]:
        note_unread(row, row.keys() - {"system"}, "", unread)


def recognise(row: Mapping[str, Any]) -> Shape:
    """The shape of a row by its fields; question and answer where nothing else fits, whose error then lists all."""
    said = {name: value for name, value in row.items() if value is not None}
    return _recognise(said) or _recognise(row) or "qa"


def _recognise(row: Mapping[str, Any]) -> Shape | None:
    if "question" in row and "answer" in row:
        return "qa"
    if isinstance(unpacked(row.get("messages")), list):
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "output" in row and "answer" not in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    return "messages" if "messages" in row else None


# ---- One question, one answer


def _question_answer(row: dict[str, Any], question: str, answer: str) -> list[Message]:
    return [*_history(row), Message("user", _text(row, question)), Message("assistant", _text(row, answer))]


def _alpaca(row: dict[str, Any], system_prompt: str) -> list[Message]:
    """The instruction, and the input, where there is one, on a line of its own: the convention of Alpaca data.

    An instruction that is a system prompt (this run's, or the one that the reference script's converter wrote into
    every row) is left out.
    """
    instruction, extra = _text(row, "instruction"), _optional_text(row, "input") or ""
    if row.get("input") is not None and instruction in (system_prompt, REFERENCE_PROMPT):
        question = extra
    else:
        question = f"{instruction}\n{extra}" if extra else instruction
    return [*_history(row), Message("user", question), Message("assistant", _text(row, "output"))]


def _history(row: dict[str, Any]) -> list[Message]:
    """`history`: earlier pairs of question and answer."""
    history = unpacked(row.get("history"))
    if history is None or history == "":
        return []
    pairs = history if isinstance(history, list) else [None]
    messages = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("field 'history' is not pairs", "field 'history': expected [[question, answer], ...]")
        question, answer = (check_text(text, "history") for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def _prompt_completion(row: dict[str, Any], fields: Mapping[str, str], unread: set[str]) -> list[Message]:
    """Two texts, or two lists of messages; only the completion is learned."""
    if not _is_messages(row.get("prompt")):
        return _question_answer(row, "prompt", "completion")
    note_unread(row, row.keys() - {"history"}, "", unread)
    prompt = [
        replace(message, train=False) if message.role == "assistant" else message
        for message in _message_list(row, "prompt", fields, unread)
    ]
    if not _is_messages(row.get("completion")):
        return [*prompt, Message("assistant", _text(row, "completion"))]
    return prompt + _message_list(row, "completion", fields, unread)


def _is_messages(value: Any) -> bool:
    """A text may well be JSON and still be the text to learn; a list of objects is not."""
    value = unpacked(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# ---- Lists of messages


def _message_list(row: dict[str, Any], name: str, fields: Mapping[str, str], unread: set[str]) -> list[Message]:
    items = unpacked(_field(row, name))
    if not isinstance(items, list):
        raise BadRow(f"field {name!r} is not a list", f"field {name!r} is {found(items)}; expected a list of messages")
    return [_message(item, f"{name}[{index}]", fields, unread) for index, item in enumerate(items)]


def _message(item: Any, where: str, fields: Mapping[str, str], unread: set[str]) -> Message:
    if not isinstance(item, dict):
        raise BadRow("a message is not an object", f"{where} is {found(item)}; expected role and content")
    said, name = (_name(item, names, fields) for names in (("role", "from"), ("content", "value")))
    role, value = item.get(said), item.get(name)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow("unknown role", f"{where}.{said} is {found(role)}; expected system, user, assistant or tool")
    if len(item) == 2 and isinstance(value, str) and role not in CALLS:
        return Message(ROLES[role], check_text(value, f"{where}.{name}"))
    return _full_message(item, role, (said, name), where, unread)


def _full_message(item: dict[str, Any], role: str, names: tuple[str, str], where: str, unread: set[str]) -> Message:
    """A message with more than a role and a text."""
    kind, value, place = ROLES[role], item.get(names[1]), f"{where}.{names[1]}"
    answer, learned = kind == "assistant", _learned_by(item)
    extra = {name: check_text(item[name], f"{where}.{name}") for name in EXTRA if isinstance(item.get(name), str)}
    known = {*names, learned, *extra, *((*REASONING, *CALL_FIELDS) if answer else ())}
    note_unread(item, known, f"{where}.", unread)
    if role in CALLS:
        said = ContentParts(calls=read_calls(value, place, unread))
    else:
        said = read_content(value, place, unread, answer=answer)
    calls = _one_place(said.calls, _field_calls(item, where, unread), where) if answer else ()
    if said.text is None and not calls and answer and (said.reasoning or any(item.get(n) for n in REASONING)):
        raise BadRow(
            "reasoning without an answer",
            f'{place} has no text beside the reasoning; expected the answer, or "" for none',
        )
    if said.text is None and not calls:
        raise BadRow(
            "a content is not text", f"{place} is {found(value)}; expected {'a call' if role in CALLS else 'a string'}"
        )
    text = said.text or ""
    reasoning = read_reasoning(item, f"{where}.", unread, text=text, parts=said.reasoning) if answer else ""
    extra = {"reasoning_content": reasoning, **extra} if reasoning else extra
    return Message(kind, text, _train(item, learned, where, kind), calls, extra)


def _name(item: dict[str, Any], names: tuple[str, str], fields: Mapping[str, str]) -> str:
    """What a message calls its role or its content: the field map's name, OpenAI's or ShareGPT's."""
    known = [name for name in (fields.get(names[0]), fields.get(names[1]), *names) if name]
    present = [name for name in known if name in item]
    return next((name for name in present if item[name] is not None), present[0] if present else known[0])


def _field_calls(item: dict[str, Any], where: str, unread: set[str]) -> Calls:
    first, second = (read_calls(item.get(name), f"{where}.{name}", unread) for name in CALL_FIELDS)
    return _one_place(first, second, where)


def _one_place(first: Calls, second: Calls, where: str) -> Calls:
    """The calls of whichever place has some.

    Raises:
        BadRow: both do.
    """
    if first and second:
        raise BadRow("calls in two places", f"{where} has calls in two places; expected them in tool_calls alone")
    return first or second


def _learned_by(item: Mapping[str, Any]) -> str:
    """The field that says whether a message is learned."""
    return next((name for name in TRAIN if item.get(name) is not None), TRAIN[0])


def _train(item: Mapping[str, Any], name: str, where: str, role: str) -> bool | None:
    """`train`: true or false; `weight` and `loss_weight`: 1 or 0."""
    value = item.get(name)
    if value is None:
        return None
    known = "true or false" if name == TRAIN[0] else "0 or 1"
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise BadRow(f"{name!r} of a message", f"{where}.{name} is {found(value)}; expected {known}")
    if value and role != "assistant":
        raise BadRow("train on a question", f"{where}.{name}: only assistant messages are learned, this is {role}")
    return bool(value)


# ---- Fields


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        names = ", ".join(sorted(map(str, row))) or "no field at all"
        raise BadRow(f"no field {name!r}", f"no field {name!r} (found: {names[:80]}); {EXPECTED}")
    return row[name]


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not a string", f"field {name!r} is {found(value)}; expected a string")
    return check_text(value, name)


def _optional_text(row: Mapping[str, Any], name: str) -> str | None:
    return _text(row, name) if row.get(name) is not None else None
