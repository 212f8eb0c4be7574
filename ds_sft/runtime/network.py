"""Do the ranks reach each other, and how fast: before a process group is risked, and then with one."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from ds_sft.errors import UserError
from ds_sft.runtime.distributed import Launch, gather
from ds_sft.runtime.storage import is_shared

ROUND_TRIPS = 20
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
    """
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))
    here = f"rank {launch.rank} on {socket.gethostname()}"
    try:
        socket.getaddrinfo(address, port)
    except OSError as error:
        raise Unreachable(
            f"{here} cannot resolve {address}: {error.strerror}",
            "every node must know the first node's name (DNS, /etc/hosts), or set MASTER_ADDR to its address",
        ) from None
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun keeps the store itself
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address,
            port,
            is_master=launch.is_main and not agent,
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


def measure_network(ranks: Ranks, output_dir: Path) -> Network:
    """Start a process group and time it; all ranks must call this."""
    import torch
    import torch.distributed as dist

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(ranks.launch.local_rank)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=ranks.store,
        rank=ranks.launch.rank,
        world_size=ranks.launch.world_size,
        timeout=timedelta(seconds=patience()),
    )
    try:
        device = torch.device("cuda", ranks.launch.local_rank) if gpu else torch.device("cpu")
        latency = _all_reduce_seconds(1, ROUND_TRIPS, device)
        elements = (GPU_BYTES if gpu else CPU_BYTES) // 4
        seconds = _all_reduce_seconds(elements, 3, device)
        share = 2 * (ranks.launch.world_size - 1) / ranks.launch.world_size
        return Network(
            address=ranks.address,
            port=ranks.port,
            backend="nccl" if gpu else "gloo",
            world_size=ranks.launch.world_size,
            latency=latency,
            bandwidth=share * elements * 4 / seconds,
            clock_skew=min(_clock_skew() for _ in range(3)),
            shared=is_shared(output_dir, ranks.launch),
        )
    finally:
        dist.barrier()
        dist.destroy_process_group()


def _all_reduce_seconds(elements: int, times: int, device: Any) -> float:
    """Seconds of one all-reduce of float32, after one to warm up."""
    import torch
    import torch.distributed as dist

    tensor = torch.ones(elements, device=device)
    for count in (1, times):
        dist.barrier()
        started = time.perf_counter()
        for _ in range(count):
            dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / count
    return seconds


def _clock_skew() -> float:
    import torch.distributed as dist

    dist.barrier()
    clocks = gather(time.time())
    return max(clocks) - min(clocks)
