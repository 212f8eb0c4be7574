"""Micro batches: the same rows in every step whatever the number of ranks, none twice, none left out, dealt evenly."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_sft.data.loader import NOTHING, GlobalBatches, RowsOrNothing, TrainLoader
from ds_sft.data.micro_batches import Batching, Seam
from ds_sft.data.packing import PackedRows, Packing
from ds_sft.data.rows import fingerprint, lengths_of
from ds_sft.errors import UserError
from ds_sft.training.validation import RankRows


def make(lengths: Any, **changes: Any) -> Batching:
    options = {"micro_batch": 2, "accumulation": 2, "ranks": 2, "padded": False, "seed": 7} | changes
    return Batching(lengths=np.array(lengths, np.int64), **options)


def batches(num_rows: int, ranks: int, micro: int, accumulation: int, **changes: Any) -> list[GlobalBatches]:
    """Of every rank, for rows of many lengths."""
    lengths = changes.pop("lengths", [n * 5 % 13 + 1 for n in range(num_rows)])
    batching = make(lengths, micro_batch=micro, accumulation=accumulation, ranks=ranks, **changes)
    return [GlobalBatches(batching, rank) for rank in range(ranks)]


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


def of_ranks(batching: Batching, epoch: int = 0) -> list[list[list[int]]]:
    """The micro batches of every rank."""
    found = [GlobalBatches(batching, rank) for rank in range(batching.ranks)]
    for sampler in found:
        sampler.set_epoch(epoch)
    return [list(sampler) for sampler in found]


@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 29, 64])
def test_the_same_steps_on_any_number_of_ranks(num_rows: int) -> None:
    expected = steps(batches(num_rows, 1, 1, 8), 8)
    assert sorted(chain(*expected)) == list(range(num_rows))
    for ranks, micro, accumulation in ((1, 8, 1), (2, 2, 2), (2, 1, 4), (4, 1, 2), (4, 2, 1), (8, 1, 1)):
        assert steps(batches(num_rows, ranks, micro, accumulation), accumulation) == expected


def test_order() -> None:
    """The rows of a step are those of torch's permutation; within it the longest micro batch comes first."""
    ranks = of_ranks(make([3, 9, 1, 7, 5], micro_batch=1, order="sequential"))
    assert ranks == [[[1], [2], [4]], [[3], [0], [NOTHING]]]  # 9 | 7, then back: 1 | 3, and the last step
    shuffled = torch.randperm(29, generator=torch.Generator().manual_seed(7 + 3)).tolist()
    (alone,) = batches(29, 1, 29, 1)
    alone.set_epoch(3)
    assert list(alone) == [shuffled]
    assert steps(batches(29, 2, 2, 2), 2, epoch=0) != steps(batches(29, 2, 2, 2), 2, epoch=1)


def test_rows_end_to_end_are_dealt_into_even_micro_batches() -> None:
    """Eight rows, 64 tokens, four micro batches: longest first, each into the emptiest."""
    batching = make([1, 20, 8, 5, 9, 10, 4, 7], order="sequential")
    assert of_ranks(batching) == [[[1], [3, 4]], [[0, 5, 6], [2, 7]]]  # 20 | 1 + 10 + 4, then 5 + 9 | 8 + 7
    assert batching.epoch(0).computed.tolist() == [20, 15, 14, 15]
    assert batching.epoch(0).padding == 0


def test_attention_counts_with_the_square_of_the_length() -> None:
    """At 0.2 a pair 20 tokens cost 100 and 10 cost 30: the long row stands alone, the others share."""
    by_tokens = make([20, 10, 10, 10, 10], micro_batch=3, accumulation=1, order="sequential")
    by_cost = replace(by_tokens, attention=0.2)
    assert of_ranks(by_tokens) == [[[0, 3]], [[1, 2, 4]]]
    assert of_ranks(by_cost) == [[[1, 2, 3, 4]], [[0]]]
    assert by_cost.epoch(0).cost.tolist() == [120, 100]
    assert by_cost.epoch(0).computed.tolist() == [40, 20]
    crowded = replace(by_cost, max_tokens=35)
    assert crowded.epoch(0).computed.tolist() == [30, 30]  # there is no room for the fourth


def test_padded_rows_stand_beside_rows_of_their_length() -> None:
    batching = make([1, 20, 8, 5, 9, 10, 4, 7], order="sequential", padded=True)
    assert of_ranks(batching) == [[[1, 5], [0, 6]], [[2, 4], [3, 7]]]
    epoch = batching.epoch(0)
    assert epoch.computed.tolist() == [2 * 20, 2 * 9, 2 * 4, 2 * 7]
    assert epoch.padding == pytest.approx(1 - 64 / 80)
    assert epoch.waiting(each_micro_batch=True) == (pytest.approx(14), pytest.approx(1 - 80 / (80 + 28)))
    assert epoch.waiting(each_micro_batch=False) == (pytest.approx(16), pytest.approx(1 - 80 / (2 * 48)))
    assert batching.padding_and_waiting(each_micro_batch=False) == (
        "Padding is 20.0% of the tokens computed. Ranks differ by 16 tokens a step; about 16.7% of the time is waiting."
    )
    assert make([1, 2], ranks=1).padding_and_waiting(each_micro_batch=True) == "No padding."


def test_rows_of_similar_length_follow_each_other() -> None:
    """Decided by seed and epoch alone: not by the state of the random numbers, which a resume restores later."""
    lengths = [n % 7 + 1 for n in range(64)]
    options: dict[str, Any] = {"lengths": lengths, "order": "group_by_length"}
    expected = steps(batches(64, 1, 2, 4, **options), 4, epoch=1)
    torch.manual_seed(1)
    assert steps(batches(64, 1, 2, 4, **options), 4, epoch=1) == expected
    assert steps(batches(64, 2, 2, 2, **options), 2, epoch=1) == expected
    assert steps(batches(64, 1, 2, 4, **options), 4, epoch=2) != expected
    assert sorted(chain(*expected)) == list(range(64))
    spread = [max(lengths[row] for row in step) - min(lengths[row] for row in step) for step in expected]
    assert max(spread[1:]) <= 4  # the first step has the longest row in it


# ---- A number of tokens


def test_literal_bins() -> None:
    """At most 10 tokens: 5 + 4 + 1 fill a micro batch; in the order of the rows 1, 9 | 5, 4 | 8 | 7."""
    lengths = [1, 9, 5, 4, 8, 7]
    batching = make(lengths, micro_batch=None, max_tokens=10, accumulation=1)
    assert batching.num_bins == 4
    found = sorted(sorted(rows) for rank in of_ranks(batching) for rows in rank)
    assert found == [[0, 2, 3], [1], [4], [5]]
    assert of_ranks(batching, epoch=1) != of_ranks(batching, epoch=2)
    in_order = make(lengths, micro_batch=None, max_tokens=10, accumulation=1, order="sequential")
    assert of_ranks(in_order) == [[[0, 1], [5]], [[2, 3], [4]]]
    padded = make(lengths, micro_batch=None, max_tokens=10, accumulation=1, padded=True)
    found = sorted(sorted(rows) for rank in of_ranks(padded) for rows in rank)
    assert found == [[NOTHING], [0], [1], [2, 3], [4], [5]]  # 2 x 5 tokens are the budget; 2 x 9 are above it


def test_a_row_or_a_batch_above_the_budget_is_said_with_the_numbers_that_work() -> None:
    filled = make([5, 30], micro_batch=None, max_tokens=20)
    with pytest.raises(
        UserError, match=r"max_tokens_per_batch: 20: the longest row \(f:2\) has 30 tokens: write 30 or"
    ):
        filled.check(1, lambda row: f"f:{row + 1}")
    rows = make([9, 9, 9, 9, 9, 9, 1, 1, 1], micro_batch=3, accumulation=1, ranks=3, max_tokens=18)
    with pytest.raises(
        UserError,
        match=r"18: 9 rows a step put 19 tokens into a micro batch; write 19 or more, or per_device_train_batch_size: "
        r"1 with gradient_accumulation_steps: 3, or leave per_device_train_batch_size out",
    ):
        rows.check(2)
    replace(rows, max_tokens=19).check(2)
    replace(rows, micro_batch=1, accumulation=3).check(2)
    replace(rows, max_tokens=None).check(2)


LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=60)
SPLITS = ((1, 8), (2, 4), (4, 2), (8, 1))  # ranks x accumulation: eight micro batches a step


@settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS, st.booleans(), st.booleans(), st.sampled_from(["random", "sequential", "group_by_length"]),
       st.integers(0, 3), st.sampled_from([0.0, 0.01, 1.0]))  # fmt: skip
def test_a_number_of_rows(
    lengths: list[int], padded: bool, drop_last: bool, order: str, epoch: int, attention: float
) -> None:
    """On any split of 16 rows a step: the same rows in it, each once, and no micro batch above two of the longest."""
    options: dict[str, Any] = {"padded": padded, "drop_last": drop_last, "order": order, "attention": attention}
    expected = None
    for ranks, accumulation in SPLITS:
        batching = make(lengths, ranks=ranks, accumulation=accumulation, **options)
        found = steps([GlobalBatches(batching, rank) for rank in range(ranks)], accumulation, epoch)
        expected = expected or found
        assert found == expected
        plan = batching.epoch(epoch)
        assert plan.computed.max() <= 2 * max(lengths)
        assert [plan.samples(step) for step in range(len(found) + 1)] == [0, *np.cumsum([len(rows) for rows in found])]
        learned = sorted(chain(*found))
        assert len(learned) == len(set(learned)) == batching.samples(1, 0)
        if not drop_last:
            assert learned == list(range(len(lengths)))
        twin = make(lengths, ranks=ranks, accumulation=accumulation, **options)
        assert of_ranks(twin, epoch) == of_ranks(batching, epoch)


@settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS, st.booleans(), st.booleans(), st.sampled_from(["random", "sequential"]), st.integers(60, 200))
def test_a_number_of_tokens(lengths: list[int], padded: bool, drop_last: bool, order: str, max_tokens: int) -> None:
    """On any split of 8 micro batches a step: the same rows in it, each once, and no micro batch above the budget."""
    options: dict[str, Any] = {"padded": padded, "drop_last": drop_last, "order": order, "max_tokens": max_tokens}
    for epoch in range(3):
        expected = None
        for ranks, accumulation in SPLITS:
            batching = make(lengths, micro_batch=None, ranks=ranks, accumulation=accumulation, **options)
            found = steps([GlobalBatches(batching, rank) for rank in range(ranks)], accumulation, epoch)
            expected = expected or found
            assert found == expected
            assert len(batching._bins(epoch)) == batching.num_bins  # so every epoch has as many steps
            assert len(found) == len(steps([GlobalBatches(batching, rank) for rank in range(ranks)], accumulation, 0))
            plan = batching.epoch(epoch)
            assert plan.computed.max() <= max_tokens
            learned = sorted(chain(*found))
            assert len(learned) == len(set(learned)) == len(plan.rows) == plan.samples(len(found))
            if not drop_last:
                assert learned == list(range(len(lengths)))
                assert batching.samples(epoch, len(found)) == (epoch + 1) * len(lengths)


LAYOUTS = [(1, 1, 1), (1, 4, 1), (2, 1, 2), (1, 3, 2), (3, 1, 1), (2, 2, 4)]  # micro batch, accumulation, ranks


@settings(deadline=None, max_examples=300, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(LENGTHS, st.booleans(), st.sampled_from(["random", "sequential"]),
       st.lists(st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 9)), min_size=1, max_size=5))  # fmt: skip
def test_each_row_once_an_epoch_whatever_size_steps_have(
    lengths: list[int], padded: bool, order: str, starts: list[tuple[tuple[int, int, int], int]]
) -> None:
    """Each start makes so many steps in its own size, resuming where the one before it stopped."""
    seam, step = Seam(), 0
    epochs: dict[int, list[int]] = {}
    for (micro, accumulation, ranks), number in [*starts, ((1, 1, 1), 3 * len(lengths))]:
        batching = make(lengths, micro_batch=micro, accumulation=accumulation, ranks=ranks, padded=padded, order=order,
                        seam=seam)  # fmt: skip
        for _ in range(number):
            epoch, done = batching.position(step)
            found = steps([GlobalBatches(batching, rank) for rank in range(ranks)], accumulation, epoch)
            assert len(found) == batching.steps_of(epoch)
            epochs.setdefault(epoch, []).extend(found[done])
            step += 1
        seam = batching.seam_at(step)
        assert seam.samples == sum(len(rows) for rows in epochs.values())
        assert batching.steps(seam.epoch) <= step < batching.steps(seam.epoch + 1)
    last = epochs.pop(max(epochs))
    assert all(sorted(rows) == list(range(len(lengths))) for rows in epochs.values())
    assert len(last) == len(set(last))
    assert len(epochs) >= 2


@pytest.mark.parametrize(
    ("epochs", "seam", "expected"),
    [
        (2, {}, 8),  # 13 rows, 4 a step
        (2.5, {}, 10),
        (2, {"step": 1, "rows": 6}, 1 + 2 + 4),  # one step of six rows, seven rows in steps of four
        (2.5, {"step": 1, "rows": 6}, 1 + 2 + 4 + 2),
        (1, {"step": 1, "rows": 6}, 3),
        (2, {"epoch": 1, "first_step": 3, "step": 3}, 3 + 4),
        (1, {"epoch": 1, "first_step": 3, "step": 3}, 3),  # nothing is left
    ],
)
def test_steps_of_a_run_with_a_seam(epochs: float, seam: dict[str, int], expected: int) -> None:
    assert make([5] * 13, micro_batch=1, seam=Seam(**seam)).steps(epochs) == expected


def test_lengths() -> None:
    rows = {"input_ids": [[1, 2], [3], [4, 5, 6]], "labels": [[1, 2], [3], [4, 5, 6]]}
    data = Dataset.from_dict(rows)
    assert lengths_of(data).tolist() == [2, 1, 3]
    assert lengths_of(data.select([2, 0])).tolist() == [3, 2]
    assert lengths_of(PackedRows(data, Packing([[0, 2], [1]], 6, 8))).tolist() == [5, 1]


def test_drop_last_leaves_out_the_incomplete_step() -> None:
    assert [len(step) for step in steps(batches(29, 2, 2, 2, drop_last=True), 2)] == [8, 8, 8]
    assert [len(step) for step in steps(batches(5, 2, 2, 2, drop_last=True), 2)] == [5]


def test_skipping_reads_nothing_that_is_skipped() -> None:
    read: list[int] = []

    class Counting(RowsOrNothing):
        def __getitem__(self, index: int) -> dict[str, list[int]]:
            read.append(index)
            return super().__getitem__(index)

    rows = [{"input_ids": [n], "labels": [n]} for n in range(40)]
    (sampler,) = batches(40, 1, 2, 4, order="sequential", lengths=[1] * 40)
    loader = TrainLoader(Counting(rows), batch_sampler=sampler, collate_fn=list)
    assert [len(batch) for batch in skip_first_batches(loader, 17)] == [2, 2, 2]
    assert read == [33, 37, 34, 38, 35, 39]


def test_a_row_that_is_nothing_teaches_nothing() -> None:
    rows = RowsOrNothing([{"input_ids": [5], "labels": [5]}])
    assert (rows[0], rows[NOTHING]) == ({"input_ids": [5], "labels": [5]}, {"input_ids": [0], "labels": [-100]})


def test_validation_rows_are_dealt_by_length() -> None:
    """Every row to one rank; what the ranks have at a time is as long as can be; the end of a set counts nothing."""
    lengths = np.random.default_rng(0).integers(2, 500, 101)
    rows = Dataset.from_dict(
        {name: [[i] * n for i, n in enumerate(lengths.tolist())] for name in ("input_ids", "labels")}
    )
    ranks = [RankRows(rows, rank, 4) for rank in range(4)]
    assert {len(rank) for rank in ranks} == {26}
    dealt = [[rank[i] for i in range(26)] for rank in ranks]
    counted = [[row["input_ids"][0] for row in of_rank if row["labels"][0] != -100] for of_rank in dealt]
    assert sorted(chain(*counted)) == list(range(101))
    assert [len(of_rank) for of_rank in counted] == [26, 25, 25, 25]
    tokens = [sum(len(row["input_ids"]) for row in of_rank) for of_rank in dealt]
    assert max(tokens) - min(tokens) <= lengths.max()  # in the order of the file: 1,159
    last = [of_rank[-1] for of_rank in dealt]
    assert [len(row["input_ids"]) for row in last] == [lengths.min()] * 4


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
