"""What ds_sft has put into a model, and why: one object on it, `model.ds_sft`, which a reader can print.

    print(parts_of(model))

`load_model_to_train` (train.py) puts the parts in one after the other; each comes from the file that knows it, and says
in words what it does, or why it does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ds_sft.model.adapters import Adapter, Trained
from ds_sft.model.attention import Attention
from ds_sft.model.experts import GroupedExperts, ListedExperts
from ds_sft.model.fused import Fused
from ds_sft.model.loss import OwnLoss, SharedAuxiliary, SupervisedLoss
from ds_sft.model.offload import InputOffload, NotOffloaded
from ds_sft.model.padding import Padding
from ds_sft.model.quantized import Quantization
from ds_sft.model.routing import Routing
from ds_sft.model.tiling import Tiling
from ds_sft.model.working_copy import LentCopy, NoCopy, WorkingCopy


@dataclass
class Parts:
    """The parts of a model, in the order in which they are put in; None: a model of its kind has no such part."""

    quantization: Quantization | None = None  # of its frozen weights
    adapter: Adapter | None = None
    trained: Trained | None = None
    attention: Attention | None = None  # of rows laid end to end, and the ranks that share them
    padding: Padding | None = None  # where rows are padded
    fused_kernels: Fused | None = None
    tiled_mlps: Tiling | None = None
    listed_experts: ListedExperts | None = None
    experts: GroupedExperts | None = None
    routing: Routing | None = None
    loss: SupervisedLoss | OwnLoss | None = None
    auxiliary: SharedAuxiliary | None = None  # that the model adds to it
    offload: InputOffload | NotOffloaded | None = None  # of layers' inputs
    working_copy: WorkingCopy | LentCopy | NoCopy | None = None

    def __str__(self) -> str:
        """A line for each part."""
        parts = {_title(field.name): getattr(self, field.name) for field in fields(self)}
        parts = {title: part for title, part in parts.items() if part is not None}
        width = max(map(len, parts), default=0)
        return "\n".join(f"{title:{width}}  {part}" for title, part in parts.items())

    @property
    def supervised_loss(self) -> SupervisedLoss | None:
        """None where the model has its own."""
        return self.loss if isinstance(self.loss, SupervisedLoss) else None


def _title(name: str) -> str:
    """ "Tiled MLPs" of tiled_mlps."""
    return name.replace("_", " ").capitalize().replace("mlps", "MLPs")


def parts_of(model: Any) -> Parts:
    """What is in a model; nothing, of one that ds_sft has not prepared."""
    found: Parts = getattr(model, "ds_sft", None) or Parts()
    return found
