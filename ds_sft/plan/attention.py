"""What autograd keeps of attention."""

from __future__ import annotations

import math

from ds_sft.plan.run import Run, inputs_kept
from ds_sft.plan.shape import Shape
from ds_sft.plan.weights import FP32, Learned

# Tokens of a row up to which attention on a CPU in 16 bits computes its scores again: 4 MiB a head, for a moment.
SHORT_ROW = 1024
INDEX = 8  # an int64
BLOCK = 128  # queries of a block of a GPU's kernel


def attention_kept(run: Run, learned: Learned) -> int:
    """Queries, keys, values, output and their norms, a token."""
    s, w = run.shape, run.width
    if s.latent is not None:
        return _latent_attention(run, learned)
    keys_values = 2 * (exchanged_keys(s, run.sequence) if _groups_inside(run) else s.q_size)
    # gpt-oss: a sink's own share, and which score is the largest.
    log_sums = s.heads * FP32 if run.way != "eager" else s.heads * (w + INDEX) * s.sinks
    behind = inputs_kept(run, learned, "self_attn.o_proj")
    # Of each row, and all rows' in one, or of all tokens, and of its own; eager attention does not need its own.
    outputs = 1 + behind if run.row_by_row or run.sequence > 1 else behind if run.way == "eager" else 1
    kept = (s.q_size + keys_values + outputs * s.q_size) * w + log_sums
    if s.head_norms and run.fused:  # their inputs; what they write is rotated where it lies
        kept += (s.q_size + s.kv_size) * w + (s.heads + s.kv_heads) * FP32
    elif s.head_norms:
        normalised = ("self_attn.q_norm" in learned) * s.q_size + ("self_attn.k_norm" in learned) * s.kv_size
        kept += (s.q_size + s.kv_size) * FP32 + normalised * w + (s.heads + s.kv_heads) * FP32
    return kept


def exchanged_keys(shape: Shape, group: int) -> int:
    """Width of the keys that attention reads: fewer heads than ranks that share a row are there several times."""
    return math.lcm(shape.kv_heads, group) * shape.head_dim


def exchanged_width(shape: Shape, group: int) -> int:
    """Of queries, keys and values of a token, as ranks that share a row exchange them."""
    return shape.q_size + 2 * exchanged_keys(shape, group)


def attention_backward(run: Run) -> int:
    """Gradients alive at once in attention's backward: of its output, queries, keys and values; or those of scores.

    Ranks that share a row have the last three twice, before and after they are exchanged.
    """
    s = run.shape
    keys = s.kv_size if s.latent is None else s.q_size
    made = run.tokens * (s.v_size + s.q_size + 2 * keys) * run.width
    twice = s.v_size + 2 * exchanged_width(s, run.sequence)
    made = made if run.sequence == 1 else run.tokens * twice * run.width
    return max(made + _flash_backward(run), _scores_backward(run))


def _flash_backward(run: Run) -> int:
    """What the kernel of a GPU takes beside (PyTorch's `flash_attn/flash_api.cpp`, `mha_varlen_bwd`).

    The gradient of queries in float32, room for a block behind each row included; of grouped keys and values one for
    each query head.
    """
    s = run.shape
    if run.lazy or not run.half or run.way == "eager" or s.latent is not None:
        return 0
    step = 32 if s.head_dim <= 128 else 64
    padded = -(-s.head_dim // step) * step
    heads = s.heads / run.sequence  # of all tokens that a group shares
    in_float = int((run.batch_tokens + BLOCK * run.micro_batch) * heads) * (padded + 1) * FP32
    return in_float + (2 * run.tokens * s.q_size * run.width if s.heads != s.kv_heads else 0)


def _scores_backward(run: Run) -> int:
    """Where scores are kept: the softmax, its gradient and that of what it was made of, less what was counted."""
    s = run.shape
    if run.way == "eager":
        return 3 * run.pairs * s.heads * (run.width if s.sinks else FP32) - scores_kept(run)
    return 2 * _pairs_kept(run) * s.heads * FP32


def _latent_attention(run: Run, learned: Learned) -> int:
    """The short vectors and their norms, then whole queries, keys and values, a token.

    These stand for themselves but for values: a view of what was made with the keys' part without positions, which
    eager attention copies.
    Where keys are larger than values a CPU has no kernel: but for short rows it keeps float32 copies and the scores.
    """
    s, latent, w = run.shape, run.shape.latent, run.width
    assert latent is not None
    kept = 0
    for name, size in (("q", latent.queries), ("kv", latent.values)):
        if size is not None:
            normalised = f"self_attn.{name}_a_layernorm" in learned
            used = inputs_kept(run, learned, f"self_attn.{name}_b_proj")
            kept += size * (FP32 + (normalised + used) * w) + FP32
    if not run.half:
        kept += latent.rotated * w  # in one with the vector of keys and values
    behind = inputs_kept(run, learned, "self_attn.o_proj") * s.v_size * w
    if keeps_scores(run):
        return kept + (2 * s.q_size + s.v_size) * FP32 + behind
    made = s.v_size if run.way == "eager" else s.heads * (latent.plain + latent.value)
    outputs = 0 if run.way == "eager" or run.lazy else s.v_size * w + s.heads * FP32
    return kept + (2 * s.q_size + made) * w + outputs + (behind if run.row_by_row or run.way == "eager" else 0)


def keeps_scores(run: Run) -> bool:
    """Whether a CPU keeps the scores of latent attention."""
    short = run.row_by_row and run.half and run.length <= SHORT_ROW
    return run.shape.latent is not None and run.lazy and run.way != "eager" and not short


def _groups_inside(run: Run) -> bool:
    """Whether attention reads grouped keys as they are; with a mask transformers repeats them for each query."""
    return run.way.startswith("flash") or (run.sdpa and not run.masked)


def scores_kept(run: Run) -> int:
    """Attention's quadratic part in a layer: the mask as numbers, or the scores themselves where eager keeps them."""
    s = run.shape
    if run.way == "eager":  # softmax in float32, and cast; gpt-oss has it in the dtype that computes
        return run.pairs * s.heads * (run.width if s.sinks else FP32 + (2 if run.half else 0))
    mask = run.pairs * run.width if run.masked and run.sdpa else 0
    return mask + _pairs_kept(run) * s.heads * FP32


def _pairs_kept(run: Run) -> int:
    """Pairs of tokens whose scores latent attention keeps on a CPU."""
    if not keeps_scores(run):
        return 0
    return run.tokens * run.length if run.row_by_row else run.pairs
