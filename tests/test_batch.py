"""A batch, and what it says of itself: as read from it afterwards, by a reference that reads."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from ds_sft.data.batch import METADATA, BatchMetadata, collate_flat, collate_padded, collate_share
from ds_sft.data.loader import NOTHING, RowsOrNothing
from ds_sft.data.packing import PackedRows, Packing
from ds_sft.data.rows import ArrowRows
from ds_sft.model.attention import lengths_of_rows
from ds_sft.model.loss import supervised_positions

ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [7, -100, 8, 9, -100]},
    {"input_ids": [6, 7], "labels": [-100, 5]},
]


def facts(metadata: BatchMetadata) -> dict[str, Any]:
    starts = None if metadata.starts is None else metadata.starts.tolist()
    return {"lengths": metadata.lengths, "starts": starts, "positions": metadata.positions.tolist(),
            "targets": metadata.targets.tolist(), "tokens": metadata.tokens, "places": metadata.places,
            "supervised": metadata.supervised, "pairs": metadata.pairs}  # fmt: skip


def read(batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The same, read from the batch."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    positions, targets = supervised_positions(labels)
    lengths = lengths_of_rows(batch["position_ids"]) if mask is None else mask.sum(-1).tolist()
    starts = torch.tensor([0, *lengths]).cumsum(0).tolist() if mask is None else None
    return {"lengths": lengths, "starts": starts, "positions": positions.tolist(), "targets": targets.tolist(),
            "tokens": sum(lengths), "places": labels.numel(), "supervised": int((labels[:, 1:] != -100).sum()),
            "pairs": sum(n * (n + 1) // 2 for n in lengths)}  # fmt: skip


def dataset(rows: list[dict[str, list[int]]]) -> Dataset:
    return Dataset.from_list(rows)


def test_rows_end_to_end() -> None:
    """The first label of a row is predicted by nothing; rows of 5 and 2 tokens see 15 and 3 pairs."""
    batch = collate_flat(ROWS)
    assert {name: batch[name].tolist() for name in ("input_ids", "labels", "position_ids")} == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7]],
        "labels": [[-100, -100, 8, 9, -100, -100, 5]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1]],
    }
    assert facts(batch[METADATA]) == {
        "lengths": [5, 2], "starts": [0, 5, 7], "positions": [1, 2, 5], "targets": [8, 9, 5],
        "tokens": 7, "places": 7, "supervised": 3, "pairs": 18,
    }  # fmt: skip
    assert batch[METADATA].starts.dtype == torch.int32


def test_padded_rows(tokenizer: Any) -> None:
    """As transformers' collator has them."""
    batch = collate_padded(ROWS, pad_token_id=tokenizer.pad_token_id)
    assert facts(batch.pop(METADATA)) == {
        "lengths": [5, 2], "starts": None, "positions": [1, 2, 5], "targets": [8, 9, 5],
        "tokens": 7, "places": 10, "supervised": 3, "pairs": 18,
    }  # fmt: skip
    known = DataCollatorForSeq2Seq(tokenizer)([dict(row) for row in ROWS])
    assert known.keys() == batch.keys()
    for name, expected in known.items():
        assert torch.equal(batch[name], expected)
        assert batch[name].dtype == expected.dtype


def test_parts_of_a_sequence() -> None:
    """Of 7 tokens for 2 ranks 8: the second row is longer by one. The first part predicts the first of the second."""
    first, second = (collate_share(ROWS, place=place, size=2) for place in (0, 1))
    assert [{name: batch[name].tolist() for name in ("input_ids", "labels", "position_ids")}
            for batch in (first, second)] == [
        {"input_ids": [[1, 2, 3, 4]], "labels": [[-100, -100, 8, 9]], "position_ids": [[0, 1, 2, 3]]},
        {"input_ids": [[5, 6, 7, 0]], "labels": [[-100, -100, 5, -100]], "position_ids": [[4, 0, 1, 1]]},
    ]  # fmt: skip
    assert facts(first[METADATA]) == {
        "lengths": [5, 3], "starts": [0, 5, 8], "positions": [1, 2], "targets": [8, 9],
        "tokens": 4, "places": 4, "supervised": 2, "pairs": 10,
    }  # fmt: skip
    assert facts(second[METADATA]) == {
        "lengths": [5, 3], "starts": [0, 5, 8], "positions": [1], "targets": [5],
        "tokens": 3, "places": 4, "supervised": 1, "pairs": 8,
    }  # fmt: skip
    assert second[METADATA].of_rows().tolist() == [True, True, True, False]


def test_a_part_of_what_stands_in_for_a_missing_row() -> None:
    """One token, which counts for no row, and what fills up the other ranks' parts."""
    parts = [
        collate_share([RowsOrNothing(dataset(ROWS))[NOTHING]], place=place, size=3)[METADATA] for place in range(3)
    ]
    assert [(part.tokens, part.tokens_of_rows, part.supervised, part.places) for part in parts] == [
        (1, 0, 0, 1), (0, 0, 0, 1), (0, 0, 0, 1),
    ]  # fmt: skip
    assert [part.of_rows().tolist() for part in parts] == [[False]] * 3


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=2, max_size=9), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_parts_are_the_whole(rows: list[list[tuple[int, bool]]], size: int) -> None:
    """End to end they are the sequence, and what is counted in them sums to what is in it."""
    lists = [{"input_ids": [i for i, _ in row], "labels": [i if learn else -100 for i, learn in row]} for row in rows]
    whole, parts = collate_flat(lists), [collate_share(lists, place=place, size=size) for place in range(size)]
    length = whole[METADATA].places
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(torch.cat([part[name] for part in parts], 1)[:, :length], whole[name])
    of_parts = [part[METADATA] for part in parts]
    for name in ("tokens", "tokens_of_rows", "supervised", "pairs"):
        assert sum(getattr(metadata, name) for metadata in of_parts) == getattr(whole[METADATA], name)
    assert len({metadata.places for metadata in of_parts}) == 1
    assert torch.cat([metadata.of_rows() for metadata in of_parts]).tolist() == [
        place < length for place in range(size * of_parts[0].places)
    ]
    places = [metadata.positions + number * metadata.places for number, metadata in enumerate(of_parts)]
    assert torch.equal(torch.cat(places), whole[METADATA].positions)
    assert torch.equal(torch.cat([metadata.targets for metadata in of_parts]), whole[METADATA].targets)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9), min_size=1, max_size=9))
def test_what_a_batch_says_is_what_is_in_it(rows: list[list[tuple[int, bool]]]) -> None:
    """Of lists, of views of Arrow's buffers, and of packed sequences of them."""
    lists = [{"input_ids": [i for i, _ in row], "labels": [i if learn else -100 for i, learn in row]} for row in rows]
    views = ArrowRows(dataset(lists))
    packed = PackedRows(views.rows, Packing([list(range(len(rows)))], 0, 0))
    flat = [collate_flat(features) for features in (lists, [views[i] for i in range(len(rows))], [packed[0]])]
    for batch in (*flat, collate_padded(lists, pad_token_id=0)):
        assert facts(batch[METADATA]) == read(batch)
    for batch in flat[1:]:
        assert all(torch.equal(batch[name], flat[0][name]) for name in ("input_ids", "labels", "position_ids"))


def test_views_of_rows_however_they_are_stored() -> None:
    """In one part or three, chosen by numbers, cut out, or for a loader's worker; nothing is copied."""
    rows = [{"input_ids": list(range(n + 1)), "labels": [-100, *range(n)]} for n in range(12)]
    joined = concatenate_datasets([dataset(rows[:3]), dataset(rows[3:4]), dataset(rows[4:])])
    numbers = [11, 0, 3, 3, 7]
    chosen = [rows[n] for n in numbers]
    stored = [(dataset(rows), rows), (joined, rows), (joined.select(numbers), chosen)]
    for data, expected in [*stored, (joined.select(range(2, 9)), rows[2:9])]:
        views = pickle.loads(pickle.dumps(ArrowRows(data)))
        assert len(views) == len(expected)
        found = [{name: ids.tolist() for name, ids in views[n].items()} for n in range(len(views))]
        assert found == expected
    views = ArrowRows(joined)
    assert np.shares_memory(views[11]["input_ids"], views._chunks[2][0][2])


def test_a_layout_goes_through_a_loader_and_moves_as_a_tensor_does() -> None:
    rows = RowsOrNothing(dataset(ROWS))
    loader = DataLoader(rows, batch_sampler=[[0, 1], [NOTHING]], collate_fn=collate_flat, num_workers=1)
    first, last = (batch[METADATA] for batch in loader)
    assert facts(first) == facts(collate_flat(ROWS)[METADATA])
    assert (last.tokens, last.supervised) == (1, 0)
    moved = first.to("meta", non_blocking=True)
    assert {moved.starts.device.type, moved.positions.device.type, moved.targets.device.type} == {"meta"}
    assert (moved.lengths, moved.supervised) == (first.lengths, 3)
    assert collate_padded(ROWS, pad_token_id=0)[METADATA].to("meta").starts is None


def test_a_layout_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By whatever pins the batch that it is in: its three tensors."""
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.numel()) or tensor)
    from torch.utils.data._utils.pin_memory import pin_memory

    found = pin_memory({METADATA: collate_flat(ROWS)[METADATA]})
    assert (pinned, facts(found[METADATA])) == ([3, 3, 3], facts(collate_flat(ROWS)[METADATA]))
