"""Stop requests: a signal to any rank, a stop file, a launcher that died -> all ranks stop at the same step.

A thread in every rank notices requests, also while the main thread waits inside a collective. It passes them on to the
other ranks: through a note in the node's temporary folder until a process group exists, then through the group's store.
The ranks agree at the end of a step (`agreed`), because one that stops alone leaves the others waiting for it.

Nothing here imports torch until a process group exists.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch, launch_id
from ds_sft.results import write_json

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
WAKE = signal.SIGURG  # interrupts the main thread; does nothing to a process that has no handler for it
POLL = 0.5  # seconds between looks at the stop file, the launcher and the other ranks
PACE = 1.0  # seconds of work between two meetings in a loop that nobody times
# A launcher hands on a signal that the terminal has sent to its workers already.
ECHO = 5.0  # seconds in which a further signal counts as the same request, on a busy machine too
A_DAY = 86400.0  # seconds; a note counts for the minutes before there is a process group
PREEMPTED = "PREEMPTED.json"
STORE_KEY = "ds_sft/stop"
LAUNCHER_DIED = "the launcher died"


class Stopped(BaseException):
    """The run ends here because it was asked to; no Exception, so that nothing on the way takes it for a failure."""


class StopRequests:
    """What this rank knows of a request to stop.

    `reason` is set as soon as this rank knows of one; `decided` once all ranks have agreed to stop.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.reason: str | None = None
        self.decided: str | None = None
        self._file = named_stop_file()
        self._own_file = False  # the default one, which is removed when it was obeyed
        self._note: Path | None = None
        self._store: Any = None
        self._first_signal: float | None = None
        self.waits = False  # the main thread does what would be lost by a stop
        self.interruptible = False  # the main thread may be interrupted where it is
        self._closed = False
        self._ancestors = _launcher_processes(launch)
        self._main = threading.main_thread().ident
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._watch, name="stop requests", daemon=True)

    # ---- What the run calls, in the main thread

    def start(self) -> None:
        os.set_blocking(self._writer, False)
        self._handlers = {number: signal.signal(number, self._handle) for number in (*SIGNALS, WAKE)}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _StopInParentOnly.install()
        self._thread.start()

    def close(self) -> None:
        """Give the signals back and end the thread."""
        self._closed = True
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.write(self._writer, b"\0")
        self._thread.join(5)
        if self._note is not None:
            with contextlib.suppress(OSError):
                self._note.unlink(missing_ok=True)

    def use_output_dir(self, output_dir: Path) -> None:
        """From here on OUTPUT_DIR/STOP counts, and ranks of this launch that have no process group tell each other."""
        if self._file is None:
            self._file, self._own_file = output_dir / "STOP", True
        notes = f"ds_sft-stop-{os.getuid()}-"
        self._note = Path(tempfile.gettempdir()) / f"{notes}{launch_id()}"  # of one node
        remove_older(self._note.parent, f"{notes}*", A_DAY)  # of runs that were killed
        if self.reason:
            self._tell(self.reason)

    @property
    def has_group(self) -> bool:
        return self._store is not None

    def use_group(self, timeout_seconds: int) -> None:
        """The process group exists (or never will): tell the other ranks through its store; all ranks must call it."""
        import torch.distributed as dist

        if dist.is_initialized():
            world: Any = dist.group.WORLD
            _cpu_group(timeout_seconds)
            store = world.get_group_store()
            self._store = store.clone()  # a connection of its own: the thread must not wait for the others'
            if self.reason:
                self._tell(self.reason)

    def anywhere(self) -> Interruptible:
        """In the block a request raises `Stopped` at once: no other rank waits for what is done there."""
        return Interruptible(self, quietly=False)

    def until_ranks_meet(self) -> Interruptible:
        """In the block a request ends the block; the ranks then meet and `check`, which raises on all of them.

        A rank that nobody waits for, or that lost its launcher before there was a process group, raises `Stopped`.
        """
        return Interruptible(self, quietly=self.launch.world_size > 1)

    def meet(self, *flags: bool) -> tuple[str | None, list[bool]]:
        """Why the run stops here, if any rank was asked to, and which flags any has, in one small collective.

        All ranks must call it, with equally many flags, and all get the same answer.
        """
        asked, *anywhere = any_rank(self.reason is not None and not self.waits, *flags)
        if asked and self.decided is None:
            reasons = [reason for reason in gather(self.reason) if reason]
            self.decided = reasons[0]
            self.reason = self.reason or self.decided
        return self.decided, anywhere

    def agreed(self) -> str | None:
        """Why the run stops here, if any rank was asked to; all ranks must call it, and all get the same answer."""
        return self.decided or self.meet()[0]

    def check(self) -> None:
        """Raise `Stopped` on every rank if any was asked to stop; all ranks must call it."""
        reason = self.agreed()
        if reason:
            raise Stopped(reason)

    @contextlib.contextmanager
    def later(self) -> Iterator[None]:
        """In the block no request is agreed on: it waits for who asks behind it. All ranks must enter it."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False

    def paced(self) -> Paced:
        """A `check` for loops of many short turns."""
        return Paced(self)

    def leave(self, output_dir: Path, checkpoint: str | None, step: int) -> None:
        """Write OUTPUT_DIR/PREEMPTED.json and take the default stop file away: it was obeyed; for rank 0."""
        output_dir.mkdir(parents=True, exist_ok=True)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        what = {"step": step, "checkpoint": checkpoint, "reason": self.reason, "time": now}
        write_json(output_dir / PREEMPTED, what)
        if self._own_file and self._file is not None:
            self._file.unlink(missing_ok=True)

    # ---- The main thread's signal handler, and the thread

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """The thread has been told of the signal, or will be: it wakes the main thread again until that has stopped."""
        here = frame is not None and frame.f_code.co_filename == __file__  # entering or leaving a block
        if self.interruptible and self.reason and not here:
            self.interruptible = False
            raise Stopped(self.reason)

    def _watch(self) -> None:
        while not self._closed:
            ready, _, _ = select.select([self._reader], [], [], POLL)
            # Ctrl-C in a terminal is SIGINT to every process; the launcher's SIGTERM may be here as soon. The lowest
            # number, the terminal's, is the reason.
            for number in sorted(os.read(self._reader, 512)) if ready else b"":
                if number in SIGNALS:
                    self._signalled(signal.Signals(number))
            if self.reason is None and not self._closed:
                self._look()
            if self.reason is not None and self.interruptible and self._main is not None:
                signal.pthread_kill(self._main, WAKE)

    def _signalled(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if self._first_signal is None:
            self._first_signal = now
            self._request(number.name)
        elif now - self._first_signal > (ECHO if self.launch.distributed else 0):
            os.write(2, f"\nds_sft: {number.name} again: ending at once. Complete checkpoints are kept.\n".encode())
            os._exit(128 + number)

    def _look(self) -> None:
        heard = None  # from another rank
        if self._file is not None and self.launch.local_rank == 0 and self._file.exists():
            self._request(f"stop file {self._file}")
        elif self._ancestors is not None and _launcher_processes(self.launch) != self._ancestors:
            self._request(LAUNCHER_DIED)
        elif self._store is not None:
            with contextlib.suppress(Exception):  # rank 0, which keeps the store, is gone
                heard = self._store.get(STORE_KEY).decode() if self._store.check([STORE_KEY]) else None
        elif self._note is not None and self._note.exists():
            with contextlib.suppress(OSError):
                heard = self._note.read_text(encoding="utf-8")
        if heard:
            self._request(heard, heard=True)

    def _request(self, reason: str, *, heard: bool = False) -> None:
        if self.reason is None:
            self.reason = reason
            if not heard:
                place = f"[rank {self.launch.rank}] " if self.launch.world_size > 1 else ""
                os.write(1, f"\nds_sft: {place}asked to stop ({reason}); a second signal ends at once.\n".encode())
                self._tell(reason)

    def _tell(self, reason: str) -> None:
        """Let the other ranks of the run know."""
        with contextlib.suppress(Exception):
            if self._store is not None:
                self._store.set(STORE_KEY, reason)
            elif self._note is not None and self.launch.world_size > 1:
                self._note.write_text(reason, encoding="utf-8")


class Paced:
    """`check` once in about `PACE` seconds, in the same turns of a loop on all ranks.

    No rank's clock can say when, as they differ: the number of turns between two meetings is doubled while every rank
    had them behind it within `PACE`, and halved when one had not.
    """

    def __init__(self, stop: StopRequests) -> None:
        self.stop = stop
        self.every, self.left = 1, 0  # turns from one meeting to the next; until the next
        self.met: float | None = None  # when, on this rank's clock

    def check(self) -> None:
        """Raise `Stopped` on every rank if any was asked to stop; all ranks must call it equally often."""
        if self.left:
            self.left -= 1
            return
        slow = self.met is None or time.monotonic() - self.met > PACE
        reason, (someone_is_slow,) = self.stop.meet(slow)
        if reason:
            raise Stopped(reason)
        self.every = max(self.every // 2, 1) if someone_is_slow else 2 * self.every
        self.left, self.met = self.every - 1, time.monotonic()


class Interruptible:
    """A block that a request ends; `quietly`: without an exception."""

    def __init__(self, stop: StopRequests, *, quietly: bool) -> None:
        self.stop, self.quietly = stop, quietly

    def __enter__(self) -> None:
        if self.stop.reason and not self.quietly:
            raise Stopped(self.stop.reason)
        self.stop.interruptible = True

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> bool:
        self.stop.interruptible = False
        if self.stop.reason and kind is None and not self.quietly:
            raise Stopped(self.stop.reason)
        stopped = kind is not None and issubclass(kind, Stopped)
        # Without a group nobody would meet a rank that lost its launcher; with one the others wait for it in there.
        meets = self.stop.has_group or self.stop.reason != LAUNCHER_DIED
        return stopped and self.quietly and meets


class _StopInParentOnly:
    """Children that this process forks (encoding, data loading) leave stop requests to it."""

    installed = False

    @classmethod
    def install(cls) -> None:
        if not cls.installed:
            os.register_at_fork(after_in_child=cls.reset)
            cls.installed = True

    @staticmethod
    def reset() -> None:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGUSR1, WAKE):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # how a pool ends its workers


@contextlib.contextmanager
def watch_for_stop(launch: Launch) -> Iterator[StopRequests]:
    """Notice stop requests from here to the end of the block."""
    stop = StopRequests(launch)
    stop.start()
    try:
        yield stop
    finally:
        stop.close()


def remove_older(folder: Path, pattern: str, seconds: float) -> None:
    """Delete the files that nobody has written for so long."""
    for file in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > seconds:
                file.unlink()


def any_rank(*values: bool) -> list[bool]:
    """Whether each value is true on any rank; a byte each between CPUs, so that a GPU's queue is not waited for."""
    if _group_size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    flags = torch.tensor(values, dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_cpu_group())
    return [bool(flag) for flag in flags.tolist()]


def _group_size() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def named_stop_file() -> Path | None:
    """The file that DS_SFT_STOP_FILE names; without it OUTPUT_DIR/STOP asks a run to stop."""
    named = os.environ.get("DS_SFT_STOP_FILE")
    return Path(named) if named else None


_groups: list[Any] = []  # of the process group it was made beside, and the gloo group


def _cpu_group(timeout_seconds: int = 1800) -> Any:
    """The run's process group if it is gloo, else a gloo group of all ranks, made by the first call."""
    import torch.distributed as dist

    if dist.get_backend() == "gloo":
        return None
    if not _groups or _groups[0] is not dist.group.WORLD:
        _groups[:] = [dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))]
    return _groups[1]


def _launcher_processes(launch: Launch) -> tuple[int, ...] | None:
    """The processes above this rank whose end must end it: torchrun; DeepSpeed's launch.py and the runner above it.

    A rank that Slurm or a shell started has none: Slurm ends its own, and a shell may go before what it started.
    """
    if launch.launcher not in ("torchrun", "deepspeed"):
        return None
    parent = os.getppid()
    if launch.launcher == "torchrun":
        return (parent,)
    with contextlib.suppress(OSError, ValueError, IndexError):
        above = int(Path(f"/proc/{parent}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        return (parent, above)
    return (parent,)
