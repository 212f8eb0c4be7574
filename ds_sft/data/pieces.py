"""Rendered text, cut into pieces that are learned and pieces that are not; special-token text of a row stays text."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from ds_sft.data.bad_row import BadRow

# Around special-token text of a row while it is rendered. Unicode reserves these two for a program's own use.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
MARKED = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)


class Piece(NamedTuple):
    """A stretch of what a model reads: text, or the id of one token."""

    text: str | int
    learned: bool
    plain: bool = False  # special-token text of a row, which must stay text


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


def unmarked(text: str) -> str:
    return text.replace(OPEN, "").replace(CLOSE, "")


def cut_text(whole: str, spans: list[tuple[int, int]]) -> list[Piece]:
    """Pieces of a whole text, of which what stands in `spans` is learned."""
    pieces, at = [], 0
    for start, end in spans:
        pieces += split_text(whole[at:start], False) + split_text(whole[start:end], True)
        at = end
    return pieces + split_text(whole[at:], False)


def split_text(text: str, learned: bool) -> list[Piece]:
    """Set special-token text of the row apart."""
    if OPEN not in text:
        return [Piece(text, learned)] if text else []
    parts = MARKED.split(text)
    return [Piece(unmarked(part), learned, plain=i % 2 == 1) for i, part in enumerate(parts) if unmarked(part)]
