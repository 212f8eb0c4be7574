"""The harness itself: a run that hangs says what each rank was doing, and leaves nothing behind."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import is_alive, run

pytestmark = pytest.mark.distributed

LAUNCHER = """
import os, subprocess, sys
def start(rank):
    environment = {**os.environ, "RANK": str(rank)}
    return subprocess.Popen([sys.executable, "hangs.py"], env=environment, start_new_session=True)
ranks = [start(rank) for rank in range(2)]
ranks[0].wait()
"""
HANGS = """
import os, pathlib, time
def wait_for_nobody():
    time.sleep(600)
def compute_forever():
    while True: pass
pathlib.Path("pid" + os.environ["RANK"]).write_text(str(os.getpid()))
wait_for_nobody() if os.environ["RANK"] == "0" else compute_forever()
"""


def test_a_hang_shows_the_stack_of_each_rank(tmp_path: Path) -> None:
    """Of a launcher that imports nothing: its ranks are there within the time limit on a busy machine, too."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "hangs.py").write_text(HANGS)
    with pytest.raises(AssertionError, match="not done after 20 s") as caught:
        run([sys.executable, "launcher.py"], cwd=tmp_path, timeout=20)
    said = str(caught.value)
    first, second = said.index("---- rank 0 was here"), said.index("---- rank 1 was here")
    assert first < said.index("in wait_for_nobody") < second < said.index("in compute_forever")
    pids = [int((tmp_path / name).read_text()) for name in ("pid0", "pid1")]
    for process in psutil.process_iter():
        if process.pid in pids and is_alive(process):
            assert "hangs.py" not in process.cmdline()
