r"""What a chat template writes around an answer, found by rendering small dialogues of our own.

| kind | generation prompt ends | then the last answer |
|---|---|---|
| Qwen3 | <|im_start|>assistant\n | <think>\nREASONING\n</think>\n\nCONTENT<|im_end|> |
| Qwen3-Thinking | <|im_start|>assistant\n<think>\n | REASONING\n</think>\n\nCONTENT<|im_end|> |
| GLM | <|assistant|> | \n<think>REASONING</think>\nCONTENT, and then the token of the next turn's role |
| gpt-oss | <|start|>assistant | <|channel|>analysis<|message|>REASONING<|end|><|start|>assistant, and then
| | | <|channel|>final<|message|>CONTENT<|return|> |

Of earlier answers most leave the reasoning out, gpt-oss ends them with <|end|>, and its calls with <|call|>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ds_sft.data.bad_row import BadRow
from ds_sft.data.content import as_object
from ds_sft.errors import UserError

EMPTY_BLOCK = re.compile(r"\s*<think>\s*</think>\n{0,2}")
THINK_TAG = re.compile("</?think>")
REFUSED = "the template refuses it"
FIELD = "reasoning_content"  # transformers hands it to gpt-oss's template as `thinking`, too

# What the dialogues of our own say. No template writes these.
QUESTION, ANSWER, THOUGHT, NAME, ARGUMENT, RESULT = (
    "ds_sft-3b7e", "ds_sft-7f3a", "ds_sft-5c1e", "ds_sft_f", "ds_sft-1d90", "ds_sft-e64b"
)  # fmt: skip
USER = {"role": "user", "content": QUESTION}
CALL = {  # Mistral wants ids of nine letters and digits
    "id": "call00001",
    "type": "function",
    "function": {"name": NAME, "arguments": {"ds_sft_a": ARGUMENT}},
}
TOOL_RESULT = {"role": "tool", "content": RESULT, "name": NAME, "tool_call_id": "call00001"}


Content = Literal["empty", "none", "absent"]
CONTENTS: tuple[Content, ...] = ("empty", "none", "absent")


class CallForm(NamedTuple):
    """How a message with calls is handed to a template: some want OpenAI's text, or test whether there is content."""

    as_text: bool  # arguments as JSON in a text, not as an object
    content: Content  # where the message says nothing beside its calls

    def applied(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A message with calls in this form."""
        calls = [{**call, "function": self._function(call["function"])} for call in row["tool_calls"]]
        kept = {**row, "tool_calls": calls}
        if self.content != "empty" and not row["content"]:
            del kept["content"]
            return kept if self.content == "absent" else {**kept, "content": None}
        return kept

    def _function(self, function: Mapping[str, Any]) -> dict[str, Any]:
        given = function["arguments"]
        if not self.as_text:
            return {**function, "arguments": as_object(given)}
        return {**function, "arguments": given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)}


CALL_FORMS = tuple(CallForm(as_text, content) for as_text in (False, True) for content in CONTENTS)


class Renderer:
    """A Jinja chat template with a tokenizer's special tokens, as `apply_chat_template` renders it."""

    def __init__(self, tokenizer: Any, source: str) -> None:
        self.source, self.special_tokens_map = source, tokenizer.special_tokens_map
        added = list(tokenizer.added_tokens_decoder.values())
        self.special = {str(token) for token in added if token.special}
        longest_first = sorted(map(str, added), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def render(
        self, rows: Sequence[Any], tools: Sequence[Any] = (), *, generation: bool = False, marks: bool = False,
        thinking: bool = True
    ) -> tuple[str, list[tuple[int, int]]]:  # fmt: skip
        """The text, and the spans of {% generation %} where `marks` asks for them.

        Raises:
            BadRow: the template refuses the dialogue.
        """
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, spans = render_jinja_template(
                [list(rows)],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=generation,
                **self.special_tokens_map,
                **({} if thinking else {"enable_thinking": False}),
            )
        except (TemplateError, TypeError, KeyError, AttributeError, ValueError, IndexError, RecursionError) as error:
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise BadRow(REFUSED, f"the template refuses this dialogue: {reason}") from None
        return texts[0], spans[0] if marks else []

    def attempt(self, *rows: Any, generation: bool = False, thinking: bool = True) -> str:
        """The text; none where the template refuses the dialogue."""
        try:
            return self.render(rows, generation=generation, thinking=thinking)[0]
        except BadRow:
            return ""

    def first_token(self, text: str) -> str:
        """The first of the tokenizer's added tokens in a text."""
        match = self._token.search(text)
        return match[0] if match else ""


@dataclass(frozen=True)
class Turns:
    """What a template writes around an answer. "" stands for what it does not write, or what cannot be told."""

    header: str  # before an answer
    opened: str  # after the header in the generation prompt alone, as <think>\n
    plain: tuple[tuple[str, int], ...]  # between header and content, and how much of it belongs to the prompt
    beside: tuple[tuple[str, int], ...]  # likewise where calls follow: gpt-oss's channel of reasoning, too
    thought: tuple[tuple[str, str], ...]  # between header and reasoning, and between reasoning and content
    end: str  # ends the last answer
    call_end: str  # ends one with calls
    ends: tuple[str, ...]  # all that may end an answer
    closes: bool  # whether the last answer ends with the first token of the turn that would follow
    reasoning: Literal["field", "content", "nowhere"]  # of a message, where the template wants it
    splits: bool  # whether reasoning at the start of a content must be put into the field
    call_forms: tuple[CallForm, ...]  # those in which the template renders a call
    tool_header: str  # before the result of a call
    written: str  # a question, an answer and a prompt, as rendered

    def prompt_part(self, text: str) -> int:
        """How much of the text after a header stands in the generation prompt."""
        return len(self.opened) if text.startswith(self.opened) else 0


def find_turns(renderer: Renderer) -> Turns:
    """Render a few dialogues of our own.

    Raises:
        UserError: the template does not render a question and an answer, or nothing that ends it.
    """
    answer = {"role": "assistant", "content": ANSWER}
    try:
        last, before = renderer.render([USER, answer])[0], renderer.render([USER])[0]
        prompt = renderer.render([USER], generation=True)[0]
    except BadRow as error:
        raise UserError(f"template: {error}, one question and one answer") from None
    if ANSWER not in last:
        raise UserError("template: it does not render an answer as it is")
    earlier = renderer.attempt(USER, answer, USER, {"role": "assistant", "content": "y"})
    reasoning, splits, thoughtful = _reasoning(renderer)
    start, header, opened = _header(before, prompt, [last, earlier, *thoughtful])
    call_forms = _call_forms(renderer, header)
    beside, called, tool_header = _calls(renderer, call_forms)
    end, closes = _end(renderer, last, earlier)
    call_end = _call_end(renderer, called, tool_header, end, closes=closes)
    at = start + header
    block = renderer.attempt(USER, generation=True, thinking=False).rpartition(header or prompt)[2]
    plain = {"", opened, *_before_answer((last, earlier), at)}
    return Turns(
        header=header,
        opened=opened,
        plain=_with_prompt_parts(plain, opened, block),
        beside=_with_prompt_parts(plain | _before_answer(beside, at), opened, block),
        thought=tuple(dict.fromkeys(pair for text in thoughtful for pair in _around_thought(text, at))),
        end=end,
        call_end=call_end,
        ends=tuple(dict.fromkeys([end, call_end, _earlier_end(renderer, before, earlier, end)])),
        closes=closes,
        reasoning=reasoning,
        splits=splits,
        call_forms=call_forms,
        tool_header=tool_header,
        written=before + prompt + last + end,
    )


def _before_answer(texts: Sequence[str], at: str) -> set[str]:
    return {text[len(at) : text.find(ANSWER)] for text in texts if _begins(text, at, ANSWER)}


def _with_prompt_parts(prefixes: set[str], opened: str, block: str) -> tuple[tuple[str, int], ...]:
    """The longest first."""
    return tuple((text, _prompt_part(text, opened, block)) for text in sorted(prefixes, key=len, reverse=True))


def _begins(text: str, at: str, *held: str) -> bool:
    return text.startswith(at) and all(mark in text[len(at) :] for mark in held)


def _header(before: str, prompt: str, answered: Sequence[str]) -> tuple[str, str, str]:
    """What stands before every answer, what each begins with, and what the generation prompt has besides.

    That is an opened block of reasoning, as of Qwen3-Thinking.
    """
    start = common_start([before, prompt, answered[0]])
    if QUESTION not in start:  # a template that renders the question otherwise once there is an answer
        return "", "", ""
    whole = prompt[len(start) :]
    written = [re.split(f"{THOUGHT}|{ANSWER}", text[len(start) :])[0] for text in answered if text.startswith(start)]
    header = common_start([whole, *written])
    tag = THINK_TAG.search(whole)
    if tag and header != whole:  # no border inside <think></think>
        header = header[: tag.start()]
    return start, header, whole[len(header) :]


def common_start(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    differ = (i for i, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    return texts[0][: next(differ, min(map(len, texts)))]


def _prompt_part(prefix: str, opened: str, block: str) -> int:
    """How much of what a template writes before a content is prompt: what it opens there, or an empty block.

    `block` is what the generation prompt ends with when it is asked for no reasoning.
    """
    if opened and prefix.startswith(opened):
        return len(opened)
    empty = EMPTY_BLOCK.match(prefix)
    if not empty:
        return 0
    return len(block) if EMPTY_BLOCK.fullmatch(block) and prefix.startswith(block) else empty.end()


# ---- Reasoning


def _reasoning(renderer: Renderer) -> tuple[Literal["field", "content", "nowhere"], bool, list[str]]:
    """Where the template wants reasoning, whether it must be taken out of a content, and dialogues with some."""
    inline = {"role": "assistant", "content": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"}
    field = {"role": "assistant", "content": ANSWER, FIELD: THOUGHT}
    in_content, in_field = renderer.attempt(USER, inline), renderer.attempt(USER, field)
    if THOUGHT in in_field:
        splits = "".join(in_field.split()) != "".join(in_content.split())
        return "field", splits, [in_field, renderer.attempt(USER, field, USER)]
    if THOUGHT in in_content:
        return "content", False, [in_content, renderer.attempt(USER, inline, USER)]
    return "nowhere", False, []


def _around_thought(text: str, at: str) -> Iterator[tuple[str, str]]:
    if _begins(text, at, THOUGHT, ANSWER):
        before, _, rest = text[len(at) :].partition(THOUGHT)
        yield before, rest.partition(ANSWER)[0]


# ---- Calls


def _call_forms(renderer: Renderer, header: str) -> tuple[CallForm, ...]:
    """The forms in which a call is rendered, once, and without a second turn for a content that says nothing.

    A template that wants objects may write a text twice quoted or braced; where it takes both, they come out the same.
    """
    rendered = {}
    for form in CALL_FORMS:
        message = form.applied({"role": "assistant", "content": "", "tool_calls": [CALL]})
        text = renderer.attempt(USER, message)
        text = text or renderer.attempt(USER, message, TOOL_RESULT, {"role": "assistant", "content": ANSWER})
        once = not header or ANSWER in text or text.count(header) <= 1
        if once and shows_call(text, message["tool_calls"][0]):
            rendered[form] = text
    of_objects = {text for form, text in rendered.items() if not form.as_text}
    return tuple(form for form, text in rendered.items() if not of_objects or text in of_objects)


def _calls(renderer: Renderer, forms: Sequence[CallForm]) -> tuple[list[str], str, str]:
    """Dialogues with a content beside a call, one with a call alone, and what stands before a result."""
    if not forms:
        return [], "", ""
    message = forms[0].applied({"role": "assistant", "content": "", "tool_calls": [CALL]})
    called, answered = renderer.attempt(USER, message), renderer.attempt(USER, message, TOOL_RESULT)
    beside = renderer.attempt(USER, {**message, "content": ANSWER})
    between = answered.partition(ARGUMENT)[2].partition(RESULT)[0]
    tail = called.partition(ARGUMENT)[2]
    header = between[len(tail) :].partition(NAME)[0] if tail and between.startswith(tail) else ""
    header = header if renderer.first_token(header) else ""  # plain text may stand anywhere
    return [beside] if NAME not in beside.partition(ANSWER)[0] else [], called, header


def shows_call(text: str, call: Mapping[str, Any]) -> bool:
    """Whether a rendered text has a call with its arguments, in JSON or in a way of its own, but not in Python's."""
    function = call["function"]
    arguments = function["arguments"]
    if function["name"] not in text:
        return False
    if isinstance(arguments, str):
        quoted = json.dumps(arguments, ensure_ascii=False)
        if as_object(arguments) is arguments:  # no object, which JSON has no other form for
            return arguments in text or quoted in text
        return arguments in text and quoted not in text
    if arguments and str(arguments) in text and json.dumps(arguments, ensure_ascii=False) not in text:
        return False
    missing = [forms for forms in _leaves(arguments) if not any(form in text for form in forms)]
    flat = _letters(text) if missing else ""
    return all(any(_letters(form) in flat for form in forms) for forms in missing)


def _leaves(value: Any) -> Iterator[tuple[str, ...]]:
    """Keys and values in arguments, each in the forms that templates write."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key), json.dumps(key, ensure_ascii=False)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield str(value), json.dumps(value, ensure_ascii=False), repr(value)


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, text)).casefold()


# ---- Ends


def _end(renderer: Renderer, last: str, earlier: str) -> tuple[str, bool]:
    """What ends the last answer, and whether it is the first token of a turn that would follow."""
    tail = last.partition(ANSWER)[2]
    if tail.strip():
        return renderer.first_token(tail) or tail.strip(), False
    following = earlier.partition(ANSWER)[2].lstrip()
    token = renderer.first_token(following)
    if not token or not following.startswith(token) or token == renderer.special_tokens_map.get("bos_token"):
        raise UserError("template: it writes nothing after an answer, so no end of turn could be learned; expected a "
                        "template that ends an answer with a token such as <|im_end|>")  # fmt: skip
    return token, True


def _earlier_end(renderer: Renderer, before: str, earlier: str, end: str) -> str:
    """What ends an earlier answer, if that is what ends a question, too: gpt-oss's <|end|>."""
    token = renderer.first_token(earlier.partition(ANSWER)[2])
    return token if token and before.rpartition(QUESTION)[2].startswith(token) else end


def _call_end(renderer: Renderer, called: str, tool_header: str, end: str, *, closes: bool) -> str:
    """What ends an answer with calls: the same, the token of a result's turn, or one of its own."""
    if closes:
        return renderer.first_token(tool_header) or end
    tail = called.partition(ARGUMENT)[2].rstrip()
    own = max((token for token in renderer.special if tail.endswith(token)), key=len, default=end)
    return end if end in tail else own
