"""What Trainer loads a rank's batches with: data set, sampler, collator, loader. `micro_batches.py` says which rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_sft.config.keys import Config
from ds_sft.data.batch import collate_flat, collate_padded, collate_share
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.data.micro_batches import Batching
from ds_sft.data.packing import PackedRows, pack_rows
from ds_sft.data.rows import lengths_of, views_of
from ds_sft.ranks.launch import Launch

NOTHING = -1  # the row of a rank for which the end of an epoch has none left


class GlobalBatches(Sampler[list[int]]):
    """The micro batches of one rank, as lists of row numbers; `[NOTHING]` where an epoch has none left for it.

    Ranks of a group have the same.
    """

    def __init__(self, batching: Batching, rank: int) -> None:
        self.batching, self.first, self.number = batching, rank // batching.group, 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __len__(self) -> int:
        return len(self.batching.epoch(self.number).computed) // self.batching.ranks

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.batching.epoch(self.number)
        for number in range(self.first, len(epoch.computed), self.batching.ranks):
            yield epoch.micro_batch(number) or [NOTHING]


class RowsOrNothing(Dataset[dict[str, Any]]):
    """The rows of a data set, and under `NOTHING` one that counts nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows = views_of(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index != NOTHING:
            return dict(self.rows[index])
        return {"input_ids": [0], "labels": [IGNORE_INDEX]}


def dataset_and_collator(
    rows: Any, config: Config, tokenizer: Any, launch: Launch, *, padded: bool
) -> tuple[Any, Callable[..., Any]]:
    """What a batch is made of, rows or packed sequences of them, and what puts it together.

    A padded batch is input_ids, labels, attention_mask: [rows, longest]. Otherwise it is input_ids, labels,
    position_ids, which start at 0 with every row: [1, tokens], of validation rows too; of rows that ranks share this
    rank's part. All come with `BatchMetadata`.
    """
    group = config.sequence_parallel
    flat = collate_flat if group == 1 else partial(collate_share, place=launch.rank % group, size=group)
    if config.packing == "none":
        return rows, partial(collate_padded, pad_token_id=tokenizer.pad_token_id) if padded else flat
    # The packing must not depend on the number of ranks: a checkpoint may be resumed by another.
    packing = pack_rows(lengths_of(rows), config.max_length, seed=int(config.training.get("seed", 42)))
    launch.say(packing.in_words(len(rows)))
    return PackedRows(rows, packing), flat


def single_rows(rows: Any, numbers: Sequence[int]) -> list[int]:
    """Numbers of the rows that the rows or packed sequences with these numbers are made of."""
    packs = rows.packing.packs if isinstance(rows, PackedRows) else None
    return [row for number in numbers for row in (packs[number] if packs else [number])]


class TrainLoader(DataLoader[dict[str, Any]]):
    """A loader that tells its batches the epoch; Trainer asks for it at the start of each."""

    batch_sampler: GlobalBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class Ahead:
    """Batches of a loader, made by a thread while those before them are computed.

    What is read ahead of a stop is lost and read again after the resume: rows are found by their numbers alone.
    """

    def __init__(self, batches: Iterator[Any], depth: int, device: torch.device) -> None:
        """`device`: of what computes them. For a GPU they are pinned, and a thread opens the first one by itself."""
        self.batches = batches
        start = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._thread = ThreadPoolExecutor(1, "read-ahead", *start)
        self._coming = deque(self._read() for _ in range(depth))

    def _read(self) -> Future[Any]:
        return self._thread.submit(next, self.batches, None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        batch = self._coming.popleft().result()
        self._coming.append(self._read())
        if batch is None:
            raise StopIteration
        return batch

    def close(self) -> None:
        """End the thread, and forget what it has read; after the batch that it is at."""
        self._thread.shutdown(cancel_futures=True)
        self._coming.clear()
