"""Rows of a step: a permutation of the epoch, the same whatever the number of ranks, none twice, none left out."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset

from ds_sft.data.batches import NOTHING, GlobalBatches, Rows, TrainLoader, fingerprint, lengths_of
from ds_sft.data.packing import PackedRows, Plan


def batches(num_rows: int, ranks: int, micro: int, accumulation: int, **changes: Any) -> list[GlobalBatches]:
    options = {"micro_batch": micro, "accumulation": accumulation, "seed": 7, "shuffle": True} | changes
    return [GlobalBatches(num_rows, rank=rank, world_size=ranks, **options) for rank in range(ranks)]


def steps(of_ranks: list[GlobalBatches], accumulation: int, epoch: int = 0) -> list[list[int]]:
    """The rows of every step, sorted."""
    lists = []
    for sampler in of_ranks:
        sampler.set_epoch(epoch)
        lists.append(list(sampler))
        assert len(lists[-1]) == len(sampler)
    assert len({len(one) for one in lists}) == 1  # ZeRO-3 hangs otherwise
    rows = [[row for rank in lists for row in rank[n] if row != NOTHING] for n in range(len(lists[0]))]
    return [sorted(chain(*rows[n : n + accumulation])) for n in range(0, len(rows), accumulation)]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 29, 64])
def test_the_same_steps_on_any_number_of_ranks(num_rows: int) -> None:
    expected = steps(batches(num_rows, 1, 1, 8), 8)
    assert sorted(chain(*expected)) == list(range(num_rows))
    for ranks, micro, accumulation in ((1, 8, 1), (2, 2, 2), (2, 1, 4), (4, 1, 2), (4, 2, 1), (8, 1, 1)):
        assert steps(batches(num_rows, ranks, micro, accumulation), accumulation) == expected


def test_order() -> None:
    assert list(batches(5, 2, 1, 2, shuffle=False)[1]) == [[1], [3], [NOTHING]]
    shuffled = torch.randperm(29, generator=torch.Generator().manual_seed(7 + 3)).tolist()
    (alone,) = batches(29, 1, 29, 1)
    alone.set_epoch(3)
    assert list(alone) == [shuffled]
    assert steps(batches(29, 2, 2, 2), 2, epoch=0) != steps(batches(29, 2, 2, 2), 2, epoch=1)


def test_rows_of_similar_length_follow_each_other() -> None:
    """Decided by seed and epoch alone: not by the state of the random numbers, which a resume restores later."""
    lengths = [n % 7 + 1 for n in range(64)]
    expected = steps(batches(64, 1, 2, 4, lengths=lengths), 4, epoch=1)
    torch.manual_seed(1)
    assert steps(batches(64, 1, 2, 4, lengths=lengths), 4, epoch=1) == expected
    assert steps(batches(64, 2, 2, 2, lengths=lengths), 2, epoch=1) == expected
    assert steps(batches(64, 1, 2, 4, lengths=lengths), 4, epoch=2) != expected
    assert sorted(chain(*expected)) == list(range(64))
    spread = [max(lengths[row] for row in step) - min(lengths[row] for row in step) for step in expected]
    assert max(spread[1:]) <= 4  # the first step has the longest row in it


def test_lengths() -> None:
    rows = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[1, 2], [3], [4, 5, 6]]}
    data = Dataset.from_dict(rows)
    assert lengths_of(data) == [2, 1, 3]
    assert lengths_of(data.select([2, 0])) == [3, 2]
    assert lengths_of(PackedRows(data, Plan([[0, 2], [1]], 6, 8))) == [5, 1]


def test_drop_last_leaves_out_the_incomplete_step() -> None:
    assert [len(step) for step in steps(batches(29, 2, 2, 2, drop_last=True), 2)] == [8, 8, 8]
    assert [len(step) for step in steps(batches(5, 2, 2, 2, drop_last=True), 2)] == [5]


def test_skipping_reads_nothing_that_is_skipped() -> None:
    read: list[int] = []

    class Counting(Rows):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            read.append(index)
            return super().__getitem__(index)

    rows = [{"input_ids": [n], "labels": [n]} for n in range(40)]
    (sampler,) = batches(40, 1, 2, 4, shuffle=False)
    loader = TrainLoader(Counting(rows), batch_sampler=sampler, collate_fn=list)
    assert [len(batch) for batch in skip_first_batches(loader, 17)] == [2, 2, 2]
    assert read == [34, 35, 36, 37, 38, 39]


def test_a_row_that_is_nothing_teaches_nothing() -> None:
    rows = Rows([{"input_ids": [5], "labels": [5]}])
    assert (rows[0], rows[NOTHING]) == ({"input_ids": [5], "labels": [5]}, {"input_ids": [0], "labels": [-100]})


def test_fingerprint_sees_values_order_and_borders_but_not_storage() -> None:
    rows = [[1, 2], [3], [4, 5, 6]]

    def make(ids: list[list[int]]) -> Dataset:
        return Dataset.from_dict({"input_ids": ids, "labels": ids})

    known = fingerprint(make(rows))
    from datasets import concatenate_datasets

    assert fingerprint(concatenate_datasets([make(rows[:1]), make(rows[1:])])) == known
    changed = [[[1], [2, 3], [4, 5, 6]], rows[::-1], [[1, 2], [3], [4, 5, 7]]]
    others = [*map(make, changed), make(rows).select([0, 2, 1])]
    assert len({known, *map(fingerprint, others)}) == 5
