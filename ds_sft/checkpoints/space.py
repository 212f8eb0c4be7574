"""Whether the checkpoints of a run fit on the disk, asked before hours are spent on it."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from ds_sft.checkpoints.manifest import newest_complete, steps_in
from ds_sft.checkpoints.storage import Site
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.adapter_files import adapter_of
from ds_sft.model.adapters import count_parameters
from ds_sft.model.dtype import export_dtype
from ds_sft.model.quantized import elements
from ds_sft.plan.disk import adapter_bytes, checkpoint_bytes, trained_checkpoint_bytes
from ds_sft.plan.optimizer import FLOAT32, StateBytes
from ds_sft.plan.size import ModelSize, in_units
from ds_sft.plan.steps import Steps
from ds_sft.ranks.collectives import gather


def predict_size(model: Any, stage: int | None, site: Site, *, kept: StateBytes = FLOAT32) -> int:
    """Bytes of a checkpoint of the model in memory on this rank's file system; `kept`: see `checkpoint_bytes`."""
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    weight_bytes = trained[0].element_size()
    if len(trained) < len(parameters):
        size = trained_checkpoint_bytes(sum(map(elements, trained)), _twice(model), stage=stage,
                                        weight_bytes=weight_bytes, kept=kept)  # fmt: skip
    else:
        embedding = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is embedding
        shape = ModelSize(sum(map(elements, parameters)), embedding=elements(embedding), tied=tied)
        size = checkpoint_bytes(shape, stage=stage, weight_bytes=weight_bytes, kept=kept)
    return size if site.shared else math.ceil(size * site.launch.local_world_size / site.launch.world_size)


def _twice(model: Any) -> int:
    """Elements of a tied head that is trained beside adapters: their file has it under both its names."""
    if adapter_of(model) is None:
        return 0
    once, all_names = (
        sum(elements(p) for _, p in model.named_parameters(remove_duplicate=once) if p.requires_grad)
        for once in (True, False)
    )
    return int(all_names - once)


def export_size(model: Any, config: Config, site: Site) -> int:
    """Bytes of the final weights that this rank must write: a merged model is one only under `merge: yes`."""
    if not site.launch.is_main:
        return 0
    itemsize = export_dtype(config).itemsize
    if config.adapter == "none":
        return itemsize * sum(map(elements, model.parameters()))
    trained, whole = count_parameters(model)
    return adapter_bytes(trained, _twice(model)) + (itemsize * (whole - trained) if config.merge == "yes" else 0)


def check_space(config: Config, size: int, steps: Steps, site: Site, *, done: int = 0, export: int = 0) -> None:
    """Say it if the checkpoints of `size` bytes after step `done` do not all fit beside the final weights; all ranks
    must call it.

    `export`: bytes of the final weights.

    Raises:
        UserError: not even one fits, on some file system, or the final weights do not.
    """
    saves = [step for step in steps.checkpoints(config.training) if step > done]
    folder, limit = config.output_dir, config.training.get("save_total_limit")
    room = max(0, limit + 1 - len(steps_in(folder))) if limit else len(saves)  # a new one is complete before one goes
    figures = (size, export, shutil.disk_usage(folder).free, min(len(saves), room))
    for rank, (needed, final, free, number) in enumerate(gather(figures)):
        where = f"{folder} (rank {rank})" if rank else f"{folder}"
        if saves and free < needed:
            raise UserError(
                f"output_dir: {where}: a checkpoint takes about {in_units(needed)}, the disk has {in_units(free)} "
                "free: make room, take another output_dir, or save_strategy: no"
            )
        if free < final:
            raise UserError(
                f"output_dir: {where}: the final weights take about {in_units(final)}, the disk has {in_units(free)} "
                "free: make room, or take another output_dir"
            )
        if free < needed * number + final:
            weights = f" and final weights of about {in_units(final)}" if final else ""
            ends = "ends the run (on_save_error: continue does without it)"
            site.launch.say(
                f"Warning: {where}: {number} checkpoints of about {in_units(needed)}{weights} will be there at once, "
                f"the disk has {in_units(free)} free: a smaller save_total_limit keeps fewer. The first "
                f"that does not fit {ends if config.on_save_error == 'stop' else 'is done without'}."
            )
            return


def no_room(folder: Path, predicted: int) -> str | None:
    """Why the next checkpoint would not fit, if so; the newest complete one tells the size better than a prediction."""
    newest = newest_complete(folder)
    needed = sum(size for size, _ in newest.manifest["files"].values()) if newest else predicted
    free = shutil.disk_usage(folder).free
    return f"it takes about {in_units(needed)}, the disk has {in_units(free)} free" if free < needed else None
