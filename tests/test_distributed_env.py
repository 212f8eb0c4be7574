"""Who a process is, from the launcher's variables."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tqdm import tqdm

from ds_sft.errors import UserError
from ds_sft.ranks import exits, launch
from ds_sft.ranks.exits import LOST_PEER, exit_after, exit_with
from ds_sft.ranks.launch import Launch, grow_segments, print_line, read_launch, share_cores, use_one_device

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
    ],
)
def test_variables_that_contradict(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_launch(TORCHRUN | change)


def test_one_gpu_without_a_launcher() -> None:
    for before, after in ((None, "0"), ("2,3", "2"), ("", "")):
        env = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
        use_one_device(env)
        assert env == {"CUDA_VISIBLE_DEVICES": after}


# A finder of modules that sees the import of torch before it happens.
ENVIRONMENT_OF_TORCH = """
import os, sys
class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print([os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")])
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Look())
from ds_sft import cli
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "flag", "launcher", "expected"),
    [
        ("train", "yes", {}, ["", "cpu"]),
        ("train", "yes", {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, ["", "cpu"]),
        ("train", "no", {}, ["4", None]),
        ("train", "no", {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, ["4,5", None]),
        ("doctor", "yes", {}, ["", "cpu"]),
    ],
)
def test_use_cpu_shows_no_gpu(
    tmp_path: Path, command: str, flag: str, launcher: dict[str, str], expected: list[str | None]
) -> None:
    """To torch, which looks once, nor to DeepSpeed, which would take it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: m\ntrain_file: t\noutput_dir: o\nuse_cpu: {flag}\n")
    words = [command, *(["--config"] if command == "train" else []), str(tmp_path / "run.yaml")]
    env = {**os.environ, **launcher, "CUDA_VISIBLE_DEVICES": "4,5"}
    process = [sys.executable, "-c", ENVIRONMENT_OF_TORCH, *words]
    done = subprocess.run(process, capture_output=True, text=True, check=True, env=env, cwd=tmp_path)
    assert done.stdout.splitlines()[-1] == str(expected), done.stderr


def test_ranks_of_a_node_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda process: range(8))
    for ranks, before, after in ((4, {}, "2"), (16, {}, "1"), (4, {"OMP_NUM_THREADS": "3"}, "3"), (1, {}, None)):
        share_cores(Launch(launcher="deepspeed", world_size=ranks, local_world_size=ranks), before)
        assert before.get("OMP_NUM_THREADS") == after


def test_segments_grow_unless_the_user_says_how_memory_is_allocated() -> None:
    empty, old, own = {}, {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, {"PYTORCH_ALLOC_CONF": "backend:native"}
    for env in (empty, old, own):
        grow_segments(env)
    assert empty == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert old == {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}
    assert own == {"PYTORCH_ALLOC_CONF": "backend:native"}


def test_rank_0_says_an_error_and_others_only_when_it_did_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(exits.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as first:
        exit_with("no such file", Launch(launcher="torchrun", world_size=2))
    assert (first.value.code, slept, capsys.readouterr().err) == (2, [], "ds_sft: error: no such file\n")
    with pytest.raises(SystemExit) as second:
        exit_with("no such file", Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2))
    assert (second.value.code, slept) == (2, [exits.ERROR_GRACE])
    assert capsys.readouterr().err.startswith("ds_sft: error: [rank 1 on ")
    with pytest.raises(SystemExit) as third:  # the launcher was faster
        exit_with("no such file", Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2), told_to_end=True)
    assert (third.value.code, len(slept), capsys.readouterr().err) == (2, 1, "")


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4821", True),
        ("Timed out waiting 15000ms for recv operation to complete", True),
        ("store->get('0') got error: Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("NCCL error in: x.cpp:94, remote process exited or there was a network error", True),
        ("wait timeout after 15000ms, keys: /default_pg/0//worker_count", True),
        ("NCCL error in: x.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details)", False),
        ("The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use).", False),
        ("websocket is not installed", False),
        ("Default process group has not been initialized", False),
    ],
)
def test_what_tells_that_a_peer_is_gone(message: str, lost: bool) -> None:
    assert (LOST_PEER.search(message) is not None) is lost


def test_a_rank_that_lost_the_others_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    waited: list[float] = []
    monkeypatch.setattr(exits.os, "_exit", ended.append)
    monkeypatch.setattr(exits.time, "sleep", waited.append)
    launch = Launch(launcher="torchrun", rank=1, world_size=2)
    exit_after(RuntimeError("Connection closed by peer"), launch)
    said = capsys.readouterr().err
    assert said.endswith("lost the other ranks (Connection closed by peer); the rank that failed first says why\n")
    assert "RuntimeError: Connection closed by peer\n" in said
    assert (ended, waited) == ([1], [exits.LOST_PEER_GRACE])
    exit_after(RuntimeError("Connection closed by peer"), launch, told_to_end=True)  # the launcher was faster
    assert (ended, waited, capsys.readouterr().err) == ([1, 1], [exits.LOST_PEER_GRACE], "")
    exit_after(RuntimeError("a fault"), launch, told_to_end=True)
    assert "RuntimeError: a fault\n" in capsys.readouterr().err


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
