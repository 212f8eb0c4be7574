"""An answer beside the one in the data: exact match, chrF (sacrebleu) and ROUGE-L (rouge-score).

All three compare texts without space around them and without reasoning (what stands before the last `</think>`; all of
an answer that was cut before it).
They go from 0 to 100. chrF is the corpus' (Popović 2015: n-grams of 1 to 6 characters, beta 2), as `sacrebleu -m chrf`
prints it: of the sums over all rows. The other two are means over rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from ds_sft.errors import UserError

PACKAGES = ("sacrebleu", "rouge_score", "regex")  # of the extra `evaluate`
THOUGHT, END_OF_THOUGHT = "<think>", "</think>"
# Scripts that are written without spaces: a character is a word, as in multilingual ROUGE of the field.
WITHOUT_SPACES = "".join(
    rf"\p{{{name}}}" for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
WORDS = rf"[{WITHOUT_SPACES}]\p{{M}}*|[[\p{{L}}\p{{M}}\p{{N}}]--[{WITHOUT_SPACES}]]+"


@dataclass(frozen=True)
class Scores:
    """Of one answer. What is summed over rows to score a corpus is `statistics`."""

    exact_match: float  # 0 or 100
    rouge_l: float  # F1
    chrf: float  # of this row alone
    statistics: list[int]  # of chrF: n-grams of the answer, of the reference, and in both; for 1 to 6 characters


def require_metrics(instead: str) -> None:
    """See that the packages are installed.

    Args:
        instead: what else the user may write.

    Raises:
        UserError: one is not.
    """
    missing = [name.replace("_", "-") for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{missing[0]} is not installed, which scores answers: pip install {' '.join(missing)}, or {instead}"
        )


def score(answer: str, reference: str, *, opened: bool = False) -> Scores:
    """Compare an answer with the one in the data; `opened`: its prompt has begun the reasoning."""
    answer, reference = scored_part(answer, opened=opened), scored_part(reference)
    statistics: list[int] = _chrf()._extract_corpus_statistics([answer], [[reference]])[0]
    rouge = _rouge().score(reference, answer)["rougeL"].fmeasure
    return Scores(100.0 * (answer == reference), 100.0 * rouge, chrf_of(statistics), statistics)


def scored_part(text: str, *, opened: bool = False) -> str:
    """A text without its reasoning, and without space around it."""
    _, end, rest = text.rpartition(END_OF_THOUGHT)
    reasons = opened or text.lstrip().startswith(THOUGHT)
    return "" if reasons and not end else rest.strip()


def chrf_of(statistics: Sequence[float]) -> float:
    """chrF of statistics, those of one row or their sums over rows."""
    return float(_chrf()._compute_score_from_stats(list(statistics)).score)


def words(text: str) -> list[str]:
    """What ROUGE-L compares: words in lower case; of scripts without spaces, characters.

    rouge-score's own tokenizer keeps a-z and 0-9 alone: Chinese and Russian score 0 with it, whatever they say. For
    English both give the same.
    """
    found: list[str] = _pattern().findall(text.lower())
    return found


class _Words:
    """What rouge-score calls a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


@cache
def _pattern() -> Any:
    import regex  # the standard library's `\w` knows neither scripts nor the vowel signs of Hindi

    return regex.compile(WORDS, regex.VERSION1)


@cache
def _chrf() -> Any:
    """Its public functions give no statistics to sum up; these are what sacrebleu.significance resamples."""
    from sacrebleu.metrics import CHRF

    return CHRF()


@cache
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())
