"""What a message says: text, reasoning and calls, in fields of their own or in typed parts of its content.

A part is an object with a `type`: text (its text under `text` or `value`), reasoning or thinking, tool_call. Images,
audio, and types that nobody knows are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ds_sft.data.bad_row import BadRow
from ds_sft.data.values import check_json, check_text, found, is_empty, note_unread, unpacked

REASONING = ("reasoning_content", "reasoning", "thinking")  # fields of an answer, and types of a part
TEXT_PARTS = ("text", "input_text", "output_text")
CALL_PARTS = ("tool_call", "tool_calls", "function_call")
MEDIA = re.compile(r"(?:input_|output_)?(image|audio|video|file)(?:_url|_file)?")  # types of a part, of any program
# Not reasoning but a word for how much of it: as in NVIDIA's Nemotron sets (on, off) and for gpt-oss (low to high).
EFFORT = frozenset(["on", "off", "true", "false", "none", "low", "medium", "high"])
THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)  # at the start of a content


class ContentParts(NamedTuple):
    """What the content of a message says."""

    text: str | None = None  # None: nothing that is a text, not even an empty one
    reasoning: str = ""
    calls: tuple[dict[str, Any], ...] = ()


def read_content(value: Any, where: str, unread: set[str], *, answer: bool) -> ContentParts:
    """A text, or typed parts; only an `answer` may have reasoning and calls among them.

    Raises:
        BadRow: neither, or a part that cannot be learned from.
    """
    if value is None:
        return ContentParts()
    if isinstance(value, str):
        return ContentParts(check_text(value, where))
    if not isinstance(value, list) or not value or not all(isinstance(part, dict) for part in value):
        raise BadRow("a content is not text", f"{where} is {found(value)}; expected a string, or a list of typed parts")
    said = ContentParts()
    for index, part in enumerate(value):
        said = _with_part(said, part, f"{where}[{index}]", unread, answer=answer)
    return said


def _with_part(said: ContentParts, part: dict[str, Any], where: str, unread: set[str], *, answer: bool) -> ContentParts:
    kind = part.get("type")
    if kind in TEXT_PARTS and not said.calls:
        return said._replace(text=(said.text or "") + _part_text(part, str(kind), where, unread))
    if kind in REASONING and answer and not said.text and not said.calls:
        return said._replace(reasoning=said.reasoning + _part_text(part, str(kind), where, unread))
    if kind in CALL_PARTS and answer:
        return said._replace(calls=said.calls + _part_calls(part, str(kind), where, unread))
    if answer and kind in (*TEXT_PARTS, *REASONING):
        raise BadRow("parts out of order", f"{where} is {kind}; expected reasoning first, then text, then calls")
    if isinstance(kind, str) and (media := MEDIA.fullmatch(kind)):
        remedy = "leave the row out (on_bad_row: skip does), or take this part out of it"
        raise BadRow(f"{media[1]} in a message", f"{where} is of type {kind}: only text is trained on; {remedy}")
    expected = "text, reasoning or tool_call" if answer else "text"
    raise BadRow("a part that is not text", f"{where}.type is {found(kind)}; expected {expected}")


def _part_text(part: dict[str, Any], kind: str, where: str, unread: set[str]) -> str:
    """The text of a part under `text`, `value` or its type; OpenAI's threads have {"value": ..., "annotations"}."""
    names = [name for name in dict.fromkeys(("text", "value", kind)) if part.get(name) is not None]
    if len(names) != 1:
        raise BadRow("a part without a text", f"{where} has {' and '.join(names) or 'no text'}; expected text or value")
    text, place = part[names[0]], f"{where}.{names[0]}"
    note_unread(part, ("type", names[0]), f"{where}.", unread)
    if isinstance(text, dict):
        note_unread(text, ("value",), f"{place}.", unread)
        text = text.get("value")
    if not isinstance(text, str):
        raise BadRow("a part without a text", f"{place} is {found(text)}; expected a string")
    return check_text(text, place)


def _part_calls(part: dict[str, Any], kind: str, where: str, unread: set[str]) -> tuple[dict[str, Any], ...]:
    """The calls of a part: under `value` or its type, an object or JSON in a text, or the part itself."""
    name = next((name for name in ("value", kind) if part.get(name) is not None), None)
    if name is None:
        return read_calls({key: item for key, item in part.items() if key != "type"}, where, unread)
    note_unread(part, ("type", name, "id", "tool_call_id"), f"{where}.", unread)
    calls = read_calls(part[name], f"{where}.{name}", unread)
    identity = part.get("tool_call_id") or part.get("id")
    return tuple({"id": identity, **call} for call in calls) if isinstance(identity, str) and len(calls) == 1 else calls


def read_reasoning(holder: Mapping[str, Any], where: str, unread: set[str], *, text: str = "", parts: str = "") -> str:
    """The reasoning under any of its names, or in `parts` of the content; nothing where `text` begins with the same.

    Raises:
        BadRow: it is no text, or there are two that differ.
    """
    texts = [parts] if parts else []
    for name in REASONING:
        value = holder.get(name)
        if is_empty(value):
            continue
        if isinstance(value, (list, dict)):
            raise BadRow("reasoning is not text", f"{where}{name} is {found(value)}; expected a string")
        if isinstance(value, str) and value.lower() not in EFFORT:
            texts.append(check_text(value, f"{where}{name}"))
        else:
            note_unread({name: value}, (), where, unread)
    place = where.removesuffix(".") or "the row"
    if len(set(texts)) > 1:
        raise BadRow("two reasonings", f"{place} has two that differ; expected one of {', '.join(REASONING)}")
    thought = THINKING.match(text) if texts else None
    if thought and thought[1].strip() != texts[0].strip():
        raise BadRow("two reasonings", f"{place} has one in its text and another beside it; expected one")
    return texts[0] if texts and not thought else ""


def read_calls(value: Any, where: str, unread: set[str]) -> tuple[dict[str, Any], ...]:
    """Calls in OpenAI's form, with arguments as they are: an object, or the text of one.

    Raises:
        BadRow: no call, or one without a name.
    """
    value = unpacked(value)
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        return (_call(value, where, unread),)
    return tuple(_call(call, f"{where}[{index}]", unread) for index, call in enumerate(value))


def _call(call: Any, where: str, unread: set[str]) -> dict[str, Any]:
    inner = call.get("function") if isinstance(call, dict) else None
    function = call if inner is None else inner
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise BadRow("a tool call without a name", f"{where}: {found(call)} is no call; expected name and arguments")
    known = ("id", "type", "name", "arguments") if function is call else ("id", "type", "function")
    note_unread(call, known, f"{where}.", unread)
    if function is not call:
        note_unread(function, ("name", "arguments"), f"{where}.function.", unread)
    arguments = _arguments(function.get("arguments"), where)
    identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    clean = {"name": check_text(function["name"], where), "arguments": {} if arguments is None else arguments}
    return {**identity, "type": "function", "function": clean}


def _arguments(value: Any, where: str) -> Any:
    """Arguments in a text say what they say, null fields as well: no kind of file changes them. Blank is none."""
    if not isinstance(value, str):
        return check_json(value, where)
    if not value.strip():
        return None
    check_json(as_object(value), where)
    return value


def as_object(arguments: Any) -> Any:
    """The arguments of a call as an object, where their text is one."""
    return unpacked(arguments)


def read_tools(value: Any) -> list[dict[str, Any]]:
    """JSON schemas of tools, bare or as OpenAI's {"type": "function", "function": ...}, in that form.

    Raises:
        BadRow: anything else.
    """
    tools = unpacked(value)
    if tools is None or tools == "":
        return []
    tools = [unpacked(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("field 'tools' is not a list", f"field 'tools' is {found(tools)}; expected a list of objects")
    clean: list[dict[str, Any]] = check_json(tools, "tools")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in clean]
