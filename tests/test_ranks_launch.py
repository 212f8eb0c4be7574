"""Who a process is, from the launcher's variables."""

from __future__ import annotations

import io
import os
import sys
from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from ds_sft.errors import UserError
from ds_sft.ranks.launch import (
    Launch,
    Rendezvous,
    SlurmJob,
    launch_id,
    print_line,
    read_launch,
    rendezvous,
    slurm_job,
    torchrun_asks_for_errors,
    torchrun_restarts,
    without_launch,
)

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_no_launcher() -> None:
    launch = read_launch({"WORLD": "7"})
    assert launch == Launch(launcher="python", rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert not launch.distributed


def test_launchers() -> None:
    expected = {"rank": 3, "local_rank": 1, "world_size": 4, "local_world_size": 2}
    assert read_launch(TORCHRUN) == Launch(launcher="torchrun", **expected)
    deepspeed = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert read_launch(deepspeed) == Launch(launcher="deepspeed", **expected)
    by_hand = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert read_launch(by_hand) == Launch(launcher="environment")
    assert read_launch(by_hand).distributed
    task = {"SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    assert read_launch(by_hand | {**task, "NODE_RANK": "0"}) == Launch(launcher="slurm")
    assert read_launch(by_hand | task) == Launch(launcher="environment")  # in a batch shell, without task.sh
    assert read_launch(by_hand | {"SLURM_JOB_ID": "7"}) == Launch(launcher="environment")  # in an allocation, no srun


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "four"}, "RANK='four'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not set"),
        ({"RANK": "4"}, "RANK=4 LOCAL_RANK=1 WORLD_SIZE=4: expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 LOCAL_RANK=1 WORLD_SIZE=4"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http': expected the number of a free port of the first node"),
    ],
)
def test_variables_that_contradict(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_launch(TORCHRUN | change)


def test_a_job_of_slurm() -> None:
    assert slurm_job({"SLURM_LOCALID": "0"}) is None
    assert slurm_job({"SLURM_JOB_ID": "17"}) == SlurmJob(number="17", step="", restarts=0, gpus=0)  # its batch shell
    step = {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0", "SLURM_GPUS_ON_NODE": "8"}
    job, requeued = slurm_job(step), slurm_job(step | {"SLURM_RESTART_COUNT": "2"})
    assert job == SlurmJob(number="17", step="0", restarts=0, gpus=8)
    assert requeued == SlurmJob(number="17", step="0", restarts=2, gpus=8)
    assert job.start != requeued.start


def test_the_ranks_of_one_start_have_one_id() -> None:
    port, step = {"MASTER_PORT": "29500"}, {"SLURM_JOB_ID": "17", "SLURM_STEP_ID": "0"}
    assert launch_id({}) == str(os.getppid())
    assert launch_id(port | TORCHRUN) == launch_id(port | TORCHRUN | {"RANK": "2", "LOCAL_RANK": "0"})
    starts = [{}, port, port | step, port | step | {"SLURM_RESTART_COUNT": "1"}, port | step | {"SLURM_STEP_ID": "1"}]
    assert len({launch_id(env) for env in starts}) == 5


def test_where_ranks_meet() -> None:
    assert rendezvous({}) == Rendezvous(address="127.0.0.1", port=29500, kept_by_launcher=False)
    torchrun = {"MASTER_ADDR": "node1", "MASTER_PORT": "15017", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert rendezvous(torchrun) == Rendezvous(address="node1", port=15017, kept_by_launcher=True)
    with pytest.raises(UserError, match="MASTER_PORT='http': expected the number of a free port"):
        rendezvous({"MASTER_PORT": "http"})


def test_torchrun_starts_ranks_again_and_asks_for_their_errors() -> None:
    assert (torchrun_restarts({}), torchrun_asks_for_errors({})) == (0, False)
    env = {"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_ERROR_FILE": "/tmp/error.json"}
    assert (torchrun_restarts(env), torchrun_asks_for_errors(env)) == (2, True)


def test_a_process_that_is_no_rank() -> None:
    ours = {"DS_SFT_CACHE": "cache", "CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "1"}
    task = {"SLURM_JOB_ID": "17", "NODE_RANK": "0", "CROSS_RANK": "0", "MASTER_ADDR": "node1", "PMI_RANK": "1"}
    assert without_launch(TORCHRUN | task | ours) == ours


def test_a_line_is_written_at_once() -> None:
    """Whatever the buffering: other ranks write to the same file."""
    writes: list[bytes] = []

    class File(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, content: Any) -> int:
            writes.append(bytes(content))
            return len(content)

    print_line("two\nlines", io.TextIOWrapper(File(), encoding="utf-8", write_through=True))  # as PYTHONUNBUFFERED
    assert [content for content in writes if content] == [b"two\nlines\n"]


def test_a_bar_makes_way(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=2, ncols=20, bar_format="{n}/{total}", file=screen):
        print_line("a line")
        before, _, after = screen.getvalue().partition("a line\n")
    assert before == "\r0/2\r   \r"
    assert after == "\r0/2"


def test_a_line_is_printed_while_a_thread_imports_tqdm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the one that fetches a base from the hub; its module is known then, and empty."""
    monkeypatch.setitem(sys.modules, "tqdm.std", ModuleType("tqdm.std"))
    print_line("a line")
    assert capsys.readouterr().out == "a line\n"
