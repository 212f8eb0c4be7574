"""Where the tokens of a mixture of experts go: counted for the log, and balanced by the model's auxiliary loss.

A model's load balancing loss is N x sum over experts of f_e x P_e: the share of tokens that goes to expert e, times
the mean of its probabilities (Switch Transformer, arXiv 2101.03961). Models compute it of one micro batch on one rank.
`LoadBalancing` does it of a step, as Qwen's global-batch balancing (arXiv 2501.11873): both are sums over the tokens of
all micro batches and ranks, and the loss of a step is the same however its rows are split.

So is its gradient on any number of ranks. It is that of P_e alone, as nothing flows through a count: the sum over pairs
of micro batches of one's counts times the gradient of the other's probabilities. Of a pair the first micro batch has
lost its graph when the second one's counts come. So the counts of the first with the gradient of the second stand for
both, twice: each pair once, and over all orders of the micro batches the mean is the gradient of the step. With one
micro batch a step and rank there are no pairs, and the gradient is exact. (The counts so far over the tokens so far,
as Qwen and Megatron have them, count the first micro batches' own pairs for too much: twice the error, measured.)
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from ds_sft.data.batch import METADATA, BatchMetadata
from ds_sft.errors import UserError
from ds_sft.model.experts import GroupedExperts, experts_of, group_experts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BALANCING = "load_balancing_loss_func"
# How a model's forward computes and adds its load balancing loss, of which `LoadBalancing` computes that of a step.
CALL = f"{BALANCING}(outputs.router_logits, self.num_experts, self.num_experts_per_tok, attention_mask)"
ADDED = "loss += self.router_aux_loss_coef * aux_loss.to(loss.device)"


def counted_tokens(kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Which tokens of a batch a row has, [tokens] bool; None: all of them.

    Left out are padding, what fills up a part of a sequence, and what stands in for a missing row, which is one token
    long: no row that teaches is.
    """
    metadata: BatchMetadata | None = kwargs.get(METADATA)
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    ids = kwargs["input_ids"]
    if metadata is not None and metadata.share is not None:
        return metadata.of_rows().to(ids.device, non_blocking=True) if metadata.share.filling else None
    if mask is None and (metadata is None or min(metadata.lengths) > 1):
        return None
    counted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if metadata is None or min(metadata.lengths) > 1:
        return counted.flatten()
    lengths = torch.tensor(metadata.lengths)  # on the host, which does not wait for the device to get what follows
    rows = (lengths > 1).repeat_interleave(lengths)[None] if mask is None else (lengths > 1)[:, None]
    return (counted & rows.to(ids.device, non_blocking=True)).flatten()


class Routing:
    """Counts the tokens of each expert of each layer, on the device, until they are read; `balancing`: see there."""

    def __init__(self, model: PreTrainedModel, balancing: LoadBalancing | None, device: torch.device) -> None:
        layers: list[Any] = experts_of(model)
        self.balancing = balancing
        self.counted: torch.Tensor | None = None  # of the batch under way, as `counted_tokens` has it
        self.counts = [torch.zeros(layer.num_experts, dtype=torch.int64, device=device) for layer in layers]
        self.chosen = 1  # experts a token
        model.register_forward_pre_hook(self._take_batch, with_kwargs=True)
        for layer, counts in zip(layers, self.counts, strict=True):
            layer.register_forward_pre_hook(partial(self._count, counts))

    def __str__(self) -> str:
        counted = "tokens of each expert are counted, " if self.counts else ""
        if self.balancing is None:
            return f"{counted}no load balancing loss"
        return f"{counted}load balancing loss of a step (times {self.balancing.model.router_aux_loss_coef:g})"

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _take_batch(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.counted = counted_tokens(kwargs) if model.training else None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _count(self, counts: torch.Tensor, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Before an experts' forward: args has [tokens, k], the experts of each token, second.

        What is computed again in backward is counted again, in every layer alike.
        """
        if not experts.training:
            return
        chosen = args[1]
        self.chosen = chosen.shape[-1]
        weights = torch.ones_like(chosen) if self.counted is None else self.counted.to(chosen.dtype)[:, None]
        counts.scatter_add_(0, chosen.flatten(), weights.expand_as(chosen).flatten())

    @property
    def balances_step(self) -> bool:
        """Whether the load balancing loss of a step is under way."""
        return self.balancing is not None and self.balancing.tokens is not None

    def begin_step(self, tokens: torch.Tensor) -> None:
        """A step begins; tokens: of the rows of all its micro batches and ranks."""
        if self.balancing is not None:
            self.balancing.begin(tokens)

    def part_of_step(self, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`LoadBalancing.loss` of the batch under way."""
        assert self.balancing is not None
        return self.balancing.loss(router_logits, self.counted)

    def logged(self) -> dict[str, float]:
        """Shares of the tokens since the last call that the fullest and the emptiest expert got, of any layer.

        With k of N experts a token each has k / N of them where all are equally full. All ranks must call it.
        """
        found = self.balancing.logged() if self.balancing is not None else {}
        if not self.counts:
            return found
        counts = self._of_all_ranks()
        for kept in self.counts:
            kept.zero_()
        shares = counts * self.chosen / counts.sum(-1, keepdim=True).clamp(min=1)
        fullest, emptiest = torch.stack([shares.max(), shares.min()]).tolist()
        return found | {"expert_share_max": round(fullest, 6), "expert_share_min": round(emptiest, 6)}

    def state(self) -> dict[str, Any]:
        """What `logged` would tell of, of all ranks, for a checkpoint's JSON; all ranks must call it."""
        counts = self._of_all_ranks().tolist() if self.counts else []
        aux_loss = [self.balancing.total.item(), self.balancing.steps] if self.balancing is not None else None
        return {"counts": counts, "chosen": self.chosen, "aux_loss": aux_loss}

    def restore(self, state: dict[str, Any], *, is_main: bool) -> None:
        """Take up a `state`; counts that were of all ranks, maybe of another number of them, go on on rank 0."""
        self.chosen = state["chosen"]
        for kept, counts in zip(self.counts, state["counts"], strict=True):
            kept.copy_(torch.tensor(counts) * is_main)
        if self.balancing is not None and state["aux_loss"] is not None:
            total, self.balancing.steps = state["aux_loss"]
            self.balancing.total = torch.tensor(total)

    def _of_all_ranks(self) -> torch.Tensor:
        """The counts, [layers, experts]."""
        counts = torch.stack(self.counts)
        if dist.is_initialized():
            dist.all_reduce(counts)
        return counts


def prepare_experts(
    model: PreTrainedModel, *, device: torch.device, aux_loss_coef: float | None = None, reentrant: bool = False
) -> tuple[GroupedExperts | None, Routing | None]:
    """Let a mixture of experts compute fast, count its tokens, and balance them over a step; nothing for dense models.

    Args:
        model: before DeepSpeed or DistributedDataParallel wrap it.
        device: on which the model computes.
        aux_loss_coef: what its load balancing loss counts, 0: nothing; None: as the model's configuration says.
        reentrant: layers are computed again in backward, and without a graph before.

    Raises:
        UserError: a coefficient for a model without such a loss, or a loss that would have no gradient.
    """
    balancing = balancing_of(model, aux_loss_coef)
    if balancing is not None and reentrant:
        raise UserError(
            "activation_checkpointing_kwargs: use_reentrant: true: routers would learn nothing from the load balancing "
            "loss: leave it out, or write router_aux_loss_coef: 0"
        )
    grouped = group_experts(model, on_gpu=device.type == "cuda")
    if balancing is None and grouped is None:
        return None, None
    return grouped, Routing(model, balancing, device)


class LoadBalancing:
    """A model's load balancing loss of a whole step, a micro batch at a time: see the module."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model
        self.tokens: torch.Tensor | None = None  # of the step under way; None: none was announced
        self.so_far = torch.zeros(2, self.model.num_experts)  # its `sums_over_tokens` until now, over all ranks
        self.value = torch.zeros(())  # their loss
        self.total, self.steps = torch.zeros(()), 0  # sum of the steps' losses since the last log entry

    def begin(self, tokens: torch.Tensor) -> None:
        """A step begins; tokens: of the rows of all its micro batches and ranks."""
        self.tokens = tokens
        self.so_far = torch.zeros(2, self.model.num_experts, device=tokens.device)
        self.value = self.so_far.new_zeros(())
        self.total, self.steps = self.total.to(tokens.device), self.steps + 1

    def loss(self, router_logits: tuple[torch.Tensor, ...], counted: torch.Tensor | None) -> torch.Tensor:
        """This micro batch's and rank's part of the step's loss, times its coefficient; all ranks must call it.

        The parts sum to the loss of the step; each is what the micro batch adds to that of those before it.

        Args:
            router_logits: [tokens, experts] of each layer.
            counted: [tokens], as `counted_tokens` has it.
        """
        assert self.tokens is not None
        assigned, probability = sums_over_tokens(router_logits, self.model.num_experts_per_tok, counted)
        told = torch.stack([assigned, probability.detach()])
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        if ranks > 1:
            dist.all_reduce(told)
        scale = len(assigned) / (self.tokens * len(router_logits)).clamp(min=1) ** 2
        learned = scale * ((told[0] + 2 * self.so_far[0]) * probability).sum()
        self.so_far = self.so_far + told
        value = scale * (self.so_far[0] * self.so_far[1]).sum()
        added, self.value = value - self.value, value
        self.total = self.total + added
        part: torch.Tensor = self.model.router_aux_loss_coef * (learned + (added / ranks - learned).detach())
        return part

    def logged(self) -> dict[str, float]:
        """Mean over the steps since the last call, without the coefficient; the same on all ranks."""
        if not self.steps:
            return {}
        found = self.total.item() / self.steps
        self.total, self.steps = torch.zeros_like(self.total), 0
        return {"aux_loss": round(found, 6)}


def sums_over_tokens(
    router_logits: tuple[torch.Tensor, ...], k: int, counted: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over tokens and layers: how many chose each expert, and the experts' probabilities, [experts] each.

    Args:
        router_logits: [tokens, experts] of each layer.
        k: experts a token.
        counted: [tokens] bool, which of them count; None: all.
    """
    logits = torch.stack([layer.flatten(0, -2) for layer in router_logits]).float()
    probabilities = logits.softmax(-1)  # [layers, tokens, experts]
    chosen = probabilities.topk(k, dim=-1).indices
    weights = logits.new_ones(logits.shape[:2]) if counted is None else counted.float().expand(logits.shape[:2])
    assigned = logits.new_zeros(logits.shape[-1]).scatter_add_(
        0, chosen.flatten(), weights[..., None].expand_as(chosen).flatten()
    )
    return assigned, (probabilities * weights[..., None]).sum((0, 1))


def balancing_of(model: PreTrainedModel, coefficient: float | None) -> LoadBalancing | None:
    """What computes a model's load balancing loss over a step; None where it has none, or one of its own kind.

    Args:
        model: one whose forward adds it where `output_router_logits` says so.
        coefficient: what it counts, 0 turns it off; None: as the model's configuration says.

    Raises:
        UserError: a coefficient for a model without such a loss.
    """
    if not balances(model):
        if coefficient is not None:
            name = type(model).__name__
            raise UserError(f"router_aux_loss_coef: {name} adds no load balancing loss to its own; leave it out")
        return None
    if coefficient is not None:
        model.router_aux_loss_coef = coefficient
        model.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "output_router_logits": model.training and coefficient > 0}),
            with_kwargs=True,
        )
    wanted = model.config.output_router_logits if coefficient is None else coefficient > 0
    return LoadBalancing(model) if wanted else None


def balances(model: PreTrainedModel) -> bool:
    """Whether a model's forward adds the loss that Mixtral's file defines, as that does."""
    from transformers.models.mixtral import modeling_mixtral

    function: Any = getattr(sys.modules[type(model).__module__], BALANCING, None)
    try:
        forward = inspect.getsource(inspect.unwrap(type(model).forward))
        known = inspect.getsource(function) == inspect.getsource(modeling_mixtral.load_balancing_loss_func)
    except (OSError, TypeError):
        return False
    text = ast.unparse(ast.parse(textwrap.dedent(forward)))
    return known and CALL in text and ADDED in text
