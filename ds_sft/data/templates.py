"""Dialogues -> the text a model reads, cut into pieces that are learned and pieces that are not.

Four templates: the reference script's ChatML, the tokenizer's own chat template, ours with tools (`hermes.py`), a Jinja
file. Pieces are encoded apart, so that no token spans the border where generation starts; joined, their texts are what
the template renders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ds_sft.config.keys import TEMPLATES, Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import THINKING
from ds_sft.data.hermes import HERMES
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.data.turns import CALL_FORMS, FIELD, REFUSED, THINK_TAG, CallForm, Renderer, find_turns, shows_call
from ds_sft.errors import UserError, nearest_value

EMPTY_THINKING = "<think>\n\n</think>\n\n"
# Around special-token text of a row while it is rendered. Unicode reserves these two for a program's own use.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
NO_CALLS = "the template has no tool calls"
NOT_SEEN = "it cannot be shown which text is learned"
REMEDIED = ("the template rewrites an answer", "the template rewrites earlier turns", "no end of turn")


class Piece(NamedTuple):
    """A stretch of what a model reads: text, or the id of one token."""

    text: str | int
    learned: bool
    plain: bool = False  # special-token text of a row, which must stay text


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


def learned_messages(dialogue: Dialogue, mask: str) -> list[bool]:
    """For each message whether it is learned: what it says itself, else what `mask` says ("all" or "last")."""
    last = dialogue.last_answer
    return [
        message.role == "assistant" and (message.train if message.train is not None else mask == "all" or i == last)
        for i, message in enumerate(dialogue.messages)
    ]


def special_tokens(tokenizer: Any, written: str) -> re.Pattern[str]:
    """Matches the text of any special token, and of any other added token in what a template has `written`."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token) for token in added if token.special or str(token) in written}
    texts = {text for text in texts | set(tokenizer.all_special_tokens) if text}
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def mark_special(text: str, special: re.Pattern[str]) -> str:
    """Wrap special-token text in OPEN and CLOSE.

    Raises:
        BadRow: the text has these two itself.
    """
    if OPEN in text or CLOSE in text:
        raise BadRow("not Unicode text", "holds U+FDD0 or U+FDD1, which are no characters; expected text")
    return special.sub(lambda match: OPEN + match[0] + CLOSE, text)


def with_thinking(messages: Sequence[Message], policy: str) -> list[Message]:
    """The messages as the key `thinking` wants them: reasoning kept, dropped, or replaced by an empty block."""
    return list(messages) if policy == "keep" else [_rethink(message, policy) for message in messages]


def _rethink(message: Message, policy: str) -> Message:
    if message.role != "assistant":
        return message
    extra = {name: text for name, text in message.extra.items() if name != FIELD}
    content = THINKING.sub("", message.content, count=1) if THINKING.match(message.content) else message.content
    return replace(message, content=EMPTY_THINKING + content if policy == "empty" else content, extra=extra)


def full_content(message: Message) -> str:
    """A message with the reasoning that stands in a field of its own before it, as Qwen3 and DeepSeek write it."""
    reasoning = message.extra.get(FIELD, "")
    return f"<think>\n{reasoning}\n</think>\n\n{message.content}" if reasoning else message.content


A_TEMPLATE_WITH_TOOLS = "the key template: hermes (ChatML with tools), or a Jinja file that has them"


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
        return [Piece(text, learned)] if self.allow_special_tokens else _split(text, learned)

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
        self.plain, self.beside, self.thought = self.turns.plain, self.turns.beside, self.turns.thought
        if self.marks:  # which begin where a template's author put them
            self.plain, self.beside = map(self._from_any_start, (self.plain, self.beside))
            self.thought = tuple({(start, after) for text, after in self.thought for start in self._starts(text)})
        within = any(self.turns.header in text for pair in self.turns.thought for text in pair)  # between channels
        headers = (self.turns.tool_header, "" if self.marks or within else self.turns.header)
        self.borders = [header for header in headers if header]  # where another turn begins
        self.ends = re.compile(f"(?<!{OPEN})(?:{'|'.join(map(re.escape, self.turns.ends))})")
        # Ends that the template writes within an answer: gpt-oss's <|end|> between reasoning and content.
        self.inner_ends = max((len(self.ends.findall(between)) for _, between in self.turns.thought), default=0)

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

    def _from_any_start(self, prefixes: Sequence[tuple[str, int]]) -> tuple[tuple[str, int], ...]:
        """What may stand before a content after a mark: all the template writes, or a part of it."""
        starts = {start for text, part in prefixes for start in (*self._starts(text), text[part:])}
        return tuple((text, 0) for text in sorted(starts, key=len, reverse=True))

    def _starts(self, text: str) -> list[str]:
        """A text with the header, without it, and from each tag of a thinking block on."""
        whole = self.turns.header + text
        return [whole, text, *(whole[tag.start() :] for tag in THINK_TAG.finditer(whole))]

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
        if OPEN in whole and _unmarked(whole) != self.renderer.render(rows, tools)[0]:
            raise BadRow("special-token text", "the template renders special-token text of this row differently from "
                         "other text; remove it, or write allow_special_tokens: true")  # fmt: skip
        _check_tools(whole, marked_tools)
        if self.turns.closes and messages[-1].role == "assistant":
            whole += self.turns.call_end if messages[-1].tool_calls else self.turns.end
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if self.marks:
            return _cut(whole, self._marked_spans(whole, marks, marked, answers, learned))
        return _cut(whole, self._found_spans(whole, marked, marked_tools, answers, learned))

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
                ends = [end for end in self.ends.finditer(whole, start) if end.start() <= stop]
                if not ends:
                    raise BadRow("no end of turn", f"the template's marks do not end with {self.end!r}")
                spans.append(self._span(whole, start, ends, rows[i]))
        return spans

    def _found_spans(
        self, whole: str, rows: list[Any], tools: list[Any], answers: list[int], learned: Sequence[bool]
    ) -> list[tuple[int, int]]:
        starts, spans = self._header_ends(whole, len(answers)), []
        for count, i in enumerate(answers):
            if learned[i]:
                start = starts[count] if starts else self._prompt_end(whole, rows[:i], tools)
                spans.append(self._span(whole, start, self.ends.finditer(whole, start), rows[i]))
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

    def _span(self, whole: str, start: int, ends: Iterable[re.Match[str]], row: dict[str, Any]) -> tuple[int, int]:
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
        return _unmarked(names[0])[:40] if names else None

    def _shows_first_call(self, text: str, row: dict[str, Any]) -> bool:
        return self._missing_call(text, {"tool_calls": row["tool_calls"][:1]}) is None

    def _refusal(self, texts: Sequence[str], row: dict[str, Any]) -> BadRow:
        """Why none of the texts up to an end is the answer."""
        text = next((text for text in texts if self._missing_call(text, row) is None), texts[0] if texts else None)
        if text is None or self._runs_on(text):
            return BadRow("no end of turn", f"the template does not end this answer with {self.end!r}: {NOT_SEEN}")
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
        said = _unmarked(f"<think>{reasoning}</think>{content}" if reasoning else content)[:40]
        return BadRow("the template rewrites an answer", f"the template renders the answer {said!r} as "
                      f"{_unmarked(text)[:40]!r}")  # fmt: skip


def _check_tools(whole: str, tools: list[Any]) -> None:
    for tool in tools:
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if not isinstance(name, str) or name not in whole:
            raise BadRow("the template has no tools", f"the template leaves out the tool {str(name)[:40]!r}; expected "
                         f"rows without, or {A_TEMPLATE_WITH_TOOLS}")  # fmt: skip


def _unmarked(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def _squeezed(text: str) -> str:
    """Without white space: templates set their own around reasoning."""
    return "".join(text.split())


def _cut(whole: str, spans: list[tuple[int, int]]) -> list[Piece]:
    pieces, at = [], 0
    for start, end in spans:
        pieces += _split(whole[at:start], False) + _split(whole[start:end], True)
        at = end
    return pieces + _split(whole[at:], False)


def _split(text: str, learned: bool) -> list[Piece]:
    """Set special-token text of the row apart."""
    if OPEN not in text:
        return [Piece(text, learned)] if text else []
    parts = MARKED.split(text)
    return [Piece(_unmarked(part), learned, plain=i % 2 == 1) for i, part in enumerate(parts) if _unmarked(part)]
