"""The conversion for another number of ranks ends when the run is asked to stop, and when the run is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ds_sft.checkpoints.manifest import Checkpoint
from ds_sft.checkpoints.storage import Site
from ds_sft.checkpoints.universal import make_universal
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import Stopped, watch_for_stop

ALONE = Launch(launcher="python")


def wait_for_number(path: Path) -> int:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):
            return int(path.read_text(encoding="utf-8"))
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def test_a_stop_ends_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop as the run knows it, not a failure; the converter's own workers end too."""
    script = tmp_path / "converter"
    script.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {tmp_path}/worker\nwait\n", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "latest").write_text("global_step4", encoding="utf-8")
    workers: list[int] = []
    waits, wait = threading.Event(), subprocess.Popen.wait

    def waiting(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        waits.set()
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", waiting)

    def ask() -> None:
        workers.append(wait_for_number(tmp_path / "worker"))
        assert waits.wait(120)  # before that the run does not know the process, which ends with it in any case
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    with watch_for_stop(ALONE) as stop:
        thread.start()
        with pytest.raises(Stopped, match="SIGTERM"):
            make_universal(Checkpoint(folder, {"step": 4, "world_size": 2}), Site(ALONE, shared=True), stop)
    thread.join()
    assert ended(workers[0])
    assert not (folder / "universal.json").exists()


def ended(process: int) -> bool:
    """Whether it is gone within some seconds, or waits to be collected."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


ORPHAN = """
import os, signal, time
from ds_sft.checkpoints.universal import end_with_parent
ready, tell = os.pipe()
if os.fork() == 0:
    end_with_parent()
    os.write(tell, b"1")
    time.sleep(600)
os.read(ready, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_converter_ends_with_its_parent() -> None:
    """Both ends of the pipe close only when the child is gone."""
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
