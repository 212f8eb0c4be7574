"""Dialogues -> the text a model reads, cut into pieces that are learned and pieces that are not.

Three templates: the reference script's ChatML, the tokenizer's own chat template, a Jinja file. Pieces are encoded
apart, so that no token spans the border where generation starts; joined, their texts are what the template renders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ds_sft.config import Config
from ds_sft.data.files import BadRow
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.errors import UserError

THINKING = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
EMPTY_THINKING = "<think>\n\n</think>\n\n"
EMPTY_AGAIN = re.compile(r"<think>\s*</think>\n{0,2}")
# Around special-token text of a row while it is rendered. Unicode reserves these two for a program's own use.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
SENTINEL = "ds_sft-7f3a"
NOT_SEEN = "it cannot be shown which text is learned"


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
            raise UserError("template: tokenizer: this tokenizer has no chat template; give a Jinja file, or reference")
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
        raise UserError(f"template: {path}: {reason}; expected reference, tokenizer, or a Jinja file") from None


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


def with_thinking(messages: Sequence[Message], policy: str) -> list[Message]:
    """The messages as the key `thinking` wants them: reasoning kept, dropped, or replaced by an empty block."""
    return list(messages) if policy == "keep" else [_rethink(message, policy) for message in messages]


def _rethink(message: Message, policy: str) -> Message:
    if message.role != "assistant":
        return message
    extra = {name: text for name, text in message.extra.items() if name != "reasoning_content"}
    content = THINKING.sub("", message.content, count=1) if THINKING.match(message.content) else message.content
    return replace(message, content=EMPTY_THINKING + content if policy == "empty" else content, extra=extra)


def full_content(message: Message) -> str:
    """A message with the reasoning that stands in a field of its own before it, as Qwen3 and DeepSeek write it."""
    reasoning = message.extra.get("reasoning_content", "")
    return f"<think>\n{reasoning}\n</think>\n\n{message.content}" if reasoning else message.content


A_TEMPLATE_WITH_TOOLS = "the key template: FILE.jinja, the chat template of a model that was trained with tools"


@dataclass(frozen=True)
class Reference:
    """The reference script's layout: ChatML written out by hand, with the pad token as the end of an answer.

    Later turns follow on a line of their own; the reference has one question and one answer only.
    """

    tokenizer: Any
    system_prompt: str
    thinking: str = "keep"

    @property
    def end(self) -> str:
        return str(self.tokenizer.pad_token)

    @property
    def allow_special_tokens(self) -> bool:
        return True  # as in the reference; `forged` counts them

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
                text += f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n"
                continue
            pieces.append(Piece(text + "<|im_start|>assistant\n", False))
            pieces += [Piece(full_content(message), is_learned), Piece(self.tokenizer.pad_token_id, is_learned)]
            text = "\n"
        return [*pieces, Piece(text, False)] if text != "\n" else pieces


class ChatTemplate:
    """A Jinja chat template, as `apply_chat_template` renders it.

    What is learned of a turn: from where generation would start up to and with the end-of-turn token. The template's
    {% generation %} marks say so where it has them; else it is found from what the template writes before an answer,
    and the text found must be the answer: a turn that the template rewrites is refused.
    """

    def __init__(
        self, tokenizer: Any, source: str, *, system_prompt: str, thinking: str, allow_special_tokens: bool
    ) -> None:
        self.tokenizer, self.source, self.thinking = tokenizer, source, thinking
        self.system_prompt, self.allow_special_tokens = system_prompt, allow_special_tokens
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        whole, before, prompt = self._probe()
        # Of a thinking block the tokens are not structure: answers write it themselves.
        self.special = special_tokens(tokenizer, THINKING.sub("", self._probe_system() + prompt + whole))
        self.end, self.header = self._end_and_header(whole, before, prompt)

    def forged(self, dialogue: Dialogue) -> bool:
        return False

    def pieces(self, dialogue: Dialogue, learned: Sequence[bool]) -> list[Piece]:
        """Raises BadRow: the template refuses the dialogue, or rewrites what is to be learned."""
        messages, learned = self._complete(dialogue, learned)
        rows, tools = [_openai(message) for message in messages], list(dialogue.tools)
        marked = rows if self.allow_special_tokens else self._mark(rows)
        marked_tools = tools if self.allow_special_tokens else self._mark(tools)
        try:
            whole, marks = self._render(marked, marked_tools, marks=self.marks)
        except BadRow as error:
            if messages[0].role == "system" and dialogue.messages[0].role != "system":
                text = 'the system turn is the key system_prompt: write system_prompt: "" to have none'
                raise BadRow(error.reason, f"{error}; {text}") from None
            raise
        if OPEN in whole and _unmarked(whole) != self._render(rows, tools)[0]:
            raise BadRow("special-token text", "the template renders special-token text of this row differently from "
                         "other text; remove it, or write allow_special_tokens: true")  # fmt: skip
        _check_tools(whole, marked_tools)
        find = self._marked_spans if self.marks else self._found_spans
        spans = find(whole, marks, marked, marked_tools, messages, learned)
        return _cut(whole, spans)

    def _complete(self, dialogue: Dialogue, learned: Sequence[bool]) -> tuple[list[Message], list[bool]]:
        messages, learned = with_thinking(dialogue.messages, self.thinking), list(learned)
        if self.system_prompt and messages[0].role != "system":
            return [Message("system", self.system_prompt), *messages], [False, *learned]
        return messages, learned

    def _mark(self, value: Any) -> Any:
        """Wrap special-token text in whatever a row says, so that it can be told from the template's own."""
        if isinstance(value, str):
            if OPEN in value or CLOSE in value:
                raise BadRow("not Unicode text", "holds U+FDD0 or U+FDD1, which are no characters; expected text")
            return self.special.sub(lambda match: OPEN + match[0] + CLOSE, value)
        if isinstance(value, dict):
            return {self._mark(key): self._mark(item) for key, item in value.items()}
        return [self._mark(item) for item in value] if isinstance(value, list) else value

    def _render(
        self, rows: list[Any], tools: list[Any], *, generation: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans of {% generation %} where `marks` asks for them."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [rows],
                tools=tools or None,
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError, IndexError, RecursionError) as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise BadRow("the template refuses it", f"the template refuses this dialogue: {reason}") from None
        return texts[0], spans[0] if marks else []

    def _probe(self) -> tuple[str, str, str]:
        """What the template makes of a question and an answer, of the question, and of that as a prompt.

        Raises:
            UserError: it cannot be used.
        """
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": SENTINEL}
        try:
            whole, _ = self._render([question, answer], [])
            before, prompt = self._render([question], [])[0], self._render([question], [], generation=True)[0]
        except BadRow as error:
            raise UserError(f"template: {error}, one question and one answer") from None
        return whole, before, prompt

    def _probe_system(self) -> str:
        """A system turn; nothing where the template has no form for it."""
        try:
            return self._render([{"role": "system", "content": "x"}, {"role": "user", "content": "x"}], [])[0]
        except BadRow:
            return ""

    def _end_and_header(self, whole: str, before: str, prompt: str) -> tuple[str, str]:
        """What the template writes after an answer to end the turn, and before one, where that can be told.

        Raises:
            UserError: nothing that could be learned.
        """
        tail = whole.partition(SENTINEL)[2]
        added = sorted((str(token) for token in self.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        match = re.search("|".join(map(re.escape, added)) or "(?!)", tail)
        end = match[0] if match else tail.strip()
        if SENTINEL not in whole:
            raise UserError("template: it does not render an answer as it is")
        if not end:
            raise UserError("template: it writes nothing after an answer, so no end of turn could be learned; "
                            "expected a template that ends an answer with a token such as <|im_end|>")  # fmt: skip
        header = prompt.removeprefix(before) if prompt.startswith(before) else ""
        return end, header if self.special.search(header) and whole.startswith(before + header) else ""

    def _marked_spans(
        self,
        whole: str,
        marks: list[tuple[int, int]],
        rows: list[Any],
        tools: list[Any],
        messages: Sequence[Message],
        learned: Sequence[bool],
    ) -> list[tuple[int, int]]:
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if len(marks) != len(answers):
            raise BadRow("generation marks", f"the template marks {len(marks)} generated parts where the dialogue has "
                         f"{len(answers)} answers: {NOT_SEEN}")  # fmt: skip
        spans = []
        for i, (start, end) in zip(answers, marks, strict=True):
            if learned[i]:
                content = rows[i]["content"]
                own_end = self._end_after(whole, start + len(content) * whole.startswith(content, start))
                end = own_end if 0 <= own_end < end else end  # a line end after it may be marked, too
                if not whole.startswith(self.end, end):
                    raise BadRow("no end of turn", f"the template's marks do not end with {self.end!r}")
                self._check(whole[start:end], rows[i], messages[i])
                spans.append((start, end + len(self.end)))
        return spans

    def _found_spans(
        self,
        whole: str,
        marks: list[tuple[int, int]],
        rows: list[Any],
        tools: list[Any],
        messages: Sequence[Message],
        learned: Sequence[bool],
    ) -> list[tuple[int, int]]:
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        starts = self._header_ends(whole, len(answers))
        spans = []
        for count, i in enumerate(answers):
            if learned[i]:
                start = starts[count] if starts else self._prompt_end(whole, rows[:i], tools)
                spans.append(self._span(whole, start, rows[i], messages[i]))
        return spans

    def _header_ends(self, whole: str, count: int) -> list[int]:
        """Where the answers start, if the special tokens before one occur just as often as there are answers."""
        if not self.header or self.allow_special_tokens or whole.count(self.header) != count:
            return []
        return [match.end() for match in re.finditer(re.escape(self.header), whole)]

    def _prompt_end(self, whole: str, before: list[Any], tools: list[Any]) -> int:
        prompt, _ = self._render(before, tools, generation=True)
        if not whole.startswith(prompt):
            raise BadRow("the template rewrites earlier turns", f"message {len(before)}: the template renders what is "
                         f"before this answer differently once it is there: {NOT_SEEN}")  # fmt: skip
        return len(prompt)

    def _span(self, whole: str, start: int, row: dict[str, Any], message: Message) -> tuple[int, int]:
        """From where generation starts to the end of the turn, with the end-of-turn token."""
        content = row["content"]
        empty = EMPTY_AGAIN.match(whole, start)
        own = THINKING.match(content) or message.extra.get("reasoning_content")
        if empty and not own:
            start = empty.end()  # written by the template, so it belongs to the prompt
        end = self._end_after(whole, start + len(content) * whole.startswith(content, start))
        body = whole[start:end]
        if end < 0 or (self.header and self.header in body):
            raise BadRow("no end of turn", f"the template does not end this answer with {self.end!r}: {NOT_SEEN}")
        self._check(body, row, message)
        return start, end + len(self.end)

    def _end_after(self, whole: str, start: int) -> int:
        """Where the template ends a turn next; special-token text of the row does not count."""
        match = re.compile(f"(?<!{OPEN})" + re.escape(self.end)).search(whole, start)
        return match.start() if match else -1

    def _check(self, body: str, row: dict[str, Any], message: Message) -> None:
        """The text between header and end of turn must be the answer."""
        content = full_content(replace(message, content=row["content"], extra={k: row[k] for k in message.extra}))
        thought = THINKING.match(content)
        if self.thinking == "empty" and thought and not EMPTY_AGAIN.match(body):
            content = content[thought.end() :]  # an earlier turn: Qwen3 leaves its reasoning out, empty or not
        body, content = (_squeezed(text) if thought else text.strip() for text in (body, content))
        if not (body.startswith(content) if message.tool_calls else body == content):
            raise BadRow("the template rewrites an answer", f"the template renders the answer {message.content[:40]!r} "
                         f"as {body[:40]!r}; leave reasoning out (thinking: drop) or learn the last answer only "
                         "(mask: last)")  # fmt: skip
        for call in row.get("tool_calls", ()):
            if call["function"]["name"] not in body:
                raise BadRow("the template has no tool calls", "the template leaves out the call of "
                             f"{message.tool_calls[0]['function']['name']!r}; expected one with tools")  # fmt: skip


def _check_tools(whole: str, tools: list[Any]) -> None:
    for tool in tools:
        name = tool["function"].get("name") if isinstance(tool["function"], dict) else None
        if not isinstance(name, str) or name not in whole:
            raise BadRow("the template has no tools", f"the template leaves out the tool {str(name)[:40]!r}; expected "
                         f"rows without, or {A_TEMPLATE_WITH_TOOLS}")  # fmt: skip


def _openai(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": message.role, "content": message.content, **message.extra}
    return {**row, "tool_calls": list(message.tool_calls)} if message.tool_calls else row


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
