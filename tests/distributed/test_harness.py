"""The harness itself: a run that hangs says what each rank was doing, and leaves nothing behind."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from tests.distributed.harness import entry, run

pytestmark = pytest.mark.distributed

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
    (tmp_path / "hangs.py").write_text(HANGS)
    with pytest.raises(AssertionError, match="not done after 30 s") as caught:
        run([*entry("torchrun", 2)[:-1], "hangs.py"], cwd=tmp_path, timeout=30)
    said = str(caught.value)
    first, second = said.index("---- rank 0 was here"), said.index("---- rank 1 was here")
    assert first < said.index("in wait_for_nobody") < second < said.index("in compute_forever")
    pids = [int((tmp_path / name).read_text()) for name in ("pid0", "pid1")]
    assert not any(psutil.pid_exists(pid) and "hangs.py" in " ".join(psutil.Process(pid).cmdline()) for pid in pids)
    assert os.getpid() not in pids
