"""Experts of a mixture by grouped products: the tokens of each expert lie together, and are multiplied at once.

transformers' loop over experts crawls in training: what it takes out of a tensor of all experts has, in backward, a
gradient of all experts, for each expert anew. On a GPU transformers' own `grouped_mm` is one kernel for all of them;
on a CPU each expert that has tokens costs one product a matrix, and their gradients are written where they belong
(benchmarks/experts.py has the speeds). A model looks its function up under a name, in transformers' one table of the
process, where ours is (`NAME`): no class and no other model changes.

Under ZeRO-3 all experts of a layer are gathered as the one tensor that they are in transformers. Where a model's own
code has a module for each, ranks whose tokens choose others would wait for each other for ever: DeepSpeed then gathers
the whole layer of them. Under DDP such ranks would end with an error, and under ZeRO-1 and 2 add gradients of different
experts to each other: there all experts have a gradient on every rank (`keep_experts_together`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ds_sft.model.autocast import HALF, autocast_dtype, without_autocast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Pairs of a token and an expert. For 16 bits oneDNN compiles a product for each new number of rows, which takes three
# times as long as the product: 2.4 ms the first time and 0.8 then (128 rows, 512 x 512, torch 2.13).
BLOCK = 16
BIAS = "e_score_correction_bias"  # DeepSeek-V3's way to balance experts; transformers has no update of it
NAME = "ds_sft_experts"  # as experts_implementation; transformers does not write it into a saved config


def experts_of(model: nn.Module) -> list[nn.Module]:
    """The modules that hold all experts of a layer as single tensors, in the order of the layers."""
    return [module for module in model.modules() if hasattr(module, "has_gate") and hasattr(module, "is_transposed")]


@dataclass(frozen=True)
class GroupedExperts:
    """How many experts a model has, and what multiplies the tokens of each together."""

    each_layer: int
    layers: int
    implementation: str
    fixed_bias: bool  # whether it has `BIAS`

    def __str__(self) -> str:
        how = f"{self.implementation} (transformers')"
        how = "one product an expert (ds_sft's)" if self.implementation == NAME else how
        kept = f"; {BIAS}, which balances them, stays as it is" if self.fixed_bias else ""
        return f"{self.each_layer} a layer, in {self.layers} of them, by {how}{kept}"


@dataclass(frozen=True)
class ListedExperts:
    """Modules with a list of experts, and how ranks whose tokens choose others train them together."""

    names: str  # of the modules' classes
    gathered: bool  # under ZeRO-3

    def __str__(self) -> str:
        if self.gathered:
            return f"{self.names} is gathered whole (under ZeRO-3 ranks whose tokens choose other experts would wait)"
        return f"those of {self.names} without tokens have gradients of zeros (ranks may choose others)"


def group_experts(model: PreTrainedModel, *, on_gpu: bool) -> GroupedExperts | None:
    """Let a model's experts be computed by grouped products; nothing for a dense model."""
    layers = experts_of(model)
    if not layers:
        return None
    if not on_gpu:
        model.set_experts_implementation(NAME)
    first: Any = layers[0]
    implementations = model.get_experts_implementation()  # of the model, and of a part of it that has its own
    name = implementations.get("text_config", implementations[""])
    biased = any(name.endswith(f".{BIAS}") for name, _ in model.named_buffers())
    return GroupedExperts(first.num_experts, len(layers), name, biased)


def keep_experts_together(model: nn.Module, *, ranks: int) -> ListedExperts | None:
    """Let ranks whose tokens choose other experts train together where a module has a list of experts."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    zero3 = is_deepspeed_zero3_enabled()
    found = [module for module in model.modules() if isinstance(getattr(module, "experts", None), nn.ModuleList)]
    if not found or (ranks == 1 and not zero3):
        return None
    names = ", ".join(sorted({type(module).__name__ for module in found}))
    if zero3:
        from deepspeed.utils import set_z3_leaf_module

        for module in found:
            set_z3_leaf_module(module, True)
        return ListedExperts(names, gathered=True)
    for module in found:
        module.register_forward_pre_hook(_let_all_take_part, with_kwargs=True)
    return ListedExperts(names, gathered=False)


def _let_all_take_part(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Before the forward of a module with a list of experts: see `_AllTakePart`, for its hidden states."""
    weights = [weight for weight in module.experts.parameters() if weight.requires_grad]
    if not weights or not torch.is_grad_enabled():
        return args, kwargs
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    place = next(place for place, value in given.items() if torch.is_tensor(value) and value.is_floating_point())
    given[place] = _AllTakePart.apply(given[place], *weights)  # type: ignore[no-untyped-call]
    return tuple(given[number] for number in range(len(args))), {name: given[name] for name in kwargs}


class _AllTakePart(torch.autograd.Function):
    """Hidden states as they are; in backward zeros for all weights of the experts behind them.

    It comes last in their backward, so that every gradient is complete here: in one order on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.zeros = [weight.new_zeros(()).expand_as(weight) for weight in weights]
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradient, *ctx.zeros


def expert_products(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What the chosen experts make of each token, in place of the forward of transformers' experts.

    Tokens are weighted before the second matrix, which is narrower there than behind it; a bias or a norm behind it
    has its weight for itself. All in the dtype of training; the sum over a token's experts in float32.

    Args:
        experts: a module whose class transformers' `use_experts_implementation` describes.
        hidden_states: [tokens, hidden].
        top_k_index: [tokens, k], the experts of each token.
        top_k_weights: [tokens, k].

    Returns:
        [tokens, hidden].
    """
    order = _Order(top_k_index, experts.num_experts, BLOCK if hidden_states.dtype in HALF else 1)
    weights = top_k_weights.reshape(-1)[order.pairs, None]
    first = "gate_up_proj" if experts.has_gate else "up_proj"
    inner = _linear(experts, first, _Dispatch.apply(hidden_states, order), order)  # type: ignore[no-untyped-call]
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(_linear(experts, "down_proj", inner, order)) * weights
    else:
        outer = _linear(experts, "down_proj", (inner * weights).to(inner.dtype), order, weights)
    found: torch.Tensor = _Combine.apply(outer, order)  # type: ignore[no-untyped-call]
    return found.to(hidden_states.dtype)


class _Order:
    """Pairs of a token and one of its experts, sorted by expert; each expert's are filled up to whole blocks."""

    def __init__(self, top_k_index: torch.Tensor, num_experts: int, block: int) -> None:
        """top_k_index: [tokens, k]; block: pairs. Pairs that fill a block up are copies of any, and count nothing."""
        self.k = top_k_index.shape[-1]
        chosen = top_k_index.reshape(-1)
        counts = torch.bincount(chosen, minlength=num_experts)
        ends = ((counts + block - 1) // block * block).cumsum(0)
        first = torch.cat([ends.new_zeros(1), ends[:-1]])  # place of each expert's first pair
        known = torch.argsort(chosen, stable=True)
        places = torch.arange(len(known)) + (first - counts.cumsum(0) + counts)[chosen[known]]
        self.pairs = known.new_zeros(int(ends[-1])).index_copy_(0, places, known)  # [places], which pair is there
        self.tokens = self.pairs // self.k  # [places], whose hidden state it has
        self.experts = torch.bucketize(torch.arange(len(self.pairs)), ends, right=True)  # [places]
        self.filled = torch.ones(len(self.pairs), dtype=torch.bool).index_fill_(0, places, value=False).nonzero()[:, 0]
        self.places = torch.empty_like(known).index_copy_(0, known, places)  # [tokens x k], where each pair is
        self.parts = [slice(*ends) for ends in zip(first.tolist(), ends.tolist(), strict=True)]  # of each expert

    def spread(self, states: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to [places, hidden]."""
        return states.index_select(0, self.tokens)

    def sum(self, states: torch.Tensor) -> torch.Tensor:
        """[places, hidden] to [tokens, hidden], the sums over each token's pairs."""
        return states.index_select(0, self.places).view(-1, self.k, states.shape[-1]).sum(1)


def _linear(
    experts: Any, name: str, states: torch.Tensor, order: _Order, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The product of each pair with its expert's matrix, and the bias, which counts `weights`; [places, out]."""
    matrices = getattr(experts, name)
    dtype = autocast_dtype(states.device) or matrices.dtype
    with without_autocast(states.device):
        product: torch.Tensor = _GroupedProduct.apply(  # type: ignore[no-untyped-call]
            states.to(dtype), matrices.to(dtype), order.parts, experts.is_transposed
        )
    if not experts.has_bias:
        return product
    bias = getattr(experts, f"{name}_bias").to(dtype).index_select(0, order.experts)
    added: torch.Tensor = product + (bias if weights is None else (bias * weights).to(dtype))
    return added


class _GroupedProduct(torch.autograd.Function):
    """Rows that belong to one expert, times its matrix: one product each, none for an expert without rows."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, matrices: torch.Tensor, parts: list[slice], transposed: bool
    ) -> torch.Tensor:
        """states: [rows, in], sorted by expert; matrices: [experts, out, in], `transposed`: [experts, in, out]."""
        ctx.save_for_backward(states, matrices)
        ctx.parts, ctx.transposed = parts, transposed
        product = states.new_empty(len(states), matrices.shape[2 if transposed else 1])
        for matrix, part in zip(matrices if transposed else matrices.mT, parts, strict=True):
            if part.start < part.stop:
                torch.mm(states[part], matrix, out=product[part])
        return product

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, matrices = ctx.saved_tensors
        of_states, of_matrices = (
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip((states, matrices), ctx.needs_input_grad, strict=False)
        )
        for expert, part in enumerate(ctx.parts):
            rows, some = gradient[part], part.start < part.stop
            if of_states is not None and some:
                torch.mm(rows, matrices[expert].mT if ctx.transposed else matrices[expert], out=of_states[part])
            if of_matrices is not None:  # without rows zeros: a sum over nothing
                one, other = (states[part], rows) if ctx.transposed else (rows, states[part])
                torch.mm(one.mT, other, out=of_matrices[expert]) if some else of_matrices[expert].zero_()
        return of_states, of_matrices, None, None


class _Dispatch(torch.autograd.Function):
    """[tokens, hidden] to [places, hidden]; autograd's own would scatter its gradient."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, order: _Order) -> torch.Tensor:
        ctx.order = order
        return order.spread(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.order.sum(gradient), None


class _Combine(torch.autograd.Function):
    """The other way round: the sum over each token's experts."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, order: _Order) -> torch.Tensor:
        ctx.order = order
        return order.sum(states)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.order.spread(gradient).index_fill_(0, ctx.order.filled, 0), None


ALL_EXPERTS_FUNCTIONS.register(NAME, torch.compiler.disable(expert_products))  # type: ignore[no-untyped-call]
