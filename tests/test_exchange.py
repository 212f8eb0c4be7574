"""What ranks that share rows exchange: as it is counted, and as it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_sft.data.batch import collate_share
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.loss import supervise
from ds_sft.model.sequence import SequenceGroup
from ds_sft.plan.cost import exchanged
from ds_sft.plan.shape import shape_of
from tests.distributed.harness import run_forked, script
from tests.test_attention import learn, make, make_rows

MIB = 2**20


class Counting(SequenceGroup):
    """A group of which only this rank is there."""

    sent = 0.0  # bytes to other ranks

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        self.sent += parts.nbytes * (self.size - 1) / self.size
        return parts.clone()


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(
    ("heads", "key_heads", "size"),
    [(4, 2, 2), (4, 1, 4), (4, 4, 4), (12, 6, 4)],  # key heads: a multiple of the ranks, fewer, as many, no divisor
)
def test_bytes_are_those_that_the_plan_counts(heads: int, key_heads: int, size: int, again: bool) -> None:
    changes: dict[str, Any] = {"num_attention_heads": heads, "num_key_value_heads": key_heads}
    if heads == 12:
        changes |= {"hidden_size": 48, "head_dim": 4}
    group = Counting(size, None)
    model = make("qwen3", torch.float32, **changes)
    keep_rows_apart(model, group=group)
    supervise(model)
    if again:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = collate_share(make_rows(), place=0, size=size)
    learn(model, [batch])
    tokens = batch["input_ids"].numel() * size
    assert group.sent == exchanged(shape_of(model.config.to_dict(), "it"), tokens, size, 4, again=again)


@pytest.mark.distributed
def test_groups_inside_nodes_and_between_them(tmp_path: Path) -> None:
    """Of 8 MiB that a rank has, it sends a half in a group of two, three quarters in one of four. The slowest rank of
    the slowest group counts; rank n takes n + 1 seconds."""
    done = run_forked([script("exchanged")], 4, cwd=tmp_path)
    assert done.code == 0, done.output
    two, four = 4 * MIB, 6 * MIB
    lines = [line for line in done.output.splitlines() if not line.startswith("[W")]
    assert [line.partition(", so ")[0] for line in lines if not line.startswith("{")] == [
        "sequence_parallel: 2: 1 of 2 groups of 2 ranks spans nodes (ranks 2-3)",
        "sequence_parallel: 4: 1 of 1 groups of 4 ranks spans nodes (ranks 0-3)",
        "sequence_parallel: 2: 2 of 2 groups of 2 ranks span nodes (ranks 0-1, ...)",
    ]
    assert [json.loads(line) for line in lines if line.startswith("{")] == [
        {"nodes": [0, 0, 1, 1], "size": 2, "latency": 4, "inside": two / 4, "between": None},
        {"nodes": [0, 0, 0, 1], "size": 2, "latency": 4, "inside": two / 2, "between": two / 4},
        # None is inside: what the ranks of a node would have without the others.
        {"nodes": [0, 0, 1, 1], "size": 4, "latency": 4, "inside": two / 4, "between": four / 4},
        {"nodes": [0, 1, 2, 3], "size": 2, "latency": 4, "inside": None, "between": two / 4},
        {"nodes": [0, 0, 0, 0], "size": 4, "latency": 4, "inside": four / 4, "between": None},
    ]
