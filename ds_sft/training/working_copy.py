"""A model's weights in bfloat16, made once a step of the float32 weights that the optimizer changes.

DeepSpeed's engine keeps such a copy; this is the same for training without it. Autocast instead casts every matrix in
each micro batch, again where activations are recomputed, and leaves norms and the residual in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


class WorkingCopy:
    """Lends a model 16-bit weights while it computes; gradients arrive at the float32 ones, in float32.

    The model's parameters, and so its optimizer, checkpoints and DistributedDataParallel, are the float32 weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.tables = [module._parameters for module in model.modules() if module._parameters]
        self.copies: dict[nn.Parameter, torch.Tensor] = {}

    @contextmanager
    def lent(self, *, keep: bool = False) -> Iterator[None]:
        """Compute with 16-bit weights here, backward included.

        Args:
            keep: the copies serve again, the weights do not change before; else their memory is given back.
        """
        masters = [dict(table) for table in self.tables]
        try:
            for table in self.tables:
                for name, master in table.items():
                    if master is not None and master.dtype == torch.float32:
                        table[name] = self._copy(master)  # type: ignore[assignment]
            yield
        finally:
            for table, own in zip(self.tables, masters, strict=True):
                table.update(own)
            if not keep:
                self.copies.clear()

    def _copy(self, master: nn.Parameter) -> torch.Tensor:
        """One for each parameter, wherever it is used; its gradient is summed in 16 bits over a micro batch's uses."""
        if master not in self.copies:
            self.copies[master] = master.to(self.dtype)
        return self.copies[master]
