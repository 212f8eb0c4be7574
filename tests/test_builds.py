"""A lock left by a killed build of a C++ op cannot hang a run."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion
from torch.utils.file_baton import FileBaton

from ds_sft.engine import builds
from ds_sft.ranks.launch import Launch

LAUNCHED = Launch(launcher="torchrun", world_size=2)


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / "cpu_adam").mkdir()
    file = tmp_path / "cpu_adam" / "lock"
    file.touch()
    return file


def test_a_lock_without_an_owner_is_removed(lock: Path, capsys: pytest.CaptureFixture[str]) -> None:
    builds.remove_stale_locks(LAUNCHED)
    assert not lock.exists()
    assert capsys.readouterr().out == (
        f"Removed {lock}: a build that was killed left it, and this run would have waited for it.\n"
    )


def test_a_lock_that_is_held_stays(lock: Path) -> None:
    lock.unlink()
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)  # as torch takes it
    builds.remove_stale_locks(LAUNCHED)
    assert lock.exists()
    os.close(descriptor)
    builds.remove_stale_locks(LAUNCHED)
    assert not lock.exists()


@pytest.mark.parametrize(("version", "stays"), [("2.10.0", False), ("2.13.0+cpu", False), ("2.14.1+cu130", True)])
def test_a_torch_that_locks_by_flock_leaves_its_files(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: str, stays: bool
) -> None:
    """Each build does: nothing was killed, and nobody waits."""
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    monkeypatch.setattr(FileBaton, "try_acquire", before := FileBaton.try_acquire)
    builds.guard_builds(LAUNCHED)
    assert (lock.exists(), FileBaton.try_acquire is before) == (stays, stays)
    assert (capsys.readouterr().out == "") == stays


BUILD = """
import sys, time
from ds_sft.engine.builds import hold_builds_by_flock
from torch.utils.file_baton import FileBaton
hold_builds_by_flock()
hold_builds_by_flock()  # of another run in the same process
assert FileBaton(sys.argv[1]).try_acquire() is True
print("building", flush=True)
time.sleep(600)
"""


def test_a_build_in_another_container_is_seen(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is not; what counts is that the kernel knows of the lock, until the process is killed."""
    monkeypatch.setattr(builds, "_open_files", lambda: iter(()))
    lock.unlink()
    with subprocess.Popen([sys.executable, "-c", BUILD, str(lock)], stdout=subprocess.PIPE) as build:
        assert build.stdout is not None
        assert build.stdout.readline() == b"building\n"
        builds.remove_stale_locks(LAUNCHED)
        assert lock.exists()
        build.kill()
        build.wait()
        builds.remove_stale_locks(LAUNCHED)
        assert not lock.exists()


def test_only_local_rank_0_looks(lock: Path) -> None:
    builds.remove_stale_locks(Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2))
    assert lock.exists()


def test_another_machine_is_given_its_time(
    lock: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builds, "_on_network", lambda path: True)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            os.utime(lock, (0, time.time() - builds.OLD))

    monkeypatch.setattr(builds.time, "sleep", nap)
    builds.remove_stale_locks(LAUNCHED)
    assert naps == [1, 1, 1]
    assert not lock.exists()
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"Waiting for {lock}, at most 900 s: another machine may be compiling there."
    assert said[1].startswith("Removed ")


def test_where_torch_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.cpp_extension import get_default_build_root

    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = Path(get_default_build_root())
    assert root == builds.build_root()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    assert builds.build_root() == Path("/somewhere")
    assert builds._on_network(tmp_path) is False


def test_the_compiler_of_an_unused_optimizer_is_not_loaded() -> None:
    """DeepSpeed imports Muon to compare; only where it is the run's optimizer may it compile."""
    code = (
        "import sys; from ds_sft.engine.builds import import_muon; import_muon({ENGINE}); "
        "from deepspeed.runtime import compiler; "
        "from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam; "
        "print('torch._inductor.compile_fx' in sys.modules, compiler.compile.__name__)"
    )
    for engine, loaded in (("{}", "False compile"), ("{'optimizer': {'type': 'Muon'}}", "True compile")):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("{ENGINE}", engine)], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == loaded
