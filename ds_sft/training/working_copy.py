"""A model's weights in bfloat16, made once a step of the float32 weights that the optimizer changes.

DeepSpeed's engine keeps such a copy; this is the same for training without it. Autocast alone casts every matrix in
each micro batch, again where activations are recomputed, and leaves norms and the residual in float32. It stays on
around the copy: it casts weights that a module reads of another one without calling it (Mamba), and rounds what a model
multiplies in float32, such as a router. As in DeepSpeed's engine all float32 parameters have a copy, and buffers none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class WorkingCopy:
    """Lends a model's modules 16-bit weights while it computes; gradients arrive at the float32 ones, in float32.

    The model's parameters, and so its optimizer, checkpoints and DistributedDataParallel, are the float32 weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.values: dict[nn.Parameter, torch.Tensor] = {}  # in 16 bits
        self.loans: dict[nn.Parameter, torch.Tensor] = {}  # the same as part of the pass under way
        self.lenders: list[tuple[dict[str, Any], str, nn.Parameter]] = []  # where to put the float32 weights back
        self.lending = False
        for module in model.modules():
            if any(_is_master(p) for p in module._parameters.values()):
                module.register_forward_pre_hook(self._lend)

    @contextmanager
    def lent(self, *, keep: bool = False) -> Iterator[None]:
        """Compute with 16-bit weights here, forward and backward of one micro batch.

        Args:
            keep: the values serve again, for the weights do not change before; else their memory is given back.
        """
        self.lending = True
        try:
            yield
        finally:
            self.lending = False
            for table, name, master in self.lenders:
                table[name] = master
            self.lenders.clear()
            self.loans.clear()
            if not keep:
                self.values.clear()

    def _lend(self, module: nn.Module, args: Any) -> None:
        """Called before a module's forward.

        A loan made at a weight's first use has its turn in backward as soon as its gradient is there; those made before
        the whole forward would have theirs after the whole backward.
        """
        if not self.lending:
            return
        table: dict[str, Any] = module._parameters
        for name, master in table.items():
            if _is_master(master):
                self.lenders.append((table, name, master))
                table[name] = self._loan(master)

    def _loan(self, master: nn.Parameter) -> torch.Tensor:
        """One for each weight, in however many places it is used: its gradient is their sum, in 16 bits."""
        if master not in self.values:
            self.values[master] = master.detach().to(self.dtype)
        if master not in self.loans:
            with torch.enable_grad():  # reentrant checkpointing's forward is without: the weight would be cut off
                self.loans[master] = _Loan.apply(master, self.values[master])  # type: ignore[no-untyped-call]
        return self.loans[master]


def _is_master(parameter: Any) -> bool:
    return isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32


class _Loan(torch.autograd.Function):
    """The 16-bit values of a weight; gradients go back to the weight itself."""

    @staticmethod
    def forward(ctx: Any, master: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return values.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.float(), None
