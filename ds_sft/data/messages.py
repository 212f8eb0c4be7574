"""Which messages of a dialogue are learned, and what becomes of their reasoning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ds_sft.data.content import THINKING
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.data.turns import FIELD

EMPTY_THINKING = "<think>\n\n</think>\n\n"


def learned_messages(dialogue: Dialogue, mask: str) -> list[bool]:
    """For each message whether it is learned: what it says itself, else what `mask` says ("all" or "last")."""
    last = dialogue.last_answer
    return [
        message.role == "assistant" and (message.train if message.train is not None else mask == "all" or i == last)
        for i, message in enumerate(dialogue.messages)
    ]


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
