"""The tests themselves: every process collects the same, in the same order, and reads nothing of a developer's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_house import ROOT

# `-o addopts=`: with pyproject.toml's -q beside this one pytest would print counts instead of ids.
COLLECT = ["-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider", f"--rootdir={ROOT}"]


def collect(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Collect the whole suite from another folder, in another environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, *COLLECT, str(ROOT / "tests")]
    return subprocess.Popen(command, cwd=folder, env={**kept, **environment}, stdout=subprocess.PIPE, text=True)


def ids_of(process: subprocess.Popen[str]) -> list[str]:
    said, _ = process.communicate(timeout=1200)
    assert process.returncode == 0, said
    return [line for line in said.splitlines() if "::" in line]


def test_ids_depend_on_nothing_but_the_tests(tmp_path: Path) -> None:
    """Two lanes collect apart, and must agree: not on the time (gzip writes the second), hashes, machine or user."""
    first = collect(ROOT, PYTHONHASHSEED="1", TZ="UTC", LC_ALL="C.UTF-8", OMP_NUM_THREADS="1", CI="")
    time.sleep(2)  # so that the other one meets every file in another second
    other = collect(tmp_path, PYTHONHASHSEED="2", TZ="Asia/Tokyo", LC_ALL="C", OMP_NUM_THREADS="3", CI="true",
                    HOME=str(tmp_path), TMPDIR=str(tmp_path), USER="nobody", HOSTNAME="elsewhere",
                    COLUMNS="40")  # fmt: skip
    ids = ids_of(first)
    assert ids_of(other) == ids
    assert len(ids) > 1000
    assert len(set(ids)) == len(ids)


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return dict(os.environ)


def test_fixtures_of_modules_have_their_own_caches(
    environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What they start would else write into the developer's cache, and to an account."""
    assert environment["DS_SFT_CACHE"] == str(tmp_path_factory.getbasetemp() / "cache")
    assert environment["SWANLAB_MODE"] == "disabled"
