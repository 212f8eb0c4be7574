"""Which rows share a sequence (`packing: concat`).

Whole rows only. Position ids start at 0 with every row, and there is no attention mask: from that
model/attention.py, or transformers' mask (masking_utils.py), keeps the rows of a sequence apart, so a packed row is
learned as if it were alone.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from ds_sft.data.batch import Ids, concatenate
from ds_sft.data.rows import views_of


@dataclass(frozen=True)
class Packing:
    """Which rows stand in which sequence."""

    packs: list[list[int]]  # row numbers, each row once
    tokens: int
    max_length: int

    @property
    def efficiency(self) -> float:
        """Share of the sequences, each `max_length` long, that holds tokens."""
        return self.tokens / (max(1, len(self.packs)) * self.max_length)

    def in_words(self, rows: int) -> str:
        """How many sequences hold the rows, and how full they are, in one line."""
        return (
            f"Packing: {rows:,} rows in {len(self.packs):,} sequences of at most {self.max_length:,} tokens, "
            f"{self.efficiency:.1%} full; rows do not see each other."
        )


def pack_rows(lengths: Sequence[int] | np.ndarray, max_length: int, *, seed: int) -> Packing:
    """Best fit, longest rows first: each row goes where it leaves the least space.

    Args:
        lengths: tokens of each row, at most `max_length`.
        seed: orders rows of equal length, and the sequences.
    """
    lengths = np.asarray(lengths, np.int64)
    shuffle = np.random.default_rng(seed)
    order = shuffle.permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    packs: list[list[int]] = []
    with_space: dict[int, list[int]] = defaultdict(list)  # space left -> numbers of packs
    spaces: list[int] = []  # with a pack, ascending
    for row in order.tolist():
        length = int(lengths[row])
        at = bisect_left(spaces, length)
        if at < len(spaces):
            space = spaces[at]
            pack = with_space[space].pop()
            if not with_space[space]:
                spaces.pop(at)
        else:
            space, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(row)
        left = space - length
        if left > 0:
            if not with_space[left]:
                insort(spaces, left)
            with_space[left].append(pack)
    return Packing([packs[i] for i in shuffle.permutation(len(packs)).tolist()], int(lengths.sum()), max_length)


class PackedRows(Dataset[dict[str, Ids]]):
    """Packed sequences: input_ids, labels and position_ids, which start at 0 with every row: [tokens] each."""

    def __init__(self, rows: Any, packing: Packing) -> None:
        self.rows, self.packing, self._views = rows, packing, views_of(rows)

    def __len__(self) -> int:
        return len(self.packing.packs)

    def __getitem__(self, index: int) -> dict[str, Ids]:
        return concatenate([self._views[row] for row in self.packing.packs[index]])
