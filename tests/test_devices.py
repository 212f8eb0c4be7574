"""Devices, cores and memory that a process is given before torch is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_sft.ranks import devices
from ds_sft.ranks.devices import grow_segments, share_cores, use_one_device
from ds_sft.ranks.launch import Launch

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


def test_one_gpu_without_a_launcher() -> None:
    for before, after in ((None, "0"), ("2,3", "2"), ("", "")):
        env = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
        use_one_device(env)
        assert env == {"CUDA_VISIBLE_DEVICES": after}


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
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: range(8))
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
