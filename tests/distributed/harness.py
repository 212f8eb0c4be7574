"""Start the real entry point through the real launchers, with a time limit, and end every process it started."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "ds_sft" / "train.py")
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Done:
    """A finished command. `output` is what its processes wrote to stdout and stderr, in order; `codes` are those of its
    ranks, where no launcher makes one of them."""

    code: int
    output: str
    codes: tuple[int, ...] = ()


def free_port() -> int:
    """A port that stays free until it is used, seconds later.

    Below those that the kernel gives out by itself, and of the numbers that are this lane's of pytest-xdist alone.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    first = first if first > 4096 else 32768  # where the kernel gives out all of them
    lane = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    while True:
        port = random.SystemRandom().randrange(max(first - 16_000, 1024) // 8, first // 8) * 8 + lane
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def entry(launcher: str, ranks: int | None = 1) -> list[str]:
    """The command that starts train.py: "python", "torchrun" or "deepspeed" with so many ranks."""
    if launcher == "python":
        return [sys.executable, TRAIN]
    port = str(free_port())
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port, TRAIN]
    return [str(BIN / "deepspeed"), "--num_accelerators", str(ranks), "--master_port", port, TRAIN]


def run(command: Sequence[str], *, cwd: Path, timeout: float = 500, env: Mapping[str, str] | None = None) -> Done:
    """Run a command in a session of its own.

    At the time limit the test fails with what each rank was doing (its Python stacks) and all its processes are killed.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        **(env or {}),
    }
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        show_stacks(process.pid)
        output, _ = process.communicate()
        raise AssertionError(f"not done after {timeout} s: {command}\n{output[-12000:]}") from None
    except BaseException:  # the tests are interrupted: nothing of theirs may go on computing
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Done(process.returncode, output)


def run_nodes(commands: Sequence[Sequence[str]], folders: Sequence[Path], *, env: Mapping[str, str]) -> list[Done]:
    """Run one command for each node at the same time, each in its folder."""
    with ThreadPoolExecutor(len(commands)) as pool:
        jobs = [pool.submit(run, command, cwd=cwd, env=env) for command, cwd in zip(commands, folders, strict=True)]
        return [job.result() for job in jobs]


@functools.cache
def forking_process() -> subprocess.Popen[str]:
    """The process whose ranks are forked, for all tests of this one; it ends with its standard input."""
    command = [sys.executable, "-u", str(Path(__file__).with_name("forked.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def run_forked(
    argv: Sequence[str],
    ranks: int | None,
    *,
    cwd: Path,
    timeout: float = 500,
    env: Mapping[str, str] | None = None,
) -> Done:
    """Run `python SCRIPT ...` as so many ranks, or without a launcher where `ranks` is None, as `run` does.

    The ranks import nothing: see forked.py. Where launchers matter, or what a process has before and after its run,
    `run` starts the real ones.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    with tempfile.NamedTemporaryFile(mode="r", encoding="utf-8") as log:
        job = {"argv": list(argv), "ranks": ranks, "cwd": str(cwd), "env": environment}
        codes = ask_for_ranks({**job, "log": log.name, "limit": timeout})
        output = log.read()
    assert codes is not None, f"not done after {timeout} s: {argv}\n{output[-12000:]}"
    return Done(max(codes, key=abs), output, tuple(codes))


def ask_for_ranks(job: Mapping[str, Any]) -> list[int] | None:
    """What forked.py answers. When this test is ended meanwhile, so is it: the next test must not get this answer."""
    process = forking_process()
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        codes: list[int] | None = json.loads(process.stdout.readline())
    except BaseException:
        end_tree(process.pid)
        forking_process.cache_clear()
        raise
    return codes


def check_apart(check: Callable[..., None], *arguments: str) -> None:
    """Call a function of a test file in a process of its own, for what would stay in this one, as Dynamo's state does.

    The file, when it is started, must call what its arguments say.
    """
    done = run_forked([inspect.getfile(check), check.__name__, *arguments], None, cwd=ROOT)
    assert done.code == 0, done.output


def script(name: str) -> str:
    """A program of this folder's that is train.py with something done to it."""
    return str(Path(__file__).with_name(f"{name}.py"))


def show_stacks(pid: int) -> None:
    """End a command and its ranks, after letting each rank write where it is."""
    family = psutil.Process(pid).children(recursive=True)
    ranks = {}
    for process in family:
        with contextlib.suppress(psutil.Error):
            environment = process.environ()
            if "RANK" in environment:
                ranks[int(environment["RANK"])] = process
    psutil.Process(pid).kill()  # a launcher would end the others as soon as the first is gone
    abort(ranks)
    kill(family)


def abort(ranks: Mapping[int, psutil.Process]) -> None:
    """Let each rank write where it is, and end it; `faulthandler` does at SIGABRT."""
    for rank, process in sorted(ranks.items()):
        with contextlib.suppress(psutil.Error, OSError), Path(f"/proc/{process.pid}/fd/2").open("a") as errors:
            errors.write(f"\n---- rank {rank} was here:\n")
            errors.flush()
            process.send_signal(signal.SIGABRT)
            process.wait(60)


def kill(processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def wait_until_gone(processes: Sequence[psutil.Process], seconds: float) -> None:
    """Fail if one of them still runs then. One that has ended but was not collected is gone: a container may have no
    first process that does it."""
    deadline = time.monotonic() + seconds
    while alive := [process for process in processes if is_alive(process)]:
        assert time.monotonic() < deadline, f"left running: {alive}"
        time.sleep(0.05)


def is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def end_tree(pid: int) -> None:
    """Kill a process and all it started: launchers give their workers sessions of their own."""
    parent = psutil.Process(pid)
    kill([*parent.children(recursive=True), parent])


def train(launcher: str, ranks: int | None, config: Mapping[str, Any], *, cwd: Path, timeout: float = 500) -> Done:
    """Write `config` as YAML into `cwd` and train from it; launcher "forked" takes that of `run_forked`."""
    write_yaml(cwd / "run.yaml", config)
    if launcher == "forked":
        return run_forked([TRAIN, "--config", "run.yaml"], ranks, cwd=cwd, timeout=timeout)
    return run([*entry(launcher, ranks), "--config", "run.yaml"], cwd=cwd, timeout=timeout)


def write_yaml(path: Path, config: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(config), allow_unicode=True), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def listing(folder: Path) -> list[str]:
    """Names in a folder, without what a tracker keeps for itself."""
    return sorted(path.name for path in folder.iterdir() if path.name != "swanlog")


def step_losses(folder: Path) -> list[float]:
    """The training loss of every logged step."""
    return [row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row]


def asked(folder: Path, capture: Any) -> str:
    """What `ds-sft chat` answers, in this process, to a model that a run has left or a checkpoint of it.

    Args:
        capture: pytest's capsys.
    """
    from ds_sft.cli import main

    capture.readouterr()
    assert main(["chat", str(folder), "--once", "What is 1?", "--predict_max_new_tokens", "8", "--use_cpu", "yes"]) == 0
    answer: str = capture.readouterr().out
    return answer
