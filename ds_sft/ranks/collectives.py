"""What ranks tell each other, and the group in which they do. Nothing here imports torch until one is wanted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")


def start_gloo(timeout_seconds: int, *, with_deepspeed: bool) -> None:
    """Start the process group for ranks without a GPU; Trainer's own start would forget the time limit.

    It would also start torch's group where DeepSpeed needs its own: under ZeRO-3 DeepSpeed's configuration then
    computes with a world of one and refuses the batch size. DeepSpeed's CPU backend compiles a shared-memory all-reduce
    (over a minute) that only its inference engine calls; it is left out.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if not with_deepspeed:
        import torch.distributed as dist

        dist.init_process_group("gloo", timeout=timeout)
        return
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", timeout=timeout, verbose=False)


def barrier() -> None:
    """Wait for every rank; nothing to wait for without a process group."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


@contextmanager
def others_wait() -> Iterator[None]:
    """The others wait at the end of the block while rank 0 works in it, as long as that takes.

    On a gloo group of its own: a barrier of the run's group would end after `ddp_timeout`, and on GPUs would spin.
    """
    import torch.distributed as dist

    group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if dist.is_initialized() else None
    yield
    if group is not None:
        dist.barrier(group)


def end_group() -> None:
    """Destroy the process group; without it a rank may abort after all work is done."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """`value` of every rank, in rank order, on every rank; must pickle."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_numbers(values: Sequence[float], *, device: Any) -> list[list[float]]:
    """`values` of every rank, in rank order, in float64; all ranks must give equally many."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    result: list[list[float]] = torch.stack(everyone).tolist()
    return result


def sum_over_ranks(*values: float, device: Any) -> list[float]:
    """The sums of `values` over all ranks, in float64."""
    import torch
    import torch.distributed as dist

    totals = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(totals)
    result: list[float] = totals.tolist()
    return result
