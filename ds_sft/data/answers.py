"""Where an answer stands in what a chat template has rendered, and why it is not to be found."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import THINKING
from ds_sft.data.pieces import MARKED, OPEN, unmarked
from ds_sft.data.turns import FIELD, THINK_TAG, Turns, shows_call

NO_CALLS = "the template has no tool calls"
NOT_SEEN = "it cannot be shown which text is learned"
A_TEMPLATE_WITH_TOOLS = "the key template: hermes (ChatML with tools), or a Jinja file that has them"


class Answers:
    """Finds answers by what the template writes around them (`turns.py`); what is found must be the answer."""

    def __init__(self, turns: Turns, special: re.Pattern[str], *, marks: bool) -> None:
        """`special` matches special tokens in what the template writes; `marks`: it says itself where answers are."""
        self.turns, self.special, self.marks = turns, special, marks
        self.plain, self.beside, self.thought = turns.plain, turns.beside, turns.thought
        if marks:  # which begin where a template's author put them
            self.plain, self.beside = map(self._from_any_start, (self.plain, self.beside))
            self.thought = tuple({(start, after) for text, after in self.thought for start in self._starts(text)})
        within = any(turns.header in text for pair in turns.thought for text in pair)  # between channels
        headers = (turns.tool_header, "" if marks or within else turns.header)
        self.borders = [header for header in headers if header]  # where another turn begins
        self.ends = re.compile(f"(?<!{OPEN})(?:{'|'.join(map(re.escape, turns.ends))})")
        # Ends that the template writes within an answer: gpt-oss's <|end|> between reasoning and content.
        self.inner_ends = max((len(self.ends.findall(between)) for _, between in turns.thought), default=0)

    def span(self, whole: str, start: int, ends: Iterable[re.Match[str]], row: dict[str, Any]) -> tuple[int, int]:
        """From where generation starts up to and with the token that ends the turn, of `ends` the first that can be."""
        texts: list[str] = []
        for end in islice(ends, 1 + self.inner_ends + self._own_ends(row)):
            texts.append(whole[start : end.start()])
            if (prompt_part := self._prompt_part(texts[-1], row)) is not None:
                return start + prompt_part, end.end()
        raise self._refusal(texts, row)

    def _own_ends(self, row: dict[str, Any]) -> int:
        """How many ends of turn a message says itself, which count where they are not marked as its text."""
        said = row.get("content") or ""
        said = f"{row[FIELD]} {said}" if FIELD in row else said
        return len(self.ends.findall(said)) if any(end in said for end in self.turns.ends) else 0

    def _prompt_part(self, text: str, row: dict[str, Any]) -> int | None:
        """How much of what stands between header and end is prompt; None where that is not the answer of `row`."""
        calls = row.get("tool_calls", ())
        if calls and (self._runs_on(text) or self._missing_call(text, row) is not None):
            return None
        reasoning, content = self._said(row)
        if reasoning is not None and self._is_thought(text, reasoning, content, bool(calls)):
            return 0 if self.marks else self.turns.prompt_part(text)
        if reasoning and not reasoning.isspace():
            if FIELD in row:
                return None
            content = row["content"]  # which the template may leave as it is
        content = content.strip()
        for prefix, prompt_part in self.beside if calls else self.plain:
            if text.startswith(prefix) or (not content and text == prefix.rstrip()):
                rest = text[len(prefix) :].strip()
                if rest == content or (calls and rest.startswith(content)):
                    return min(prompt_part, len(text))
        return None

    def _said(self, row: dict[str, Any]) -> tuple[str | None, str]:
        """Reasoning and content of a message."""
        content = row.get("content") or ""
        if FIELD in row:
            return row[FIELD], content
        if "</think>" not in content:
            return None, content
        if own := THINKING.match(content):
            return own[1], content[own.end() :]
        reasoning, _, rest = content.partition("</think>")
        half = "<think>" in self.turns.opened and "<think>" not in reasoning  # as a model writes that is so prompted
        return (reasoning, rest) if half else (None, content)

    def _is_thought(self, text: str, reasoning: str, content: str, calls: bool) -> bool:
        """Whether a text is reasoning and content as the template writes them; before calls only its beginning."""
        text, content = _squeezed(text), _squeezed(content)
        for before, between in self.thought:
            opening = _squeezed(before + reasoning)
            if text == opening + _squeezed(between) + content:
                return True
            if calls and text.startswith(opening) and content in text[len(opening) :]:
                return True
        return False

    def _runs_on(self, text: str) -> bool:
        """Whether a text goes on into another turn."""
        return any(border in text for border in self.borders)

    def _missing_call(self, text: str, row: dict[str, Any]) -> str | None:
        """The name of a call that a text leaves out, or whose arguments."""
        calls, can = row.get("tool_calls", ()), self.turns.call_forms
        names = [call["function"]["name"] for call in calls if not can or not shows_call(text, call)]
        return unmarked(names[0])[:40] if names else None

    def _shows_first_call(self, text: str, row: dict[str, Any]) -> bool:
        return self._missing_call(text, {"tool_calls": row["tool_calls"][:1]}) is None

    def _refusal(self, texts: Sequence[str], row: dict[str, Any]) -> BadRow:
        """Why none of the texts up to an end is the answer."""
        text = next((text for text in texts if self._missing_call(text, row) is None), texts[0] if texts else None)
        if text is None or self._runs_on(text):
            end = self.turns.end
            return BadRow("no end of turn", f"the template does not end this answer with {end!r}: {NOT_SEEN}")
        if (name := self._missing_call(text, row)) is not None and self._shows_first_call(text, row):
            return BadRow(NO_CALLS, f"the template renders one call of a message and leaves out that of {name!r}; "
                          f"expected messages with one call each, or {A_TEMPLATE_WITH_TOOLS}")  # fmt: skip
        if name is not None:
            return BadRow(NO_CALLS, f"the template leaves out the call of {name!r} or its "
                          f"arguments; expected {A_TEMPLATE_WITH_TOOLS}")  # fmt: skip
        reasoning, content = self._said(row)
        after = text.partition(content.strip())[2] if content.strip() else ""
        if self.turns.closes and (token := self.special.search(MARKED.sub("", after))):
            ends = " or ".join(map(repr, self.turns.ends))
            return BadRow("no end of turn", f"{token[0]!r} of the next turn follows this answer, which the template "
                          f"ends with {ends}: {NOT_SEEN}")  # fmt: skip
        said = unmarked(f"<think>{reasoning}</think>{content}" if reasoning else content)[:40]
        return BadRow("the template rewrites an answer", f"the template renders the answer {said!r} as "
                      f"{unmarked(text)[:40]!r}")  # fmt: skip

    def _from_any_start(self, prefixes: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        """What may stand before a content after a mark: all the template writes, or a part of it."""
        starts = {start for text, part in prefixes for start in (*self._starts(text), text[part:])}
        return tuple((text, 0) for text in sorted(starts, key=len, reverse=True))

    def _starts(self, text: str) -> list[str]:
        """A text with the header, without it, and from each tag of a thinking block on."""
        whole = self.turns.header + text
        return [whole, text, *(whole[tag.start() :] for tag in THINK_TAG.finditer(whole))]


def _squeezed(text: str) -> str:
    """Without white space: templates set their own around reasoning."""
    return "".join(text.split())
