"""Attention that keeps rows laid end to end apart, row by row: no mask over the whole sequence, no work between rows.

A batch without padding is one sequence, [1, tokens], whose position ids start at 0 with every row. From position ids
alone transformers' `sdpa` builds a mask of tokens x tokens and computes all of it. `keep_rows_apart(model)` reads the
borders once a batch and hands them to every layer as `row_lengths`, which transformers passes on to the attention
function (through gradient checkpointing as well, for they are an argument). Nothing leaks silently: a layer that gets
such a batch without its borders, or a model that never asks this function, is an error.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ds_sft.runtime.distributed import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHORT_ROW = 1024  # tokens: 4 MiB of scores a head, for a moment
# A model whose layers tell the attention function of their window; others have it in the mask.
PASSES_WINDOW = re.compile(r"attention_interface\((?:[^()]|\([^()]*\))*\bsliding_window=")
NAME = "ds_sft_rows"  # as attn_implementation; transformers does not write it into a saved config


class RowLengths:
    """Tokens of each row of a sequence; no tuple, for `torch.compile` compiles anew for each new length of one."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens


class _Batch:
    """The batch that is in a model's forward at the moment."""

    row_lengths: RowLengths | None = None  # None: padded, attention gets a mask
    layers = 0  # that attended to it


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled for each set of lengths
def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_lengths: RowLengths | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row; a padded batch goes to transformers' `sdpa`.

    Args:
        query: [1, heads, tokens, head_dim].
        key: [1, kv_heads, tokens, head_dim]; groups of query heads share one.
        value: as `key`.
        sliding_window: a token sees so many tokens, itself included.
        row_lengths: tokens of each row of the sequence.

    Returns:
        [1, tokens, heads, head_dim], and no weights.
    """
    if row_lengths is None:
        if _Batch.row_lengths is not None:
            raise RuntimeError(f"{type(module).__name__} does not pass row_lengths on: rows would see each other")
        attended: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return attended
    lengths = row_lengths.tokens
    if sum(lengths) != query.shape[2] or key.shape[2] != query.shape[2] or len(query) != 1:
        raise RuntimeError(f"rows of {sum(lengths)} tokens, but queries {query.shape} and keys {key.shape}")
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or attention_mask is not None:
        raise RuntimeError(f"{type(module).__name__} wants {', '.join(unknown) or 'a mask'} in its attention")
    _Batch.layers += 1
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)  # type: ignore[no-untyped-call]
    outputs = [_attend(q, k, v, sliding_window, options).transpose(1, 2) for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, options: dict[str, Any]
) -> torch.Tensor:
    """One row, [1, heads, tokens, head_dim]; beyond the window block by block, so that no mask is length x length."""
    length = query.shape[2]
    if window is None or length <= window:
        if _on_cpu_in_bfloat16(query) and length <= SHORT_ROW and not options["dropout_p"]:
            scale = options["scale"] or query.shape[-1] ** -0.5
            attended: torch.Tensor = _ShortRow.apply(query[0], key[0], value[0], scale)  # type: ignore[no-untyped-call]
            return attended[None]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, **options)
    # With a mask and groups together PyTorch has no fused kernel for GPUs.
    blocks, group, options = [], query.shape[1] // key.shape[1], {**options, "enable_gqa": False}
    for start in range(0, length, window):
        end, first = min(start + window, length), max(0, start - window + 1)
        distance = torch.arange(start, end, device=query.device)[:, None] - torch.arange(
            first, end, device=query.device
        )
        seen = (distance >= 0) & (distance < window)
        k, v = (whole[:, :, first:end].repeat_interleave(group, 1) for whole in (key, value))
        blocks.append(F.scaled_dot_product_attention(query[:, :, start:end], k, v, attn_mask=seen, **options))
    return torch.cat(blocks, dim=2)


def _on_cpu_in_bfloat16(query: torch.Tensor) -> bool:
    return query.device.type == "cpu" and query.dtype == torch.bfloat16


class _ShortRow(torch.autograd.Function):
    """Causal attention of one row by four matrix products, its probabilities computed again in backward.

    PyTorch's kernel for CPUs takes twice as long for rows of a few hundred tokens: with this a 135 M model takes 10 %
    less time for forward and backward. Scores and softmax are float32. Errors at 207 tokens, the kernel's in brackets:
    output 0.22 % (0.19), gradients of queries 0.33 % (0.26), of keys 0.33 % (0.50), of values 0.23 % (0.48).
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        """query: [heads, length, head_dim]; key, value: [kv_heads, length, head_dim]."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return torch.bmm(_probabilities(query, key, scale), value).view(query.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        seen = _probabilities(query, key, ctx.scale)  # [kv_heads, group x length, length]
        of_output = gradient.reshape(*seen.shape[:2], -1)
        of_seen = torch.bmm(of_output, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_seen, seen, -1, seen.dtype).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query.reshape(of_output.shape))
        of_value = torch.bmm(seen.transpose(1, 2), of_output)
        return torch.bmm(of_scores, key).view(query.shape), of_key, of_value, None


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What each token of each query head sees of each token: [kv_heads, group x length, length], rows sum to 1."""
    kv_heads, length, size = key.shape
    later = torch.full((length, length), float("-inf")).triu_(1).repeat(len(query) // kv_heads, 1)
    queries = query.reshape(kv_heads, -1, size).float()
    scores = torch.baddbmm(later, queries, key.float().transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores).to(key.dtype)


def _rows_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    return None if _Batch.row_lengths is not None else sdpa_mask(*args, **kwargs)


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, _rows_mask)


def keep_rows_apart(model: PreTrainedModel, asked: str | None, launch: Launch, *, flash: bool = False) -> None:
    """Let a model that is given rows end to end attend to each by itself.

    Args:
        model: one that `why_rows_mix` has nothing against: with transformers' own attention it is exact, and slow.
        asked: `attn_implementation` of the run, which is respected.
        launch: says where another attention stays.
        flash: flash-attention may be used, which takes rows of different lengths in one call.
    """
    if asked is None:
        reason = None if flash and _use_flash(model) else _use_rows_attention(model)
        if reason:
            launch.say(f"Attention: {type(model).__name__} ({reason}) masks all pairs of tokens of a micro batch.")
    used = model.config._attn_implementation or ""
    if used == NAME:
        model.register_forward_pre_hook(_pass_row_lengths, with_kwargs=True)
        model.register_forward_hook(_check_borders_were_used, always_call=True)
    elif "flash" in used:
        model.register_forward_pre_hook(_pass_flash_borders, with_kwargs=True)


def _use_flash(model: PreTrainedModel) -> bool:
    """Whether the model now uses flash-attention."""
    from transformers.utils import is_flash_attn_2_available

    if not model._supports_flash_attn or not is_flash_attn_2_available():
        return False
    model.set_attn_implementation("flash_attention_2")
    return True


def _use_rows_attention(model: PreTrainedModel) -> str | None:
    """Why the model cannot use `rows_attention`; None: now it does."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return ", ".join(sorted(kinds))
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "caps its scores"
    if not model._supports_sdpa or not model._can_set_attn_implementation():
        return "has an attention of its own"
    if re.search(r"\b(or|and)_mask_function=", inspect.getsource(type(model.base_model))):
        return "has a mask of its own"
    if _has_window(config, kinds) and not PASSES_WINDOW.search(inspect.getsource(sys.modules[type(model).__module__])):
        return "has its sliding window in its mask only"
    model.set_attn_implementation(NAME)
    return None


def _has_window(config: Any, kinds: set[str]) -> bool:
    wanted = "sliding_attention" in kinds or getattr(config, "use_sliding_window", True)
    return bool(wanted and getattr(config, "sliding_window", None))


def lengths_of_rows(position_ids: torch.Tensor) -> list[int]:
    """Tokens of each row in a sequence; position_ids: [1, tokens], 0 at the start of each row.

    Raises:
        ValueError: more than one sequence, or one that does not start with a row.
    """
    if len(position_ids) != 1 or position_ids[0, 0] != 0:
        raise ValueError(f"rows end to end are [1, tokens] and start at position 0, not {list(position_ids.shape)}")
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    lengths: list[int] = starts.diff(append=starts.new_tensor([position_ids.shape[1]])).tolist()
    return lengths


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pass_row_lengths(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    _Batch.row_lengths, _Batch.layers = None, 0
    if not _without_padding(kwargs):
        return args, kwargs
    _Batch.row_lengths = RowLengths(lengths_of_rows(kwargs["position_ids"]))
    return args, {**kwargs, "row_lengths": _Batch.row_lengths}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pass_flash_borders(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What transformers' flash-attention takes; without it every layer would look for the borders on its own."""
    if not _without_padding(kwargs):
        return args, kwargs
    lengths = lengths_of_rows(kwargs["position_ids"])
    borders = F.pad(torch.tensor(lengths, device=kwargs["position_ids"].device).cumsum(0, dtype=torch.int32), (1, 0))
    longest = max(lengths)
    return args, {**kwargs, "cu_seq_lens_q": borders, "cu_seq_lens_k": borders,
                  "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def _without_padding(kwargs: dict[str, Any]) -> bool:
    """Whether a batch is rows end to end: position ids and no mask; generation has a cache as well."""
    return (
        kwargs.get("position_ids") is not None
        and kwargs.get("attention_mask") is None
        and kwargs.get("past_key_values") is None
    )


def _check_borders_were_used(model: nn.Module, args: Any, output: Any) -> None:
    expected, _Batch.row_lengths = _Batch.row_lengths, None
    if expected is not None and output is not None and not _Batch.layers:
        raise RuntimeError(f"{type(model).__name__} does not use {NAME}: rows would see each other")
