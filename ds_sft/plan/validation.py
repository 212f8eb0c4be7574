"""What a validation takes: a forward pass without gradients, of which nothing is kept from one layer to the next."""

from __future__ import annotations

from dataclasses import replace

from ds_sft.plan.activations import chunk_logits, outside_layers
from ds_sft.plan.attention import keeps_scores
from ds_sft.plan.blocks import Experts
from ds_sft.plan.experts import routed
from ds_sft.plan.run import Run
from ds_sft.plan.states import kept_between_layers
from ds_sft.plan.weights import FP32


def validation(run: Run) -> tuple[int, int]:
    """Activations of a validation batch, and of its loss, when both together take most; 0 without validation.

    That is in a layer, or when a chunk of logits is there beside hidden states and those of supervised tokens.
    """
    if not run.eval_batch:
        return 0, 0
    batch = validation_batch(run)
    outside, states = outside_layers(batch), kept_between_layers(batch)
    inside = max(_attention(batch), *(_behind_attention(batch, experts) for experts in _kinds(batch)))
    found = ((outside + inside, 0), (outside + states, states + chunk_logits(batch, batch.tokens)))
    return max(found, key=sum)


def validation_batch(run: Run) -> Run:
    """The run with a validation's micro batch, whose MLPs have the tiles of training."""
    tiles = run.tiling if run.tiling != "auto" else "no" if run.tile is None else "yes"
    return replace(run, micro_batch=run.eval_batch, max_tokens=None, padded=run.eval_batch > 1 and not run.flat,
                   tiling=tiles)  # fmt: skip


def _kinds(run: Run) -> set[Experts | None]:
    return {run.shape.experts_in(layer) for layer in range(run.shape.layers)}


def _attention(run: Run) -> int:
    """Of attention: while queries or keys are rotated, or its scores where it has them; or of a norm.

    Beside them hidden states: embeddings, the layer's, what the norm made.
    """
    s, w = run.shape, run.width
    keys = s.kv_size if s.latent is None else s.q_size
    rotating = run.tokens * w * max(4 * s.q_size + 2 * keys, 2 * s.q_size + 5 * keys)  # three parts of what is rotated
    scores = 0
    if run.way == "eager":
        scores = run.pairs * s.heads * (3 * w if s.sinks else 2 * FP32 + w * run.half)
    elif keeps_scores(run):
        pairs = run.length**2 if run.row_by_row else run.pairs
        scores = pairs * s.heads * 2 * FP32 + run.tokens * (2 * s.q_size + s.v_size) * FP32
    norm = run.tokens * max(s.hidden * 2 * FP32, s.head_norms * s.q_size * (2 * FP32 + w))
    return 3 * kept_between_layers(run) + max(rotating + scores, norm)


def _behind_attention(run: Run, experts: Experts | None) -> int:
    """Of a gated MLP: both factors and their product, beside four hidden states; or of experts, and what adds them."""
    s, w, states = run.shape, run.width, kept_between_layers(run)
    if experts is None:
        return 4 * states + 3 * (run.tile or run.tokens) * s.intermediate * w + states * (run.tile is not None)
    h, inner = s.hidden * w, experts.intermediate * w
    if run.lazy:
        pair = max((8 if experts.biased else 4) * inner, 2 * h)
    else:
        weighted = FP32 * s.hidden if experts.float_weights else h
        pair = max((10 if experts.biased else 4) * inner + h, 2 * (h + weighted))
    return 5 * states + routed(run, experts) * pair
