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
# By what else a process would take itself for a rank of a launch.
OF_A_RANK = (*VARIABLES, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
OF_LAUNCHERS = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_", "PMI_", "OMPI_")  # what the names of theirs begin with


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
        UserError: a variable is missing, no number, or out of range; MASTER_PORT too.
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
    rendezvous(env)  # torch looks at it much later
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


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The Slurm job that this process is part of."""

    number: str
    step: str = ""  # of the job; none in its batch shell
    restarts: int = 0  # how often Slurm has started it again
    gpus: int = 0  # that it was given on this node

    @property
    def start(self) -> str:
        """Another word for each start of each step."""
        return f"{self.number}.{self.step}.{self.restarts}"


def slurm_job(env: Mapping[str, str] | None = None) -> SlurmJob | None:
    """None outside of Slurm."""
    env = os.environ if env is None else env
    if not env.get("SLURM_JOB_ID"):
        return None
    return SlurmJob(
        number=env["SLURM_JOB_ID"],
        step=env.get("SLURM_STEP_ID", ""),
        restarts=int(env.get("SLURM_RESTART_COUNT") or 0),
        gpus=int(env.get("SLURM_GPUS_ON_NODE") or 0),
    )


def torchrun_restarts(env: Mapping[str, str] | None = None) -> int:
    """How often torchrun has started its ranks again, in one job and beside one store."""
    return int((os.environ if env is None else env).get("TORCHELASTIC_RESTART_COUNT") or 0)


def torchrun_asks_for_errors(env: Mapping[str, str] | None = None) -> bool:
    """Whether torchrun's summary has the error that a rank leaves in a file."""
    return bool((os.environ if env is None else env).get("TORCHELASTIC_ERROR_FILE"))


def launch_id(env: Mapping[str, str] | None = None) -> str:
    """The same for all ranks that one launcher started on this node, another for the next start."""
    env = os.environ if env is None else env
    job = slurm_job(env)
    known = [env.get("MASTER_PORT"), job.start if job else None, str(os.getppid())]
    return "-".join(filter(None, known))


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where ranks meet: the address of rank 0's store."""

    address: str
    port: int
    kept_by_launcher: bool  # torchrun's agent keeps the store, and not rank 0


def rendezvous(env: Mapping[str, str] | None = None) -> Rendezvous:
    """As the launcher says it, or torch's own port of this machine.

    Raises:
        UserError: the port is no number.
    """
    env = os.environ if env is None else env
    port = env.get("MASTER_PORT", "29500")
    if not port.isdecimal():
        raise UserError(f"environment: MASTER_PORT={port!r}: expected the number of a free port of the first node")
    return Rendezvous(
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=int(port),
        kept_by_launcher=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def without_launch(env: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is to be none of the ranks."""
    return {name: text for name, text in env.items() if name not in OF_A_RANK and not name.startswith(OF_LAUNCHERS)}


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
