"""Whether the checkpoints of a run fit on the disk, asked before hours are spent on it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.errors import UserError
from ds_sft.runtime.checkpoint import Site, read_manifest_size, steps_in
from ds_sft.runtime.distributed import gather

if TYPE_CHECKING:
    from transformers import TrainingArguments

ADAM = 8  # bytes a parameter: two float32 averages
MASTERS = 4  # bytes a parameter: DeepSpeed's float32 copy of the weights


def bytes_a_parameter(weight_bytes: int, stage: int | None) -> int:
    """Of one checkpoint, over all ranks.

    Without DeepSpeed: weights and Adam's averages. With it: weights once for export, averages and float32 masters, and
    below ZeRO-3 the weights once more among the engine's files.
    """
    if stage is None:
        return weight_bytes + ADAM
    return weight_bytes * (1 if stage == 3 else 2) + ADAM + MASTERS


def predict_size(model: Any, stage: int | None, site: Site) -> int:
    """Bytes of a checkpoint on this rank's file system."""
    parameters = list(model.parameters())
    count = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    size: int = count * bytes_a_parameter(parameters[0].element_size(), stage)
    return size if site.shared else math.ceil(size * site.launch.local_world_size / site.launch.world_size)


def check_space(folder: Path, size: int, args: TrainingArguments, num_steps: int, site: Site) -> None:
    """Say how large the checkpoints will be if they do not all fit; all ranks must call it.

    Raises:
        UserError: not even one fits, on some file system.
    """
    if args.save_strategy == "no":
        return
    wanted = _checkpoints_at_once(args, num_steps) - len(steps_in(folder))
    free = shutil.disk_usage(folder).free
    for rank, (needed, has, number) in enumerate(gather((size, free, wanted))):
        where = f"{folder} (rank {rank})" if rank else f"{folder}"
        if has < needed:
            raise UserError(
                f"output_dir: {where}: a checkpoint takes about {gigabytes(needed)}, the disk has {gigabytes(has)} "
                "free: make room, take another output_dir, or save_strategy: no"
            )
        if has < needed * number:
            site.launch.say(
                f"Warning: {where}: {number} checkpoints of about {gigabytes(needed)} will be there at once, the disk "
                f"has {gigabytes(has)} free: a smaller save_total_limit keeps fewer."
            )
            return


def _checkpoints_at_once(args: TrainingArguments, num_steps: int) -> int:
    """How many there will be at most: a new one is complete before an old one goes."""
    every = {"steps": int(args.save_steps), "epoch": max(1, int(num_steps / max(args.num_train_epochs, 1)))}
    saves = math.ceil(num_steps / every.get(str(args.save_strategy.value), num_steps))
    return min(saves, args.save_total_limit + 1) if args.save_total_limit else saves


def no_room(folder: Path, predicted: int) -> str | None:
    """Why the next checkpoint would not fit, if so; the newest complete one tells the size better than a prediction."""
    needed = read_manifest_size(folder) or predicted
    free = shutil.disk_usage(folder).free
    return f"it takes about {gigabytes(needed)}, the disk has {gigabytes(free)} free" if free < needed else None


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
