"""One process of a node encodes a file, or finds it encoded; the others of the node wait for it and open its folder.

No process group exists yet: local rank 0 writes the name of the folder into a file that only the ranks of this start
know. It alone reads the data for their hash, and the encoded files to check them.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import socket
import time
from pathlib import Path

from filelock import FileLock

from ds_sft.config.keys import Config
from ds_sft.data.build import build, say_bad_rows
from ds_sft.data.encode import Encoder
from ds_sft.data.sources import DataFile
from ds_sft.data.store import EncodedFile, cache_dir, code_of_shape, file_key, intact, open_encoded
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch, slurm_job, torchrun_restarts


def encode_file(file: DataFile, config: Config, settings: str, encoder: Encoder, launch: Launch) -> EncodedFile:
    """Encode a file, or find it in the cache. Local rank 0 builds; the others wait for a folder that is whole.

    Args:
        settings: what else than the file decides the rows, see `settings_key`.

    Raises:
        UserError: the file, or with `on_bad_row: error` a row of it, cannot be used.
    """
    announcement = _announcement(file, settings, launch, cache_dir(config))
    if launch.local_rank != 0 and announcement is not None:
        return open_encoded(file, _await_announcement(announcement))
    folder = cache_dir(config) / f"encoded-{file_key(file, settings, cache_dir(config))}"
    if launch.local_rank != 0:
        _wait_for(folder)
    elif intact(folder):
        launch.say(f"{file.name}: already encoded in {folder}")
        say_bad_rows(file, open_encoded(file, folder).counts, launch)
    else:
        with FileLock(f"{folder}.lock"):
            if not intact(folder):  # another node may have built it meanwhile
                build(file, config, encoder, folder, launch)
    if launch.local_rank == 0 and announcement is not None:
        _announce(announcement, folder)
    return open_encoded(file, folder)


def _announcement(file: DataFile, settings: str, launch: Launch, folder: Path) -> Path | None:
    """Where local rank 0 of this start of the run, and of no other, says which folder holds the encoded file.

    None where nothing tells which ranks were started together: then each finds out for itself.
    """
    if launch.launcher == "environment":
        return None
    job, parent = slurm_job(), os.getppid()
    start = job.start if job and launch.launcher == "slurm" else [parent, _start_time(parent)]
    stat = None if file.hub else _stat(file)
    read = (file.name, file.split, file.config, file.limit, code_of_shape(file.data_format), file.data_fields)
    known = [socket.gethostname(), start, torchrun_restarts(), read, stat, settings]
    return folder / f"ready-{hashlib.sha256(repr(known).encode()).hexdigest()[:24]}"


def _start_time(process: int) -> str:
    """When it began, in ticks since boot: with its id it is itself and none before it."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        return stat.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _stat(file: DataFile) -> tuple[str, int, int] | None:
    try:
        stat = Path(file.name).stat()
    except OSError:
        return None  # reading it says what is wrong
    return str(Path(file.name).resolve()), stat.st_size, stat.st_mtime_ns


def _announce(announcement: Path, folder: Path) -> None:
    beside = announcement.with_name(f"{announcement.name}.{os.getpid()}")
    beside.write_text(folder.name, encoding="utf-8")
    os.replace(beside, announcement)
    atexit.register(announcement.unlink, missing_ok=True)


def _await_announcement(announcement: Path) -> Path:
    """Wait for local rank 0's announcement; the launcher ends this rank if that one fails."""
    parent = os.getppid()
    while not announcement.is_file():
        _end_with_the_launcher(parent, announcement)
        time.sleep(0.2)
    return announcement.with_name(announcement.read_text(encoding="utf-8"))


def _end_with_the_launcher(parent: int, path: Path) -> None:
    if os.getppid() != parent:  # the launcher died: nobody is left to end this rank
        raise UserError(f"{path}: the launcher ended while this rank waited for the encoded data")


def _wait_for(folder: Path) -> None:
    """Wait until local rank 0 has put a whole `folder` in place; the launcher ends this rank if that one fails."""
    parent = os.getppid()
    while not intact(folder):
        _end_with_the_launcher(parent, folder)
        time.sleep(0.2)
