"""Whether the nodes share one output folder, found by looking, and what follows for checkpoints."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.errors import UserError
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.nodes import is_shared

if TYPE_CHECKING:
    from transformers import TrainingArguments


def nearest_folder(folder: Path) -> Path:
    """The folder, or of those it is to be made in the innermost that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def require_writable(folder: Path) -> None:
    """See before data are encoded that a folder can be made and written; it is not made yet.

    Raises:
        UserError: it cannot.
    """
    there = nearest_folder(folder)
    if not there.is_dir():
        raise UserError(f"output_dir: {folder}: cannot be written: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"output_dir: {folder}: cannot be written: no permission to write in {there}")


def require_no_model(folder: Path, model: str) -> None:
    """See that a run's end replaces no model but that of an earlier run.

    Raises:
        UserError: the output folder is the model to start from, or has a model that no run has left.
    """
    weights = [*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")]
    start = Path(model).expanduser()
    if start.is_dir() and folder.is_dir() and start.samefile(folder):
        raise UserError(
            f"output_dir: {folder}: is the model to start from, which the result would replace: take another"
        )
    if weights and not (folder / "config.yaml").exists():  # a run writes it before it trains
        raise UserError(
            f"output_dir: {folder}: has a model that no run has left ({weights[0].name}), which the result would "
            "replace: take another folder"
        )


def settle_storage(args: TrainingArguments, launch: Launch, lock: FolderLock) -> bool:
    """Make `output_dir` on every node and set `save_on_each_node` to what the disks say; all ranks must call it.

    On a shared disk several writers of one file corrupt ZeRO-2 checkpoints; on disks of their own nodes that write
    nothing cannot resume. Returns whether the nodes share the folder.

    Args:
        lock: of the folder, which rank 0 has taken; each node takes its own where they do not share it.

    Raises:
        UserError: the folder cannot be written, or another run has a node's; on every rank, if on one.
    """
    folder = Path(args.output_dir)
    _together(lambda: _make(folder) if launch.local_rank == 0 else None)
    num_nodes = sum(gather(launch.local_rank == 0))
    if num_nodes == 1:
        return True
    shared = is_shared(folder, launch)
    if args.save_on_each_node == shared:
        found = "share output_dir" if shared else "have an output_dir each"
        launch.say(f"The {num_nodes} nodes {found}: save_on_each_node is set to {'no' if shared else 'yes'}.")
        _set_save_on_each_node(args, not shared)
    if not shared:
        _together(lambda: lock.take() if launch.local_rank == 0 and not launch.is_main else None)
    return shared


def _make(folder: Path) -> None:
    """Make the folder and see that files can be made in it.

    Raises:
        UserError: they cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"output_dir: {folder}: cannot be written: {error.strerror}") from None


def _together(action: Callable[[], None]) -> None:
    """Do it; a `UserError` of one rank is raised on all, which must all call this."""
    trouble = None
    try:
        action()
    except UserError as error:
        trouble = str(error)
    troubles = [found for found in gather(trouble) if found]
    if troubles:
        raise UserError(troubles[0])


def _set_save_on_each_node(args: TrainingArguments, value: bool) -> None:
    """Also in what `TrainingArguments` has already made of it for DeepSpeed."""
    args.save_on_each_node = value
    if args.deepspeed_plugin is not None:
        for config in (args.hf_deepspeed_config.config, args.deepspeed_plugin.deepspeed_config):
            config.setdefault("checkpoint", {})["use_node_local_storage"] = value


OF_RANK = re.compile(r"(?:zero_pp_rank_|rng_state_)(\d+)")  # files that one rank writes


@dataclass(frozen=True)
class Site:
    """Who keeps which files: all ranks see one output folder, or those of a node see their own."""

    launch: Launch
    shared: bool

    @property
    def leader(self) -> bool:
        """Whether this rank acts for its file system."""
        return self.launch.is_main if self.shared else self.launch.local_rank == 0

    @property
    def group(self) -> int:
        """The first rank of those that see the same folder."""
        return 0 if self.shared else self.launch.rank - self.launch.local_rank

    @property
    def ranks(self) -> range:
        """The ranks that see the same folder."""
        return range(self.group, self.group + (self.launch.world_size if self.shared else self.launch.local_world_size))

    def mine(self, names: Iterable[str]) -> list[str]:
        """The files that this rank writes, or is the one to look at."""
        ranks = self.ranks
        return [name for name in names if _owner(name, ranks) == self.launch.rank]


def _owner(name: str, ranks: range) -> int:
    match = OF_RANK.search(name)
    rank = int(match[1]) if match else ranks.start
    return rank if rank in ranks else ranks[rank % len(ranks)]
