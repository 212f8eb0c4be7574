"""Which rows a rank learns from in which micro batch: the same rows in every step, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, Sampler

from ds_sft.config import Config
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.runtime.distributed import Launch

NOTHING = -1  # the row of a rank for which the end of an epoch has none left


class GlobalBatches(Sampler[list[int]]):
    """The micro batches of one rank, as lists of row numbers.

    An epoch is one permutation of the rows, which depends on seed and epoch alone (with `lengths` one in which rows of
    similar length follow each other, on the rows of a step too). Step s learns from its rows
    [s x R, (s + 1) x R), R = micro batch x accumulation x ranks; within them micro batches go to the ranks in turn. So
    another number of ranks with the same R learns from the same rows in every step. At the end of an epoch no row comes
    twice: a rank without one gets `NOTHING`, because all ranks must run the same number of forward passes.
    """

    def __init__(
        self,
        num_rows: int,
        *,
        micro_batch: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        drop_last: bool = False,
        lengths: Sequence[int] | None = None,
    ) -> None:
        self.rows_a_step, self.lengths = micro_batch * accumulation * world_size, lengths
        self.num_rows, self.num_used = num_rows, rows_used(num_rows, self.rows_a_step, drop_last=drop_last)
        self.micro_batch, self.rank, self.world_size = micro_batch, rank, world_size
        self.seed, self.shuffle, self.epoch = seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_used // (self.micro_batch * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        for batch in range(len(self)):
            start = (batch * self.world_size + self.rank) * self.micro_batch
            yield order[start : min(start + self.micro_batch, self.num_used)].tolist() or [NOTHING]

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.num_rows)
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.lengths is None:
            return torch.randperm(self.num_rows, generator=generator)
        from transformers.trainer_pt_utils import get_length_grouped_indices

        return torch.tensor(get_length_grouped_indices(self.lengths, self.rows_a_step, generator=generator))


def rows_used(num_rows: int, rows_a_step: int, *, drop_last: bool) -> int:
    """The rows that an epoch learns from."""
    whole = num_rows - num_rows % rows_a_step
    return whole if drop_last and whole else num_rows


def lengths_of(rows: Any) -> list[int]:
    """Tokens of each row, of a data set or of packed sequences."""
    if hasattr(rows, "with_format"):
        lengths: list[int] = pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_pylist()
        return lengths
    return [len(rows[n]["input_ids"]) for n in range(len(rows))]


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


def make_batches(rows: Any, config: Config, tokenizer: Any, launch: Launch) -> tuple[Any, Callable[..., Any]]:
    """What a batch is made of, rows or packed sequences of them, and what puts it together."""
    from transformers import DataCollatorForSeq2Seq

    from ds_sft.data.packing import PackedRows, collate_flat, plan_packs

    if config.packing == "none":
        return rows, DataCollatorForSeq2Seq(tokenizer)
    lengths = pc.list_value_length(rows.with_format("arrow")["input_ids"][:]).to_numpy(zero_copy_only=False)
    # The plan must not depend on the number of ranks: a checkpoint may be resumed by another.
    plan = plan_packs(lengths, config.max_length, seed=int(config.training.get("seed", 42)))
    launch.say(plan.describe(len(rows)))
    return PackedRows(rows, plan), collate_flat


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
