"""Whether the checkpoints of a run fit on the disk, asked before hours are spent on it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from ds_sft.config import Config
from ds_sft.errors import UserError
from ds_sft.plan.disk import checkpoint_bytes
from ds_sft.plan.steps import Steps
from ds_sft.runtime.checkpoint import Site, newest_complete, steps_in
from ds_sft.runtime.distributed import gather
from ds_sft.runtime.size import ModelSize, in_units


def predict_size(model: Any, stage: int | None, site: Site) -> int:
    """Bytes of a checkpoint of the model in memory on this rank's file system."""
    parameters = list(model.parameters())
    embedding = model.get_input_embeddings().weight
    shape = ModelSize(
        parameters=sum(map(_count, parameters)),
        embedding=_count(embedding),
        tied=model.get_output_embeddings().weight is embedding,
    )
    size = checkpoint_bytes(shape, stage=stage, weight_bytes=parameters[0].element_size())
    return size if site.shared else math.ceil(size * site.launch.local_world_size / site.launch.world_size)


def _count(parameter: Any) -> int:
    """Elements of a parameter, of which ZeRO-3 keeps a share here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def check_space(config: Config, size: int, steps: Steps, site: Site) -> None:
    """Say it if the checkpoints of `size` bytes do not all fit; all ranks must call it.

    Raises:
        UserError: not even one fits, on some file system.
    """
    saves = steps.checkpoints(config.training)
    folder, limit = config.output_dir, config.training.get("save_total_limit")
    at_once = min(len(saves), limit + 1) if limit else len(saves)  # a new one is complete before an old one goes
    wanted = at_once - len(steps_in(folder))
    for rank, (needed, free, number) in enumerate(gather((size, shutil.disk_usage(folder).free, wanted))):
        where = f"{folder} (rank {rank})" if rank else f"{folder}"
        if saves and free < needed:
            raise UserError(
                f"output_dir: {where}: a checkpoint takes about {in_units(needed)}, the disk has {in_units(free)} "
                "free: make room, take another output_dir, or save_strategy: no"
            )
        if free < needed * number:
            site.launch.say(
                f"Warning: {where}: {number} checkpoints of about {in_units(needed)} will be there at once, the disk "
                f"has {in_units(free)} free: a smaller save_total_limit keeps fewer."
            )
            return


def no_room(folder: Path, predicted: int) -> str | None:
    """Why the next checkpoint would not fit, if so; the newest complete one tells the size better than a prediction."""
    newest = newest_complete(folder)
    needed = sum(size for size, _ in newest.manifest["files"].values()) if newest else predicted
    free = shutil.disk_usage(folder).free
    return f"it takes about {in_units(needed)}, the disk has {in_units(free)} free" if free < needed else None
