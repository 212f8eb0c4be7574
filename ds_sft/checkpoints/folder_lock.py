"""One run at a time in an output folder: OUTPUT_DIR/running.json, which the run locks and says in it who it is.

Who is locked out must not wait for the dead, so what counts depends on where the file was written:

- By a process of this kernel: the kernel's lock (flock) on it, which ends with its process, however that ends.
- On another machine: whether the file changes. Its run rewrites it every `BEAT` seconds. A lock says little there: many
  shared file systems have none between nodes (Lustre and BeeGFS as they are often mounted), and others keep that of a
  node which died. A run that was taken for dead, and finds another's name in its file, ends at once.

The flock is our own and not `filelock`'s, which empties the file and takes a file system without locks for a held one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from ds_sft.errors import UserError
from ds_sft.ranks.launch import print_line, slurm_job
from ds_sft.ranks.stop import named_stop_file

RUNNING = "running.json"
BEAT = 5.0  # seconds from one rewriting to the next
WATCH = 60.0  # seconds without one after which a run of another machine is dead; a busy one may hold its threads up
LOOK = 1.0  # seconds between two looks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # NFS without its lock service, some of FUSE


class FolderLock:
    """A folder that this process takes for its run, and gives back at the end of the block."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / RUNNING
        stop_file = str(named_stop_file() or folder.absolute() / "STOP")
        self.says = {"id": uuid.uuid4().hex, "machine": machine(), **who(), "stop_file": stop_file, "beat": 0}
        self._descriptor: int | None = None
        self._made: list[Path] = []  # folders that were not there, innermost first
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder lock", daemon=True)

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def take(self) -> None:
        """Make the folder and take it for this process, until `release` or its end.

        Raises:
            UserError: another run has it, or it cannot be written.
        """
        try:
            self._make_folder()
            while not self._taken():
                pass
        except OSError as error:
            raise UserError(f"output_dir: {self.folder}: cannot be written: {error.strerror}") from None
        os.register_at_fork(after_in_child=self._forget)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back, and remove it if it was not there before and nothing is in it."""
        self._ended.set()
        if self._descriptor is not None:
            self._thread.join()
            with contextlib.suppress(OSError):
                if self._is_ours(self._read()):
                    self.file.unlink()
            self._forget()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    # ---- Taking it

    def _make_folder(self) -> None:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)

    def _taken(self) -> bool:
        """Take the folder; False: what was there is gone, look again.

        Raises:
            UserError: another run has it.
        """
        descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = lock(descriptor)
            holder = self._read()
            self._refuse_or_outlive(holder, locked)
            if self._read() != holder or not is_at(descriptor, self.file):
                return False  # another run has begun or ended meanwhile
            if locked is False:  # a node that died has left its lock with the server of the files
                self.file.unlink()
                return False
            self._write()
            self._descriptor, descriptor = descriptor, -1
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        if locked is None:
            print_line(f"output_dir: {self.folder}: this file system has no locks: two runs that start there at the "
                       "same second are noticed some seconds later.")  # fmt: skip
        return True

    def _refuse_or_outlive(self, holder: str, locked: bool | None) -> None:
        """Come back where nobody has the folder.

        Raises:
            UserError: somebody has.
        """
        said = parse(holder)
        kernel_knows = locked is not None and (not holder or said.get("machine") == machine())
        free = locked if kernel_knows else not holder
        if not free and (kernel_knows or self._changes(holder, said)):
            raise UserError(self._refusal(said))

    def _changes(self, holder: str, said: Mapping[str, Any]) -> bool:
        """Whether the run of another machine rewrites the file; False also where it has ended and removed it."""
        print_line(f"output_dir: {self.folder}: {holder_in_words(said)} had it last and did not end well, or still has "
                   f"it: looking for {WATCH:.0f} s whether it runs.")  # fmt: skip
        until = time.monotonic() + WATCH
        while time.monotonic() < until:
            time.sleep(LOOK)
            if (now := self._read()) != holder:
                return now != ""
        return False

    def _refusal(self, said: Mapping[str, Any]) -> str:
        stop = f"ask it to save and stop (touch {shlex.quote(said['stop_file'])}), " if said.get("stop_file") else ""
        return (
            f"output_dir: {self.folder}: another run has it: {holder_in_words(said)}. Wait for its end, {stop}or take "
            "another output_dir"
        )

    # ---- Holding it

    def _beat(self) -> None:
        """Rewrite the file until the end; a file that cannot be read or is gone is not this thread's trouble."""
        while not self._ended.wait(BEAT):
            with contextlib.suppress(OSError):
                now = self._read()
                if now and not self._is_ours(now):
                    self._end_at_once(parse(now))
                if now:
                    self._write_next()

    def _write_next(self) -> None:
        self.says["beat"] += 1
        self._write()

    def _end_at_once(self, said: Mapping[str, Any]) -> None:
        os.write(2, f"\nds_sft: error: output_dir: {self.folder}: another run has taken it: {holder_in_words(said)}. "
                    "This one ends at once, so that only one writes.\n".encode())  # fmt: skip
        sys.stdout.flush()
        os._exit(1)

    def _is_ours(self, text: str) -> bool:
        """Whether nobody else is named in it."""
        return bool(parse(text).get("id", self.says["id"]) == self.says["id"])

    def _read(self) -> str:
        """What is in the file now; opened anew, as network file systems look for changes only then."""
        try:
            return self.file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def _write(self) -> None:
        """In place, as the lock is on this file."""
        with self.file.open("r+", encoding="utf-8") as file:
            file.write(json.dumps(self.says, ensure_ascii=False, indent=1) + "\n")
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    def _forget(self) -> None:
        """Close the file; in a forked child too, which would keep the lock when this process is gone."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


def lock(descriptor: int) -> bool | None:
    """Lock an open file; False: another process has it, None: its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def is_at(descriptor: int, file: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        there, opened = file.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (opened.st_dev, opened.st_ino)


def machine() -> str:
    """The running kernel, in whatever container; its name where it has no id for a boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def who() -> dict[str, Any]:
    """What a person needs to find this process."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    known: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
    job = slurm_job()
    return known | {"slurm_job": job.number} if job else known


def parse(text: str) -> dict[str, Any]:
    """What a running.json says; nothing where it is half written."""
    with contextlib.suppress(ValueError):
        said = json.loads(text)
        return said if isinstance(said, dict) else {}
    return {}


def holder_in_words(said: Mapping[str, Any]) -> str:
    """Who holds or held a folder, in words."""
    if not said:
        return "a process that has not said yet which"
    job = f", Slurm job {said['slurm_job']}" if said.get("slurm_job") else ""
    return f"process {said.get('pid')} on {said.get('host')}{job}, since {said.get('since')}"
