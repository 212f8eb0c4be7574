"""Batches of rows, with what the host knows of them: so nothing has to read the device while it computes.

Rows come as views of Arrow's buffers (`rows.py`) and go into a batch by numpy; no token becomes a Python number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ds_sft.data.encode import IGNORE_INDEX

Ids = npt.NDArray[np.int64]
METADATA = "metadata"  # the key of a batch under which it goes along


@dataclass(frozen=True)
class Share:
    """Which part of a sequence a batch is; the other ranks of a group have the others, which are as long."""

    first: int  # place in the sequence
    filling: int  # tokens behind the last row, so that the parts are equal; they count as that row's in `lengths`


# Not frozen: torch 2.10's compiler looks into all fields of a frozen one, and compiles anew for each number of rows.
@dataclass
class BatchMetadata:
    """Where rows and supervised tokens are in a batch, and how many; it moves as a tensor does."""

    lengths: list[int]  # tokens of each row; with a `share` of the rows of the whole sequence
    places: int  # of the batch, padding included
    starts: torch.Tensor | None  # [rows + 1] int32: where each row begins, and the last ends; None: padded
    positions: torch.Tensor  # [supervised] int64, in [batch x seq]: what predicts a supervised token
    targets: torch.Tensor  # [supervised] int64: that token
    share: Share | None = None  # None: the batch is whole rows

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(end - first for _, first, end in self._parts())

    @property
    def tokens_of_rows(self) -> int:
        """As `tokens`, without those that stand in for a missing row: one each, from which no row learns."""
        return sum(end - first for length, first, end in self._parts() if length > 1)

    @property
    def supervised(self) -> int:
        return len(self.targets)

    @property
    def pairs(self) -> int:
        """Of a token and one that it sees, in whichever part."""
        return sum(end * (end + 1) - first * (first + 1) for _, first, end in self._parts()) // 2

    def of_rows(self) -> torch.Tensor:
        """Which places have a token of a row, [places] bool on the host: not what fills up or stands in for one."""
        parts = [(length > 1, end - first) for length, first, end in self._parts()]
        learned, sizes = zip(*parts, (False, self.places - self.tokens), strict=True)
        return torch.tensor(learned).repeat_interleave(torch.tensor(sizes))

    def _parts(self) -> Iterator[tuple[int, int, int]]:
        """Of each row: its tokens, the first of them that is here, and the end of those that are."""
        if self.share is None:
            yield from ((length, 0, length) for length in self.lengths)
            return
        begin, filling = self.share.first, self.share.filling
        for length in [*self.lengths[:-1], self.lengths[-1] - filling]:
            first, end = (min(max(place, 0), length) for place in (begin, begin + self.places))
            yield length, first, end
            begin -= length

    def pin_memory(self) -> BatchMetadata:
        return self._each(torch.Tensor.pin_memory)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> BatchMetadata:
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _each(self, move: Any) -> BatchMetadata:
        starts = None if self.starts is None else move(self.starts)
        return replace(self, starts=starts, positions=move(self.positions), targets=move(self.targets))


def collate_flat(features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A batch without padding: input_ids, labels and position_ids of all its rows, [1, tokens] each, and metadata."""
    joined = concatenate(features)
    starts = np.append(np.flatnonzero(joined["position_ids"] == 0), len(joined["input_ids"]))
    batch: dict[str, Any] = {name: torch.from_numpy(ids)[None] for name, ids in joined.items()}
    borders = torch.from_numpy(starts.astype(np.int32))
    return batch | {METADATA: _metadata(joined["labels"][None], np.diff(starts).tolist(), borders)}


def collate_share(features: Sequence[Mapping[str, Any]], *, place: int, size: int) -> dict[str, Any]:
    """One of `size` equal parts of what `collate_flat` makes, [1, tokens / size] each: that of the rank at `place`.

    Rows are as long as they are: a part may begin in the middle of one, and predict the first token of the next part.
    Tokens behind the last row make the parts equal. No row sees them, and nothing is learned from them.
    """
    joined = concatenate(features)
    starts = np.append(np.flatnonzero(joined["position_ids"] == 0), len(joined["input_ids"]))
    filling = -len(joined["input_ids"]) % size
    starts[-1] += filling
    here = slice(place * int(starts[-1]) // size, (place + 1) * int(starts[-1]) // size)
    whole = _metadata(_filled(joined["labels"], filling, IGNORE_INDEX)[None], np.diff(starts).tolist(),
                    torch.from_numpy(starts.astype(np.int32)))  # fmt: skip
    behind = {"labels": IGNORE_INDEX, "position_ids": int(joined["position_ids"][-1])}  # a table of positions may end
    batch: dict[str, Any] = {
        name: torch.from_numpy(_filled(ids, filling, behind.get(name, 0))[here])[None] for name, ids in joined.items()
    }
    return batch | {METADATA: _part(whole, here, filling)}


def _filled(ids: Ids, number: int, value: int) -> Ids:
    return np.concatenate([ids, np.full(number, value)]) if number else ids


def _part(whole: BatchMetadata, here: slice, filling: int) -> BatchMetadata:
    """The metadata of these places of a sequence."""
    mine = slice(*np.searchsorted(whole.positions.numpy(), [here.start, here.stop]).tolist())
    return replace(
        whole,
        places=here.stop - here.start,
        positions=whole.positions[mine] - here.start,
        targets=whole.targets[mine],
        share=Share(here.start, filling),
    )


def collate_padded(features: Sequence[Mapping[str, Any]], *, pad_token_id: int) -> dict[str, Any]:
    """A padded batch: input_ids, labels and attention_mask, [rows, longest] each, and metadata; rows stand left."""
    lengths = [len(row["input_ids"]) for row in features]
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    ids, labels = np.full(mask.shape, pad_token_id), np.full(mask.shape, IGNORE_INDEX)
    ids[mask], labels[mask] = (_joined(features, name) for name in ("input_ids", "labels"))
    found = {"input_ids": ids, "labels": labels, "attention_mask": mask.astype(np.int64)}
    batch: dict[str, Any] = {name: torch.from_numpy(values) for name, values in found.items()}
    return batch | {METADATA: _metadata(labels, lengths, None)}


def concatenate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Ids]:
    """Rows or sequences end to end. The first token of a row is no target: what stands before it is another row."""
    counted = [row["position_ids"] if "position_ids" in row else np.arange(len(row["labels"])) for row in rows]
    joined = {"input_ids": _joined(rows, "input_ids"), "labels": _joined(rows, "labels"),
              "position_ids": np.concatenate(counted, dtype=np.int64)}  # fmt: skip
    joined["labels"][joined["position_ids"] == 0] = IGNORE_INDEX
    return joined


def _joined(rows: Sequence[Mapping[str, Any]], name: str) -> Ids:
    return np.concatenate([row[name] for row in rows], dtype=np.int64)


def _metadata(labels: Ids, lengths: list[int], starts: torch.Tensor | None) -> BatchMetadata:
    """labels: [batch, seq]; position t predicts the label of t + 1."""
    following = np.full_like(labels, IGNORE_INDEX)
    following[:, :-1] = labels[:, 1:]
    following = following.ravel()
    supervised = np.flatnonzero(following != IGNORE_INDEX)
    positions, targets = (torch.from_numpy(ids) for ids in (supervised, following[supervised]))
    return BatchMetadata(lengths, labels.size, starts, positions, targets)
