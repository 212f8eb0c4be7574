"""Memory of this machine, as far as this process may have it: less than is built in for a job of Slurm, a container."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # of what the system says of itself


def memory_here() -> int | None:
    """Bytes of memory that this process and the others of its job or container may have; None where nothing tells."""
    built_in = _meminfo("MemTotal")
    return None if built_in is None else min([built_in, *(limit for limit, _ in _limits())])


def free_memory_here() -> int | None:
    """Bytes of `memory_here` that are free, or hold copies of files, which give way; None where nothing tells."""
    free = _meminfo("MemAvailable")
    return None if free is None else max(0, min([free, *(limit - used for limit, used in _limits())]))


def _meminfo(name: str) -> int | None:
    text = _read(ROOT / "proc/meminfo")
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024 if f"{name}:" in text else None


def _limits() -> Iterator[tuple[int, int]]:
    """Limit and used bytes of each control group that this process is in and that has a limit (cgroup v2, else v1)."""
    for line in _read(ROOT / "proc/self/cgroup").splitlines():
        _, kind, path = line.split(":", 2)
        if kind not in ("", "memory"):
            continue
        top = ROOT / "sys/fs/cgroup" / kind
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if kind else ("memory.max", "memory.current")
        own = Path(path.lstrip("/"))
        for folder in (top / own, *(top / above for above in own.parents)):
            limit, used = (_read(folder / name).strip() for name in names)
            if limit.isdecimal() and used.isdecimal():
                yield int(limit), int(used) - _of_files(folder)


def _of_files(folder: Path) -> int:
    """Bytes of a control group's memory that are copies of files."""
    fields = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    return sum(int(fields.get(name, 0)) for name in ("active_file", "inactive_file"))


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
