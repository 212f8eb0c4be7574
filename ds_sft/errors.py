"""Exceptions that end a run with one line and no traceback, and the words in which errors are told."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(Exception):
    """What the user gave is wrong: one line saying where, what was found and what to write instead; of a file with
    several mistakes one for each.

    Entry points print it without a traceback and exit with 2; every exception but these two is a bug of ours.
    """


class RunError(Exception):
    """The run cannot go on, and nobody made a mistake that could be named beforehand; all ranks raise it together.

    Entry points print it without a traceback and exit with 1.
    """


def nearest(name: str, *groups: Iterable[str]) -> str | None:
    """The known name that was meant by an unknown one; None where none is like it.

    But for a slip of the finger, words in common say more than letters: `lora_r` is no misspelt `local_rank`. Of equals
    a name of an earlier group is taken.
    """
    found: list[tuple[bool, float, int, float, str]] = []
    words = _words(name)
    for order, group in enumerate(groups):
        for known in group:
            shared = sum(max(_likeness(word, other) for other in _words(known)) for word in words)
            letters = SequenceMatcher(None, "_".join(words), "_".join(_words(known))).ratio()
            if 2 * shared >= len(words) or letters >= 0.75:
                found.append((letters >= 0.85, shared, -order, letters, known))
    return max(found)[-1] if found else None


def nearest_value(value: str, known: Iterable[str]) -> str | None:
    """The known value that was meant by an unknown one; None where none is like it.

    One that begins with it goes before all others, the first of several: adamw is adamw_torch.
    """
    values, given = list(known), value.lower()
    near = [word for word in values if given and word.startswith(given)] or get_close_matches(given, values, n=1)
    return near[0] if near else None


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower().strip("-_"))


def _likeness(word: str, other: str) -> float:
    """1 for the same word, a little less for its beginning (accum) or one with a slip of the finger."""
    if word == other or min(len(word), len(other)) < 3:
        return float(word == other)
    begins = word.startswith(other) or other.startswith(word)
    return 0.9 if begins or SequenceMatcher(None, word, other).ratio() >= 0.8 else 0.0


def error_in_words(error: BaseException) -> str:
    """What went wrong with a file, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def first_line(error: BaseException) -> str:
    """What a library says, without the paragraphs that follow; the kind of error where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
