"""The MLP of a layer for some of its tokens at a time: what is between its matrices exists for one tile only.

A gated MLP makes four tensors of [tokens, intermediate] and as many gradients: of a long row they are most of what the
layer under way takes. Each token is computed by itself, so tiles give the same output. In backward each tile is
computed again, and the gradients of the weights are summed over tiles in float32, in one place: autograd, and with it
DistributedDataParallel, ZeRO and the working copy, gets each once. A layer that is computed again in backward anyway
ends where its MLP begins, and the products are as many as without tiles (but for families with a norm behind the MLP).

DeepSpeed's `TiledMLP` (`runtime/sequence_parallel/ulysses_sp.py`, 0.19.8) computes the MLP three times under
checkpointing. Its backward runs one for each tile, which reaches the weights each time: it tells ZeRO to wait for the
last, and DistributedDataParallel ends with an error; sums over tiles are of 16 bits; and autocast is off in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.autocast import HALF, autocast_dtype
from ds_sft.model.experts import experts_of
from ds_sft.model.fused import GATED, body_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

TILE = 4096  # tokens: products of that many rows fill a GPU
# `auto` where the largest micro batch has as many tokens, four tiles: below, the intermediates of one MLP are small
# beside weights and states (16,384 tokens of Qwen3-8B's width in bfloat16: 2.6 GiB with their gradients).
MANY = 4 * TILE
# And where the MLP is most of its layer: numbers a token between its matrices and their gradients, in sizes of the
# intermediate; beside them norms, attention and the residual's gradients, in sizes of the hidden state.
INNER, OUTER = 7, 16


class TiledMLP:
    """The forward of an MLP, in place of its own: a tile at a time where there is more than one."""

    def __init__(self, mlp: nn.Module) -> None:
        self.mlp, self.own = mlp, mlp.forward

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """[..., hidden], any number of dimensions; so is what comes out."""
        if states.shape[:-1].numel() <= TILE:
            made: torch.Tensor = self.own(states)
            return made
        weights = [weight for weight in self.mlp.parameters() if weight.requires_grad]
        place: torch.Tensor = _Place.apply(states, self.own, *weights)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            made = self._compute(states)
        filled: torch.Tensor = _Filled.apply(place, made)  # type: ignore[no-untyped-call]
        return filled

    def _compute(self, states: torch.Tensor) -> torch.Tensor:
        made = states.new_empty(states.shape, dtype=autocast_dtype(states.device) or states.dtype)
        rows, flat = made.view(-1, made.shape[-1]), states.reshape(-1, states.shape[-1])
        for part in tiles(len(flat)):
            rows[part] = self.own(flat[part])
        return made


def tiles(tokens: int) -> Iterator[slice]:
    """As few parts of at most `TILE` tokens as there may be, about equal."""
    number = -(-tokens // TILE)
    return (slice(tokens * i // number, tokens * (i + 1) // number) for i in range(number))


class _Place(torch.autograd.Function):
    """Stands for the output of an MLP that is yet to be computed, without memory; has the MLP's backward.

    A checkpointed layer is computed again up to the last tensor that it has saved. So what the MLP saves comes before
    its products, which backward computes by themselves.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, own: Callable[[torch.Tensor], torch.Tensor], *weights: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(states)
        ctx.own, ctx.weights = own, weights  # not saved: ZeRO-3 has gathered them again by then, in the same tensors
        ctx.autocast = autocast_dtype(states.device)
        return states.new_empty((), dtype=ctx.autocast or states.dtype).expand(states.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (states,) = ctx.saved_tensors
        width, wanted = states.shape[-1], ctx.needs_input_grad[0]
        flat, gradients = states.reshape(-1, width), gradient.reshape(-1, width)
        of_states = torch.empty_like(flat) if wanted else None
        sums: list[torch.Tensor | None] = [None] * len(ctx.weights)
        with torch.autocast(states.device.type, dtype=ctx.autocast, enabled=ctx.autocast is not None):
            for part in tiles(len(flat)):
                tile = flat[part].detach().requires_grad_(wanted)
                with torch.enable_grad():
                    made = ctx.own(tile)
                inputs = [*([tile] if wanted else []), *ctx.weights]
                found = list(torch.autograd.grad(made, inputs, gradients[part], allow_unused=True))
                if of_states is not None:
                    of_states[part] = found.pop(0)
                sums = [_sum(total, more) for total, more in zip(sums, found, strict=True)]
        of_weights = (
            None if total is None else total.to(weight.dtype) for total, weight in zip(sums, ctx.weights, strict=True)
        )
        return None if of_states is None else of_states.view(states.shape), None, *of_weights


def _sum(total: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """In float32 at least."""
    if total is None or more is None:
        return more.float() if more is not None and more.dtype in HALF else more
    return total.add_(more)


class _Filled(torch.autograd.Function):
    """What was computed, in the place of what stands for it."""

    @staticmethod
    def forward(ctx: Any, place: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Tiling:
    """How many MLPs of a model compute tiles, and for what micro batches, or why none does."""

    mlps: int
    why: str

    def __str__(self) -> str:
        return f"{f'{self.mlps}, of at most {TILE:,} tokens at a time' if self.mlps else 'none'} ({self.why})"


def tile_mlps(model: PreTrainedModel, config: Config, args: TrainingArguments, *, largest: int) -> Tiling | None:
    """As `tiled_mlp` asks, let the MLPs of a model compute tiles; None where nobody asks, and they would not pay.

    Under ZeRO-3 the weights of such an MLP are gathered together, once a call: ranks may have other numbers of tiles.

    Args:
        model: with its adapters and fused kernels, before DeepSpeed or DistributedDataParallel wrap it.
        largest: tokens of the largest micro batch, padding included.

    Raises:
        UserError: `tiled_mlp: yes`, and nothing of this model can be tiled.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if config.tiled_mlp == "no" or (config.tiled_mlp == "auto" and not pays(model, config, args, largest)):
        return None
    found = [] if has_experts(model) else [module for module in model.modules() if is_plain(module)]
    if not found:
        plain = f"{type(model).__name__} has no gated MLP without dropout"
        why = "a mixture of experts computes few tokens at a time" if has_experts(model) else plain
        if config.tiled_mlp == "yes":
            raise UserError(f"tiled_mlp: yes: {why}: write auto or no")
        return Tiling(0, why)
    for module in found:
        module.forward = TiledMLP(module)
        if is_deepspeed_zero3_enabled():
            from deepspeed.utils import set_z3_leaf_module

            set_z3_leaf_module(module, True)
    return Tiling(len(found), f"micro batches have up to {largest:,}")


def pays(model: PreTrainedModel, config: Config, args: TrainingArguments, largest: int) -> bool:
    """What `auto` comes to: tiles where they cost no product, as each layer is computed again, and memory is theirs."""
    options = dict(args.activation_checkpointing_kwargs or {})
    compiled = args.torch_compile or config.fused_kernels == "compile"
    by_graph = not options.get("use_reentrant", True) and options.get("every_n_layers", 1) == 1
    again = args.activation_checkpointing and by_graph
    if compiled or not again or largest < MANY:
        return False
    shape = model.config.get_text_config()
    return bool(INNER * getattr(shape, "intermediate_size", 0) >= OUTER * shape.hidden_size)


def has_experts(model: nn.Module) -> bool:
    """Whether experts compute some tokens each: few at a time as it is."""
    lists = (module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.ModuleList))
    return bool(experts_of(model)) or any(True for _ in lists)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a gated MLP, known by its text, of which each token is computed the same again."""
    drops = any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules())
    return body_of(type(module).forward) == GATED and not drops
