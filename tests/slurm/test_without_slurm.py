"""Two machines and no scheduler: DeepSpeed's launcher over ssh, and torchrun by hand on each."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_sft.cli import main
from tests.distributed.harness import BIN, ROOT
from tests.slurm.cluster import INSTALL, NODES, Cluster, path_with_sbin
from tests.slurm.conftest import settings

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]


@pytest.fixture
def ssh(cluster: Cluster) -> None:
    """sshd on both nodes, and a head that may use it."""
    absent = [name for name in ("sshd", "ssh", "pdsh") if shutil.which(name, path=path_with_sbin()) is None]
    if absent:
        pytest.skip(f"{', '.join(absent)} not found: {INSTALL}")
    cluster.start_sshd()


@pytest.fixture
def work(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to start from, with a configuration in it."""
    (tmp_path / "ds_sft").symlink_to(ROOT / "ds_sft")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings(model_dir, tmp_path)), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plan(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    words = ["launch", "--dry-run", "--json", "run.yaml", "--nodes", "2", "--hosts", "node1,node2", "--port", "29511"]
    assert main(words) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def check_equal(output: Path, whole: Path, launcher: str) -> None:
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (run["launcher"], run["world_size"]) == (launcher, 2)
    assert (output / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_deepspeed_with_a_hostfile(
    ssh: None, cluster: Cluster, work: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that `launch` prints; the environment travels in .deepspeed_env."""
    (work / "hosts").write_text("node1 slots=1\nnode2 slots=1\n", encoding="utf-8")
    travels = {
        "SWANLAB_MODE": "disabled",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "DS_SFT_CACHE": f"{work}/cache",
    }
    (work / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in travels.items()), encoding="utf-8")
    command = shlex.split(plan(capsys)["deepspeed"])
    clean = {"PATH": f"{BIN}:{path_with_sbin()}", "HOME": str(work)}
    done = subprocess.run(
        cluster.head.enter(str(BIN / command[0]), *command[1:], cwd=work),
        env=clean, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "Using IP address of 10.77.0.11 for node node1" in done.stdout + done.stderr
    assert any((work / "cache").iterdir())
    check_equal(work / "out", whole, "deepspeed")


def test_torchrun_by_hand(cluster: Cluster, work: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands that `launch` prints, one on each node."""
    commands = [shlex.split(node["torchrun"]) for node in plan(capsys)["nodes"]]

    def on_node(name: str, command: list[str]) -> subprocess.CompletedProcess[str]:
        words = cluster.nodes[name].enter(sys.executable, str(BIN / command[0]), *command[1:], cwd=work)
        return subprocess.run(
            words, env=cluster.environment(), capture_output=True, text=True, timeout=800, check=False
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(on_node, NODES, commands))
    for done in results:
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    check_equal(work / "out", whole, "torchrun")
