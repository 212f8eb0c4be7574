"""Dialogues -> the text a model reads, cut into pieces that are learned and pieces that are not.

Four templates: the reference script's ChatML, the tokenizer's own chat template, ours with tools (`hermes.py`), a Jinja
file. Pieces are encoded apart, so that no token spans the border where generation starts; joined, their texts are what
the template renders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_sft.config.keys import TEMPLATES, Config
from ds_sft.data.answers import A_TEMPLATE_WITH_TOOLS, NO_CALLS, NOT_SEEN, Answers
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import THINKING
from ds_sft.data.hermes import HERMES
from ds_sft.data.messages import full_content, learned_messages, with_thinking
from ds_sft.data.pieces import OPEN, Piece, cut_text, mark_special, special_tokens, split_text, unmarked
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.data.turns import CALL_FORMS, FIELD, REFUSED, THINK_TAG, CallForm, Renderer, find_turns
from ds_sft.errors import UserError, nearest_value

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
REMEDIED = ("the template rewrites an answer", "the template rewrites earlier turns", "no end of turn")


def open_template(config: Config, tokenizer: Any) -> Reference | ChatTemplate:
    """The template that the key `template` names.

    Raises:
        UserError: there is none, or it does not render a question and an answer.
    """
    if config.template == "reference":
        return Reference(tokenizer, config.system_prompt, config.thinking)
    if config.template == "tokenizer":
        source = tokenizer.chat_template
        source = source.get("default") if isinstance(source, dict) else source
        if not source:
            raise UserError("template: tokenizer: this tokenizer has no chat template; write reference or hermes "
                            "(ChatML, without tools and with), or a Jinja file")  # fmt: skip
    elif config.template == "hermes":
        source = HERMES
    else:
        source = _read(Path(config.template).expanduser())
    return ChatTemplate(
        tokenizer,
        source,
        system_prompt=config.system_prompt,
        thinking=config.thinking,
        allow_special_tokens=config.allow_special_tokens,
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        near = nearest_value(str(path), TEMPLATES)
        meant = f" (did you mean {near}?)" if near else ""
        expected = f"{', '.join(TEMPLATES)}, or a Jinja file{meant}"
        raise UserError(f"template: {path}: {reason}; expected {expected}") from None


@dataclass(frozen=True)
class Reference:
    """The reference script's layout: ChatML written out by hand, with the pad token as the end of an answer.

    Later turns follow on a line of their own; the reference has one question and one answer only.
    """

    tokenizer: Any
    system_prompt: str
    thinking: str = "keep"
    allow_special_tokens: bool = True  # as in the reference; `forged` counts them

    @property
    def end(self) -> str:
        return str(self.tokenizer.pad_token)

    @property
    def note(self) -> str:
        return ""

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches text that becomes special tokens."""
        return special_tokens(self.tokenizer, "<|im_start|> <|im_end|>")

    def forged(self, dialogue: Dialogue) -> bool:
        """Whether text of the row becomes special tokens, as in the reference."""
        return any(self.special.search(full_content(message)) for message in dialogue.messages)

    @cached_property
    def _remedy(self) -> str:
        """What to do about tools; the model's own template helps only if it has them."""
        if "tools" in str(self.tokenizer.chat_template or ""):
            return "expected none, or the key template: tokenizer"
        return f"expected none, or {A_TEMPLATE_WITH_TOOLS} (this tokenizer's own has none)"

    def pieces(self, dialogue: Dialogue, learned: Sequence[bool]) -> list[Piece]:
        """Raises BadRow: the row has what this layout has no form for."""
        if dialogue.tools or any(message.role == "tool" or message.tool_calls for message in dialogue.messages):
            raise BadRow("tools", f"tools: the reference template has no form for tools; {self._remedy}")
        pieces, text = [], ""
        if dialogue.messages[0].role != "system":
            text = f"<|im_start|>system\n{self.system_prompt}<|im_end|>\n"
        for message, is_learned in zip(with_thinking(dialogue.messages, self.thinking), learned, strict=True):
            if message.role != "assistant":
                text += f"<|im_start|>{message.role}\n{self._said(message.content)}<|im_end|>\n"
                continue
            pieces += self._pieces(text + "<|im_start|>assistant\n", False)
            pieces += self._pieces(self._said(full_content(message)), is_learned)
            pieces.append(Piece(self.tokenizer.pad_token_id, is_learned))
            text = "\n"
        return [*pieces, Piece(text, False)] if text != "\n" else pieces

    def _said(self, text: str) -> str:
        """Text of a message, with its special-token text marked where that must stay text."""
        return text if self.allow_special_tokens else mark_special(text, self.special)

    def _pieces(self, text: str, learned: bool) -> list[Piece]:
        return [Piece(text, learned)] if self.allow_special_tokens else split_text(text, learned)

    def lost_calls(self, dialogue: Dialogue, learned: Sequence[bool]) -> set[int]:
        """None: rows with calls are refused."""
        return set()


class ChatTemplate:
    """A Jinja chat template, as `apply_chat_template` renders it.

    What is learned of a turn: from where generation would start up to and with the token that ends it, also where that
    is the first of the next turn (GLM's; after the last answer it is added). The template's {% generation %} marks say
    so where it has them; else it is found from what the template writes before an answer (`turns.py`), and the text
    found must be the answer: a turn that the template rewrites is refused.
    """

    def __init__(
        self, tokenizer: Any, source: str, *, system_prompt: str, thinking: str, allow_special_tokens: bool
    ) -> None:
        self.tokenizer, self.source, self.thinking = tokenizer, source, thinking
        self.system_prompt, self.allow_special_tokens = system_prompt, allow_special_tokens
        self.renderer, self.marks = Renderer(tokenizer, source), GENERATION.search(source) is not None
        self.turns = find_turns(self.renderer)
        if thinking == "empty" and self.turns.reasoning == "nowhere":
            raise UserError("thinking: empty: this template writes no reasoning, so no empty block can be learned; "
                            "expected drop, or another template (template: FILE.jinja)")  # fmt: skip
        system = self.renderer.attempt({"role": "system", "content": "x"}, {"role": "user", "content": "x"})
        # Of a thinking block the tokens are not structure: answers write it themselves.
        self.special = special_tokens(tokenizer, THINK_TAG.sub("", system + self.turns.written))
        self.answers = Answers(self.turns, self.special, marks=self.marks)

    @property
    def end(self) -> str:
        """What ends the last answer."""
        return self.turns.end

    @property
    def note(self) -> str:
        """What a user would not expect of this template; none as a rule."""
        if not self.turns.closes:
            return ""
        return f"template: it ends an answer with {self.end!r} of the next turn, which is added after a last answer"

    def forged(self, dialogue: Dialogue) -> bool:
        return False

    def pieces(self, dialogue: Dialogue, learned: Sequence[bool]) -> list[Piece]:
        """Raises BadRow: the template refuses the dialogue, or rewrites what is to be learned."""
        try:
            return self._in_some_form(dialogue, learned, self.thinking)
        except BadRow as error:
            raise self._with_remedy(error, dialogue, learned) if error.reason in REMEDIED else error from None

    def _with_remedy(self, error: BadRow, dialogue: Dialogue, learned: Sequence[bool]) -> BadRow:
        """The error with what helps against it, which has been tried."""
        last, helps = learned_messages(dialogue, "last"), []
        if self._refused(dialogue, learned, "drop") is None:
            helps.append("leave reasoning out (thinking: drop)")
        if any(last) and self._refused(dialogue, last, self.thinking) is None:
            helps.append("learn the last answer only (mask: last)")
        remedy = " or ".join(helps) or "expected another template (template: FILE.jinja)"
        return BadRow(error.reason, f"{error}; {remedy}")

    def lost_calls(self, dialogue: Dialogue, learned: Sequence[bool]) -> set[int]:
        """The messages that are not learned and whose calls, or some of them, the template leaves out.

        It is asked of each what would be learned of it: elsewhere the same names and values may stand, as in tools.
        """
        calling = [
            bool(message.tool_calls) and not known for message, known in zip(dialogue.messages, learned, strict=True)
        ]
        if not any(calling) or self._refused(dialogue, calling, self.thinking) is None:
            return set()
        each = {i: [i == j for j in range(len(calling))] for i, is_calling in enumerate(calling) if is_calling}
        return {i for i, alone in each.items() if self._refused(dialogue, alone, self.thinking) == NO_CALLS}

    def _refused(self, dialogue: Dialogue, learned: Sequence[bool], thinking: str) -> str | None:
        """The reason for which the dialogue would be refused, if it would."""
        try:
            self._in_some_form(dialogue, learned, thinking)
        except BadRow as error:
            return error.reason
        return None

    def _in_some_form(self, dialogue: Dialogue, learned: Sequence[bool], thinking: str) -> list[Piece]:
        """Pieces of the dialogue, its calls in the first form that the template renders them in.

        Raises:
            BadRow: in none.
        """
        messages, learned = self._complete(dialogue, learned, thinking)
        rows, first = [self._row(message) for message in messages], None
        for form in self._call_forms(messages):
            try:
                formed = [form.applied(row) if "tool_calls" in row else row for row in rows] if form else rows
                return self._formed(formed, list(dialogue.tools), messages, learned)
            except BadRow as error:
                first = first or error
        assert first
        if messages[0].role == "system" and dialogue.messages[0].role != "system" and first.reason == REFUSED:
            text = 'the system turn is the key system_prompt: write system_prompt: "" to have none'
            raise BadRow(first.reason, f"{first}; {text}")
        raise first

    def _call_forms(self, messages: Sequence[Message]) -> list[CallForm | None]:
        """The forms to try: as the row has its arguments, then the other, but those first that work for a call."""
        calls = [call for message in messages for call in message.tool_calls]
        if not calls:
            return [None]
        as_text = any(isinstance(call["function"]["arguments"], str) for call in calls)
        own_first = sorted(CALL_FORMS, key=lambda form: form.as_text != as_text)
        working: list[CallForm | None] = [form for form in own_first if form in self.turns.call_forms]
        return working or [own_first[0]]

    def _complete(self, dialogue: Dialogue, learned: Sequence[bool], thinking: str) -> tuple[list[Message], list[bool]]:
        messages, learned = with_thinking(dialogue.messages, thinking), list(learned)
        if self.system_prompt and messages[0].role != "system":
            return [Message("system", self.system_prompt), *messages], [False, *learned]
        return messages, learned

    def _row(self, message: Message) -> dict[str, Any]:
        """A message as the template wants it: reasoning in the field that it reads, or in the content."""
        extra, content = dict(message.extra), message.content
        reasoning = extra.pop(FIELD, "")
        if not reasoning and self.turns.splits and message.role == "assistant" and (own := THINKING.match(content)):
            extra[FIELD], content = own[1].strip("\n"), content[own.end() :]
        elif reasoning and self.turns.reasoning == "content":
            content = full_content(message)
        elif reasoning:
            extra[FIELD] = reasoning
        row: dict[str, Any] = {"role": message.role, "content": content, **extra}
        return {**row, "tool_calls": list(message.tool_calls)} if message.tool_calls else row

    def _formed(
        self, rows: list[Any], tools: list[Any], messages: Sequence[Message], learned: Sequence[bool]
    ) -> list[Piece]:
        """Pieces of a dialogue in the form in which it is handed to the template."""
        marked = rows if self.allow_special_tokens else self._mark(rows)
        marked_tools = tools if self.allow_special_tokens else self._mark(tools)
        whole, marks = self.renderer.render(marked, marked_tools, marks=self.marks)
        if OPEN in whole and unmarked(whole) != self.renderer.render(rows, tools)[0]:
            raise BadRow("special-token text", "the template renders special-token text of this row differently from "
                         "other text; remove it, or write allow_special_tokens: true")  # fmt: skip
        _check_tools(whole, marked_tools)
        if self.turns.closes and messages[-1].role == "assistant":
            whole += self.turns.call_end if messages[-1].tool_calls else self.turns.end
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if self.marks:
            return cut_text(whole, self._marked_spans(whole, marks, marked, answers, learned))
        return cut_text(whole, self._found_spans(whole, marked, marked_tools, answers, learned))

    def _mark(self, value: Any) -> Any:
        """Wrap special-token text in whatever a row says, so that it can be told from the template's own."""
        if isinstance(value, str):
            return mark_special(value, self.special)
        if isinstance(value, dict):
            return {self._mark(key): self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, list) else value

    def _marked_spans(
        self, whole: str, marks: list[tuple[int, int]], rows: list[Any], answers: list[int], learned: Sequence[bool]
    ) -> list[tuple[int, int]]:
        if len(marks) != len(answers):
            raise BadRow("generation marks", f"the template marks {len(marks)} generated parts where the dialogue has "
                         f"{len(answers)} answers: {NOT_SEEN}")  # fmt: skip
        spans = []
        for i, (start, stop) in zip(answers, marks, strict=True):
            if learned[i]:
                ends = [end for end in self.answers.ends.finditer(whole, start) if end.start() <= stop]
                if not ends:
                    raise BadRow("no end of turn", f"the template's marks do not end with {self.end!r}")
                spans.append(self.answers.span(whole, start, ends, rows[i]))
        return spans

    def _found_spans(
        self, whole: str, rows: list[Any], tools: list[Any], answers: list[int], learned: Sequence[bool]
    ) -> list[tuple[int, int]]:
        starts, spans = self._header_ends(whole, len(answers)), []
        for count, i in enumerate(answers):
            if learned[i]:
                start = starts[count] if starts else self._prompt_end(whole, rows[:i], tools)
                spans.append(self.answers.span(whole, start, self.answers.ends.finditer(whole, start), rows[i]))
        return spans

    def _header_ends(self, whole: str, count: int) -> list[int]:
        """Where the answers start, if the special tokens before one occur just as often as there are answers."""
        header = self.turns.header
        if self.allow_special_tokens or not self.special.search(header) or whole.count(header) != count:
            return []
        return [match.end() for match in re.finditer(re.escape(header), whole)]

    def _prompt_end(self, whole: str, before: list[Any], tools: list[Any]) -> int:
        """Where an answer starts, without what the prompt opens: of earlier answers most templates leave that out."""
        prompt = self.renderer.render(before, tools, generation=True)[0].removesuffix(self.turns.opened)
        if not whole.startswith(prompt):
            raise BadRow("the template rewrites earlier turns", f"message {len(before)}: the template renders what is "
                         f"before this answer differently once it is there: {NOT_SEEN}")  # fmt: skip
        return len(prompt)


def _check_tools(whole: str, tools: list[Any]) -> None:
    for tool in tools:
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if not isinstance(name, str) or name not in whole:
            raise BadRow("the template has no tools", f"the template leaves out the tool {str(name)[:40]!r}; expected "
                         f"rows without, or {A_TEMPLATE_WITH_TOOLS}")  # fmt: skip
