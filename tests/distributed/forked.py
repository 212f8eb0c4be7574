"""Many short runs of train.py without paying for the imports each time; test_resume.py, test_nonfinite.py start it.

python forked.py JOBS.json: a list of {"argv", "ranks", "log", "at", "file_limit", "poison"}, run one after the other.
The process imports everything once and forks a process for each rank. "at" is when a rank is signalled, "PLACE STEP
SIGNAL RANK": PLACE is step, eval, save, start, encode or predict. "file_limit" is how many bytes a file may have: the
disk is full beyond it. "poison" makes losses no numbers: see poisoned.py. Writes the exit codes of the ranks of every
job as JSON into JOBS.json.done.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (imported for the children)
import transformers.integrations.deepspeed  # noqa: F401

import ds_sft.data.dataset
import ds_sft.predict
import ds_sft.runtime.export
from ds_sft import train
from ds_sft.runtime import preempt
from ds_sft.training.resumable import StepBoundary
from ds_sft.training.trainer import SFTTrainer
from tests.distributed.harness import free_port
from tests.distributed.poisoned import poison

LIMIT = 500  # seconds of one job; a machine with other work takes ten times as long


def signal_self(name: str) -> None:
    """Send this process a signal and wait until it has been noticed."""
    os.kill(os.getpid(), getattr(signal, name))
    while STOP and STOP[0].reason is None:
        time.sleep(0.01)


STOP: list[preempt.StopRequests] = []


def install(at: str) -> None:
    place, step, name, rank = at.split()
    if os.environ.get("RANK", "0") != rank:
        return
    start = preempt.StopRequests.start
    preempt.StopRequests.start = lambda self: (STOP.append(self), start(self))[1]  # type: ignore[method-assign, func-returns-value]
    owner, method = {
        "step": (StepBoundary, "on_step_end"),
        "eval": (SFTTrainer, "token_mean"),
        "save": (SFTTrainer, "_save_checkpoint"),
        "start": (SFTTrainer, "train"),
        "encode": (ds_sft.data.dataset, "load_data"),
        "predict": (ds_sft.predict, "predict"),
    }[place]
    original = getattr(owner, method)

    def reached(args: tuple[Any, ...]) -> bool:
        state = args[2] if place == "step" else getattr(args[0], "state", None)
        return place in ("start", "encode", "predict") or state.global_step == int(step)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if reached(args) and STOP[0].reason is None:
            signal_self(name)
        return original(*args, **kwargs)

    setattr(owner, method, signalled)


def child(job: dict[str, Any], rank: int, port: int) -> None:
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if job["ranks"]:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, job["ranks"], job["ranks"], "127.0.0.1", port)
        os.environ |= dict(zip(names, map(str, values), strict=True))
    if job["at"]:
        install(job["at"])
    if job["file_limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_limit"], job["file_limit"]))
    poison(job.get("poison", {}))
    code = 1
    try:
        code = train.main(job["argv"])
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any]) -> list[int]:
    """The exit codes of a job's ranks; None ranks means no launcher at all."""
    port = free_port()
    pids = []
    for rank in range(job["ranks"] or 1):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        pids.append(pid)
    return wait(pids)


def wait(pids: list[int]) -> list[int]:
    """The exit codes; as a launcher does, end the others when one has failed: that one's code is then the job's."""
    codes: dict[int, int] = {}
    failed = 0
    deadline = time.monotonic() + LIMIT
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = failed or os.waitstatus_to_exitcode(status)
                if codes[pid] and not failed:
                    failed = codes[pid]
                    for other in set(pids) - codes.keys():
                        os.kill(other, signal.SIGTERM)
        time.sleep(0.02)
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            raise SystemExit("a job was not done in time")
    return [codes[pid] for pid in pids]


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[1] + ".done").write_text(json.dumps([run(job) for job in jobs]), encoding="utf-8")
