"""What a start need not wait for: locks that a killed compilation left behind, and a compiler that nothing uses.

Before 2.14 torch holds the file `lock` of an op's folder open while it compiles, and whoever else needs the op waits
until the file is gone. A process that was killed cannot remove it. Builds of this package lock that file by flock as
well: the kernel gives that up with the process, and tells also those in other containers, which cannot see the process
itself. From 2.14 on torch locks by flock alone, and each build leaves its file, which nobody waits for.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ds_sft.ranks.launch import Launch, print_line

# On a disk that machines share the owner may be on another one: a lock this old is nobody's, in seconds. Compiling
# DeepSpeed's CPU Adam takes 1 to 3 minutes.
OLD = 900.0
NETWORK = ("nfs", "lustre", "gpfs", "ceph", "beegfs", "fuse", "cifs", "smb", "afs", "9p", "weka", "panfs")


def guard_builds(launch: Launch) -> None:
    """Let no build of this run wait for a dead one, nor later ones for this run's; before anything is compiled."""
    import torch

    if torch.__version__ < "2.14":
        remove_stale_locks(launch)
        hold_builds_by_flock()


def remove_stale_locks(launch: Launch) -> None:
    """Let no build wait for a dead one; on each node local rank 0, before anything is compiled.

    A lock that another machine may hold is waited for, with one line, but no longer than `OLD`.
    """
    if launch.local_rank != 0:
        return
    for lock in sorted(build_root().glob("*/lock")) + sorted(build_root().glob("*/*/lock")):
        _wait_if_foreign(lock)
        if lock.exists() and not _held(lock):
            lock.unlink(missing_ok=True)
            print_line(f"Removed {lock}: a build that was killed left it, and this run would have waited for it.")


def hold_builds_by_flock() -> None:
    """From here on a build of this process takes its lock in the way that others can ask about; for every rank."""
    from torch.utils import file_baton

    baton_class: Any = file_baton.FileBaton
    take = baton_class.try_acquire
    if getattr(take, "by_flock", False):
        return

    def take_by_flock(baton: Any) -> bool:
        taken = bool(take(baton))
        if taken:
            with contextlib.suppress(OSError):  # a file system without flock
                fcntl.flock(baton.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return taken

    take_by_flock.by_flock = True  # type: ignore[attr-defined]
    baton_class.try_acquire = take_by_flock


def build_root() -> Path:
    """Where torch compiles C++ ops."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(given) if given else Path(cache) / "torch_extensions"


def _wait_if_foreign(lock: Path) -> None:
    said = False
    while _age(lock) < OLD and not _held(lock) and _on_network(lock):
        if not said:
            seconds = OLD - _age(lock)
            print_line(f"Waiting for {lock}, at most {seconds:.0f} s: another machine may be compiling there.")
            said = True
        time.sleep(1)


def _age(lock: Path) -> float:
    """Seconds since the lock was made; without end where it is gone."""
    try:
        return time.time() - lock.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _held(lock: Path) -> bool:
    return _held_by_flock(lock) or _held_here(lock)


def _held_by_flock(lock: Path) -> bool:
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or another user's, or a file system without flock
        return False
    return False


def _held_here(lock: Path) -> bool:
    """Whether a process of this machine has the file open (those of other users cannot be looked into)."""
    try:
        wanted = lock.stat()
    except FileNotFoundError:
        return False
    return any((found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino) for found in _open_files())


def _open_files() -> Iterator[os.stat_result]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield link.stat()
        except OSError:
            continue  # closed meanwhile, or another user's


def _on_network(path: Path) -> bool:
    """Whether other machines can see the file: its mount is of a network file system."""
    best, kind = "", ""
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, name, *_ = line.split(" ")
        if len(mount) > len(best) and path.resolve().is_relative_to(mount):
            best, kind = mount, name
    return kind.startswith(NETWORK)


def import_muon(engine: Mapping[str, Any] | None) -> None:
    """Import DeepSpeed's Muon optimizer uncompiled, where the run does not use it.

    DeepSpeed looks whether the optimizer is one of that class. Its module compiles functions when it is imported, which
    loads torch's whole compiler: a second of each start.
    """
    if engine is None or str((engine.get("optimizer") or {}).get("type")).lower() == "muon":
        return
    from deepspeed.runtime import compiler

    given, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = given
