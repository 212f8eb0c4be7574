"""Started by test_exchange.py on four ranks: what `measure_exchange` finds where nodes are not what they are.

A rank takes a second more than the one before it, whatever it does; rank 0 prints a line of JSON for each case, behind
what a run would say of its groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from ds_sft.model.sequence import join_group
from ds_sft.ranks import network
from ds_sft.ranks.collectives import end_group
from ds_sft.ranks.launch import Launch

CASES = (([0, 0, 1, 1], 2), ([0, 0, 0, 1], 2), ([0, 0, 1, 1], 4), ([0, 1, 2, 3], 2), ([0, 0, 0, 0], 4))


def seconds(operation: Callable[[], Any], times: int, device: torch.device) -> float:
    operation()
    return float(dist.get_rank() + 1)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for nodes, size in CASES:
        launch = Launch(launcher="torchrun", rank=rank, local_rank=nodes[:rank].count(nodes[rank]), world_size=4)
        with (
            patch.object(network, "_seconds", seconds),
            patch.object(network.socket, "gethostname", lambda: f"node{nodes[rank]}"),  # noqa: B023 - at once
        ):
            join_group(size, launch, timeout_seconds=60)
            found = network.measure_exchange(size, launch, torch.device("cpu"))
        if rank == 0:
            print(json.dumps(asdict(found)))
    end_group()
