"""The shapes that dialogues come in -> messages.

| shape | fields |
|---|---|
| qa | question, answer; optional system, history |
| alpaca | instruction, output; optional input, system, history |
| sharegpt | conversations of from, value; optional system, tools |
| messages | messages of role, content (OpenAI); optional tools |
| prompt_completion | prompt, completion: two texts, or two lists of messages; optional system, tools |

A row is recognised by its fields. A message may also carry tool_calls, reasoning_content, and `train`: true or false.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ds_sft.config import REFERENCE_PROMPT
from ds_sft.data.files import BadRow

Shape = Literal["auto", "qa", "alpaca", "sharegpt", "messages", "prompt_completion"]
SHAPES = get_args(Shape)
EXPECTED = "expected question and answer; instruction and output; conversations; messages; or prompt and completion"
ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant", "bot": "assistant",
    "function_call": "assistant", "tool_call": "assistant",
    "tool": "tool", "observation": "tool", "function": "tool", "tool_response": "tool", "ipython": "tool",
}  # fmt: skip
CALLS = ("function_call", "tool_call")  # ShareGPT's roles for an assistant's message that is a call
SURROGATE = re.compile("[\ud800-\udfff]")
EXTRA = ("reasoning_content", "name", "tool_call_id")  # texts of a message that a template may read


@dataclass(frozen=True)
class Message:
    """One turn. `extra` holds the texts named in EXTRA."""

    role: str  # system, user, assistant or tool
    content: str
    train: bool | None = None  # whether it is learned; None: the key `mask` says
    tool_calls: tuple[dict[str, Any], ...] = ()
    extra: Mapping[str, str] = field(default_factory=dict)


def to_messages(
    row: Any, shape: Shape, fields: Mapping[str, str], system_prompt: str
) -> tuple[list[Message], list[dict[str, Any]]]:
    """Messages and tools of a parsed row.

    Raises:
        BadRow: nothing that can be learned from.
    """
    if not isinstance(row, dict):
        raise BadRow("not an object", f"found {json_type(row)}; expected one JSON object a line")
    if fields:
        row = {**row, **{ours: row[theirs] for ours, theirs in fields.items() if theirs in row}}
    shape = recognise(row) if shape == "auto" else shape
    if shape == "messages":
        messages = _message_list(row, "messages", fields)
    elif shape == "sharegpt":
        messages = _message_list(row, "conversations", fields)
    elif shape == "prompt_completion":
        messages = _prompt_completion(row, fields)
    else:
        messages = _alpaca(row, system_prompt) if shape == "alpaca" else _question_answer(row, "question", "answer")
    system = _optional_text(row, "system")
    if system is not None and not any(message.role == "system" for message in messages):
        messages.insert(0, Message("system", system))
    if not any(message.role == "assistant" and message.train is not False for message in messages):
        raise BadRow("no answer to learn", "no assistant message to learn; expected at least one")
    return messages, _tools(row)


def recognise(row: Mapping[str, Any]) -> Shape:
    """The shape of a row by its fields; question and answer where nothing else fits, whose error then lists all."""
    if "question" in row and "answer" in row:
        return "qa"
    if isinstance(_unpacked(row.get("messages")), list):
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "output" in row and "answer" not in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    return "messages" if "messages" in row else "qa"


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
    history = _unpacked(row.get("history"))
    if history is None or history == "":
        return []
    pairs = history if isinstance(history, list) else [None]
    messages = []
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise BadRow("field 'history' is not pairs", "field 'history': expected [[question, answer], ...]")
        question, answer = (_unicode(text, "history") for text in pair)
        messages += [Message("user", question), Message("assistant", answer)]
    return messages


def _prompt_completion(row: dict[str, Any], fields: Mapping[str, str]) -> list[Message]:
    """Two texts, or two lists of messages; only the completion is learned."""
    if not _is_messages(row.get("prompt")):
        return _question_answer(row, "prompt", "completion")
    prompt = [
        Message(m.role, m.content, False if m.role == "assistant" else None, m.tool_calls, m.extra)
        for m in _message_list(row, "prompt", fields)
    ]
    if not _is_messages(row.get("completion")):
        return [*prompt, Message("assistant", _text(row, "completion"))]
    return prompt + _message_list(row, "completion", fields)


def _is_messages(value: Any) -> bool:
    """A text may well be JSON and still be the text to learn; a list of objects is not."""
    value = _unpacked(value)
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


# ---- Lists of messages


def _message_list(row: dict[str, Any], name: str, fields: Mapping[str, str]) -> list[Message]:
    items = _unpacked(_field(row, name))
    if not isinstance(items, list):
        raise BadRow(f"field {name!r} is not a list", f"field {name!r} is {_found(items)}; expected a list of messages")
    return [_message(item, f"{name}[{index}]", fields) for index, item in enumerate(items)]


def _message(item: Any, where: str, fields: Mapping[str, str]) -> Message:
    if not isinstance(item, dict):
        raise BadRow("a message is not an object", f"{where} is {_found(item)}; expected role and content")
    said, text = (_name(item, names, fields) for names in (("role", "from"), ("content", "value")))
    role = item.get(said)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow("unknown role", f"{where}.{said} is {_found(role)}; expected system, user, assistant or tool")
    calls = _calls(item, where, text) if ROLES[role] == "assistant" else ()
    content = "" if role in CALLS else _content(item.get(text), f"{where}.{text}", optional=bool(calls))
    extra = {n: _unicode(item[n], f"{where}.{n}") for n in EXTRA if isinstance(item.get(n), str)}
    return Message(ROLES[role], content, _train(item, where, ROLES[role]), calls, extra)


def _name(item: dict[str, Any], names: tuple[str, str], fields: Mapping[str, str]) -> str:
    """What a message calls its role or its content: the field map's name, OpenAI's or ShareGPT's."""
    known = [name for name in (fields.get(names[0]), fields.get(names[1]), *names) if name]
    return next((name for name in known if name in item), known[0])


def _content(value: Any, where: str, *, optional: bool) -> str:
    """A text, or OpenAI's list of parts where each is one."""
    if value is None and optional:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(part["text"] if isinstance(part.get("text"), str) else "" for part in value)
    if not isinstance(value, str):
        raise BadRow("a content is not text", f"{where} is {_found(value)}; expected a string")
    return _unicode(value, where)


def _train(item: dict[str, Any], where: str, role: str) -> bool | None:
    """`train`: true or false; or OpenAI's `weight`: 1 or 0."""
    name = "train" if item.get("train") is not None else "weight"
    value = item.get(name)
    if value is None:
        return None
    if value not in (0, 1) or not isinstance(value, (bool, int)):
        raise BadRow(f"{name!r} of a message", f"{where}.{name} is {_found(value)}; expected true or false")
    if value and role != "assistant":
        raise BadRow("train on a question", f"{where}.{name}: only assistant messages are learned, this is {role}")
    return bool(value)


def _calls(item: dict[str, Any], where: str, text: str) -> tuple[dict[str, Any], ...]:
    """The calls of a message in OpenAI's form, with arguments as they are: an object, or the text of one."""
    value = item.get(text) if item.get("role", item.get("from")) in CALLS else item.get("tool_calls")
    value = _unpacked(value)
    if value is None or value == []:
        return ()
    found = value if isinstance(value, list) else [value]
    return tuple(_call(call, where) for call in found)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("a tool call without a name", f"{where}: {_found(call)} is no call; expected name and arguments")
    arguments = function.get("arguments")
    clean = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    _check_unicode({**clean, "arguments": as_object(arguments)}, where)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**identity, "type": "function", "function": clean}


def as_object(arguments: Any) -> Any:
    """The arguments of a call as an object, where their text is one."""
    return _unpacked(arguments)


def _tools(row: dict[str, Any]) -> list[dict[str, Any]]:
    """JSON schemas of the tools, bare or as OpenAI's {"type": "function", "function": ...}."""
    tools = _unpacked(row.get("tools"))
    if tools is None or tools == "":
        return []
    tools = [_unpacked(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("field 'tools' is not a list", f"field 'tools' is {_found(tools)}; expected a list of objects")
    _check_unicode(tools, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


# ---- Fields


def _field(row: dict[str, Any], name: str) -> Any:
    if name not in row:
        found = ", ".join(sorted(map(str, row))) or "no field at all"
        raise BadRow(f"no field {name!r}", f"no field {name!r} (found: {found[:80]}); {EXPECTED}")
    return row[name]


def _text(row: dict[str, Any], name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise BadRow(f"field {name!r} is not a string", f"field {name!r} is {_found(value)}; expected a string")
    return _unicode(value, name)


def _optional_text(row: dict[str, Any], name: str) -> str | None:
    return _text(row, name) if row.get(name) is not None else None


def _unicode(value: str, name: str) -> str:
    if not value.isascii() and SURROGATE.search(value):
        raise BadRow("not Unicode text", f"field {name!r} holds half of a surrogate pair; expected Unicode text")
    return value


def _check_unicode(value: Any, name: str) -> None:
    """Raises BadRow: half of a surrogate pair somewhere in it, or what JSON has no form for."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:  # a date or bytes of a Parquet file; nested without end
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON: {error}"
        raise BadRow("not JSON values", f"field {name!r} {reason}; expected JSON values") from None
    _unicode(text, name)


def _unpacked(value: Any) -> Any:
    """Lists and objects also come as JSON in a text: in CSV, and in ShareGPT's tools."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _found(value: Any) -> str:
    if value is None:
        return "null"
    try:
        return f"{json_type(value)}: {json.dumps(value, ensure_ascii=True)[:40]}"
    except (TypeError, ValueError, RecursionError):  # a date of a Parquet file
        return json_type(value)


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
