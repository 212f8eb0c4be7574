"""Memory that this process may have, as the system says it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_sft.ranks import host
from ds_sft.ranks.host import free_memory_here, memory_here

MEMINFO = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(host, "ROOT", tmp_path)
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="ascii")


V2 = {
    "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
    "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
    "sys/fs/cgroup/slurm/job_7/step_0/memory.current": "300000\n",
    "sys/fs/cgroup/slurm/job_7/memory.max": "500000\n",
    "sys/fs/cgroup/slurm/job_7/memory.current": "400000\n",
    "sys/fs/cgroup/slurm/job_7/memory.stat": "anon 300000\ninactive_file 60000\nactive_file 40000\n",
}
V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/docker\n4:memory:/docker/abc\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "300000\n",
}
NO_LIMIT = {"proc/self/cgroup": "0::/\n"}


@pytest.mark.parametrize(
    ("files", "total", "free"),
    [(NO_LIMIT, 1_024_000, 614_400), (V2, 500_000, 200_000), (V1, 500_000, 200_000)],
    ids=["no limit", "a job of Slurm", "version 1, in a container"],
)
def test_the_least_of_machine_and_limits(root: Path, files: dict[str, str], total: int, free: int) -> None:
    write(root, {"proc/meminfo": MEMINFO, **files})
    assert memory_here() == total
    assert free_memory_here() == free


def test_where_nothing_tells(root: Path) -> None:
    assert root.is_dir()
    assert memory_here() is None
    assert free_memory_here() is None


def test_this_machine() -> None:
    total, free = memory_here(), free_memory_here()
    assert total is None or (free is not None and 0 < free <= total)
