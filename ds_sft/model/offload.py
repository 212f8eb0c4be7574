"""What checkpointing keeps of a layer, its input, in host memory between forward and backward.

With `activation_checkpointing: yes` a layer's input [batch, seq, hidden] is all that stays of it, and of a long row all
of them are what fills a GPU. Here each is copied into pinned host memory while its layer computes, freed on the device
when the next layer's copy begins, and copied back while the layer above goes backward. Both ways run in a stream of
their own, and computation waits for a copy only where it needs what is copied. Copies are exact: so are losses and
gradients. The input of the last layer, which goes backward at once, stays on the device.

PyTorch's `save_on_cpu`, which transformers uses (`activation_checkpointing_kwargs: {offload: true}`), copies in the
stream that computes, and takes pinned memory anew for every tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol
from weakref import ref

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.size import in_units
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.host import free_memory_here
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

# Bytes of a host buffer. A layer's input has as many as it takes, so that micro batches of any size share them; PyTorch
# rounds pinned memory up to a power of two. At 50 GB/s it is 0.7 ms of copying.
BUFFER = 32 * 2**20


class Copies(Protocol):
    """How bytes come from the device to the host and back, beside computation and in the order they are asked for."""

    def buffer(self, size: int) -> torch.Tensor:
        """Host memory, [size] bytes."""

    def begin(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        """Begin to copy each second tensor into the first, when what computes by now is done; returns a mark."""

    def wait(self, mark: Any) -> None:
        """Let what computes from here on begin after the copies of a mark."""


class StreamCopies:
    """`Copies` in a CUDA stream of their own; the host waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def buffer(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def begin(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            mark: torch.cuda.Event = self.stream.record_event()
        return mark

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.stream.device).wait_event(mark)


class InputOffload:
    """The inputs of a model's checkpointed layers in host buffers, which serve again in every micro batch.

    A device tensor is given up only after computation was told to wait for its copy, so the allocator may give its
    memory to whatever computes next. (`record_stream` would have the allocator ask whether copies are done: a host that
    runs ahead of the device would find that they are not, and take more memory.)
    """

    def __init__(self, copies: Copies, buffer_bytes: int = BUFFER, *, layers: int = 0, size: int = 0) -> None:
        """`layers`: whose inputs leave the device; `size`: bytes of the largest of these."""
        self.copies, self.buffer_bytes, self.layers, self.size = copies, buffer_bytes, layers, size
        self.free: list[torch.Tensor] = []  # buffers that nothing lies in
        self.leaving: Leaving | None = None
        self.newest: ref[Kept] | None = None

    def __str__(self) -> str:
        return (
            f"the inputs of {self.layers} layers, up to {in_units(self.size)} each, wait in pinned host memory: "
            f"{in_units(host_bytes(self.layers, self.size, self.buffer_bytes))} a rank at most; the last layer's stays"
        )

    def wrap(self, model: nn.Module) -> None:
        """Take the place of the checkpoint function that transformers has given to a model's layers."""
        layers = [layer for layer in layers_of(model) if layer.gradient_checkpointing]
        for layer in layers:
            layer._gradient_checkpointing_func = partial(
                self.checkpoint, layer._gradient_checkpointing_func, layer is layers[-1]
            )

    def checkpoint(self, inner: Callable[..., Any], stays: bool, function: Callable[..., Any], *args: Any) -> Any:
        """`inner(function, *args)`, whose hidden states, the first of `args`, wait on the host; `stays`: they do not.

        The hooks see what `inner` keeps for recomputation; what is saved inside of it has its own.
        """
        hidden = [args[0]]

        def pack(tensor: torch.Tensor) -> torch.Tensor | Kept:
            return self._keep(tensor, stays=stays) if tensor.is_set_to(hidden[0]) else tensor

        try:
            with saved_tensors_hooks(pack, self._restore):
                return inner(function, *args)
        except BaseException:
            self._settle()  # nothing of this pass stays
            raise
        finally:
            hidden.clear()  # autograd keeps hooks as long as what they have packed
            if stays:
                self._settle()

    def _keep(self, tensor: torch.Tensor, *, stays: bool) -> Kept:
        """Begin to copy a layer's input to the host. Before that the one of the layer below is freed."""
        self._settle()
        kept = Kept(self, tensor, below=self.newest)
        self.newest = ref(kept)
        if stays:
            kept.here = tensor.detach()
            return kept
        source = tensor.detach().contiguous()
        pieces = self._pieces(source)
        kept.buffers = [self.free.pop() if self.free else self.copies.buffer(self.buffer_bytes) for _ in pieces]
        pairs = ((buffer[: len(piece)], piece) for buffer, piece in zip(kept.buffers, pieces, strict=True))
        self.leaving = Leaving(source, self.copies.begin(pairs))
        return kept

    def _settle(self) -> None:
        """Free on the device what has gone to the host."""
        if self.leaving is not None:
            self.copies.wait(self.leaving.mark)
            assert self.leaving.source._version == self.leaving.version, "a layer has changed its input in place"
            self.leaving = None

    def _restore(self, kept: torch.Tensor | Kept) -> torch.Tensor:
        """What was kept, on the device; the layer below, which goes backward next, begins to get its own."""
        if isinstance(kept, torch.Tensor):
            return kept
        self._fetch(kept)
        if kept.coming is not None:
            self.copies.wait(kept.coming)
            kept.coming = None
        below = kept.below() if kept.below is not None else None
        if below is not None:
            self._fetch(below)
        found = kept.here
        assert found is not None
        if kept.buffers:
            kept.here = None
        return found

    def _fetch(self, kept: Kept) -> None:
        if kept.here is None:
            kept.here = torch.empty(kept.shape, dtype=kept.dtype, device=kept.device)
            pieces = self._pieces(kept.here)
            pairs = ((piece, buffer[: len(piece)]) for buffer, piece in zip(kept.buffers, pieces, strict=True))
            kept.coming = self.copies.begin(pairs)

    def _pieces(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The bytes of a contiguous tensor, a buffer's at a time."""
        return torch.split(tensor.view(-1).view(torch.uint8), self.buffer_bytes)


class Leaving:
    """A device tensor that is being copied to the host."""

    def __init__(self, source: torch.Tensor, mark: Any) -> None:
        self.source, self.mark, self.version = source, mark, source._version


class Kept:
    """A layer's input, as autograd keeps it: in host buffers, on the device, or on its way back."""

    def __init__(self, owner: InputOffload, tensor: torch.Tensor, below: ref[Kept] | None) -> None:
        self.owner, self.below = owner, below
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.buffers: list[torch.Tensor] = []
        self.here: torch.Tensor | None = None
        self.coming: Any = None  # the mark of copies into `here`

    def __del__(self) -> None:
        """Backward is done with it, or will never come: a copy may be under way, whose target is freed now."""
        if self.coming is not None:
            self.owner.copies.wait(self.coming)
        self.owner.free += self.buffers


def layers_of(model: nn.Module) -> list[Any]:
    """The layers of a model that transformers can compute again in backward, in their order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@dataclass(frozen=True)
class NotOffloaded:
    """Layers' inputs that stay where they are."""

    why: str

    def __str__(self) -> str:
        return f"none ({self.why})"


def offload_inputs(
    model: PreTrainedModel, config: Config, args: TrainingArguments, launch: Launch, *, largest: int
) -> InputOffload | NotOffloaded | None:
    """Under `activation_checkpointing: offload` prepare it; None where nobody asks.

    The Trainer wraps the layers when checkpointing is switched on. All ranks must call it.

    Args:
        model: before DeepSpeed or DistributedDataParallel wrap it.
        largest: tokens of the largest micro batch, padding included.

    Raises:
        UserError: a model whose code checkpoints its layers itself, or a machine that has less memory free than its
            ranks would keep there.
    """
    if not config.offloads:
        return None
    layers = len(layers_of(model))
    if layers == 0:
        raise UserError(
            f"activation_checkpointing: offload: {type(model).__name__} checkpoints its layers in its own code, where "
            "their inputs cannot be taken: write yes"
        )
    if args.device.type != "cuda":
        return NotOffloaded("activations are in host memory already: the same as yes here")
    every = (config.training.get("activation_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    away = -(-layers // every) - 1  # layers that give their input away
    size = input_bytes(model, args, largest)
    buffer_bytes = min(BUFFER, 1 << (size - 1).bit_length())
    require_host_memory(host_bytes(away, size, buffer_bytes), launch)
    return InputOffload(StreamCopies(args.device), buffer_bytes, layers=away, size=size)


def host_bytes(layers: int, size: int, buffer_bytes: int) -> int:
    """What the inputs of so many layers, of `size` bytes each, take in whole buffers."""
    return layers * -(-size // buffer_bytes) * buffer_bytes


def input_bytes(model: PreTrainedModel, args: TrainingArguments, tokens: int) -> int:
    """Bytes of a layer's input. Where autocast casts for float16 alone, what passes between layers is float32."""
    half = args.bf16 or (args.fp16 and args.deepspeed is not None)
    return tokens * int(model.config.get_text_config().hidden_size) * (2 if half else 4)


def require_host_memory(needed: int, launch: Launch) -> None:
    """See that each machine has `needed` bytes free for each of its ranks; all ranks must call it.

    Raises:
        UserError: one has not.
    """
    for rank, (free, ranks) in enumerate(gather((free_memory_here(), launch.local_world_size))):
        if free is not None and free < needed * ranks:
            each = f" for each of {ranks} ranks" if ranks > 1 else ""
            raise UserError(
                f"activation_checkpointing: offload: the layers' inputs take {in_units(needed)} of pinned host memory"
                f"{each}, the machine of rank {rank} has {in_units(free)} free: write a smaller micro batch "
                "(max_tokens_per_batch, max_length), or yes"
            )
