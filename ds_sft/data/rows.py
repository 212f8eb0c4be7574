"""The encoded rows of a data set as they lie in Arrow: read as views of its buffers, their lengths, their hash."""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

Ints = npt.NDArray[np.int64]


class ArrowRows:
    """The rows of a `datasets.Dataset` of lists of numbers, as views of its buffers."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[Any]]:
        row = index if self._order is None else int(self._order[index])
        chunk = bisect_right(self._first, row) - 1
        row -= self._first[chunk]
        return {name: values[offsets[row] : offsets[row + 1]] for name, offsets, values in self._chunks[chunk]}

    @cached_property
    def _order(self) -> npt.NDArray[Any] | None:
        return None if self.rows._indices is None else self.rows._indices.column(0).to_numpy()

    @cached_property
    def _chunks(self) -> list[list[tuple[str, npt.NDArray[Any], npt.NDArray[Any]]]]:
        """Of each chunk its columns: name, where rows begin in the values, values."""
        names = [name for name in ("input_ids", "labels", "position_ids") if name in self.rows.column_names]
        columns = [self.rows.data.column(name).chunks for name in names]
        assert len({tuple(map(len, chunks)) for chunks in columns}) == 1, "columns are cut at different rows"
        return [
            [(name, part.offsets.to_numpy(), part.values.to_numpy()) for name, part in zip(names, parts, strict=True)]
            for parts in zip(*columns, strict=True)
        ]

    @cached_property
    def _first(self) -> list[int]:
        """The number of the first row of each chunk."""
        return list(accumulate((len(offsets) - 1 for ((_, offsets, _), *_) in self._chunks[:-1]), initial=0))

    def __getstate__(self) -> dict[str, Any]:
        """A loader's worker opens the files itself: views would travel as copies."""
        return {"rows": self.rows}


def views_of(rows: Any) -> Any:
    """Rows that are read by their number: a data set's without copies, others as they are."""
    return ArrowRows(rows) if hasattr(rows, "data") else rows


def lengths_of(rows: Any) -> Ints:
    """Tokens of each row, of a data set or of packed sequences. Reads where rows begin, not the rows."""
    if hasattr(rows, "packing"):
        alone = lengths_of(rows.rows)
        return np.array([alone[pack].sum() for pack in rows.packing.packs], np.int64)
    chunks = rows.data.column("input_ids").chunks
    lengths: Ints = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks]).astype(np.int64)
    return lengths if rows._indices is None else lengths[rows._indices.column(0).to_numpy()]


def fingerprint(rows: Any) -> str:
    """A hash of the encoded rows and their order, however they are stored; about a second for a gigabyte."""
    digest = xxhash.xxh3_128()
    for name in rows.column_names:
        chunks = rows.data.column(name).chunks
        for chunk in chunks:
            digest.update(chunk.value_lengths().to_numpy())
        for chunk in chunks:
            digest.update(chunk.flatten().to_numpy())
    for chunk in rows._indices.column(0).chunks if rows._indices is not None else []:
        digest.update(chunk.to_numpy())
    return digest.hexdigest()
