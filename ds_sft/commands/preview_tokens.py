"""The tokens of rows as `ds-sft preview` shows them, and what each is to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ds_sft.data.encode import IGNORE_INDEX

SHOWN = 20_000  # tokens of a row or a sequence that are shown, half of them its first: browsers choke on a million


@dataclass(frozen=True)
class Token:
    """One token, or the few that share a character."""

    text: str
    ids: tuple[int, ...]
    learned: bool
    special: bool
    padding: bool = False
    starts_row: bool = False  # the first of a packed row
    left_out: int = 0  # tokens that this one stands for and that are not shown


@dataclass(frozen=True)
class Shown:
    """A row or a sequence of a batch, with where it comes from."""

    title: str
    tokens: list[Token]
    num_tokens: int  # shown or not, without padding
    num_learned: int
    num_padding: int = 0


def sequences_of(batch: dict[str, Any], tokenizer: Any, number: str) -> list[Shown]:
    ids, labels = batch["input_ids"].tolist(), batch["labels"].tolist()
    masks = batch["attention_mask"].tolist() if "attention_mask" in batch else [None] * len(ids)
    positions = batch["position_ids"].tolist() if "position_ids" in batch else [None] * len(ids)
    shape = " x ".join(map(str, batch["input_ids"].shape))
    return [
        shown_of(
            f"sequence {i + 1} of {f'batch{number}, of' if number else 'a batch of'} {shape} tokens",
            ids[i],
            labels[i],
            tokenizer,
            mask=masks[i],
            positions=positions[i],
        )
        for i in range(len(ids))
    ]


def shown_of(
    title: str,
    ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: Any,
    *,
    mask: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Shown:
    """A row or a sequence as it is shown: of a long one its first and its last tokens."""
    num_padding = 0 if mask is None else list(mask).count(0)
    counts = len(ids) - num_padding, len(labels) - list(labels).count(IGNORE_INDEX), num_padding
    ends = [slice(0, SHOWN // 2), slice(len(ids) - SHOWN // 2, len(ids))] if len(ids) > SHOWN else [slice(0, len(ids))]
    parts = [
        tokens_of(ids[end], labels[end], tokenizer, mask=mask and mask[end], positions=positions and positions[end])
        for end in ends
    ]
    if len(parts) > 1:
        parts.insert(1, [Token("", (), learned=False, special=False, left_out=len(ids) - SHOWN)])
    return Shown(title, [token for part in parts for token in part], *counts)


def tokens_of(
    ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: Any,
    *,
    mask: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> list[Token]:
    """Tokens with the text each stands for; ids that only together make a character are one token here."""
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    tokens: list[Token] = []
    start = 0
    while start < len(ids):
        end = start + 1
        text = _text(ids[start:end], tokenizer)
        while "\ufffd" in text and end < min(len(ids), start + 4) and ids[end] not in special:
            longer = _text(ids[start : end + 1], tokenizer)
            end += 1
            if "\ufffd" not in longer:
                text = longer
                break
        else:
            end = start + 1
        tokens.append(
            Token(
                text,
                tuple(ids[start:end]),
                learned=labels[start] != IGNORE_INDEX,
                special=ids[start] in special,
                padding=mask is not None and not mask[start],
                starts_row=positions is not None and positions[start] == 0,
            )
        )
        start = end
    return tokens


def _text(ids: Sequence[int], tokenizer: Any) -> str:
    text: str = tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)
    return text


def left_out_in_words(token: Token) -> str:
    return f"⎯⎯ {token.left_out:,} tokens are not shown ⎯⎯"


def sequence_title(sequence: Shown) -> str:
    share = sequence.num_learned / max(1, sequence.num_tokens)
    padding = f", {sequence.num_padding:,} padding" if sequence.num_padding else ""
    return f"{sequence.title} · {sequence.num_tokens:,} tokens, {sequence.num_learned:,} learned ({share:.0%}){padding}"
