"""What a rank is given in each micro batch, padded or end to end: `micro_batches.py` says which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_sft.config import Config
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.data.micro_batches import Batching, lengths_of
from ds_sft.data.packing import PackedRows, collate_flat, plan_packs
from ds_sft.runtime.distributed import Launch

NOTHING = -1  # the row of a rank for which the end of an epoch has none left


class GlobalBatches(Sampler[list[int]]):
    """The micro batches of one rank, as lists of row numbers; `[NOTHING]` where an epoch has none left for it."""

    def __init__(self, batching: Batching, rank: int) -> None:
        self.batching, self.rank, self.number = batching, rank, 0

    def set_epoch(self, epoch: int) -> None:
        self.number = epoch

    def __len__(self) -> int:
        return len(self.batching.epoch(self.number).computed) // self.batching.ranks

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.batching.epoch(self.number)
        for number in range(self.rank, len(epoch.computed), self.batching.ranks):
            yield epoch.micro_batch(number) or [NOTHING]


class Rows(Dataset[dict[str, list[int]]]):
    """The rows of a data set, and under `NOTHING` one that counts nothing."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if index != NOTHING:
            return dict(self.rows[index])
        return {"input_ids": [0], "labels": [IGNORE_INDEX]}


def make_batches(
    rows: Any, config: Config, tokenizer: Any, launch: Launch, *, padded: bool
) -> tuple[Any, Callable[..., Any]]:
    """What a batch is made of, rows or packed sequences of them, and what puts it together.

    A padded batch is input_ids, labels, attention_mask: [rows, longest]. Otherwise it is input_ids, labels,
    position_ids, which start at 0 with every row: [1, tokens], of validation rows too.
    """
    from transformers import DataCollatorForSeq2Seq

    if config.packing == "none":
        return rows, DataCollatorForSeq2Seq(tokenizer) if padded else collate_flat
    # The plan must not depend on the number of ranks: a checkpoint may be resumed by another.
    plan = plan_packs(lengths_of(rows), config.max_length, seed=int(config.training.get("seed", 42)))
    launch.say(plan.describe(len(rows)))
    return PackedRows(rows, plan), collate_flat


def single_rows(rows: Any, numbers: Sequence[int]) -> list[int]:
    """Numbers of the rows that the rows or packed sequences with these numbers are made of."""
    packs = rows.plan.packs if isinstance(rows, PackedRows) else None
    return [row for number in numbers for row in (packs[number] if packs else [number])]


class TrainLoader(DataLoader[dict[str, list[int]]]):
    """A loader that tells its batches the epoch; Trainer asks for it at the start of each."""

    batch_sampler: GlobalBatches

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


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
