"""A request to stop is noticed in any place, once, and a second signal ends the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from ds_sft.ranks import stop as stop_module
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import LAUNCHER_DIED, Stopped, StopRequests, watch_for_stop
from ds_sft.train import ended_by_launcher
from tests.distributed.harness import free_port

ALONE = Launch(launcher="python")


def wait_for(stop: StopRequests) -> str:
    deadline = time.monotonic() + 120
    while stop.reason is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return stop.reason


def be_interrupted() -> None:
    time.sleep(300)
    raise AssertionError("it was not interrupted")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_a_request(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with watch_for_stop(ALONE) as stop:
        assert stop.agreed() is None
        os.kill(os.getpid(), getattr(signal, name))
        assert wait_for(stop) == name
        assert stop.agreed() == name
        with pytest.raises(Stopped, match=name):
            stop.check()
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"asked to stop ({name}); a second signal ends at once." in capfd.readouterr().out


def test_ctrl_c_is_the_reason_also_where_the_launcher_is_as_fast() -> None:
    """Its SIGTERM and the terminal's SIGINT reach a busy rank together."""
    both = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, both)  # the thread that is started inherits it
    try:
        with watch_for_stop(Launch(launcher="deepspeed")) as stop:
            for number in both:
                os.kill(os.getpid(), number)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            assert wait_for(stop) == "SIGINT"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_work_that_nobody_waits_for_ends_at_once() -> None:
    with watch_for_stop(ALONE) as stop:
        subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.5); os.kill({os.getpid()}, 15)"])
        with pytest.raises(Stopped), stop.anywhere():
            be_interrupted()
        with pytest.raises(Stopped), stop.until_ranks_meet():
            raise AssertionError("it does not even begin")


def test_of_several_ranks_the_block_ends_quietly(tmp_path: Path) -> None:
    launch = Launch(launcher="environment", world_size=2, local_world_size=2)
    other = Launch(launcher="environment", rank=1, local_rank=1, world_size=2, local_world_size=2)
    heard = StopRequests(other)  # of another process; its thread is not needed here
    heard.use_output_dir(tmp_path)
    with watch_for_stop(launch) as stop:
        stop.use_output_dir(tmp_path)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(stop)
        with stop.until_ranks_meet():
            be_interrupted()
        heard._look()
        assert heard.reason == "SIGTERM"  # through a note in the folder
    assert list(tmp_path.iterdir()) == []  # which is gone


def test_notes_of_killed_runs_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop_module.tempfile, "gettempdir", lambda: str(tmp_path))
    old, new, other = (tmp_path / f"ds_sft-stop-{name}-1-2" for name in (os.getuid(), f"{os.getuid()}-7", "99999"))
    for file, age in ((old, 2 * stop_module.A_DAY), (new, 60), (other, 2 * stop_module.A_DAY)):
        file.touch()
        os.utime(file, (0, time.time() - age))
    StopRequests(ALONE).use_output_dir(tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == sorted([new, other])


def test_without_a_launcher_ranks_meet_where_there_is_a_group() -> None:
    stop = StopRequests(Launch(launcher="torchrun", world_size=2, local_world_size=2))
    stop.reason = LAUNCHER_DIED
    with pytest.raises(Stopped), stop.until_ranks_meet():
        raise Stopped(LAUNCHER_DIED)
    stop._store = object()  # the others wait at the end of the block
    with stop.until_ranks_meet():
        raise Stopped(LAUNCHER_DIED)


def test_the_group_between_cpus_has_the_time_limit_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    monkeypatch.setattr("torch.distributed.get_backend", lambda: "nccl")
    monkeypatch.setattr("torch.distributed.new_group", lambda **options: made.append(options))
    monkeypatch.setattr(stop_module, "_groups", [])
    stop_module._cpu_group(15)
    stop_module._cpu_group()
    assert made == [{"backend": "gloo", "timeout": timedelta(seconds=15)}]


# Two ranks of one loop, on clocks that are told the time: a turn takes rank 0 a hundredth of a second, rank 1 a tenth.
TWO_RANKS = """
import os, sys
import torch.distributed as dist
from ds_sft.ranks import stop as stop_module
from ds_sft.ranks.launch import Launch
rank, now, turns, collectives = int(os.environ["RANK"]), [0.0], [], []
dist.init_process_group("gloo")
for name in ("all_reduce", "all_gather_object", "barrier"):
    def counted(*given, name=name, work=getattr(dist, name), **options):
        collectives.append(name)
        return work(*given, **options)
    setattr(dist, name, counted)
stop = stop_module.StopRequests(Launch(launcher="environment", rank=rank, world_size=2, local_world_size=2))
stop_module.time.monotonic = lambda: now[0]
paced, meet = stop.paced(), stop.meet
stop.meet = lambda *flags: (turns.append(turn), meet(*flags))[1]
turn = 0
try:
    for turn in range(1000):
        paced.check()
        now[0] += (0.01, 0.1)[rank]
        if turn == 100 and rank == 1:
            stop.reason = "SIGUSR1"
except stop_module.Stopped as stopped:
    print(turns, turn, stopped, collectives.count("all_reduce"), collectives.count("all_gather_object"))
"""


def test_ranks_meet_in_the_same_turns_of_a_loop() -> None:
    """Once in about a second of the slowest, and a request in the middle ends the loop on all of them."""
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS], env={**env, "RANK": rank}, stdout=subprocess.PIPE)
        for rank in ("0", "1")
    ]
    met = [0, 1, 3, 7, 15, 31, 39, 55, 63, 79, 87, 103]  # intervals of 1, 2, 4, 8 and 16 turns: the last takes 1.6 s
    said = [rank.communicate(timeout=300)[0].decode().splitlines()[-1] for rank in ranks]  # older Gloo's come first
    assert said == [f"{met} 103 SIGUSR1 {len(met)} 1"] * 2


@pytest.mark.parametrize("own", [True, False])
def test_a_stop_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool) -> None:
    file = tmp_path / "STOP" if own else tmp_path / "all-runs"
    if not own:
        monkeypatch.setenv("DS_SFT_STOP_FILE", str(file))
    with watch_for_stop(ALONE) as stop:
        stop.use_output_dir(tmp_path)
        file.touch()
        assert wait_for(stop) == f"stop file {file}"
        stop.leave(tmp_path, "checkpoint-4", 4)
    record = json.loads((tmp_path / "PREEMPTED.json").read_text(encoding="utf-8"))
    assert record.pop("time")
    assert record == {"step": 4, "checkpoint": "checkpoint-4", "reason": f"stop file {file}"}
    assert file.exists() != own  # obeyed; a file that others look at stays


SECOND = """
import os, signal, sys, time
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import watch_for_stop
with watch_for_stop(Launch(launcher="python")) as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    while stop.reason is None:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    os.system("exec sleep 60 >/dev/null 2>&1")  # not even Python code runs: the thread ends the process
print("still here")
"""


def test_a_second_signal_ends_at_once() -> None:
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 128 + signal.SIGINT
    assert "SIGINT again: ending at once. Complete checkpoints are kept." in done.stderr
    assert "still here" not in done.stdout


FORKS = """
import multiprocessing, os, signal, time
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import watch_for_stop
def work(pid):
    os.kill(os.getpid(), signal.SIGINT)  # what a terminal does to every process
    os.kill(os.getpid(), signal.SIGUSR1)
    return pid
with watch_for_stop(Launch(launcher="python")) as stop:
    pool = multiprocessing.get_context("fork").Pool(1)
    assert pool.apply(work, (7,)) == 7
    pool.terminate()  # by SIGTERM
    pool.join()
    time.sleep(1)
    assert stop.reason is None
print("done")
"""


def test_children_leave_requests_to_their_parent() -> None:
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_rank_is_ended_by_its_launcher_unless_all_agreed_to_stop() -> None:
    stop = StopRequests(ALONE)
    assert not ended_by_launcher(None)
    assert not ended_by_launcher(stop)
    stop.reason = "SIGTERM"
    assert ended_by_launcher(stop)
    stop.decided = "SIGTERM"  # a job that is preempted: whoever is lost in the save after that is to be named
    assert not ended_by_launcher(stop)
