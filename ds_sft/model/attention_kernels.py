"""What computes the attention of rows laid end to end: one kernel for all, cuDNN for a long one, or each by itself.

On a GPU in 16 bits all rows go through torch's `varlen_attn`; elsewhere, and where that kernel cannot do what a model
wants, each row goes by itself. `choose_kernel` says which, and why.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from ds_sft.model.autocast import HALF
from ds_sft.model.sequence import SequenceGroup
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


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: RowBorders,
    window: int | None,
    dropout: float,
    scaling: float | None,
) -> torch.Tensor:
    """Causal attention within each row, [1, tokens, heads, head_dim], of states [1, heads, tokens, head_dim].

    `window`: a token sees so many tokens, itself included.
    """
    in_one = rows.in_one_kernel and _has_kernel(query, value, dropout)
    if in_one and rows.by_cudnn and window is None:
        return _lone_row(query, key, value, scaling)
    if not (in_one and _has_words(query, window, scaling)):
        by_row: torch.Tensor = _row_by_row(query, key, value, rows, window, dropout, scaling)
        return by_row
    return _all_rows(query, key, value, rows, window, scaling)


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
    # [tokens, heads, head_dim]; `states[0]` would copy gradients into zeros of all of them in backward.
    q, k, v = (states.squeeze(0).transpose(0, 1) for states in (query, key, value))
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


def choose_kernel(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> Attention:
    """What computes `attend_rows` of a model on a device, and why so."""
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
