"""Sequence parallelism: the ranks of a group have each a part of every row's tokens, and of attention some heads.

All but attention sees a token at a time, so a rank computes it for its part of the sequence alone. Attention needs
whole rows, but each head by itself: before it the ranks of a group exchange their parts of all heads for whole rows of
some, [N parts] x [heads] -> [heads / N], and behind it back (DeepSpeed-Ulysses, arXiv 2309.14509). What is between the
two exchanges is the attention that one rank would use, with the borders of all rows (model/attention.py).

The group of a rank is rank // N, its place in it rank % N: groups are ranks that follow each other, so on one node
where N divides its ranks. Data parallelism, ZeRO's too, goes over all ranks as ever: the loss of a rank is a sum over
its own supervised tokens, divided by those of the step, whether the others have other rows or other parts of a row.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ds_sft.ranks.launch import Launch
from ds_sft.ranks.nodes import say_spanning


class SequenceGroup:
    """The ranks that share every row with this one."""

    def __init__(self, size: int, process_group: Any) -> None:
        self.size, self.process_group = size, process_group

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        """Give part n to rank n of the group, and get the n-th from rank n: [size, ...], both ways."""
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.process_group)
        return received


def join_group(size: int, launch: Launch, timeout_seconds: int) -> SequenceGroup | None:
    """The group of this rank; None where rows are not shared. All ranks must call it, with a size that divides them."""
    if size == 1:
        return None
    say_spanning(size, launch)
    limit = timedelta(seconds=timeout_seconds)
    mine, _ = dist.new_subgroups(group_size=size, timeout=limit)  # type: ignore[no-untyped-call]
    return SequenceGroup(size, mine)


class _Exchange(torch.autograd.Function):
    """Its own transpose: what went to rank n comes back from it."""

    @staticmethod
    def forward(ctx: Any, parts: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
        ctx.group = group
        return group.exchange(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.group.exchange(gradient.contiguous()), None


def some_heads(
    group: SequenceGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """This rank's heads of whole rows, for all heads of its part of them; one exchange.

    Args:
        query: [1, heads, tokens / size, head_dim]; the size of the group divides heads.
        key: [1, kv_heads, tokens / size, head_dim]. Fewer than ranks, or no multiple of them: each goes to several.
        value: as `key`, perhaps of other size.

    Returns:
        [1, heads / size, tokens, head_dim], and of keys and values as many heads as they need.
    """
    if query.shape[1] % group.size:
        raise RuntimeError(f"{query.shape[1]} heads for {group.size} ranks")
    times = group.size // math.gcd(key.shape[1], group.size)
    if times > 1:
        key, value = (states.repeat_interleave(times, 1) for states in (key, value))
    packed = torch.cat([_by_rank(states, group.size) for states in (query, key, value)], dim=-1)
    received: torch.Tensor = _Exchange.apply(packed, group)  # type: ignore[no-untyped-call]
    shapes = [(states.shape[1] // group.size, states.shape[-1]) for states in (query, key, value)]
    parts = torch.split(received.flatten(0, 1), [heads * head_dim for heads, head_dim in shapes], -1)
    q, k, v = (part.view(-1, *shape).transpose(0, 1)[None] for part, shape in zip(parts, shapes, strict=True))
    return q, k, v


def _by_rank(states: torch.Tensor, size: int) -> torch.Tensor:
    """[1, heads, tokens, head_dim] -> [size, tokens, heads / size x head_dim]: rank n's heads in part n."""
    _, heads, tokens, head_dim = states.shape
    return states.reshape(size, heads // size, tokens, head_dim).transpose(1, 2).flatten(2)


def own_part(group: SequenceGroup, attended: torch.Tensor) -> torch.Tensor:
    """All heads of this rank's part, for its heads of whole rows.

    Args:
        attended: [1, tokens, heads / size, head_dim].

    Returns:
        [1, tokens / size, heads, head_dim].
    """
    _, tokens, heads, head_dim = attended.shape
    parts = attended.reshape(group.size, tokens // group.size, heads, head_dim).contiguous()
    received: torch.Tensor = _Exchange.apply(parts, group)  # type: ignore[no-untyped-call]
    return received.transpose(0, 1).flatten(1, 2)[None]
