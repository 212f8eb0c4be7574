"""How fast a run is and where its time goes, over all ranks: tokens/s, MFU, padding, waiting, shares of time.

Every rank counts and times by itself; at a logging step one small collective brings the numbers together. Nothing here
waits for the device between logging steps.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from ds_sft.data.batch import BatchMetadata
from ds_sft.ranks.collectives import gather_numbers
from ds_sft.results import peak_memory
from ds_sft.training.clock import PARTS, Clock
from ds_sft.training.flops import count_flops
from ds_sft.training.peak import Peak

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COUNTS = ("tokens", "places", "supervised", "pairs")  # of a batch, as its `BatchMetadata` has them
SENT = (*COUNTS, "peak_flops", "memory_gib", *PARTS)  # what a rank tells the others, before its laps


@dataclass(frozen=True)
class Interval:
    """What all ranks did between two logging steps; `+` joins two that follow each other."""

    tokens: float = 0.0  # of all ranks, without padding
    places: float = 0.0  # with padding
    supervised: float = 0.0  # that the loss counts
    flops: float = 0.0  # useful ones
    possible_flops: float = 0.0  # at every device's peak, all the time
    seconds: float = 0.0  # of training: no evaluation
    waiting: float = 0.0
    data_wait: float = 0.0  # this and the following: seconds, mean over ranks
    forward_backward: float = 0.0
    communication: float = 0.0
    optimizer: float = 0.0
    save: float = 0.0
    other: float = 0.0

    def __add__(self, later: Interval) -> Interval:
        return Interval(*(getattr(self, f.name) + getattr(later, f.name) for f in fields(self)))

    def figures(self) -> dict[str, float]:
        """What is logged.

        `waiting_share`: time in which a rank had done its work and another had not, mean over ranks. Work is all but
        communication; between two meetings a rank waits as long as the slowest one's work is longer than its own.
        """
        seconds = max(self.seconds, 1e-9)
        rates = {
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens_per_second": self.supervised / seconds,
            **({"mfu": self.flops / self.possible_flops} if self.flops and self.possible_flops else {}),
            "padding_share": 1 - self.tokens / max(self.places, 1),
            "waiting_share": self.waiting / seconds,
        }
        shares = {f"{part}_share": getattr(self, part) / seconds for part in PARTS}
        return {name: round(value, 6) for name, value in {**rates, **shares, "interval_seconds": seconds}.items()}


class Throughput:
    """Counts what one rank learns, by a clock; `interval` brings the ranks' numbers together."""

    def __init__(self, model: PreTrainedModel, device: torch.device, clock: Clock, *, head_everywhere: bool) -> None:
        """`head_everywhere`: the loss has logits computed at every token, not only at those that are supervised."""
        self.device, self.clock, self.head_everywhere = device, clock, head_everywhere
        self.flops = count_flops(model)
        self.peak = Peak(0.0, "unknown")
        self.counts = dict.fromkeys(COUNTS, 0)
        self.total = Interval()
        self.memory_gib = 0.0  # the fullest rank's peak

    def start(self, peak: Peak) -> None:
        """Training begins now."""
        self.peak = peak
        self.clock.restart()

    def count(self, metadata: BatchMetadata) -> None:
        """Count a micro batch."""
        for name in COUNTS:
            self.counts[name] += getattr(metadata, name)

    def interval(self) -> Interval:
        """All ranks' numbers since the last call; all must call it, after equally many laps."""
        self.clock.lap()
        self.clock.settle()
        seconds, laps = self.clock.take()
        peaks = peak_memory()
        mine = {**self.counts, **seconds, "peak_flops": self.peak.flops,
                "memory_gib": peaks.get("gpu_gib", peaks["host_gib"])}  # fmt: skip
        self.counts = dict.fromkeys(COUNTS, 0)
        ranks = gather_numbers([*(mine[name] for name in SENT), *laps], device=self.device)
        told = [dict(zip(SENT, rank, strict=False)) for rank in ranks]
        self.memory_gib = max(rank["memory_gib"] for rank in told)
        done = self._join(told, [rank[len(SENT) :] for rank in ranks])
        self.total += done
        return done

    def _join(self, ranks: list[dict[str, float]], laps: list[list[float]]) -> Interval:
        def total(name: str) -> float:
            return sum(rank[name] for rank in ranks)

        count, tokens, supervised = len(ranks), total("tokens"), total("supervised")
        parts = {part: total(part) / count for part in PARTS}
        seconds = sum(parts.values())
        head_tokens = tokens if self.head_everywhere else supervised
        useful = self.flops.of(tokens=tokens, pairs=total("pairs"), head_tokens=head_tokens) if self.flops else 0.0
        return Interval(
            tokens=tokens,
            places=total("places"),
            supervised=supervised,
            flops=useful,
            possible_flops=seconds * total("peak_flops"),
            seconds=seconds,
            waiting=sum(max(lap) - sum(lap) / count for lap in zip(*laps, strict=True)),
            **parts,
        )

    def logged(self) -> dict[str, float]:
        """The figures since the last logging step; all ranks must call it."""
        return self.interval().figures() | {"peak_memory_gib": self.memory_gib}

    def summary(self) -> dict[str, float]:
        """The figures of this start of the run, for its record; after the last `interval`."""
        figures = self.total.figures()
        figures["seconds"] = figures.pop("interval_seconds")
        return figures | {"tokens": int(self.total.tokens), "supervised_tokens": int(self.total.supervised)}
