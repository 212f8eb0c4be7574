"""One run at a time in an output folder: the second is refused, and nobody waits for the dead."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ds_sft.checkpoints import folder_lock, storage
from ds_sft.checkpoints.folder_lock import RUNNING, WATCH, FolderLock
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from ds_sft.train import main

ELSEWHERE = {"id": "f00", "machine": "another kernel", "host": "node7", "pid": 42, "slurm_job": "17",
             "since": "2026-11-03 14:02:11 +0100", "stop_file": "/logs/ds_sft-17/stop", "beat": 3}  # fmt: skip
HOLD = """
import os, sys, time
from pathlib import Path
from ds_sft.checkpoints import folder_lock
folder_lock.BEAT = 0.01
lock = folder_lock.FolderLock(Path(sys.argv[1]))
lock.take()
if "fork" not in sys.argv or os.fork() == 0:  # the child says it, which has come to life then
    print("it has it", flush=True)
time.sleep(300)
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a process that takes a folder, and wait until it has."""
    started = []

    def start(folder: Path, *words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *words], text=True, start_new_session=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "it has it\n"
        return process

    yield start
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """A clock that sleeping moves on; what happens at each look, in order."""
    now, events = [0.0], list[Callable[[], None]]()

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if events:
            events.pop(0)()

    told = SimpleNamespace(monotonic=lambda: now[0], sleep=sleep, strftime=folder_lock.time.strftime)
    monkeypatch.setattr(folder_lock, "time", told)
    return events


def refusal(folder: Path) -> str:
    lock = FolderLock(folder)
    with pytest.raises(UserError) as refused, lock:
        lock.take()
    return str(refused.value)


def takes(folder: Path) -> bool:
    with FolderLock(folder) as lock:
        lock.take()
        return bool(json.loads((folder / RUNNING).read_text())["id"] == lock.says["id"])


def write(folder: Path, **changes: Any) -> None:
    (folder / RUNNING).write_text(json.dumps(ELSEWHERE | changes))


def test_the_second_run_is_refused(out: Path) -> None:
    with FolderLock(out) as first:
        first.take()
        said = json.loads((out / RUNNING).read_text())
        assert refusal(out) == (
            f"output_dir: {out}: another run has it: process {os.getpid()} on {said['host']}, since {said['since']}. "
            f"Wait for its end, ask it to save and stop (touch {out / 'STOP'}), or take another output_dir"
        )
        assert json.loads((out / RUNNING).read_text()) == said
    assert list(out.iterdir()) == []
    assert takes(out)


def test_it_is_said_how_to_stop_a_job(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("DS_SFT_STOP_FILE", "/logs/ds_sft-17/stop")
    with FolderLock(out) as first:
        first.take()
        said = refusal(out)
    assert ", Slurm job 17, since " in said
    assert "(touch /logs/ds_sft-17/stop)" in said


def test_a_folder_that_was_made_and_is_empty_does_not_stay(tmp_path: Path) -> None:
    assert takes(tmp_path / "runs" / "one")
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path / "runs" / "one") as lock:
        lock.take()
        (tmp_path / "runs" / "one" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["metrics.jsonl"]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = refusal(tmp_path / "file" / "out")
    assert said == f"output_dir: {tmp_path}/file/out: cannot be written: Not a directory"


@pytest.mark.parametrize("words", [(), ("fork",)], ids=["alone", "with a child that lives on"])
def test_a_killed_run_does_not_block(
    out: Path, hold: Callable[..., subprocess.Popen[str]], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    process = hold(out, *words)
    assert f"process {process.pid} on" in refusal(out)
    process.kill()
    process.wait()
    assert (out / RUNNING).exists()
    assert takes(out)
    assert list(out.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_a_run_of_another_machine_that_is_alive(
    out: Path, clock: list[Callable[[], None]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose lock does not reach here."""
    write(out)
    clock += [lambda: None, lambda: write(out, beat=4)]
    assert refusal(out) == (
        f"output_dir: {out}: another run has it: process 42 on node7, Slurm job 17, since 2026-11-03 14:02:11 +0100. "
        "Wait for its end, ask it to save and stop (touch /logs/ds_sft-17/stop), or take another output_dir"
    )
    assert f"did not end well, or still has it: looking for {WATCH:.0f} s whether it runs." in capsys.readouterr().out
    assert json.loads((out / RUNNING).read_text()) == ELSEWHERE | {"beat": 4}


@pytest.mark.parametrize("end", ["is dead", "ends", "was dead in the middle of a write"])
def test_a_run_of_another_machine_that_is_not(out: Path, clock: list[Callable[[], None]], end: str) -> None:
    write(out)
    if end == "ends":
        clock += [lambda: None, (out / RUNNING).unlink]
    elif end != "is dead":
        (out / RUNNING).write_text('{"id": "f0')
    assert takes(out)
    assert list(out.iterdir()) == []


def test_the_lock_that_a_dead_node_left_with_the_server(
    out: Path, clock: list[Callable[[], None]], hold: Callable[..., subprocess.Popen[str]]
) -> None:
    ghost = hold(out)
    os.kill(ghost.pid, signal.SIGSTOP)
    write(out)
    assert takes(out)


def test_a_file_system_without_locks(
    out: Path, clock: list[Callable[[], None]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "flock", none)
    with FolderLock(out) as first:
        first.take()
        assert "this file system has no locks" in capsys.readouterr().out
        clock.append(first._write_next)
        assert "another run has it: process" in refusal(out)
    assert list(out.iterdir()) == []


def test_who_was_taken_for_dead_ends(out: Path, hold: Callable[..., subprocess.Popen[str]]) -> None:
    process = hold(out)
    while process.poll() is None:  # it may write over the first
        write(out)
    assert process.returncode == 1
    assert process.stderr is not None
    assert process.stderr.read() == (
        f"\nds_sft: error: output_dir: {out}: another run has taken it: process 42 on node7, Slurm job 17, since "
        "2026-11-03 14:02:11 +0100. This one ends at once, so that only one writes.\n"
    )
    assert json.loads((out / RUNNING).read_text()) == ELSEWHERE


def test_a_node_with_a_disk_of_its_own_takes_its_folder(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "gather", lambda value: [value, value])
    monkeypatch.setattr(storage, "is_shared", lambda folder, launch: False)
    args: Any = SimpleNamespace(output_dir=str(out), save_on_each_node=True)
    second = Launch(launcher="torchrun", rank=1, world_size=2, local_world_size=1)
    with FolderLock(out) as lock:
        assert not storage.settle_storage(args, second, lock)
        with pytest.raises(UserError, match="another run has it"):
            storage.settle_storage(args, second, FolderLock(out))


def test_a_second_start_touches_nothing(out: Path, model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("STOP", "PREEMPTED.json", "run.json", "metrics.jsonl", ".set-out")
    with FolderLock(out) as first:
        first.take()
        for name in names:
            (out / name).write_text("of the first")
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    "--model_name_or_path",
                    str(model_dir),
                    "--train_file",
                    "t.jsonl",
                    "--output_dir",
                    str(out),
                    "--resume=never",
                ]
            )
        assert ended.value.code == 2
        assert capsys.readouterr().err.startswith(f"ds_sft: error: output_dir: {out}: another run has it: process ")
        left = {path.name: path.read_text() for path in out.iterdir() if path.name != RUNNING}
        assert left == dict.fromkeys(names, "of the first")
