"""How sure a number is: percentile intervals of the bootstrap (Efron 1979), paired for two models (Koehn 2004).

Dialogues are drawn with replacement, as many as there are, `RESAMPLES` times; what a draw gives is computed as the
number itself is, from sums over dialogues. Two models get the same draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ds_sft.evaluation.scores import chrf_of

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
LEVEL = 95.0  # percent
LOWER_IS_BETTER = ("loss", "perplexity")
# Columns of the numbers of a dialogue; those of chrF's statistics follow.
LOSS, TOKENS, ANSWERED, EXACT, ROUGE, CHRF = range(6)


@dataclass(frozen=True)
class Estimate:
    """A number and its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference(Estimate):
    """Of two models, the second less the first."""

    better: float  # share of the draws in which the second is better
    worse: float  # and in which it is worse


def resampled(numbers: Floats, seed: int) -> Floats:
    """Sums over drawn dialogues, [RESAMPLES, columns], of numbers [dialogues, columns]; a seed's draws are the same."""
    rng, count = np.random.default_rng(seed), len(numbers)
    draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    return np.stack([draw @ numbers for draw in draws])


def metric(name: str, sums: Floats) -> Floats:
    """A metric of sums over dialogues: [n, columns] -> [n]; NaN where nothing was measured.

    Args:
        sums: of the columns LOSS (cross-entropy), TOKENS (supervised), ANSWERED, EXACT, ROUGE, and from CHRF on.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        if name == "loss":
            return sums[:, LOSS] / sums[:, TOKENS]
        if name == "perplexity":
            return np.exp(sums[:, LOSS] / sums[:, TOKENS])
        if name != "chrf":
            return sums[:, EXACT if name == "exact_match" else ROUGE] / sums[:, ANSWERED]
    return np.array([chrf_of(row[CHRF:].tolist()) if row[ANSWERED] else np.nan for row in sums])


def estimate(name: str, numbers: Floats, drawn: Floats) -> Estimate:
    """A metric of all dialogues; `drawn`: `resampled(numbers, ...)`."""
    return Estimate(float(metric(name, numbers.sum(0)[None])[0]), *_interval(metric(name, drawn)))


def difference(name: str, first: Sequence[Floats], second: Sequence[Floats]) -> Difference:
    """By how much a metric of the second model is above the first's; of each model its numbers and their draws."""
    value = metric(name, second[0].sum(0)[None]) - metric(name, first[0].sum(0)[None])
    apart = metric(name, second[1]) - metric(name, first[1])
    better, worse = float((apart > 0).mean()), float((apart < 0).mean())
    if name in LOWER_IS_BETTER:
        better, worse = worse, better
    return Difference(float(value[0]), *_interval(apart), better=better, worse=worse)


def _interval(values: Floats) -> tuple[float, float]:
    """Where the middle 95 % of the values lie; of those that are numbers."""
    numbers = values[~np.isnan(values)]
    if not len(numbers):
        return float("nan"), float("nan")
    low, high = np.percentile(numbers, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return float(low), float(high)
