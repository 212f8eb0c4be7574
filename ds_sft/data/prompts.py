"""A conversation as training would have shown it: the prompt before an answer, and the message that it becomes.

The encoder makes the prompts, so they are, token for token, what stood before such an answer in training. What a model
then writes is read the other way round: reasoning and content are found by what the template writes around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import THINKING
from ds_sft.data.encode import Encoder
from ds_sft.data.records import Dialogue, read_dialogues, reading_of
from ds_sft.data.shapes import Message
from ds_sft.data.sources import find_files
from ds_sft.data.templates import ChatTemplate
from ds_sft.data.turns import FIELD
from ds_sft.errors import UserError

ROWS_ASKED = 100  # of each file, for whether answers were taught with reasoning


class Prompt(NamedTuple):
    ids: list[int]
    opened: str  # what it ends with after the header of an answer, as <think>\n


class AnswerParts(NamedTuple):
    """What an answer says, or has said so far."""

    reasoning: str
    content: str


@dataclass(frozen=True)
class Form:
    """What a template writes before a content, or before and after reasoning, however white space is set."""

    before: str
    between: str = ""  # reasoning and content; none where there is no reasoning

    def read(self, text: str, *, whole: bool) -> AnswerParts | None:
        """None where the text does not begin so; while it is not `whole`, what may yet become a mark is left out."""
        begun = _find(self.before, text, 0)
        if begun is None or begun[0] > 0:
            return AnswerParts("", "") if not whole and _squeezed(self.before).startswith(_squeezed(text)) else None
        start = begun[1]
        if not self.between:
            return AnswerParts("", text[start:])
        if found := _find(self.between, text, start):
            return AnswerParts(text[start : found[0]], text[found[1] :])
        return AnswerParts(text[start:].rstrip() if whole else _without_begun(text[start:], self.between), "")


THINK = Form("<think>", "</think>")  # in a content, where the template has no other place for reasoning


class Prompts:
    """Prompts of a model that was trained with these keys, and what its answers say.

    Text of a message never becomes a special token: under the reference template, too, where training lets it.

    Args:
        reasoning: whether answers begin with reasoning, where the prompt tells; None: as in the run's data.

    Raises:
        UserError: the key `template` names none that can be used, or not with this system prompt.
    """

    def __init__(self, tokenizer: Any, config: Config, *, reasoning: bool | None = None) -> None:
        self.encoder, self.system_prompt = Encoder(tokenizer, config), config.system_prompt
        if not isinstance(self.encoder.template, ChatTemplate):
            self.encoder.template = replace(self.encoder.template, allow_special_tokens=False)
        turns = self.encoder.template.turns if isinstance(self.encoder.template, ChatTemplate) else None
        self.header = turns.header if turns else "<|im_start|>assistant\n"
        self.forms = list(_forms(self.encoder.template)) if isinstance(self.encoder.template, ChatTemplate) else []
        self.chooses = self._chooses()
        self.reasoning = self.chooses and (taught_reasoning(config) if reasoning is None else reasoning)

    def _chooses(self) -> bool:
        """Whether the prompt before an answer with reasoning is another one than before one without.

        Raises:
            UserError: the template has no form for a question, or not with this system prompt.
        """
        question = [Message("user", "x")]
        self.reasoning = False
        try:
            plain = self.prompt(question)
        except BadRow as error:
            raise UserError(f"template: {error}") from None
        self.reasoning = True
        try:
            return self.prompt(question) != plain
        except BadRow:  # this template has no reasoning
            return False

    def prompt(self, messages: Sequence[Message]) -> Prompt:
        """What stands before the answer to these messages, the last of which asks.

        Raises:
            BadRow: the template cannot render them.
        """
        answer = Message("assistant", "x", extra={FIELD: "x"} if self.reasoning else {})
        pieces = self.encoder.prompt_pieces(Dialogue((*messages, answer)))
        text = "".join(str(piece.text) for piece in pieces)
        opened = text.rpartition(self.header)[2] if self.header and self.header in text else ""
        return Prompt(self.encoder.prompt_ids(pieces), opened)

    def forges(self, text: str) -> str:
        """The special token that a text has in it, if any; it stays text."""
        found = self.encoder.template.special.search(text)
        return found[0] if found else ""

    def shown(self, prompt: Prompt, answer: str, *, whole: bool = True) -> AnswerParts:
        """What a model that was asked with `prompt` has said, for people; content grows as the answer does."""
        said = self._said(prompt, answer, whole=whole)
        own = THINK.read(said.content, whole=whole) if not said.reasoning and said.content else None
        return own or said

    def message(self, prompt: Prompt, answer: str) -> Message:
        """The answer as a row of the training data would have it."""
        said = self._said(prompt, answer, whole=True)
        return Message("assistant", said.content, extra={FIELD: said.reasoning} if said.reasoning.strip() else {})

    def _said(self, prompt: Prompt, answer: str, *, whole: bool) -> AnswerParts:
        read = (form.read(prompt.opened + answer, whole=whole) for form in self.forms)
        return next((said for said in read if said is not None), AnswerParts("", answer))


def _forms(template: ChatTemplate) -> Iterator[Form]:
    """What the template writes that tells: reasoning first, then the longest beginnings."""
    if template.turns.reasoning == "field":
        yield from (Form(before, between) for before, between in template.turns.thought if _tells(before, between))
    yield from (Form(before) for before, _ in template.turns.plain if _tells(before))


def _tells(*marks: str) -> bool:
    return all(mark.strip() for mark in marks)


def _find(mark: str, text: str, start: int) -> tuple[int, int] | None:
    """Where a mark stands, with the white space before it, and where it ends: as it is, or set otherwise."""
    chunks = r"\s*".join(map(re.escape, mark.split()))
    loose = re.compile(rf"\s*{chunks}\s*").search(text, start)
    if loose is None:
        return None
    exact = text.find(mark, loose.start(), loose.end())
    return loose.start(), exact + len(mark) if exact >= 0 else loose.end()


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _without_begun(text: str, mark: str) -> str:
    """A text without the white space and the beginning of `mark` that it ends with.

    It is asked at every token, so only the end of the text is looked at.
    """
    mark, tail, end = _squeezed(mark), "", len(text)
    for at in reversed(range(len(text))):
        if text[at].isspace():
            continue
        tail = text[at] + tail
        if mark.startswith(tail):
            end = at
        if len(tail) == len(mark):
            break
    return text[:end].rstrip()


def taught_reasoning(config: Config) -> bool:
    """Whether an answer among the first rows that a run has learned has reasoning; no, where they cannot be read."""
    if config.thinking != "keep":
        return False
    try:
        files = [file for file in find_files(config.train_file, "train_file") if Path(file.name).is_file()]
        return any(
            message.role == "assistant" and (message.extra.get(FIELD) or THINKING.match(message.content))
            for file in files
            for _, row in islice(read_dialogues(file, reading_of(config, file)), ROWS_ASKED)
            if isinstance(row, Dialogue)
            for message in row.messages
        )
    except UserError:
        return False
