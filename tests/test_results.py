"""What run.json is made of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ds_sft import results


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    results.write_json(path, {"文": 1})
    with pytest.raises(TypeError):
        results.write_json(path, {"bad": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"文": 1}


def test_the_commit_says_whether_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "results.py"
    module.write_text("")
    monkeypatch.setattr(results, "__file__", str(module))
    assert results.git_commit() is None  # no checkout
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for command in (["init", "-q"], ["commit", "-qm", "another's", "--allow-empty"]):
        subprocess.run([*git, *command], check=True)
    assert results.git_commit() is None  # an environment in a project of its user's
    for command in (["add", "results.py"], ["commit", "-qm", "m"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert results.git_commit() == commit
    module.write_text("changed")
    assert results.git_commit() == f"{commit}-dirty"


def test_versions_and_memory() -> None:
    found = results.versions()
    assert {"python", *results.PACKAGES} == set(found)
    assert 0.01 < results.peak_memory()["host_gib"] < 100


CHILD = "from ds_sft.results import peak_memory; print(peak_memory()['host_gib'])"
PARENT = f"""
import subprocess, sys
held = b"x" * 600_000_000
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
{CHILD}
"""


def test_a_child_does_not_report_the_memory_of_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True, timeout=300, check=True)
    child, parent = map(float, done.stdout.split())
    assert child < 0.2 < 0.55 < parent
