"""Who this process is among those of the run: the launcher's environment, read in this one place."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TextIO

from ds_sft.errors import UserError

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
