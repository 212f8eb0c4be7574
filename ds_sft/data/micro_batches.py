"""Which rows make which micro batch of an epoch: the same rows in every step whatever the number of ranks.

Within a step they are dealt so that ranks wait little on each other: micro batches that run at the same time are about
as long. The gradient is a mean over the tokens of the step, so dealing changes nothing but rounding. Arithmetic on
lengths alone; `loader.py` gives each rank its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ds_sft.data.packing import pack_rows
from ds_sft.errors import UserError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Epoch:
    """The micro batches of an epoch; at the same time run number n, n + 1, ... n + ranks - 1, n a multiple of ranks."""

    rows: Ints  # [rows] numbers of the rows learned from, each once, micro batch by micro batch
    borders: Ints  # [micro batches + 1]: micro batch m has rows[borders[m] : borders[m + 1]], maybe none
    computed: Ints  # [micro batches] tokens, padding included
    cost: Ints  # [micro batches] what they last, in tokens without attention
    tokens: int  # without padding
    accumulation: int
    ranks: int

    def micro_batch(self, number: int) -> list[int]:
        rows: list[int] = self.rows[self.borders[number] : self.borders[number + 1]].tolist()
        return rows

    def samples(self, steps: int) -> int:
        """Rows of the first steps."""
        return int(self.borders[min(steps * self.accumulation * self.ranks, len(self.borders) - 1)])

    @property
    def padding(self) -> float:
        """Share of the tokens computed."""
        return 1 - self.tokens / max(1, int(self.computed.sum()))

    def waiting(self, *, each_micro_batch: bool) -> tuple[float, float]:
        """What ranks differ by, and the share of the time that they wait, by cost.

        Args:
            each_micro_batch: ranks meet after each (ZeRO-2 and 3), else once a step.

        Returns:
            Cost between the longest and the shortest, the mean over all meetings; mean over ranks of the waiting.
        """
        at_once = self.cost.reshape(-1, self.ranks)  # [micro batches of a rank, ranks]
        if not each_micro_batch:
            at_once = np.add.reduceat(at_once, np.arange(0, len(at_once), self.accumulation))
        longest = at_once.max(axis=1)
        apart = float((longest - at_once.min(axis=1)).mean())
        return apart, 1 - float(at_once.sum()) / max(1, int(longest.sum()) * self.ranks)


@dataclass(frozen=True, kw_only=True)
class Seam:
    """Where a run went on with other rows in a step: the steps before it are done, whatever rows they had."""

    epoch: int = 0  # the one under way, or about to begin
    first_step: int = 0  # steps of the run before that epoch
    step: int = 0  # steps of the run that are done
    rows: int = 0  # of that epoch's order, that they have learned
    samples: int = 0  # rows learned since the run began


@dataclass(frozen=True, kw_only=True, eq=False)
class Batching:
    """What decides the micro batches of a run.

    An epoch is one permutation of the rows, which depends on seed and epoch alone (by `order` one in which rows of
    similar length follow each other, or none). Step s learns from its rows [s x R, (s + 1) x R), R = micro batch x
    accumulation x ranks. Without a `micro_batch` the rows are put into bins of at most `max_tokens`, anew in every
    epoch; a micro batch is a bin, and step s has the bins [s x K, (s + 1) x K), K = accumulation x ranks. At the end of
    an epoch no row comes twice: some micro batches then have none, because all ranks must run as many.

    A run that goes on with another R deals the rows after its `seam` anew. The steps before it count as steps of that
    epoch, with micro batches that have no rows here and are never asked for.
    """

    lengths: Ints  # [rows] tokens of each
    micro_batch: int | None  # rows; None: as many as `max_tokens` hold
    accumulation: int
    ranks: int  # that have rows of their own: groups of them where `group` ranks share theirs
    padded: bool  # to the longest row of a micro batch; else rows are laid end to end
    seed: int
    order: str = "random"  # or sequential, group_by_length
    max_tokens: int | None = None  # of a micro batch, padding included
    drop_last: bool = False
    attention: float = 0.0  # what a pair of tokens costs in attention, beside all else that a token costs
    seam: Seam = Seam()
    group: int = 1  # ranks that share the rows of a micro batch
    _last: dict[int, Epoch] = field(default_factory=dict, init=False, repr=False)

    @property
    def slots(self) -> int:
        """Micro batches of a step, of all ranks."""
        return self.accumulation * self.ranks

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    @property
    def largest(self) -> int:
        """Tokens of the largest micro batch, padding included, of the first epoch."""
        return int(self.epoch(0).computed.max())

    @property
    def largest_part(self) -> int:
        """As `largest`, of one rank: where ranks share rows, its part of them."""
        return math.ceil(self.largest / self.group)

    @cached_property
    def num_bins(self) -> int | None:
        """Micro batches of an epoch, the same in all: how well rows fit depends on their lengths only."""
        return None if self.micro_batch else len(self._bins(0))

    def epoch(self, number: int) -> Epoch:
        """The micro batches of an epoch; those of the last one asked for are kept."""
        if number not in self._last:
            epoch = self._by_rows(number) if self.micro_batch else self._by_tokens(number)
            self._last.clear()
            self._last[number] = epoch
        return self._last[number]

    @property
    def a_step(self) -> int:
        """Rows of a step, or the micro batches that tokens fill."""
        return (self.micro_batch or 1) * self.slots

    def _past(self, epoch: int) -> tuple[int, int]:
        """Rows and steps of an epoch that lie before the seam."""
        seam = self.seam
        return (seam.rows, seam.step - seam.first_step) if epoch == seam.epoch else (0, 0)

    def steps_of(self, epoch: int) -> int:
        """Steps of an epoch; those of the one with the seam are of both sizes."""
        rows, steps = self._past(epoch)
        units = (self.num_bins or len(self.lengths)) - rows
        return steps + math.ceil(used(units, self.a_step, drop_last=self.drop_last) / self.a_step)

    def steps(self, epochs: float) -> int:
        """Steps of a run of so many epochs."""
        whole, first = self.seam.epoch + 1, self.steps_of(self.seam.epoch)
        if epochs <= whole:
            return self.seam.first_step + math.ceil(max(0.0, epochs - self.seam.epoch) * first)
        anywhere = self.steps_of(whole)
        return math.ceil(epochs * anywhere) + self.seam.first_step + first - whole * anywhere

    def position(self, step: int) -> tuple[int, int]:
        """The epoch under way after a step of the run, and the steps of it that are done."""
        into = step - self.seam.first_step
        if into < self.steps_of(self.seam.epoch):
            return self.seam.epoch, into
        later, into = divmod(into - self.steps_of(self.seam.epoch), self.steps_of(self.seam.epoch + 1))
        return self.seam.epoch + 1 + later, into

    def samples(self, epochs: int, steps: int) -> int:
        """Rows learned from in so many whole epochs and steps."""
        whole = sum(self._rows_used(number) for number in range(self.seam.epoch, epochs))
        return self.seam.samples + whole + (self.epoch(epochs).samples(steps) if steps else 0)

    def _rows_used(self, number: int) -> int:
        if self.drop_last and not self.micro_batch:  # how many rows are in the whole steps differs
            return len(self.epoch(number).rows)
        a_step = self.a_step if self.micro_batch else 1
        return used(len(self.lengths) - self._past(number)[0], a_step, drop_last=self.drop_last)

    def seam_at(self, step: int) -> Seam:
        """Where another size of a step could go on after this one."""
        epoch, steps = self.position(step)
        learned = self._past(epoch)[0] + (self.epoch(epoch).samples(steps) if steps else 0)
        return Seam(epoch=epoch, first_step=step - steps, step=step, rows=learned, samples=self.samples(epoch, steps))

    # ---- A number of rows

    def _by_rows(self, number: int) -> Epoch:
        assert self.micro_batch is not None
        a_step, (learned, steps) = self.a_step, self._past(number)
        done = steps * self.slots
        order = self._order(number)[learned:]
        order = order[: used(len(order), a_step, drop_last=self.drop_last)]
        whole = len(order) // a_step
        rest = order[whole * a_step :]
        rest_slots = math.ceil(len(rest) / (self.micro_batch * self.ranks)) * self.ranks
        full = self._deal(self.lengths[order[: whole * a_step].reshape(whole, a_step)], self.slots)
        last = self._deal(self.lengths[rest[None]], rest_slots)
        of_step = np.arange(whole)[:, None] * self.slots
        owner = np.concatenate([(full + of_step).ravel(), last.ravel() + whole * self.slots])
        return self._arrange(order, owner + done, done + whole * self.slots + rest_slots)

    def _deal(self, lengths: Ints, slots: int) -> Ints:
        """[steps, rows] -> the micro batch of each, below `slots`."""
        if self.padded or not lengths.size:
            return neighbours(lengths, max(1, slots))
        assert self.micro_batch is not None
        room = lengths.max(axis=1) * self.micro_batch
        if self.max_tokens is not None:
            room = room.clip(max=self.max_tokens)
        return balanced(lengths, self._cost(lengths), slots, room)

    def _order(self, number: int) -> Ints:
        if self.order == "sequential":
            return np.arange(len(self.lengths))
        import torch
        from transformers.trainer_pt_utils import get_length_grouped_indices

        generator = torch.Generator().manual_seed(self.seed + number)
        if self.order == "random":
            return torch.randperm(len(self.lengths), generator=generator).numpy()
        return np.array(get_length_grouped_indices(self.lengths.tolist(), self.a_step, generator=generator), np.int64)

    # ---- A number of tokens

    def _by_tokens(self, number: int) -> Epoch:
        bins = self._bins(number)
        bins = bins[: used(len(bins), self.slots, drop_last=self.drop_last)]
        owner = np.repeat(np.arange(len(bins)), [len(rows) for rows in bins])
        return self._arrange(np.concatenate(bins), owner, math.ceil(len(bins) / self.ranks) * self.ranks)

    def _bins(self, number: int) -> list[Sequence[int]]:
        assert self.max_tokens is not None
        if self.order == "sequential":
            return list(fill(self.lengths, np.arange(len(self.lengths)), self.max_tokens, padded=self.padded))
        if not self.padded:
            return list(pack_rows(self.lengths, self.max_tokens, seed=self.seed + number).packs)
        chance = np.random.default_rng(self.seed + number)
        order = chance.permutation(len(self.lengths))
        order = order[np.argsort(-self.lengths[order], kind="stable")]  # rows of equal length change their company
        bins = list(fill(self.lengths, order, self.max_tokens, padded=True))
        return [bins[number] for number in chance.permutation(len(bins))]

    # ---- Both

    def _arrange(self, rows: Ints, owner: Ints, total: int) -> Epoch:
        """Put the micro batches of each step in the order of their costs, and deal them to the ranks.

        Args:
            rows: [rows] in the order of the steps.
            owner: [rows] number of the micro batch of each, below `total`; a step has `slots` of them.
            total: micro batches, a multiple of the ranks.
        """
        computed = self._total(self.lengths[rows], owner, total)
        cost = self._total(self._cost(self.lengths[rows]), owner, total)
        by_cost = np.lexsort((-cost, np.arange(total) // self.slots))
        number = np.arange(total).reshape(-1, self.ranks)
        number[1::2] = number[1::2, ::-1]  # there and back, so that no rank always has the longest
        position = np.empty(total, np.int64)
        position[by_cost] = number.ravel()
        place = position[owner]
        borders = np.concatenate([[0], np.bincount(place, minlength=total).cumsum()])
        by_position = np.argsort(position)
        return Epoch(
            rows=rows[np.argsort(place, kind="stable")],
            borders=borders,
            computed=computed[by_position],
            cost=cost[by_position],
            tokens=int(self.lengths[rows].sum()),
            accumulation=self.accumulation,
            ranks=self.ranks,
        )

    def _cost(self, lengths: Ints) -> Ints:
        return np.rint(lengths * (1 + self.attention * lengths)).astype(np.int64)  # no sum then depends on its order

    def _total(self, of_rows: Ints, owner: Ints, total: int) -> Ints:
        """Of every micro batch; where rows are padded each counts as the longest."""
        if not self.padded:
            return np.bincount(owner, weights=of_rows, minlength=total).astype(np.int64)
        longest = np.zeros(total, np.int64)
        np.maximum.at(longest, owner, of_rows)
        return longest * np.bincount(owner, minlength=total)

    # ---- What is said before training

    def check(self, epochs: int, where: Callable[[int], str] = lambda row: f"number {row + 1}") -> None:
        """See that no micro batch of the run is above `max_tokens`; `where` gives FILE:LINE of a row.

        Raises:
            UserError: one is; says what would work.
        """
        if self.max_tokens is None:
            return
        if self.longest > self.max_tokens:
            raise UserError(
                f"max_tokens_per_batch: {self.max_tokens}: the longest row ({where(int(self.lengths.argmax()))}) has "
                f"{self.longest} tokens: write {self.longest} or more, or a max_length of {self.max_tokens}"
            )
        if self.micro_batch is None or (largest := self._largest_of(epochs)) <= self.max_tokens:
            return
        rows = self.micro_batch * self.accumulation
        smaller = (replace(self, micro_batch=micro, accumulation=rows // micro)
                   for micro in range(self.micro_batch - 1, 0, -1) if rows % micro == 0)  # fmt: skip
        fits = next(other for other in smaller if other._largest_of(epochs) <= self.max_tokens)
        raise UserError(
            f"max_tokens_per_batch: {self.max_tokens}: {rows * self.ranks} rows a step put {largest} tokens into a "
            f"micro batch; write {largest} or more, or per_device_train_batch_size: {fits.micro_batch} with "
            f"gradient_accumulation_steps: {fits.accumulation}, or leave per_device_train_batch_size out, so that a "
            "step has as many rows as fit"
        )

    def _largest_of(self, epochs: int) -> int:
        left = range(self.seam.epoch, epochs)
        return max((int(self.epoch(number).computed.max()) for number in left), default=0)

    def padding_and_waiting(self, *, each_micro_batch: bool) -> str:
        """How much of the first epoch is padding and waiting, in one line."""
        first = self.epoch(self.seam.epoch + 1 if self.seam.rows else 0)  # a whole one
        line = f"Padding is {first.padding:.1%} of the tokens computed." if self.padded else "No padding."
        if self.ranks == 1:
            return line
        apart, share = first.waiting(each_micro_batch=each_micro_batch)
        what = "micro batch" if each_micro_batch else "step"
        who = "Ranks" if self.group == 1 else f"Groups of {self.group} ranks"
        return f"{line} {who} differ by {apart:,.0f} tokens a {what}; about {share:.1%} of the time is waiting."


def used(units: int, a_step: int, *, drop_last: bool) -> int:
    """The rows, or bins, that an epoch learns from."""
    whole = units - units % a_step
    return whole if drop_last and whole else units


def neighbours(lengths: Ints, slots: int) -> Ints:
    """Rows of similar length together, as many in each micro batch: [steps, rows] -> number of its micro batch."""
    sizes = [len(part) for part in np.array_split(np.arange(lengths.shape[1]), slots)]  # longer rows are never more
    by_length = np.argsort(np.argsort(lengths, axis=1, kind="stable"), axis=1)
    dealt: Ints = np.repeat(np.arange(slots), sizes)[by_length]
    return dealt


def balanced(lengths: Ints, cost: Ints, slots: int, room: Ints) -> Ints:
    """About as much to do in each micro batch: [steps, rows] -> number of its micro batch.

    Longest row first, each to the micro batch with the least to do (Graham 1969) among those with room for its tokens.
    One always has room where that is m times the longest row and a step has at most m rows for each of the `slots`: if
    none had, all would hold more than the tokens of m - 1 such rows, hence m rows, and this one would be one too many.

    Args:
        lengths, cost: [steps, rows]
        room: [steps] tokens of a micro batch
    """
    steps, none = np.arange(len(lengths)), np.iinfo(np.int64).max
    tokens = np.zeros((len(lengths), slots), np.int64)
    load, dealt = np.zeros_like(tokens), np.empty_like(lengths)
    for column in np.argsort(-lengths, axis=1, kind="stable").T:
        length = lengths[steps, column]
        fits = tokens + length[:, None] <= room[:, None]
        least = np.where(fits.any(axis=1), np.where(fits, load, none).argmin(axis=1), tokens.argmin(axis=1))
        dealt[steps, column] = least
        tokens[steps, least] += length
        load[steps, least] += cost[steps, column]
    return dealt


def fill(lengths: Ints, order: Ints, max_tokens: int, *, padded: bool) -> Iterator[list[int]]:
    """Rows in this order, as many in each bin as it holds."""
    rows: list[int] = []
    tokens = longest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        tokens, longest = tokens + length, max(longest, length)
        if rows and (longest * (len(rows) + 1) if padded else tokens) > max_tokens:
            yield rows
            rows, tokens, longest = [], length, length
        rows.append(row)
    if rows:
        yield rows
