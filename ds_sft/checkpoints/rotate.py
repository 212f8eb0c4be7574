"""Checkpoints that are no longer wanted: deleted beyond a number of them, or moved out of the way of another run."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path

from ds_sft.checkpoints.manifest import MANIFEST, newest_complete, steps_in
from ds_sft.ranks.launch import Launch


def remove(folder: Path) -> None:
    """Delete a checkpoint, the manifest first: what is left if that is interrupted is no checkpoint."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the newest complete one, a newer folder, or `keep`.

    For one process of each file system, after a checkpoint was completed.
    """
    newest = newest_complete(output_dir)
    if not limit or newest is None:
        return
    folders = [output_dir / f"checkpoint-{step}" for step in steps_in(output_dir) if step <= newest.step]
    kept = {newest.path, *([keep] if keep is not None and keep in folders else [])}
    for folder in folders:  # newest first
        if len(kept) < limit and folder not in kept and (folder / MANIFEST).exists():
            kept.add(folder)
    for folder in reversed(folders):
        if folder not in kept:
            remove(folder)


def move_aside(output_dir: Path, after: int, launch: Launch) -> None:
    """Move checkpoints newer than step `after` out of the way of a run that starts before them.

    For one process of each file system.
    """
    later = [step for step in steps_in(output_dir) if step > after]
    if not later:
        return
    aside = output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir(exist_ok=True)
    for step in later:
        (output_dir / f"checkpoint-{step}").rename(aside / f"checkpoint-{step}")
    launch.say(f"Moved {len(later)} checkpoints of an earlier run into {aside}.")
