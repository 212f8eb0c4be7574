"""Texts of a dialogue that a template leaves out: what stands in the row and not in what is learned from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ds_sft.data.content import THOUGHT, as_object
from ds_sft.data.shapes import Message


class Rendered:
    """What a template made of a dialogue."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def squeezed(self) -> str:
        return "".join(self.text.split())

    def has(self, text: str) -> bool:
        """Whether a text is in it, however white space was set, as it is or as JSON writes it."""
        if text.strip() in self.text:
            return True
        return any("".join(form.split()) in self.squeezed for form in _forms(text))


def _forms(text: str) -> Iterator[str]:
    """As it is, in JSON, and in JSON that is a text in JSON, as arguments may be."""
    yield text
    for _ in range(2):
        text = json.dumps(text, ensure_ascii=False)[1:-1]
        yield text


def left_out(messages: Sequence[Message], learned: Sequence[bool], text: str) -> set[str]:
    """What of the messages is not in the text that a template made of them, as "user name".

    Of a message that is learned the template has shown content and reasoning already. The ids that pair calls with
    their results are no text, and a tool's schema is written in a form of the template's own.
    """
    rendered, found = Rendered(text), set()
    for message, is_learned in zip(messages, learned, strict=True):
        if not is_learned and not rendered.has(message.content):
            found |= {f"{message.role} {part}" for part, said in _parts(message.content) if not rendered.has(said)}
        for name, said in message.extra.items() if message.extra else ():
            if name != "tool_call_id" and not (is_learned and name == "reasoning_content") and not rendered.has(said):
                found.add(f"{message.role} {name}")
        if not all(_has_call(rendered, call["function"]) for call in message.tool_calls):
            found.add(f"{message.role} tool_calls")
    return found


def _parts(content: str) -> Iterator[tuple[str, str]]:
    """A content with the reasoning in it told apart."""
    thought = THOUGHT.match(content)
    if thought:
        yield "reasoning_content", thought[1]
    yield "content", content[thought.end() :] if thought else content


def _has_call(rendered: Rendered, function: Mapping[str, Any]) -> bool:
    """Arguments that are JSON in a text may be rendered so, or as what they say."""
    arguments = function["arguments"]
    if isinstance(arguments, str) and rendered.has(arguments):
        return rendered.has(function["name"])
    return all(map(rendered.has, texts_in([function["name"], as_object(arguments)])))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a parsed value, names of fields as well."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from (str(name), *texts_in(item))
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
