"""Which node each rank is on, which groups of ranks that share a row (`sequence_parallel`) span nodes, and whether
nodes share a folder.
"""

from __future__ import annotations

import math
import socket
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch


def nodes_of(places: Sequence[tuple[str, int]]) -> list[int]:
    """The node of each rank, in rank order, numbered as they appear.

    Args:
        places: host name and local rank of each rank. A local rank that a host has twice is of a second node there.
    """
    seen: Counter[tuple[str, int]] = Counter()
    numbers: dict[tuple[str, int], int] = {}
    nodes = []
    for host, local_rank in places:
        nodes.append(numbers.setdefault((host, seen[host, local_rank]), len(numbers)))
        seen[host, local_rank] += 1
    return nodes


def groups_of(ranks: int, size: int) -> list[range]:
    """The ranks of each sequence group: `size` consecutive ones."""
    return [range(first, first + size) for first in range(0, ranks, size)]


def spanning(nodes: Sequence[int], size: int) -> list[range]:
    """The groups that are on several nodes."""
    return [group for group in groups_of(len(nodes), size) if len({nodes[rank] for rank in group}) > 1]


def name_spanning(nodes: Sequence[int], size: int) -> str | None:
    """Which groups of `size` ranks are on several nodes; None where none is."""
    groups = spanning(nodes, size)
    if not groups:
        return None
    first = f"ranks {groups[0][0]}-{groups[0][-1]}"
    if len(groups) == 1:
        return f"1 of {len(nodes) // size} groups of {size} ranks spans nodes ({first})"
    return f"{len(groups)} of {len(nodes) // size} groups of {size} ranks span nodes ({first}, ...)"


def spanning_in_words(nodes: Sequence[int], size: int) -> str | None:
    """Which groups span nodes, what of it, and what to do instead, in one line."""
    named = name_spanning(nodes, size)
    return named and (
        f"sequence_parallel: {size}: {named}, so every layer's attention waits for the network between them; "
        f"{keep_inside(nodes, size)}."
    )


def keep_inside(nodes: Sequence[int], size: int) -> str:
    """What to do so that no group of `size` ranks spans nodes."""
    counts = Counter(nodes).values()
    if all(count % size == 0 for count in counts):
        return "start consecutive ranks on each node"
    common = math.gcd(*counts)
    fitting = [str(number) for number in range(2, common + 1) if common % number == 0]
    instead = f", or write sequence_parallel: {' or '.join(fitting)}" if fitting else ""
    have = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else str(common)
    return f"a node has {have} {'rank' if have == '1' else 'ranks'}: start a multiple of {size} on each{instead}"


def say_spanning(size: int, launch: Launch) -> None:
    """Say which groups of `size` ranks span nodes; all ranks must call it."""
    remark = spanning_in_words(nodes_of(gather((socket.gethostname(), launch.local_rank))), size)
    if remark is not None:
        launch.say(remark)


LOOK_SECONDS = 10.0  # network file systems show a new file to other nodes late


def is_shared(folder: Path, launch: Launch) -> bool:
    """Rank 0 writes a file; do all nodes see it? All ranks must call it."""
    name = gather(f".probe-{uuid.uuid4().hex}")[0]
    if launch.is_main:
        (folder / name).touch()
    gather(None)  # it is there
    deadline = time.monotonic() + LOOK_SECONDS
    while not (seen := name in {path.name for path in folder.glob(".probe-*")}) and time.monotonic() < deadline:
        time.sleep(0.2)
    everywhere = all(gather(seen))
    if launch.is_main:
        (folder / name).unlink()
    return everywhere
