"""Checkpoints that are complete or do not exist: their manifests, and the files that these list.

A checkpoint is complete when it has a manifest. `complete` writes it last, after every rank has written, synced and
hashed its files: every file with its size and hash, the step, and what was being trained.

Nothing here imports torch until ranks have to agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from ds_sft.checkpoints.storage import Site
from ds_sft.errors import error_in_words
from ds_sft.ranks.collectives import gather

MANIFEST = "manifest.json"
FORMAT = 1
FACTS = {  # what a manifest says beside its files
    "step", "epoch", "samples", "rows_a_step", "per_device_train_batch_size", "gradient_accumulation_steps",
    "world_size", "zero_stage", "config", "data", "evaluation_due", "loss_pending", "last_logged_step", "loss_total",
    "tokens", "metrics_bytes", "save_id",
}  # fmt: skip
NAME = re.compile(r"checkpoint-(\d+)")
BLOCK = 1 << 24  # bytes read at a time
HASH_THREADS = 4  # of one rank; a thread hashes faster than most disks read


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


@dataclass(frozen=True)
class Broken(Exception):
    """Why a folder is not a checkpoint to resume from."""

    reason: str


def steps_in(output_dir: Path) -> list[int]:
    """Steps of the folders named checkpoint-N, newest first, complete or not."""
    if not output_dir.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        Broken: there is none, or it is not one.
    """
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
        files = manifest["files"]
        int(manifest["step"]), [(int(size), str(digest)) for size, digest in files.values()]
    except FileNotFoundError:
        raise Broken("it was never completed: no manifest" if folder.is_dir() else "it is not there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"its manifest cannot be read ({type(error).__name__})") from None
    if manifest.get("format") != FORMAT:
        raise Broken(f"its manifest has format {manifest.get('format')}, this version reads {FORMAT}")
    if name == MANIFEST and not manifest.keys() >= FACTS:
        raise Broken(f"its manifest lacks {', '.join(sorted(FACTS - manifest.keys()))}")
    return dict(manifest)


def newest_complete(output_dir: Path, *, resumable: bool = False) -> Checkpoint | None:
    """The newest checkpoint with a manifest; its files are not looked at. `resumable`: of more than the weights."""
    for step in steps_in(output_dir):
        folder = output_dir / f"checkpoint-{step}"
        with contextlib.suppress(Broken):
            found = Checkpoint(folder, read_manifest(folder))
            if not (resumable and found.manifest.get("model_only")):
                return found
    return None


def check_files(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Compare files with what the manifest says of them; sizes first.

    Raises:
        Broken: a file is missing, or has another size or hash.
    """
    for name, (size, _) in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise Broken(f"{name} is missing") from None
        if found != size:
            raise Broken(f"{name} has {found:,} bytes instead of {size:,}")
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        try:
            hashes = list(pool.map(lambda name: hash_file(folder / name), files))
        except OSError as error:
            raise Broken(f"{error.filename}: {error.strerror}") from None
    for (name, (_, digest)), found_digest in zip(files.items(), hashes, strict=True):
        if digest != found_digest:
            raise Broken(f"{name} has other contents than were saved (hash)")


def hash_file(path: Path) -> str:
    """XXH3 with 128 bits: finds every accident, at the speed of memory; it is no defence against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def complete(
    folder: Path,
    facts: Mapping[str, Any],
    site: Site,
    trouble: str | None = None,
    hashed: Future[dict[str, tuple[int, str]]] | None = None,
) -> str | None:
    """Make a written folder a checkpoint, or say why it is none; the same answer on all ranks, all must call it.

    Every rank syncs and hashes the files it wrote, the first rank of each file system those of nobody; when all have
    succeeded that one writes the manifest.

    Args:
        facts: what the manifest says beside its files; of rank 0.
        trouble: what already went wrong on this rank.
        hashed: `sync_and_hash`, where a thread has begun with it.
    """
    files: dict[str, tuple[int, str]] = {}
    if trouble is None:
        try:
            files = hashed.result() if hashed is not None else sync_and_hash(folder, site)
        except OSError as error:
            trouble = error_in_words(error)
    facts, save_id = gather((dict(facts), uuid.uuid4().hex))[0]
    parts = gather((trouble, site.group, files))
    if not any(reason for reason, _, _ in parts) and site.leader:
        listed = {name: entry for _, group, part in parts if group == site.group for name, entry in part.items()}
        manifest = {"format": FORMAT, "save_id": save_id, **facts, "files": dict(sorted(listed.items()))}
        try:
            write_manifest(folder / MANIFEST, manifest)
        except OSError as error:
            trouble = error_in_words(error)
    reasons = [reason for reason in gather(trouble) if reason]
    return reasons[0] if reasons else None


def sync_and_hash(folder: Path, site: Site) -> dict[str, tuple[int, str]]:
    """Size and hash of this rank's files, which are on the disk then; some threads at a time."""
    names = site.mine(files_below(folder))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        entries = list(pool.map(lambda name: _sync_and_hash_one(folder / name), names))
    if site.leader:
        for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync(directory)
        sync(folder.parent)
    return dict(zip(names, entries, strict=True))


def files_below(folder: Path) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sync_and_hash_one(path: Path) -> tuple[int, str]:
    digest = hash_file(path)  # from memory: it was written a moment ago
    sync(path)
    return path.stat().st_size, digest


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Put the manifest in place in one step, on the disk."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)
