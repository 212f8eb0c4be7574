"""Activations: what autograd keeps of a layer for its backward, what that takes, and what is outside the layers."""

from __future__ import annotations

from ds_sft.plan.attention import INDEX, attention_backward, attention_kept, scores_kept
from ds_sft.plan.blocks import Experts
from ds_sft.plan.experts import adapted_experts, experts_backward, experts_kept
from ds_sft.plan.run import Run, gates_backward, gates_kept, inputs_kept, supervised
from ds_sft.plan.states import kept_between_layers
from ds_sft.plan.weights import FP32, Learned

# Float32 logits of a chunk of the loss, bytes: 1,365 tokens at a vocabulary of 49,152, 441 at 151,936. On a CPU the
# time is the same from 128 tokens on; a GPU reads the weight three times and its gradient once a chunk, which takes as
# long as the products of some 300 tokens (H100: 3.3 TB/s, 800 TFLOP/s).
CHUNK_BYTES = 256 * 2**20
NUMBERS = 3  # of each token: its id, position and label


def layer_activations(run: Run, layer: int = 0) -> int:
    """What autograd keeps of one layer for its backward, as transformers' modules compute it.

    Like Korthikanti et al. (arXiv 2205.05198, section 4.1), for this layer: RMS norms in float32, rotary embeddings,
    grouped queries, a gated MLP, attention that keeps no scores. A matrix's input is kept for the gradient of the
    matrix or of its adapter, a norm's for the norm's weight: of what is frozen neither. Below the first layer that has
    something trained nothing is kept at all.
    """
    if layer < run.weights.first:
        return 0
    learned, mixture = run.weights.learned(layer), run.shape.experts_in(layer)
    norms = _norm_before(run, learned) + _norm_behind(run, learned, mixture)
    kept = norms + attention_kept(run, learned) + _adapters(run, layer)
    return run.tokens * kept + _mlp_kept(run, learned, mixture) + scores_kept(run)


def _mlp_kept(run: Run, learned: Learned, mixture: Experts | None) -> int:
    """What is between the second norm and the residual."""
    if mixture is not None:
        return experts_kept(run, learned, mixture)
    return 0 if run.tile else run.tokens * gates_kept(run, learned, "mlp", run.shape.intermediate)


def _adapters(run: Run, layer: int) -> int:
    """What adapters keep of a token: what lies between their matrices, and what dropout leaves of their input."""
    w, kept = run.width, 0
    for weight in run.weights.of_layer(layer):
        if weight.beside is not None:
            continue  # see `adapted_experts`
        if ".lora_A." in weight.name:
            rank, inputs = weight.shape
            mask = w if run.lazy else 1  # a CPU keeps it as numbers
            kept += rank * w + run.choice.dropout * inputs * (w + mask)
        elif ".lora_magnitude_vector." in weight.name:  # outputs of the matrix and of the adapter
            kept += 2 * weight.size * w
    return kept


def _norm(run: Run, learned: Learned, name: str, *, used: bool) -> int:
    """A norm of hidden states, a token; `used`: matrices behind it keep what comes out."""
    h, w = run.shape.hidden, run.width
    if run.fused:  # the residual, output, a factor
        return (1 + used) * h * w + FP32
    # In 16 bits a float32 copy, normalised, output; else the residual itself. And a float32 factor.
    wide = FP32 if run.shape.sinks else w  # gpt-oss multiplies by the norm's weight before it casts
    return (FP32 + (name in learned) * wide + used * w) * h + FP32


def _norm_before(run: Run, learned: Learned) -> int:
    """The norm before attention, a token."""
    return _norm(run, learned, "input_layernorm", used=inputs_kept(run, learned, *_of_attention(run)))


def _norm_behind(run: Run, learned: Learned, experts: Experts | None) -> int:
    """The norm behind attention, a token."""
    used = run.tile is not None or inputs_kept(run, learned, *_behind_norm(run, experts))
    return _norm(run, learned, "post_attention_layernorm", used=used)


def _of_attention(run: Run) -> tuple[str, ...]:
    """Matrices that attention multiplies hidden states with."""
    if run.shape.latent is None:
        return ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    first = "self_attn.q_proj" if run.shape.latent.queries is None else "self_attn.q_a_proj"
    return (first, "self_attn.kv_a_proj_with_mqa")


def _behind_norm(run: Run, experts: Experts | None) -> tuple[str, ...]:
    """Matrices that keep the second norm's output; experts have copies of it, and a router in float32 its own."""
    if experts is None:
        return ("mlp.gate_proj", "mlp.up_proj")
    shared = (f"{experts.shared_name}.gate_proj", f"{experts.shared_name}.up_proj", "mlp.shared_expert_gate")
    return shared if experts.sigmoid and run.half else (experts.router, *shared)


def activations(run: Run, *, checkpointing: bool) -> int:
    """Activations at their most: of all layers, or what checkpointing keeps of them and one layer computed again."""
    layers = [layer_activations(run, layer) for layer in range(run.shape.layers)]
    reached = run.shape.layers - run.weights.first
    inside = reached * kept_between_layers(run) + max(layers) if checkpointing else sum(layers)
    return outside_layers(run) + last_norm(run) + inside


def layer_backward(run: Run, layer: int) -> int:
    """Activations of a layer and their gradients at the fullest moment of its backward.

    That is in the MLP, in the norm before it, in attention, or in the norms of its queries and keys: what lies behind
    is gone by then. Beside it the residual's gradient. 4 bits are unpacked a matrix at a time.
    """
    learned, mixture = run.weights.learned(layer), run.shape.experts_in(layer)
    kept, before = layer_activations(run, layer), run.tokens * _norm_before(run, learned)
    attention = kept - _mlp_kept(run, learned, mixture) - run.tokens * _norm_behind(run, learned, mixture)
    moments = (
        kept + _mlp_backward(run, layer),
        attention + run.tokens * norm_backward(run, run.shape.hidden),
        attention + attention_backward(run),
        before + run.tokens * _head_norms_backward(run),
    )
    unpacked = max((weight.size for weight in run.weights.of_layer(layer) if weight.four_bits), default=0)
    own = run.checkpointing and run.half and not run.fused  # its input, where the first norm keeps a copy of it
    return max(moments) + (1 + own) * kept_between_layers(run) + unpacked * run.width


def norm_backward(run: Run, size: int) -> int:
    """A norm's backward, a token: its float32 input, two gradients of it, and three parts of a third one.

    Liger's has the gradient that comes in and the one that goes out.
    """
    return size * (2 * run.width if run.fused else 6 * FP32)


def _head_norms_backward(run: Run) -> int:
    """Of the norms of queries, and of keys while those of queries wait, a token; beside it what they were made of."""
    s, w = run.shape, run.width
    if not s.head_norms or run.fused:
        return 0
    queries = s.q_size * (FP32 + 2 * w)  # their input, normalised, gradient
    return s.hidden * w + max(norm_backward(run, s.q_size), norm_backward(run, s.kv_size) + queries)


def _mlp_backward(run: Run, layer: int) -> int:
    """Gradients alive at once in the backward of the gated MLP, or of experts."""
    experts, learned = run.shape.experts_in(layer), run.weights.learned(layer)
    if experts is None:
        inner = run.shape.intermediate
        return _tile_backward(run, layer) if run.tile else run.tokens * gates_backward(run, learned, "mlp", inner)
    sums = adapted_experts(run, learned, experts)  # their gradients are made, for the adapters'
    return experts_backward(run, learned, experts) + max(sums, default=0)


def _tile_backward(run: Run, layer: int) -> int:
    """A tile of the MLP computed again with its gradients, that of all tokens' input, and sums of its weights'.

    These are float32, and at the end there in the dtype that computes, too.
    """
    assert run.tile is not None
    s, learned = run.shape, run.weights.learned(layer)
    gates = (gates_kept, gates_backward)
    tile = run.tile * sum(ask(run, learned, "mlp", s.intermediate) for ask in gates)
    sums = sum(w.size for w in run.weights.of_layer(layer) if w.trained and ".mlp." in w.name)
    return tile + sums * (FP32 + run.width) + kept_between_layers(run)


def outside_layers(run: Run) -> int:
    """What is alive from the first layer to the last gradient: numbers of tokens, rotations, the mask."""
    s = run.shape
    rotated = s.head_dim if s.latent is None else s.latent.rotated
    mask = run.pairs if run.masked and run.sdpa else 0
    if run.way == "eager":  # as numbers to add; gpt-oss has another for its windows
        mask = run.pairs * run.width * (1 + s.sinks)
    return run.tokens * (NUMBERS * INDEX + 2 * rotated * run.width) + mask


def last_norm(run: Run) -> int:
    """What the norm behind all layers keeps while the loss is computed, with what comes out of it."""
    inner = run.width if run.fused else FP32 + run.width
    return run.tokens * (run.shape.hidden * (inner + run.width) + FP32)


def chunk_logits(run: Run, tokens: int) -> int:
    """Logits of a chunk (`model/loss.py`), as the product leaves them; in float32 too on a CPU, and where labels are
    smoothed, which the kernel of a GPU does not."""
    chunk = min(tokens, max(1, CHUNK_BYTES // (FP32 * run.shape.vocab)))
    return chunk * run.shape.vocab * (run.width + (FP32 if run.half and (run.lazy or run.smoothed) else 0))


def loss_inputs(run: Run) -> int:
    """Hidden states of supervised tokens and their gradients: what the loss keeps beside its chunk."""
    return 2 * supervised(run) * run.shape.hidden * run.width
