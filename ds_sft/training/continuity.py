"""What one start of a run knows of the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ds_sft.checkpoints.identity import Changes
from ds_sft.checkpoints.manifest import Checkpoint
from ds_sft.checkpoints.storage import Site
from ds_sft.ranks.stop import StopRequests


@dataclass(frozen=True, kw_only=True)
class Continuity:
    """What makes a run one run, however often it is stopped."""

    stop: StopRequests
    site: Site
    resumed: Checkpoint | None  # where this start continues
    changed: Changes = field(default_factory=dict)  # what was otherwise there
    on_save_error: str = "stop"
    size: int = 0  # bytes of a checkpoint, as predicted
    identity: dict[str, Any] = field(default_factory=dict)  # what was trained on what; goes into the manifest
    freezes: bool = False  # whether weights are frozen: checkpoints have those that are trained alone
    end_ids: Sequence[int] = ()  # tokens that end an answer, for whoever takes a checkpoint for a model
