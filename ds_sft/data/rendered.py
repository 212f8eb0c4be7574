"""Texts of a dialogue that a template leaves out: what stands in the row and not in what is learned from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from ds_sft.data.content import THINKING, as_object
from ds_sft.data.shapes import Message
from ds_sft.data.turns import shows_call

FORMS = 4  # of a text: as it is; white space aside as it is, in JSON, and in JSON that is a text in JSON
CALL_SIZE = 4096  # characters of a template's own around a call


class Search:
    """A text that is asked for others in their order: each search begins where the last one ended.

    Of a dialogue of a thousand messages it would else go over the whole text a thousand times.
    """

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def has(self, text: str) -> bool:
        found = self.text.find(text, self.at)
        if found < 0:
            found = self.text.find(text, 0, self.at + len(text))
        if found >= 0:
            self.at = found + len(text)
        return found >= 0


class Rendered:
    """What a template made of a dialogue."""

    def __init__(self, text: str) -> None:
        self.plain = Search(text)
        self.form: dict[str, int] = {}  # part of a message -> number of the form in which it was found last

    @cached_property
    def squeezed(self) -> Search:
        return Search("".join(self.plain.text.split()))

    def has(self, text: str, part: str) -> bool:
        """Whether a text is in it, however white space was set, as it is or as JSON writes it.

        Args:
            part: of a message that the text is, such as "tool content"; likely in the form of those before.
        """
        first = self.form.get(part, 0)
        for form in sorted(range(FORMS), key=lambda number: number != first):
            if self._has_form(text, form):
                self.form[part] = form
                return True
        return False

    def _has_form(self, text: str, form: int) -> bool:
        if form == 0:
            return self.plain.has(text.strip())
        for _ in range(form - 1):
            text = json.dumps(text, ensure_ascii=False)[1:-1]
        return self.squeezed.has("".join(text.split()))

    def has_call(self, function: Mapping[str, Any]) -> bool:
        """Whether it has a call: first looked for where the last text was found, for many may follow each other."""
        size = CALL_SIZE + 8 * len(json.dumps(function, ensure_ascii=False, default=str))
        near = self.plain.text[self.plain.at : self.plain.at + size]
        if not _has_call(near, function):
            return _has_call(self.plain.text, function)
        return self.plain.has(function["name"])  # and the next search begins behind it


def left_out_by_template(
    messages: Sequence[Message], learned: Sequence[bool], text: str, lost_calls: Collection[int] = ()
) -> set[str]:
    """What of the messages is not in the text that a template made of them, as "user name".

    Of a message that is learned the template has shown content, reasoning and calls already. The ids that pair calls
    with their results are no text, and a tool's schema is written in a form of the template's own.

    Args:
        lost_calls: indices of messages with calls that are known to be left out, though the text may have their words.
    """
    rendered, found = Rendered(text), set[str]()

    def look_for(part: str, said: str) -> None:
        if part not in found and not rendered.has(said, part):
            found.add(part)

    for i, (message, is_learned) in enumerate(zip(messages, learned, strict=True)):
        for part, said in () if is_learned else _parts(message.content):
            look_for(f"{message.role} {part}", said)
        for name, said in message.extra.items() if message.extra else ():
            if name != "tool_call_id" and not (is_learned and name == "reasoning_content"):
                look_for(f"{message.role} {name}", said)
        calls = f"{message.role} tool_calls"
        if is_learned or calls in found:
            continue
        if i in lost_calls or not all(rendered.has_call(call["function"]) for call in message.tool_calls):
            found.add(calls)
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
