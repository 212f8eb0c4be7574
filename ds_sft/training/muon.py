"""Muon for the matrices between embedding and output projection, AdamW for all else, as one optimizer.

Muon (Jordan, 2024, kellerjordan.github.io/posts/muon) makes a momentum's singular values about equal, and keeps one
state where AdamW has two. Steps are as long as AdamW's (Liu et al., 2502.16982, equation 4), so the same learning rate
and decay serve. Under ZeRO a rank has parts of matrices: DeepSpeed's Muon sees them whole where it reduces gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any

import torch
from torch import nn

from ds_sft.errors import UserError

MOMENTUM = 0.95  # torch's and DeepSpeed's default


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW, with one list of parameter groups and one state between them."""

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **adamw: Any) -> None:
        """Groups as optimizers take them; `adamw` are options of AdamW, of which Muon takes `lr`.

        What is not fused has two to three copies of an embedding at a time.
        """
        muon = torch.optim.Muon(matrices, lr=adamw["lr"], momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        self.parts: list[torch.optim.Optimizer] = [muon, torch.optim.AdamW(others, fused=True, **adamw)]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both have the groups and states of this optimizer, whose they are for Trainer and checkpoints."""
        numbers = [len(part.param_groups) for part in self.parts]
        self.parts[0].param_groups = self.param_groups[: numbers[0]]
        self.parts[1].param_groups = self.param_groups[numbers[0] :]
        for part in self.parts:
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        muon, adamw = self.parts
        loss: float | None = muon.step(closure)  # gradients of both are there then
        adamw.step()
        return loss


def muon_of(model: nn.Module, *, weight_decay: float, **adamw: Any) -> MuonAndAdamW:
    """The optimizer of what is trained of a model; biases and norms without decay, as Trainer has it.

    Raises:
        UserError: no matrix is trained, or no other weight.
    """
    matrices, others = _trained(model, weight_decay)
    return MuonAndAdamW([{"params": matrices, "weight_decay": weight_decay}], others, **adamw)


def partitioned_muon_of(model: nn.Module, *, weight_decay: float, **adamw: Any) -> torch.optim.Optimizer:
    """The same training for ZeRO, by DeepSpeed's Muon.

    Its update of [rows, columns] is sqrt(max(1, rows / columns)) long, that of `muon_of` 0.2 sqrt(max(rows, columns)):
    0.2 sqrt(columns) times as long. Matrices of a width share a group with a rate that makes up for it, and a decay
    that takes it back. AdamW's groups come first, whose rate is the run's and is logged.

    Raises:
        UserError: no matrix is trained, or no other weight.
    """
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    matrices, others = _trained(model, weight_decay)
    groups = [{**group, **adamw, "use_muon": False} for group in others]
    for width, same in groupby(sorted(matrices, key=_width), _width):
        longer = 0.2 * math.sqrt(width)
        groups.append({"params": list(same), "lr": adamw["lr"] * longer, "weight_decay": weight_decay / longer,
                       "momentum": MOMENTUM, "ns_method": "standard", "use_muon": True})  # fmt: skip
    for parameter in matrices:
        parameter.use_muon = True  # type: ignore[attr-defined]  # ZeRO asks each parameter
    made: torch.optim.Optimizer = MuonWithAuxAdam(groups, torch.optim.AdamW, {**adamw, "fused": True})
    return made


def _trained(model: nn.Module, weight_decay: float) -> tuple[list[nn.Parameter], list[dict[str, Any]]]:
    """Matrices that Muon updates, and AdamW's groups of all else: biases and norms without decay."""
    inside = hidden_matrices(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter in inside]
    others = [parameter for parameter in trained if parameter not in inside]
    if not (matrices and others):
        raise UserError("optim: muon: it wants hidden matrices and other weights to train: write optim: adamw_torch")
    wide, flat = ([p for p in others if (len(_shape(p)) > 1) is several] for several in (True, False))
    split: Iterable[tuple[list[nn.Parameter], float]] = ((wide, weight_decay), (flat, 0.0))
    return matrices, [{"params": group, "weight_decay": decay} for group, decay in split if group]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The whole weight's: stage 3 leaves an empty one in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _width(matrix: nn.Parameter) -> int:
    return _shape(matrix)[1]


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """The weights of linear layers, but of those that are the embedding or the output projection."""
    ends = {parameter for module in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
            for parameter in module.parameters()}  # fmt: skip
    found: set[Any] = {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    return found - ends
