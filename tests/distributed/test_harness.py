"""The harness itself: a run that hangs says what each rank was doing, and leaves nothing behind, launched or forked."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from tests.distributed import harness
from tests.distributed.harness import Done, is_alive, run, run_forked, wait_until_gone

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
import os, pathlib, sys, time
def wait_for_nobody():
    time.sleep(600)
def compute_forever():
    while True: pass
if len(sys.argv) > 1:
    sys.exit()
pathlib.Path("pid" + os.environ["RANK"]).write_text(str(os.getpid()))
wait_for_nobody() if os.environ["RANK"] == "0" else compute_forever()
"""


def test_a_hang_shows_the_stack_of_each_rank(tmp_path: Path) -> None:
    """Of a launcher that imports nothing: its ranks are there within the time limit on a busy machine, too."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "hangs.py").write_text(HANGS)
    with pytest.raises(AssertionError, match="not done after 20 s") as caught:
        run([sys.executable, "launcher.py"], cwd=tmp_path, timeout=20)
    check_hang(tmp_path, str(caught.value))


def test_a_hang_of_forked_ranks_shows_them_too(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    run_forked([str(tmp_path / "hangs.py"), "?"], 2, cwd=tmp_path)  # nothing is imported any more
    with pytest.raises(AssertionError, match="not done after 5 s") as caught:
        run_forked([str(tmp_path / "hangs.py")], 2, cwd=tmp_path, timeout=5)
    check_hang(tmp_path, str(caught.value))
    assert run_forked([str(tmp_path / "hangs.py"), "?"], None, cwd=tmp_path).codes == (0,)


def test_a_test_that_is_ended_leaves_its_answer_to_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytest's time limit or Ctrl-C ends one while its ranks run."""
    (tmp_path / "fails.py").write_text("raise SystemExit(7)")
    (tmp_path / "ends.py").write_text("")
    before = harness.forking_process()
    with monkeypatch.context() as patched:
        patched.setattr(harness.json, "loads", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_forked([str(tmp_path / "fails.py")], None, cwd=tmp_path)
    wait_until_gone([psutil.Process(before.pid)], 60)
    assert run_forked([str(tmp_path / "ends.py")], None, cwd=tmp_path).codes == (0,)


def interrupt(answer: str) -> None:
    raise KeyboardInterrupt


def check_hang(tmp_path: Path, said: str) -> None:
    first, second = said.index("---- rank 0 was here"), said.index("---- rank 1 was here")
    assert first < said.index("in wait_for_nobody") < second < said.index("in compute_forever")
    pids = [int((tmp_path / name).read_text()) for name in ("pid0", "pid1")]
    for process in psutil.process_iter():
        if process.pid in pids and is_alive(process):
            assert "hangs.py" not in process.cmdline()


PROGRAM = """
import os, subprocess, sys, time
import tests.distributed.harness
print(sys.argv[1], os.environ["WORD"], os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), os.getcwd())
tests.distributed.harness.ROOT = None
if sys.argv[1] == "fails":
    sys.exit(3) if os.environ["RANK"] == "1" else time.sleep(600)
if sys.argv[1] == "leaves":
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1); print('the last word')"])
"""


def test_forked_ranks_are_processes_of_their_own(tmp_path: Path) -> None:
    """With folder and environment as given; what they leave running is waited for; one that fails ends the others."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def start(word: str, ranks: int | None) -> Done:
        return run_forked([str(program), word], ranks, cwd=tmp_path, env={"WORD": "hello"})

    assert start("alone", None) == Done(0, f"alone hello None None {tmp_path}\n", (0,))
    two = start("two", 2)
    assert sorted(two.output.splitlines()) == [f"two hello {rank} 2 {tmp_path}" for rank in (0, 1)]
    assert start("leaves", None).output == f"leaves hello None None {tmp_path}\nthe last word\n"
    failed = start("fails", 2)
    assert (failed.code, failed.codes) == (3, (3, 3))
