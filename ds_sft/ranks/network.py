"""Do the ranks reach each other, and how fast: before a process group is risked, and then with one."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ds_sft.errors import UserError
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch, rendezvous
from ds_sft.ranks.nodes import groups_of, is_shared, nodes_of, spanning

ROUND_TRIPS, LARGE_TRIPS = 20, 3
CPU_BYTES, GPU_BYTES = 8 << 20, 256 << 20  # of the tensor that measures the bandwidth


def patience() -> float:
    """Seconds that the slowest rank has to start.

    Raises:
        UserError: the variable is no number above 0.
    """
    text = os.environ.get("DS_SFT_CONNECT_SECONDS", "45")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise UserError(f"environment: DS_SFT_CONNECT_SECONDS={text!r}: expected seconds, a number above 0")
    return seconds


class Unreachable(Exception):
    """A rank, or the address of rank 0, does not answer."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """All-to-alls of ranks that share rows, all groups at once: what `sequence_parallel` does around attention.

    Bandwidths are bytes/s that a rank sends to others, (size - 1) / size of its tensor, in the slowest group.
    """

    nodes: list[int]  # of each rank
    size: int  # ranks of a group
    latency: float  # seconds of an all-to-all of single numbers
    inside: float | None  # of a group in one node; where all span nodes of the ranks of a node; None: it has but one
    between: float | None  # of a group that spans nodes; None: none does


@dataclass(frozen=True, kw_only=True)
class Network:
    """What was measured between the ranks."""

    address: str
    port: int
    backend: str
    world_size: int
    latency: float  # seconds of an all-reduce of one number
    bandwidth: float  # bytes/s through a rank: what an all-reduce of a large tensor moves, 2 (n - 1) / n of it
    clock_skew: float  # seconds between the first and the last clock
    shared: bool  # whether all nodes see one output folder
    exchange: Exchange | None = None  # None: each rank has rows of its own


class Ranks:
    """A store that all ranks reach: they can compare notes without a process group."""

    def __init__(self, store: Any, launch: Launch, address: str, port: int) -> None:
        self.store, self.launch, self.address, self.port = store, launch, address, port

    def exchange(self, mine: Any) -> list[Any]:
        """What each rank says, in rank order; on rank 0, for the others their own alone.

        Raises:
            Unreachable: a rank says nothing in time.
        """
        self.store.set(f"facts-{self.launch.rank}", json.dumps(mine))
        if not self.launch.is_main:
            return [mine]
        names = [f"facts-{rank}" for rank in range(self.launch.world_size)]
        seconds = 2 * patience()  # a rank that cannot reach this one says so itself, and before this one does
        deadline = time.monotonic() + seconds
        while absent := [rank for rank, name in enumerate(names) if not self.store.check([name])]:
            if time.monotonic() > deadline:
                few = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
                raise Unreachable(
                    f"no word from rank {few} within {seconds:.0f} s at {self.address}:{self.port}",
                    "its node's log says why, or a firewall, MASTER_ADDR or MASTER_PORT keeps it from this address",
                )
            time.sleep(0.1)
        return [json.loads(self.store.get(name)) for name in names]

    def agree(self, value: bool) -> bool:
        """What rank 0 decides."""
        if self.launch.is_main:
            self.store.set("verdict", str(value))
            if self.launch.world_size == 1:
                return value
            self.store.wait(["heard"], timedelta(seconds=patience()))
            return value
        decided: bool = self.store.get("verdict") == b"True"
        if self.store.add("ears", 1) == self.launch.world_size - 1:
            self.store.set("heard", "1")  # rank 0, which keeps the store, may end now
        return decided


def connect(launch: Launch, purpose: str = "doctor") -> Ranks:
    """Reach rank 0's address and port from every rank; `purpose`: what names in the store begin with.

    Raises:
        Unreachable: this rank cannot.
        UserError: there is no such port.
    """
    import torch.distributed as dist

    meeting = rendezvous()
    address, port = meeting.address, meeting.port
    here = f"rank {launch.rank} on {socket.gethostname()}"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise Unreachable(
            f"{here} cannot resolve {address}: {error.strerror}",
            "every node must know the first node's name (DNS, /etc/hosts), or set MASTER_ADDR to its address",
        ) from None
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=launch.is_main and not meeting.kept_by_launcher,
            timeout=timedelta(seconds=patience()),
            wait_for_workers=False,
        )
    except Exception as error:
        reason = "cannot listen on" if launch.is_main else "cannot reach"
        raise Unreachable(
            f"{here} {reason} {address}:{port}: {' '.join(str(error).split())[:160]}",
            "a firewall between the nodes, another program on that port, or the wrong network card",
        ) from None
    return Ranks(dist.PrefixStore(purpose, store), launch, address, port)  # type: ignore[attr-defined]


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What libraries in C++ write to stdout in the block goes to stderr: torch 2.10's Gloo greets each rank there, in
    front of `doctor --json`, which programs read."""
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def measure_network(ranks: Ranks, output_dir: Path, *, sequence_parallel: int = 1) -> Network:
    """Start a process group and time it; all ranks must call this. Groups must divide the ranks."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(ranks.launch.local_rank)
    with stdout_to_stderr():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=ranks.store,
            rank=ranks.launch.rank,
            world_size=ranks.launch.world_size,
            timeout=timedelta(seconds=patience()),
        )
    try:
        device = torch.device("cuda", ranks.launch.local_rank) if gpu else torch.device("cpu")
        one, many = (torch.ones(count, device=device) for count in (1, (GPU_BYTES if gpu else CPU_BYTES) // 4))
        latency = _seconds(partial(dist.all_reduce, one), ROUND_TRIPS, device)
        seconds = _seconds(partial(dist.all_reduce, many), LARGE_TRIPS, device)
        share = 2 * (ranks.launch.world_size - 1) / ranks.launch.world_size
        return Network(
            address=ranks.address,
            port=ranks.port,
            backend="nccl" if gpu else "gloo",
            world_size=ranks.launch.world_size,
            latency=latency,
            bandwidth=share * many.nbytes / seconds,
            clock_skew=min(_clock_skew() for _ in range(3)),
            shared=is_shared(output_dir, ranks.launch),
            exchange=measure_exchange(sequence_parallel, ranks.launch, device) if sequence_parallel > 1 else None,
        )
    finally:
        dist.barrier()
        dist.destroy_process_group()


def measure_exchange(size: int, launch: Launch, device: Any) -> Exchange:
    """Time all-to-alls in groups of `size` ranks, which must divide the ranks; all must call this."""
    nodes = nodes_of(gather((socket.gethostname(), launch.local_rank)))
    groups, across = groups_of(len(nodes), size), spanning(nodes, size)
    found = dict(zip(groups, _time_exchanges(groups, device), strict=True))
    inside = [found[group][1] for group in groups if group not in across]
    if not inside:  # to compare with
        of_nodes = [[rank for rank, on in enumerate(nodes) if on == node] for node in range(max(nodes) + 1)]
        inside = [speed for _, speed in _time_exchanges(of_nodes, device) if speed]
    return Exchange(
        nodes=nodes,
        size=size,
        latency=max(latency for latency, _ in found.values()),
        inside=min(inside, default=None),
        between=min((found[group][1] for group in across), default=None),
    )


def _time_exchanges(groups: Sequence[Sequence[int]], device: Any) -> list[tuple[float, float]]:
    """Seconds of an all-to-all of single numbers, and bytes/s that a rank sends, in each group: its slowest rank's.

    All ranks are in a group, and call this. One that is alone sends nothing.
    """
    import torch
    import torch.distributed as dist

    gpu = device.type == "cuda"
    mine, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        [list(group) for group in groups], timedelta(seconds=patience()), "nccl" if gpu else "gloo"
    )
    size = dist.get_world_size(mine)
    seconds, part = [], (GPU_BYTES if gpu else CPU_BYTES) // 4 // size
    for count, times in ((1, ROUND_TRIPS), (part, LARGE_TRIPS)):
        sent = torch.ones(count * size, device=device)
        exchange = partial(dist.all_to_all_single, torch.empty_like(sent), sent, group=mine)
        seconds.append(_seconds(exchange, times, device))
    everyone = gather((seconds[0], seconds[1] / (4 * part * (size - 1)) if size > 1 else math.inf))  # of a byte
    return [
        (max(everyone[rank][0] for rank in group), 1 / max(everyone[rank][1] for rank in group)) for group in groups
    ]


def _seconds(operation: Callable[[], Any], times: int, device: Any) -> float:
    """Seconds of one, after one to warm up; all ranks must call it."""
    import torch
    import torch.distributed as dist

    for count in (1, times):
        dist.barrier()
        started = time.perf_counter()
        for _ in range(count):
            operation()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / count
    return seconds


def _clock_skew() -> float:
    import torch.distributed as dist

    dist.barrier()
    clocks = gather(time.time())
    return max(clocks) - min(clocks)
