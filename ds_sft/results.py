"""`run.json`: what ran, where, how long and with which result."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = "run.json"  # written last: a run that has it is finished
EXPORTED = "exported.json"  # of a run that was stopped behind its export, where no checkpoint has the last step
KEPT = "verify.json"  # what a model on disk was to be asked, and there was no memory: for `ds-sft verify`
PACKAGES = ("ds_sft", "torch", "transformers", "deepspeed", "accelerate", "datasets", "tokenizers", "swanlab", "peft")


def write_json(path: Path, value: Any) -> None:
    """Write beside and rename, so that the file is never half there; JSON has no NaN, which becomes null."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(_finite(value), ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # ds_sft run from a checkout that is not installed
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """The commit of this package's checkout, "-dirty" behind it where files differ; None outside a checkout.

    An environment may lie in a repository of its user's, whose commit says nothing of this package.
    """
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(*words: str) -> str | None:
    """What git answers about the repository around this file; None where there is none."""
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def peak_memory() -> dict[str, float]:
    """This process's peaks so far in GiB: resident memory and, where a GPU was used, what torch allocated on it, and
    reserved."""
    peaks = {"host_gib": round(peak_resident_kib() / 2**20, 3)}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        peaks["gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        peaks["gpu_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 3)  # with gaps between blocks
    return peaks


def peak_resident_kib() -> int:
    """The most this program has had resident. `ru_maxrss` would not do: a child starts with that of its parent, also
    over an exec, so whatever a large program starts seems as large as that was (getrusage(2))."""
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):  # a sandbox without the line
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
