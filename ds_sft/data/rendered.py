"""Texts of a dialogue that a template leaves out: what stands in the row and not in what is learned from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ds_sft.data.content import THINKING, as_object
from ds_sft.data.shapes import Message
from ds_sft.data.turns import shows_call


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


def left_out(
    messages: Sequence[Message], learned: Sequence[bool], text: str, lost_calls: Collection[int] = ()
) -> set[str]:
    """What of the messages is not in the text that a template made of them, as "user name".

    Of a message that is learned the template has shown content, reasoning and calls already. The ids that pair calls
    with their results are no text, and a tool's schema is written in a form of the template's own.

    Args:
        lost_calls: indices of messages with calls that are known to be left out, though the text may have their words.
    """
    rendered, found = Rendered(text), set()
    for i, (message, is_learned) in enumerate(zip(messages, learned, strict=True)):
        if not is_learned and not rendered.has(message.content):
            found |= {f"{message.role} {part}" for part, said in _parts(message.content) if not rendered.has(said)}
        for name, said in message.extra.items() if message.extra else ():
            if name != "tool_call_id" and not (is_learned and name == "reasoning_content") and not rendered.has(said):
                found.add(f"{message.role} {name}")
        if is_learned:
            continue
        if i in lost_calls or not all(_has_call(text, call["function"]) for call in message.tool_calls):
            found.add(f"{message.role} tool_calls")
    return found


def _parts(content: str) -> Iterator[tuple[str, str]]:
    """A content with the reasoning in it told apart."""
    thought = THINKING.match(content)
    if thought:
        yield "reasoning_content", thought[1]
    yield "content", content[thought.end() :] if thought else content


def _has_call(text: str, function: Mapping[str, Any]) -> bool:
    """Arguments that are JSON in a text may be rendered so, or as what they say."""
    given = function["arguments"]
    return any(shows_call(text, {"function": {**function, "arguments": form}}) for form in (given, as_object(given)))
