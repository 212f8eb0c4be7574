"""A model's weights in bfloat16, made once a step of the float32 weights that the optimizer changes.

DeepSpeed's engine keeps such a copy; this is the same for training without it. Autocast alone casts every matrix in
each micro batch, again where activations are recomputed, and leaves norms and the residual in float32. It stays on
around the copy, and rounds what a model multiplies in float32, such as a router. As in DeepSpeed's engine all float32
parameters have a copy, and buffers none.

One process computes with copies that are leaves of autograd and stay the same tensors for the whole run
(`WorkingCopy`): a step costs one call that casts them all, and their gradients reach the float32 weights some dozens at
a time. DistributedDataParallel hears of a gradient only where autograd brings it to the parameter itself, so under it
each weight is lent as part of the graph (`LentCopy`). Both give the same gradients, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Bytes of 16-bit gradients that wait to be cast together on a GPU, where a call costs more than casting a weight; on a
# CPU each is cast as it comes.
WAITING_BYTES = 64 * 2**20


@dataclass(frozen=True)
class NoCopy:
    """A model that computes with the weights it has."""

    why: str

    def __str__(self) -> str:
        return f"none ({self.why})"


def copy_weights(
    model: nn.Module, args: TrainingArguments, *, compiles_layers: bool = False
) -> WorkingCopy | LentCopy | NoCopy:
    """Prepare the copies that a training with these arguments computes with, where it does.

    Args:
        model: with its adapters, before DeepSpeed or DistributedDataParallel wrap it.
        args: its precision, engine and ranks.
        compiles_layers: each layer is compiled. (What is compiled would be compiled again for other weights.)
    """
    alone = args.world_size == 1
    if not args.bf16:
        return NoCopy("autocast casts weights to float16" if args.fp16 else "computed in float32")
    if args.deepspeed is not None:
        return NoCopy("DeepSpeed's engine has 16-bit weights")
    if not any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters()):
        return NoCopy("trained weights are bfloat16 themselves")
    if args.torch_compile or (compiles_layers and not alone):
        return NoCopy("autocast casts weights in what is compiled")
    return WorkingCopy(model) if alone else LentCopy(model)


class WorkingCopy:
    """16-bit weights that a model's modules have while it computes; gradients are summed in float32 at its own.

    The model's parameters, and so its optimizer and checkpoints, are the float32 weights.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype
        self.places: list[tuple[dict[str, Any], str, nn.Parameter]] = [  # where modules look for the float32 weights
            (module._parameters, name, parameter)
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and _is_master(parameter)
        ]
        self.copies: dict[nn.Parameter, nn.Parameter] = {}  # float32 weight -> its copy; made at the first use
        self.fresh = False  # whether they are what the weights are now
        self.waiting: dict[nn.Parameter, None] = {}  # weights whose gradient lies at the copy, in their order
        self.waiting_bytes = 0

    def __str__(self) -> str:
        number = len({master for _, _, master in self.places})
        return f"{number} weights in {_name(self.dtype)} for each step (what is trained stays float32)"

    @contextmanager
    def lent(self, *, keep: bool = False) -> Iterator[None]:
        """Compute with 16-bit weights here, forward and backward of one micro batch.

        Args:
            keep: the values serve again, for the weights do not change before.
        """
        self._refresh()
        for table, name, master in self.places:
            table[name] = self.copies[master]
        try:
            yield
            self._bring_gradients()
        finally:
            for table, name, master in self.places:
                table[name] = master
            self._forget_gradients()
            self.fresh = keep
            if not keep:
                self._give_back()

    @torch.no_grad()
    def _refresh(self) -> None:
        if not self.copies:
            self.copies = {master: self._make(master) for _, _, master in self.places}
        if self.copies and not self.fresh:
            for copy in self.copies.values():
                held, wanted = copy.untyped_storage(), copy.numel() * copy.element_size()
                if held.nbytes() != wanted:  # CUDA would take new memory for the same size, and copy the old values
                    held.resize_(wanted)
            torch._foreach_copy_(list(self.copies.values()), list(self.copies))
            self.fresh = True

    def _give_back(self) -> None:
        """The memory of the values on a CPU, where allocating costs nothing; on a GPU they stay where they are."""
        for copy in self.copies.values():
            if copy.device.type == "cpu":
                copy.untyped_storage().resize_(0)

    def _make(self, master: nn.Parameter) -> nn.Parameter:
        copy = nn.Parameter(torch.empty_like(master, dtype=self.dtype), requires_grad=master.requires_grad)
        if master.requires_grad:
            owner = ref(self)  # what a hook refers to is out of the collector's sight: copies would never be freed

            def arrived(leaf: torch.Tensor) -> None:
                if (lender := owner()) is not None:
                    lender._arrived(master, leaf)

            copy.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
        return copy

    def _arrived(self, master: nn.Parameter, leaf: torch.Tensor) -> None:
        if master not in self.waiting:  # one that several recomputed parts use comes more than once
            self.waiting[master] = None
            self.waiting_bytes += leaf.numel() * leaf.element_size()
        if self.waiting_bytes > _waiting_limit(master):
            self._bring_gradients()

    @torch.no_grad()
    def _bring_gradients(self) -> None:
        """Add what waits to the gradients of the float32 weights."""
        first = [master for master in self.waiting if master.grad is None]
        sums = [master.grad for master in self.waiting if master.grad is not None]
        later = [self._gradient(master) for master in self.waiting if master.grad is not None]
        if first:
            made = [torch.empty_like(master) for master in first]
            torch._foreach_copy_(made, [self._gradient(master) for master in first])
            for master, gradient in zip(first, made, strict=True):
                master.grad = gradient
        if sums:  # in float32 first: of two dtypes CUDA would add each weight by itself
            wide = [torch.empty_like(gradient) for gradient in sums]
            torch._foreach_copy_(wide, later)
            torch._foreach_add_(sums, wide)
        self._forget_gradients()

    def _gradient(self, master: nn.Parameter) -> torch.Tensor:
        gradient = self.copies[master].grad
        assert gradient is not None
        return gradient

    def _forget_gradients(self) -> None:
        for master in self.waiting:
            self.copies[master].grad = None
        self.waiting.clear()
        self.waiting_bytes = 0


class LentCopy:
    """The same for DistributedDataParallel, whose hooks are at the float32 weights: gradients reach them by autograd.

    A loan made at a weight's first use has its turn in backward as soon as its gradient is there; those made before
    the whole forward would have theirs after the whole backward.
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

    def __str__(self) -> str:
        return f"weights in {_name(self.dtype)} for each step, lent at their first use (what is trained stays float32)"

    @contextmanager
    def lent(self, *, keep: bool = False) -> Iterator[None]:
        """As `WorkingCopy.lent`; without `keep` the memory of the values is given back."""
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
        """Called before a module's forward."""
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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _waiting_limit(master: torch.Tensor) -> int:
    return 0 if master.device.type == "cpu" else WAITING_BYTES


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
