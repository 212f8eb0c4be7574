"""Attention that keeps rows laid end to end apart: no mask over the whole sequence, no work between rows.

A batch without padding is one sequence, [1, tokens], whose position ids start at 0 with every row. From position ids
alone transformers' `sdpa` builds a mask of tokens x tokens and computes all of it. `keep_rows_apart(model)` hands the
borders of the rows to every layer as `row_borders`, which transformers passes on to the attention function (through
gradient checkpointing as well, for they are an argument). Nothing leaks silently: a layer that gets such a batch
without its borders, or a model that never asks this function, is an error.

Where ranks share rows (model/sequence.py) they exchange their tokens' heads for whole rows of some heads first.

On a GPU in 16 bits all rows go through one kernel a layer, torch's `varlen_attn`; elsewhere, and where that kernel
cannot do what a model wants, each row goes by itself. What `keep_rows_apart` returns says which, and why.

transformers finds an attention function by a name, of which a process has one table: ours is in it once, for all models
(`NAME`), and knows by the layer that calls it which model it computes.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ds_sft.data.batch import LAYOUT, Layout
from ds_sft.errors import UserError
from ds_sft.model.autocast import HALF, autocast_dtype
from ds_sft.model.own_attention import takes_borders
from ds_sft.model.sequence import SequenceGroup, own_part, some_heads
from ds_sft.plan.attention import SHORT_ROW

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens from which on a row that is alone in its sequence goes through cuDNN: 16,384 took it 7.2 ms and varlen_attn
# 12.7, forward and backward of a layer with 16 heads; 8 rows of 2,048 took it 3.1 ms one by one and varlen_attn 2.3
# (an H200, torch 2.11). Between the two nothing was measured.
LONE_ROW = 8192
# cuDNN builds a plan for each length it meets, about 0.1 s of the host: few lengths, few plans.
PLANNED_LENGTHS = 1024  # multiples of it
NO_KERNEL = "no kernel takes rows of different lengths"
MAX_HEAD_DIM = 256  # of varlen_attn's kernels, which also want multiples of 8
BLOCK = 128  # tokens: kernels cover the longest row by blocks, so nothing is lost by rounding up to whole ones
WORDS = inspect.signature(varlen_attn).parameters
# Newer versions of torch want to be told of grouped heads, older ones do not know the word.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in WORDS else {}
# torch 2.10, the last one on PyPI for CUDA 12: its kernel sees the whole past, and scales by the width of heads.
ONLY_PLAIN = "window_size" not in WORDS
# A model whose layers tell the attention function of their window; others have it in the mask.
PASSES_WINDOW = re.compile(r"attention_interface\((?:[^()]|\([^()]*\))*\bsliding_window=")
NAME = "ds_sft_rows"  # as attn_implementation; transformers does not write it into a saved config


@dataclass(frozen=True)
class Attention:
    """Which attention a model uses for rows laid end to end, and why."""

    name: str
    why: str
    in_one_kernel: bool = False  # all rows at once
    lone_rows_by_cudnn: bool = False
    group: SequenceGroup | None = None  # of ranks that share rows

    def __str__(self) -> str:
        shared = f", each rank some heads of rows that {self.group.size} ranks share" if self.group else ""
        return f"{self.name} ({self.why}){shared}"


class RowBorders:
    """Rows of the sequence under way, as every layer gets them.

    No tuple, for `torch.compile` compiles anew for each new length of one. What it reads here are `starts`, `longest`
    and the flags: of any number of rows and tokens it makes two graphs.
    """

    def __init__(
        self, lengths: Sequence[int], starts: torch.Tensor, attention: Attention, *, shared: bool = False
    ) -> None:
        """`lengths`: tokens of each row; `starts`: [rows + 1] int32, where each begins, and where the last ends.

        `shared`: other ranks of a group have the rest of these rows.
        """
        self.lengths, self.starts = list(lengths), starts
        self.longest = -(-max(self.lengths) // BLOCK) * BLOCK  # an upper bound is what kernels need
        self.in_one_kernel = attention.in_one_kernel
        self.by_cudnn = attention.lone_rows_by_cudnn and len(self.lengths) == 1 and self.lengths[0] >= LONE_ROW
        self.group = attention.group if shared else None
        self.attended = False  # by a layer


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
        layout: Layout | None = kwargs.get(LAYOUT)
        shared = layout is not None and layout.share is not None
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
        return _whole_rows(query, key, value, row_borders, sliding_window, dropout, scaling), None
    query, key, value = some_heads(row_borders.group, query, key, value)
    return own_part(
        row_borders.group, _whole_rows(query, key, value, row_borders, sliding_window, dropout, scaling)
    ), None


def _whole_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowBorders,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    in_one = rows.in_one_kernel and _has_kernel(query, value, dropout)
    if in_one and rows.by_cudnn and window is None:
        return _lone_row(query, key, value, scaling)
    if not (in_one and _has_words(query, window, scaling)):
        by_row: torch.Tensor = _row_by_row(query, key, value, rows, window, dropout, scaling)
        return by_row
    return _all_rows(query, key, value, rows, window, scaling)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _masked(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    under_way: RowsUnderWay | None = getattr(module, "rows_under_way", None)
    if under_way is not None and under_way.borders is not None:
        raise RuntimeError(f"{type(module).__name__} does not pass row_borders on: rows would see each other")
    attended: tuple[torch.Tensor, None] = sdpa_attention_forward(module, *args, **kwargs)
    return attended


def _has_words(query: torch.Tensor, window: int | None, scaling: float | None) -> bool:
    """Whether `varlen_attn` can be told of a window and a scale."""
    return not ONLY_PLAIN or (window is None and scaling in (None, query.shape[-1] ** -0.5))


def _has_kernel(query: torch.Tensor, value: torch.Tensor, dropout: float) -> bool:
    size = query.shape[-1]
    return query.dtype in HALF and not dropout and size == value.shape[-1] <= MAX_HEAD_DIM and size % 8 == 0


def _all_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowBorders,
    window: int | None,
    scaling: float | None,
) -> torch.Tensor:
    """All rows in one kernel; it counts a window without the token itself, and takes (-1, 0) for the whole past."""
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))  # [tokens, heads, head_dim]
    seen = (-1 if window is None else window - 1, 0)
    borders = (rows.starts, rows.starts, rows.longest, rows.longest)
    words: dict[str, Any] = {"is_causal": True} if ONLY_PLAIN else {"scale": scaling, "window_size": seen, **GROUPED}
    attended: Any = varlen_attn(q, k, v, *borders, **words)
    return attended[None]  # type: ignore[no-any-return]


def _lone_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """One long row by cuDNN, at a length for which it has a plan: no token sees those that are put behind the row."""
    length = query.shape[2]
    if behind := -length % PLANNED_LENGTHS:
        query, key, value = (F.pad(states, (0, 0, 0, behind)) for states in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=grouped)
    return attended[:, :, :length].transpose(1, 2)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would be compiled for each set of lengths
def _row_by_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowBorders,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    lengths = rows.lengths
    if sum(lengths) != query.shape[2] or key.shape[2] != query.shape[2] or len(query) != 1:
        raise RuntimeError(f"rows of {sum(lengths)} tokens, but queries {query.shape} and keys {key.shape}")
    if query.device.type != "cpu" and query.dtype == torch.float32:  # its one fused kernel there knows no groups
        key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], 1) for states in (key, value))
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    states = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)  # type: ignore[no-untyped-call]
    return torch.cat([_attend(q, k, v, window, options).transpose(1, 2) for q, k, v in states], dim=1)


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
        """query: [heads, length, head_dim]; key: [kv_heads, length, head_dim]; value: the same, perhaps narrower."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        return torch.bmm(_probabilities(query, key, scale), value).view(*query.shape[:2], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        seen = _probabilities(query, key, ctx.scale)  # [kv_heads, group x length, length]
        of_output = gradient.reshape(*seen.shape[:2], -1)
        of_seen = torch.bmm(of_output, value.transpose(1, 2))
        of_scores = torch._softmax_backward_data(of_seen, seen, -1, seen.dtype).mul_(ctx.scale)
        of_key = torch.bmm(of_scores.transpose(1, 2), query.reshape(*seen.shape[:2], -1))
        of_value = torch.bmm(seen.transpose(1, 2), of_output)
        return torch.bmm(of_scores, key).view(query.shape), of_key, of_value, None


def _probabilities(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """What each token of each query head sees of each token: [kv_heads, group x length, length], rows sum to 1."""
    kv_heads, length, size = key.shape
    later = torch.full((length, length), float("-inf")).triu_(1).repeat(len(query) // kv_heads, 1)
    queries = query.reshape(kv_heads, -1, size).float()
    scores = torch.baddbmm(later, queries, key.float().transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1, out=scores).to(key.dtype)


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
    config = model.config.get_text_config()
    if reason := _why_row_by_row(config, device, dtype) or _why_not_plain(model, config):
        return Attention("row by row", reason)
    by_cudnn = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)  # where it was measured
    long = f"a lone row of {LONE_ROW:,} tokens and more by cuDNN, " if by_cudnn else ""
    return Attention("varlen_attn", f"{long}all rows in one kernel a layer", True, by_cudnn)


def _why_row_by_row(config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `varlen_attn` cannot take all rows at once; None: it can."""
    if device.type not in ("cuda", "meta"):
        return f"{NO_KERNEL} on {device.type}"
    if dtype not in HALF:
        return f"{NO_KERNEL} in {str(dtype).removeprefix('torch.')}; with bf16: yes one does"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{NO_KERNEL} on a {torch.cuda.get_device_name(device)}"
    if getattr(config, "attention_dropout", 0):
        return f"{NO_KERNEL} with attention_dropout"
    sizes = _head_dims(config)
    if len(set(sizes)) > 1 or max(sizes) > MAX_HEAD_DIM or max(sizes) % 8:
        return f"{NO_KERNEL} with heads of {' and '.join(map(str, sizes))}"
    return None


def _why_not_plain(model: PreTrainedModel, config: Any) -> str | None:
    """What a model wants that torch 2.10's kernel has no word for; None: nothing, or a newer torch."""
    if not ONLY_PLAIN:
        return None
    usual = {None, *(size**-0.5 for size in _head_dims(config))}
    if any(getattr(module, "scaling", None) not in usual for module in model.modules()):
        return f"{NO_KERNEL} with a scale of the model's own before torch 2.11"
    return f"{NO_KERNEL} with a window before torch 2.11" if getattr(config, "sliding_window", None) else None


def _head_dims(config: Any) -> list[int]:
    """Sizes of heads, each once: of queries and keys, of values, of the layers that see everything."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_keys = getattr(config, "qk_head_dim", None) or size
    others = (getattr(config, name, None) or of_keys for name in ("v_head_dim", "global_head_dim"))
    return sorted({of_keys, *others})


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
    layout: Layout | None = kwargs.get(LAYOUT)
    if layout is not None and layout.starts is not None:
        return layout.lengths, layout.starts
    lengths = lengths_of_rows(kwargs["position_ids"])
    starts = F.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))
    return lengths, starts.to(kwargs["position_ids"].device)


def _without_padding(kwargs: dict[str, Any]) -> bool:
    """Whether a batch is rows end to end: position ids and no mask; generation has a cache as well.

    transformers 5.24 calls the cache `cache`, older versions and who calls the model as they want `past_key_values`.
    """
    absent = ("attention_mask", "cache", "past_key_values")
    return kwargs.get("position_ids") is not None and all(kwargs.get(name) is None for name in absent)
