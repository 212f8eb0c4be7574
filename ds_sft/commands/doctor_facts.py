"""What one rank sees of its node, for `ds-sft doctor`: code, devices, files, disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.records import read_dialogues, reading_of
from ds_sft.data.sources import find_files
from ds_sft.errors import UserError
from ds_sft.plan.size import in_units, model_folder, model_size
from ds_sft.plan.source import looks_like_path, no_such_folder
from ds_sft.plan.weights import choice_of
from ds_sft.ranks.launch import Launch, slurm_job
from ds_sft.ranks.network import patience
from ds_sft.results import git_commit, versions
from ds_sft.shipped import CONFIGS, PACKAGE

READ_SECONDS = 10.0  # of reading rows, on a rank of each node
Facts = dict[str, Any]


def look_around(config: Config, launch: Launch) -> Facts:
    """What this rank sees of its node; JSON."""
    seconds = min(READ_SECONDS, patience() / 2)  # the other ranks wait meanwhile
    return {
        "rank": launch.rank,
        "local_rank": launch.local_rank,
        "host": socket.gethostname(),
        "code": {"commit": git_commit(), "hash": _code_hash()},
        "config": config.to_dict(),
        "versions": versions(),
        "device": _device(launch, use_cpu=bool(config.training.get("use_cpu"))),
        "model": _trouble_or(lambda: _look_at_model(config)),
        "groups": _trouble_or(lambda: _look_at_groups(config)),
        "data": _trouble_or(lambda: _look_at_data(config, seconds if launch.local_rank == 0 else 0)),
        "output": _trouble_or(lambda: _look_at_output(config.output_dir)),
        "address": _own_address(),
    }


def _trouble_or(look: Callable[[], Facts]) -> Facts:
    try:
        return look()
    except (UserError, ValueError) as error:
        return {"trouble": str(error)}
    except OSError as error:
        return {"trouble": f"{error.filename}: {error.strerror}"}


def _code_hash() -> str:
    """Of every source file of this package, and of what `deepspeed` has names for: a checkout can differ from its
    commit."""
    digest = hashlib.sha256()
    for file in sorted([*PACKAGE.rglob("*.py"), *CONFIGS.glob("*.json")]):
        digest.update(f"{file.relative_to(PACKAGE)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _device(launch: Launch, *, use_cpu: bool) -> Facts:
    import torch

    job = slurm_job()
    promised = job.gpus if job and not use_cpu else 0
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        trouble = f"Slurm gave {promised} GPUs, torch {torch.__version__} sees none" if promised else None
        return {"kind": "cpu", "name": f"CPU, {cores} cores", "trouble": trouble}
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        return {"kind": "cuda", "name": "none", "trouble": f"local rank {launch.local_rank} finds {count} GPUs "
                f"(CUDA_VISIBLE_DEVICES={visible})"}  # fmt: skip
    found = torch.cuda.get_device_properties(launch.local_rank)
    return {"kind": "cuda", "name": f"{found.name}, {in_units(found.total_memory)}", "trouble": None}


def _look_at_model(config: Config) -> Facts:
    folder = model_folder(config.model_name_or_path)
    if folder is None:
        if looks_like_path(config.model_name_or_path):
            raise UserError(f"{config.model_name_or_path}: {no_such_folder(config.model_name_or_path)}")
        return {"download": True}
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: this folder has no config.json, so it is not a model")
    (folder / "config.json").read_bytes()
    size = model_size(folder, choice_of(config))
    return {"folder": str(folder), "size": size and asdict(size)}


def _look_at_groups(config: Config) -> Facts:
    """Where the model is here, whether ranks can share its rows.

    Raises:
        UserError: they cannot.
    """
    folder = model_folder(config.model_name_or_path)
    if folder is not None and (folder / "config.json").is_file():
        from ds_sft.model.sequence_support import require_shareable

        require_shareable(config)
    return {}


def _look_at_data(config: Config, seconds: float) -> Facts:
    """Size of each file, and how many rows were read: the first of each file, and all others for which there is time.

    Raises:
        UserError: a file has no row, or one of those read cannot be used and `on_bad_row` is error.
    """
    sizes, rows, whole, until = {}, 0, True, time.monotonic() + seconds
    for key, value in (("train_file", config.train_file), ("eval_file", config.eval_file)):
        for file in find_files(value, key) if value is not None else []:
            before = rows
            for line, row in read_dialogues(file, reading_of(config, file)):
                if isinstance(row, BadRow) and config.on_bad_row == "error":
                    raise UserError(f"{file.name}:{line}: {row} (on_bad_row: skip leaves such rows out)")
                rows += 1
                if time.monotonic() > until:
                    whole = False
                    break
            if rows == before:
                raise UserError(f"{file.name}: no row in it")
            sizes[file.name] = file.size or 0
    return {"bytes": sizes, "rows": rows, "whole": whole}


def _look_at_output(folder: Path) -> Facts:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_bytes(b"")
    probe.unlink()
    return {"free": shutil.disk_usage(folder).free}


def _own_address() -> Facts:
    """The address that this node's name stands for; gloo listens there."""
    try:
        return {"address": socket.gethostbyname(socket.gethostname())}
    except OSError as error:
        return {"trouble": f"its own name does not resolve: {error.strerror}"}
