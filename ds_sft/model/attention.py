"""Attention that keeps rows laid end to end apart: no mask over the whole sequence, no work between rows.

A batch without padding is one sequence, [1, tokens], whose position ids start at 0 with every row. From position ids
alone transformers' `sdpa` builds a mask of tokens x tokens and computes all of it. `keep_rows_apart(model)` hands the
borders of the rows to every layer as `row_borders`, which transformers passes on to the attention function (through
gradient checkpointing as well, for they are an argument). Nothing leaks silently: a layer that gets such a batch
without its borders, or a model that never asks this function, is an error.

Where ranks share rows (model/sequence.py) they exchange their tokens' heads for whole rows of some heads first.

What computes the attention then is in model/attention_kernels.py. What `keep_rows_apart` returns says which, and why.

transformers finds an attention function by a name, of which a process has one table: ours is in it once, for all models
(`NAME`), and knows by the layer that calls it which model it computes.
"""

from __future__ import annotations

import inspect
import re
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ds_sft.data.batch import METADATA, BatchMetadata
from ds_sft.errors import UserError
from ds_sft.model.attention_kernels import Attention, RowBorders, attend_rows, choose_kernel
from ds_sft.model.autocast import autocast_dtype
from ds_sft.model.own_attention import takes_borders
from ds_sft.model.sequence import SequenceGroup, own_part, some_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A model whose layers tell the attention function of their window; others have it in the mask.
PASSES_WINDOW = re.compile(r"attention_interface\((?:[^()]|\([^()]*\))*\bsliding_window=")
NAME = "ds_sft_rows"  # as attn_implementation; transformers does not write it into a saved config


class RowsUnderWay:
    """The rows that are in the forward of one model at the moment; its layers have this object, too."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention
        self.borders: RowBorders | None = None  # None: padded, attention gets a mask; or no forward is under way

    def watch(self, model: PreTrainedModel) -> None:
        """Let a model that uses `rows_attention` pass the borders of its rows to every layer, and see that it does."""
        for module in model.modules():
            if hasattr(module, "config"):  # by which a layer finds the attention function
                module.rows_under_way = self
        model.register_forward_pre_hook(self.pass_borders, with_kwargs=True)
        model.base_model.register_forward_pre_hook(_mask_nothing, with_kwargs=True)
        model.register_forward_hook(self.check_use, always_call=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pass_borders(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        self.borders = None
        if not _without_padding(kwargs):
            return args, kwargs
        metadata: BatchMetadata | None = kwargs.get(METADATA)
        shared = metadata is not None and metadata.share is not None
        self.borders = RowBorders(*_borders(kwargs), self.attention, shared=shared)
        return args, {**kwargs, "row_borders": self.borders}

    def check_use(self, model: nn.Module, args: Any, output: Any) -> None:
        expected, self.borders = self.borders, None
        if expected is not None and output is not None and not expected.attended:
            raise RuntimeError(f"{type(model).__name__} does not use {NAME}: rows would see each other")


def rows_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    row_borders: RowBorders | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row; a padded batch goes to transformers' `sdpa`.

    Args:
        query: [1, heads, tokens, head_dim]; of rows that ranks share this rank's part of them, here and in return.
        key: [1, kv_heads, tokens, head_dim]; groups of query heads share one.
        value: as `key`.
        attention_mask: for a padded batch.
        sliding_window: a token sees so many tokens, itself included.
        row_borders: where the rows of the sequence are.

    Returns:
        [1, tokens, heads, head_dim], and no weights.
    """
    if row_borders is None:
        attended: tuple[torch.Tensor, None] = _masked(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )
        return attended
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or (attention_mask is not None and attention_mask.numel()):
        raise RuntimeError(f"{type(module).__name__} wants {', '.join(unknown) or 'a mask'} in its attention")
    row_borders.attended = True
    if row_borders.in_one_kernel or row_borders.group:
        dtype = autocast_dtype(query.device) or value.dtype  # autocast knows `sdpa`: no kernel of ours, no exchange
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if row_borders.group is None:
        return attend_rows(query, key, value, row_borders, sliding_window, dropout, scaling), None
    query, key, value = some_heads(row_borders.group, query, key, value)
    return own_part(
        row_borders.group, attend_rows(query, key, value, row_borders, sliding_window, dropout, scaling)
    ), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _masked(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    under_way: RowsUnderWay | None = getattr(module, "rows_under_way", None)
    if under_way is not None and under_way.borders is not None:
        raise RuntimeError(f"{type(module).__name__} does not pass row_borders on: rows would see each other")
    attended: tuple[torch.Tensor, None] = sdpa_attention_forward(module, *args, **kwargs)
    return attended


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def keep_rows_apart(
    model: PreTrainedModel,
    asked: str | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    group: SequenceGroup | None = None,
) -> Attention:
    """Let a model that is given rows end to end attend to each by itself; returns how, and why so.

    Args:
        model: one that `why_rows_mix` has nothing against: with transformers' own attention it is exact, and slow.
        asked: `attn_implementation` of the run, which is respected.
        device: on which the model is trained.
        dtype: in which it computes.
        group: the ranks that share its rows, of a model that `require_shareable` has nothing against.
    """
    if takes_borders(asked):
        _pass_borders_to(model, str(asked))
    found = replace(_choose(model, asked, torch.device(device), dtype), group=group)
    used = model.config._attn_implementation or ""
    if used == NAME or takes_borders(used):
        RowsUnderWay(found).watch(model)
    elif "flash" in used:
        model.register_forward_pre_hook(_pass_flash_borders, with_kwargs=True)
    return found


def _pass_borders_to(model: PreTrainedModel, own: str) -> None:
    """Let a function of the user's have the borders in place of a mask, in a model that can hand them on.

    Raises:
        UserError: it cannot.
    """
    if reason := use_rows_attention(model):
        raise UserError(
            f"attn_implementation: {own}: {type(model).__name__} {reason}, and hands no row_borders on: leave that "
            "parameter out, and the function gets a mask"
        )
    model.set_attn_implementation(own)


def _choose(model: PreTrainedModel, asked: str | None, device: torch.device, dtype: torch.dtype) -> Attention:
    if asked is not None:
        return Attention(asked, "as attn_implementation says")
    if reason := use_rows_attention(model):
        why = f"{type(model).__name__} {reason}; it masks all pairs of tokens of a micro batch"
        return Attention(str(model.config._attn_implementation), why)
    return choose_kernel(model, device, dtype)


def use_rows_attention(model: PreTrainedModel) -> str | None:
    """Why the model cannot use `rows_attention`; None: now it does."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"has layers of {', '.join(sorted(kinds))}"
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
def _mask_nothing(base: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A mask with nothing in it is a mask that transformers does not make: it would read the position ids."""
    rows: RowBorders | None = kwargs.get("row_borders")
    if rows is None:
        return args, kwargs
    if base.config._attn_implementation != NAME and not takes_borders(base.config._attn_implementation):
        raise RuntimeError(f"{type(base).__name__} does not use {NAME}: rows would see each other")
    return args, {**kwargs, "attention_mask": rows.starts.new_empty((1, 1, 0, 0), dtype=torch.bool)}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _pass_flash_borders(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What transformers' flash-attention takes; without it every layer would look for the borders on its own."""
    if not _without_padding(kwargs):
        return args, kwargs
    lengths, starts = _borders(kwargs)
    longest = max(lengths)
    return args, {**kwargs, "cu_seq_lens_q": starts, "cu_seq_lens_k": starts,
                  "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def _borders(kwargs: dict[str, Any]) -> tuple[list[int], torch.Tensor]:
    """Lengths of the rows, and where they begin, [rows + 1] int32: as the batch says, or by reading its positions."""
    metadata: BatchMetadata | None = kwargs.get(METADATA)
    if metadata is not None and metadata.starts is not None:
        return metadata.lengths, metadata.starts
    lengths = lengths_of_rows(kwargs["position_ids"])
    starts = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
    return lengths, starts.to(kwargs["position_ids"].device)


def _without_padding(kwargs: dict[str, Any]) -> bool:
    """Whether a batch is rows end to end: position ids and no mask; generation has a cache as well.

    transformers 5.24 calls the cache `cache`, older versions and who calls the model as they want `past_key_values`.
    """
    absent = ("attention_mask", "cache", "past_key_values")
    return kwargs.get("position_ids") is not None and all(kwargs.get(name) is None for name in absent)
