"""Question and answer -> `input_ids` and `labels`: the mask.

The layout is the reference script's: ChatML written out by hand, everything before the answer unsupervised (-100), the
answer and the tokenizer's pad token, which serves as end of turn, supervised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss's default `ignore_index`
TEMPLATE = "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class Encoded:
    """One row as a model sees it. All lists have the row's length in tokens."""

    input_ids: list[int]
    labels: list[int]  # IGNORE_INDEX where nothing is learned
    cut: int  # tokens lost to `max_length`


def prompt_text(system_prompt: str, question: str) -> str:
    """What stands before the answer, in training and in prediction."""
    return TEMPLATE.format(system=system_prompt, question=question)


def encode_rows(
    tokenizer: Any, questions: Sequence[str], answers: Sequence[str], *, system_prompt: str, max_length: int
) -> list[Encoded]:
    """Encode rows; prompt and answer are tokenised apart, so no token ever spans the border.

    Args:
        tokenizer: a transformers tokenizer with a pad token.
        max_length: tokens; longer rows are cut at the end, terminator first, as the reference does.
    """
    if not questions:
        return []
    prompts = [prompt_text(system_prompt, question) for question in questions]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    end = [tokenizer.pad_token_id]
    return [_join(p, a + end, max_length) for p, a in zip(prompt_ids, answer_ids, strict=True)]


def _join(prompt: list[int], answer: list[int], max_length: int) -> Encoded:
    input_ids = prompt + answer
    labels = [IGNORE_INDEX] * len(prompt) + answer
    cut = max(0, len(input_ids) - max_length)
    return Encoded(input_ids[:max_length], labels[:max_length], cut)
