"""Ranks and nodes: the launcher's environment, read in this one place, and what ranks tell each other.

Nothing here imports torch until a process group is wanted.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TextIO, TypeVar

from ds_sft.errors import UserError

# How long rank 0 has to say an error that every rank meets before another rank says it instead, seconds.
# Long enough for rank 0 to reach the same line on a slow file system; launchers end the others as soon as it exits.
ERROR_GRACE = 60.0
# How long a rank that lost the others keeps quiet, seconds: the one that failed first is speaking, and the launcher
# ends this one meanwhile. What gloo, NCCL and torch's store say of a peer that is gone, and of no other trouble:
LOST_PEER_GRACE = 20.0
LOST_PEER = re.compile(
    r"gloo/transport|connection (was likely )?(closed|reset|refused)|broken pipe|failed to recv|recvvalue failed"
    r"|timed out (waiting|after)|(wait|socket|watchdog|application) timeout|connectfullmesh|monitoredbarrier"
    r"|remote (process|error)|ncclremoteerror",
    re.IGNORECASE,
)
T = TypeVar("T")
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Who this process is among those of the run."""

    launcher: str  # "python" (none), "deepspeed", "torchrun", "slurm" or "environment" (RANK and siblings set by hand)
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1  # ranks on this node

    @property
    def distributed(self) -> bool:
        """Whether a launcher started this process, be it alone."""
        return self.launcher != "python"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print once for the whole run."""
        if self.is_main:
            print_line(message)


def print_line(text: str, file: TextIO | None = None) -> None:
    """Print in one write: where output is unbuffered `print` makes two, and ranks get into each other's lines.

    A bar in a terminal makes way and comes back below.
    """
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)  # not imported, or by a thread that is at it
    with nullcontext() if bars is None else bars.external_write_mode(file):
        print(f"{text}\n", end="", file=file, flush=True)


def read_launch(env: Mapping[str, str] | None = None) -> Launch:
    """Read RANK, LOCAL_RANK and WORLD_SIZE, all of them or none.

    Raises:
        UserError: a variable is missing, no number, or out of range.
    """
    env = os.environ if env is None else env
    given = [name for name in VARIABLES if env.get(name)]
    if not given:
        return Launch(launcher="python")
    rank, local_rank, world_size = (_whole_number(env, name) for name in VARIABLES)
    # LOCAL_SIZE is DeepSpeed's name, LOCAL_WORLD_SIZE torchrun's.
    local = next((n for n in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if env.get(n)), None)
    local_world_size = _whole_number(env, local) if local else 1 if world_size == 1 else local_rank + 1
    if not (rank < world_size and local_rank <= rank and world_size > 0):
        raise UserError(
            f"RANK={rank} LOCAL_RANK={local_rank} WORLD_SIZE={world_size}: "
            "expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE; start the run with deepspeed, torchrun or srun"
        )
    return Launch(
        launcher=_launcher(env),
        rank=rank,
        local_rank=local_rank,
        world_size=world_size,
        local_world_size=local_world_size,
    )


def _launcher(env: Mapping[str, str]) -> str:
    if env.get("TORCHELASTIC_RUN_ID"):
        return "torchrun"
    if env.get("CROSS_RANK") and env.get("LOCAL_SIZE"):
        return "deepspeed"
    task = (env.get("SLURM_NODEID"), env.get("SLURM_LOCALID"))  # what slurm/task.sh makes a rank of
    return "slurm" if task == (env.get("NODE_RANK"), env["LOCAL_RANK"]) else "environment"


def _whole_number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not value.isdecimal():
        found = f"{name}={value!r}" if value else f"{name} is not set"
        raise UserError(
            f"environment: {found}: RANK, LOCAL_RANK and WORLD_SIZE go together, whole numbers; "
            "start the run with deepspeed, torchrun or srun, or unset all three for a single process"
        )
    return int(value)


def require_groups(size: int, launch: Launch) -> None:
    """See that the ranks make whole groups of `sequence_parallel`.

    Raises:
        UserError: they do not; says which sizes would.
    """
    ranks = launch.world_size
    if ranks % size:
        sizes = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
        raise UserError(
            f"sequence_parallel: {size}: the run has {ranks} rank{'s' if ranks > 1 else ''}, no groups of {size}: "
            f"write {sizes}, or start a multiple of {size} ranks (deepspeed, torchrun, srun)"
        )


def use_one_device(env: dict[str, str] | os._Environ[str]) -> None:
    """Without a launcher show torch the first GPU only: with more, Trainer would take nn.DataParallel.

    Must run before torch looks for devices.
    """
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def hide_gpus(env: dict[str, str] | os._Environ[str]) -> None:
    """Show torch and DeepSpeed no GPU, so that nothing of a run with `use_cpu` asks one, measures one or waits for one.

    DeepSpeed takes the GPU that it sees, whatever Trainer was told. Must run before torch looks for devices.
    """
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["DS_ACCELERATOR"] = "cpu"


def share_cores(launch: Launch, env: dict[str, str] | os._Environ[str]) -> None:
    """Give each rank of a node its part of the cores where nobody has said OMP_NUM_THREADS; torchrun says 1 itself.

    Under `deepspeed` every rank would start a thread for every core. Must run before torch is imported.
    """
    if launch.local_world_size > 1 and not env.get("OMP_NUM_THREADS"):
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))


def grow_segments(env: dict[str, str] | os._Environ[str]) -> None:
    """Let PyTorch's allocator of GPU memory grow its segments: micro batches differ in size, and blocks of many sizes
    would leave gaps between them. Must run before torch is imported; what a user has set stays.
    """
    if not env.get("PYTORCH_CUDA_ALLOC_CONF"):  # the name of older versions
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


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


def exit_with(message: str, launch: Launch, *, told_to_end: bool = False, code: int = 2) -> NoReturn:
    """End this rank with an exit code, 2 for a mistake of the user's, after `message` was said once for the whole run.

    All ranks usually meet the same trouble; rank 0 says it and exits, and the launcher ends the others. A rank that is
    still there after `ERROR_GRACE` met something of its own (a file missing on its node) and says so itself. One that
    was `told_to_end` before it came here need not wait for it.
    """
    if not launch.is_main:
        if told_to_end:
            sys.exit(code)
        time.sleep(ERROR_GRACE)
        message = f"[rank {launch.rank} on {socket.gethostname()}] {message}"
    print_line(f"ds_sft: error: {message}", sys.stderr)
    sys.exit(code)


def exit_after(error: Exception, launch: Launch, *, told_to_end: bool = False) -> NoReturn:
    """End this rank with exit code 1 because of an error nobody expected, at once and whatever threads are left.

    The first rank to fail prints its traceback. Those that fail because it is gone wait for the launcher to end them,
    so that the cause is what a log ends with; a rank still there after `LOST_PEER_GRACE` says what it met. One that was
    `told_to_end` meanwhile, as launchers do by SIGTERM, has nothing to add.
    """
    message = "".join(traceback.format_exception(error))
    lost = launch.world_size > 1 and isinstance(error, RuntimeError) and LOST_PEER.search(str(error))
    if lost and told_to_end:
        message = ""
    elif lost:
        time.sleep(LOST_PEER_GRACE)
        reason = " ".join(str(error).split())[:200]
        message += f"lost the other ranks ({reason}); the rank that failed first says why"
    else:
        _tell_torchrun(error)
        if "out of memory" in str(error).lower():
            message += (
                "Out of memory: try a smaller per_device_train_batch_size (and a larger gradient_accumulation_steps"
            )
            message += "), gradient_checkpointing: yes, a smaller max_length, or deepspeed: zero3.\n"
    if message:
        print_line(f"ds_sft: [rank {launch.rank} on {socket.gethostname()}] {message}", sys.stderr)
    sys.stdout.flush()
    os._exit(1)  # an ordinary exit waits for the process group and for other libraries' threads


def _tell_torchrun(error: Exception) -> None:
    """Leave the error where torchrun's summary, the last thing it prints, looks for it."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
