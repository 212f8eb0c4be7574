"""Which ranks share a node, and what is said of groups that do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_sft.ranks.nodes import groups_of, nodes_of, spanning, spanning_in_words


@pytest.mark.parametrize(
    ("places", "nodes"),
    [
        ([("a", 0)], [0]),
        ([("a", 0), ("a", 1), ("b", 0), ("b", 1)], [0, 0, 1, 1]),
        ([("b", 0), ("b", 1), ("b", 2), ("a", 0)], [0, 0, 0, 1]),  # unlike numbers of ranks
        ([("a", 0), ("b", 0), ("a", 1), ("b", 1)], [0, 1, 0, 1]),  # dealt out in turn
        ([("a", 0), ("a", 1), ("a", 0), ("a", 1)], [0, 0, 1, 1]),  # two launchers on one host
    ],
)
def test_the_node_of_each_rank(places: list[tuple[str, int]], nodes: list[int]) -> None:
    assert nodes_of(places) == nodes


WAITS = "so every layer's attention waits for the network between them; "


@pytest.mark.parametrize(
    ("nodes", "size", "said"),
    [
        ([0, 0, 1, 1], 1, None),
        ([0, 0, 1, 1], 2, None),
        ([0] * 8 + [1] * 8, 8, None),
        ([0] * 4 + [1] * 2, 2, None),
        (
            [0, 0, 0, 1, 1, 1],
            2,
            f"1 of 3 groups of 2 ranks spans nodes (ranks 2-3), {WAITS}"
            "a node has 3 ranks: start a multiple of 2 on each, or write sequence_parallel: 3.",
        ),
        (
            [0] * 4 + [1] * 4,
            8,
            f"1 of 1 groups of 8 ranks spans nodes (ranks 0-7), {WAITS}"
            "a node has 4 ranks: start a multiple of 8 on each, or write sequence_parallel: 2 or 4.",
        ),
        (
            [0, 1, 2, 3],
            2,
            f"2 of 2 groups of 2 ranks span nodes (ranks 0-1, ...), {WAITS}"
            "a node has 1 rank: start a multiple of 2 on each.",
        ),
        (
            [0, 0, 0, 1],
            2,
            f"1 of 2 groups of 2 ranks spans nodes (ranks 2-3), {WAITS}"
            "a node has 1 to 3 ranks: start a multiple of 2 on each.",
        ),
        (
            [0, 1, 0, 1],
            2,
            f"2 of 2 groups of 2 ranks span nodes (ranks 0-1, ...), {WAITS}start consecutive ranks on each node.",
        ),
    ],
)
def test_what_is_said_of_groups(nodes: list[int], size: int, said: str | None) -> None:
    assert spanning_in_words(nodes, size) == (said and f"sequence_parallel: {size}: {said}")


@given(counts=st.lists(st.integers(1, 9), min_size=1, max_size=5), size=st.integers(1, 8))
def test_what_is_advised_keeps_groups_inside(counts: list[int], size: int) -> None:
    """Of every shape of cluster, and nothing is advised where none spans."""
    nodes = [node for node, count in enumerate(counts) for _ in range(count)]
    nodes = nodes[: len(nodes) // size * size]
    said = spanning_in_words(nodes, size)
    assert (said is None) == all(len({nodes[rank] for rank in group}) == 1 for group in groups_of(len(nodes), size))
    advised = (said or "").partition("or write sequence_parallel: ")[2].rstrip(".")
    assert [number for number in advised.split(" or ") if number and spanning(nodes, int(number))] == []
