"""The shapes that dialogues come in -> messages.

| shape | fields |
|---|---|
| qa | question, answer; optional system, history |
| alpaca | instruction, output; optional input, system, history |
| sharegpt | conversations of from, value; optional system, tools |
| messages | messages of role, content (OpenAI); optional tools |
| prompt_completion | prompt, completion: two texts, or two lists of messages; optional system, tools |

A user's own shape is a function, `data_format: my.module:function`, which makes messages of a row. A new one here is an
entry of `SHAPES` with a function, and its name in `config.keys.DATA_FORMATS`.

A row is recognised by its fields; those that are null are absent. A message may also carry tool_calls, reasoning (as
reasoning_content, reasoning or thinking, which also stand beside the one answer of a row), and `train`: true or false.
Fields that nobody reads are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ds_sft.config.extension import is_dotted, load, said
from ds_sft.config.keys import REFERENCE_PROMPT
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import REASONING, ContentParts, read_calls, read_content, read_reasoning, read_tools
from ds_sft.data.values import check_text, found, json_type, note_unread, unpacked

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


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds reasoning_content and the texts named in EXTRA."""

    role: str  # system, user, assistant or tool
    content: str
    train: bool | None = None  # whether it is learned; None: the key `mask` says
    tool_calls: tuple[dict[str, Any], ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)


class Told(NamedTuple):
    """What is known of a row beside its fields, and what is found out about it."""

    fields: Mapping[str, str]  # our name of a field -> the file's
    system_prompt: str
    unread: set[str]  # names of fields that hold something and were not read


class RowShape(NamedTuple):
    """One shape of rows."""

    reads: frozenset[str]  # the fields
    messages: Callable[[dict[str, Any], Told], list[Message]]
    is_shape_of: Callable[[Mapping[str, Any]], bool]  # whether a row, by its fields, has this shape
    one_answer: bool = False  # reasoning beside the fields is that of the answer


def to_messages(
    row: Any, shape: str, fields: Mapping[str, str], system_prompt: str
) -> tuple[list[Message], list[dict[str, Any]], tuple[str, ...]]:
    """Messages and tools of a parsed row, and the names of the fields that hold something and were not read.

    Raises:
        BadRow: nothing that can be learned from.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {json_type(row)}; expected one JSON object a line")
    if is_dotted(shape):
        row, shape = by_function(shape, row), "messages"
    given, unread = row, set[str]()
    if fields:
        row = {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
    shape = recognise(row) if shape == "auto" else shape
    messages = SHAPES[shape].messages(row, Told(fields, system_prompt, unread))
    if not row.keys() <= SHAPES[shape].reads:
        note_unread(given, _read_names(given, shape, fields), "", unread)
    if not row.keys().isdisjoint(REASONING):
        _add_reasoning(messages, row, shape, unread)
    _add_system(messages, row, unread)
    if not any(message.role == "assistant" and message.train is not False for message in messages):
        raise BadRow("no answer to learn", "no assistant message to learn; expected at least one")
    return messages, read_tools(row.get("tools")), tuple(sorted(unread))


def by_function(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the shape `messages`, as a user's function makes it of a row.

    Raises:
        BadRow: the function refuses the row by a ValueError, fails otherwise, or returns no messages.
    """
    try:
        made = load(name, "data_format")(dict(row))
    except ValueError as error:
        raise BadRow(f"refused by {name}", " ".join(str(error).split()) or f"refused by {name}") from error
    except (Exception, SystemExit) as error:
        raise BadRow(f"{name} failed", f"{name} ended in {said(error)}") from error
    row = {"messages": list(made)} if isinstance(made, (list, tuple)) else made
    if not isinstance(row, dict) or "messages" not in row:
        text = f"{name} returned {found(made)}; expected a list of messages, or an object of messages, tools, system"
        raise BadRow(f"{name} returned no messages", text)
    return row


def _read_names(given: Mapping[str, Any], shape: str, fields: Mapping[str, str]) -> frozenset[str]:
    """The names of the fields that this shape reads, as the file has them."""
    reads = SHAPES[shape].reads
    if not fields:
        return reads
    renamed = {ours: theirs for ours, theirs in fields.items() if ours in reads and theirs in given}
    return (reads - renamed.keys()) | frozenset(renamed.values())


def _add_reasoning(messages: list[Message], row: Mapping[str, Any], shape: str, unread: set[str]) -> None:
    """The reasoning that stands beside the answer of a row; where it is not one answer, nobody knows whose it is."""
    answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.train is not False]
    at = answers[-1] if answers and (len(answers) == 1 or SHAPES[shape].one_answer) else None
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


def recognise(row: Mapping[str, Any]) -> str:
    """The shape of a row by its fields; question and answer where nothing else fits, whose error then lists all."""
    full = {name: value for name, value in row.items() if value is not None}
    return _recognise(full) or _recognise(row) or "qa"


def _recognise(row: Mapping[str, Any]) -> str | None:
    for name, shape in SHAPES.items():
        if shape.is_shape_of(row):
            return name
    return "messages" if "messages" in row else None


# ---- One question, one answer


def _qa(row: dict[str, Any], told: Told) -> list[Message]:
    return _question_answer(row, "question", "answer")


def _question_answer(row: dict[str, Any], question: str, answer: str) -> list[Message]:
    return [*_history(row), Message("user", _text(row, question)), Message("assistant", _text(row, answer))]


def _alpaca(row: dict[str, Any], told: Told) -> list[Message]:
    """The instruction, and the input, where there is one, on a line of its own: the convention of Alpaca data.

    An instruction that is a system prompt (this run's, or the one that the reference script's converter wrote into
    every row) is left out.
    """
    instruction, extra = _text(row, "instruction"), _optional_text(row, "input") or ""
    if row.get("input") is not None and instruction in (told.system_prompt, REFERENCE_PROMPT):
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


def _prompt_completion(row: dict[str, Any], told: Told) -> list[Message]:
    """Two texts, or two lists of messages; only the completion is learned."""
    if not _is_messages(row.get("prompt")):
        return _question_answer(row, "prompt", "completion")
    note_unread(row, row.keys() - {"history"}, "", told.unread)
    prompt = [
        replace(message, train=False) if message.role == "assistant" else message
        for message in _message_list(row, "prompt", told)
    ]
    if not _is_messages(row.get("completion")):
        return [*prompt, Message("assistant", _text(row, "completion"))]
    return prompt + _message_list(row, "completion", told)


def _is_messages(value: Any) -> bool:
    """A text may well be JSON and still be the text to learn; a list of objects is not."""
    value = unpacked(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# ---- Lists of messages


def _sharegpt(row: dict[str, Any], told: Told) -> list[Message]:
    return _message_list(row, "conversations", told)


def _messages(row: dict[str, Any], told: Told) -> list[Message]:
    return _message_list(row, "messages", told)


def _message_list(row: dict[str, Any], name: str, told: Told) -> list[Message]:
    items = unpacked(_field(row, name))
    if not isinstance(items, list):
        raise BadRow(f"field {name!r} is not a list", f"field {name!r} is {found(items)}; expected a list of messages")
    return [_message(item, f"{name}[{index}]", told.fields, told.unread) for index, item in enumerate(items)]


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


# ---- Every shape; a row has the first one that it could be of


SHAPES = {
    "qa": RowShape(BESIDE | {"question", "answer", "history"}, _qa, lambda row: "question" in row and "answer" in row,
                one_answer=True),
    "messages": RowShape(BESIDE | {"messages"}, _messages, lambda row: isinstance(unpacked(row.get("messages")), list)),
    "sharegpt": RowShape(BESIDE | {"conversations"}, _sharegpt, lambda row: "conversations" in row),
    "alpaca": RowShape(BESIDE | {"instruction", "input", "output", "history"}, _alpaca,
                    lambda row: "output" in row and "answer" not in row, one_answer=True),
    "prompt_completion": RowShape(BESIDE | {"prompt", "completion", "history"}, _prompt_completion,
                               lambda row: "prompt" in row and "completion" in row),
}  # fmt: skip
