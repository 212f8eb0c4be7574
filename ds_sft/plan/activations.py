"""Activations: what autograd keeps of a layer for its backward, what that takes, and what is outside the layers."""

from __future__ import annotations

from ds_sft.plan.attention import attention_backward, attention_kept, scores_kept
from ds_sft.plan.blocks import Experts
from ds_sft.plan.experts import adapted_experts, experts_backward, experts_kept
from ds_sft.plan.run import Run, gates_kept, inputs_kept, supervised
from ds_sft.plan.states import kept_between_layers
from ds_sft.plan.weights import FP32, Learned

# Float32 logits of a chunk of the loss, bytes: 1,365 tokens at a vocabulary of 49,152, 441 at 151,936. On a CPU the
# time is the same from 128 tokens on; a GPU reads the weight three times and its gradient once a chunk, which takes as
# long as the products of some 300 tokens (H100: 3.3 TB/s, 800 TFLOP/s).
CHUNK_BYTES = 256 * 2**20


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
    kept = _norms(run, learned, mixture) + attention_kept(run, learned) + _adapters(run, layer)
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


def _norms(run: Run, learned: Learned, experts: Experts | None) -> int:
    """Both norms of a layer and the input of the matrices behind them, a token."""
    h, w = run.shape.hidden, run.width
    behind = run.tile is not None or inputs_kept(run, learned, *_behind_norm(run, experts))
    outputs = inputs_kept(run, learned, *_of_attention(run)) + behind
    if run.fused:  # the residual, output, a factor
        return (2 + outputs) * h * w + 2 * FP32
    # In 16 bits a float32 copy, normalised, output; else the residual itself. And two float32 factors.
    normalised = ("input_layernorm" in learned) + ("post_attention_layernorm" in learned)
    wide = FP32 if run.shape.sinks else w  # gpt-oss multiplies by the norm's weight before it casts
    return 2 * (h * FP32 + FP32) + (normalised * wide + outputs * w) * h


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
    return outside_layers(run) + inside


def layer_backward(run: Run, layer: int) -> int:
    """Activations of a layer and their gradients at the fullest moment of its backward: in the MLP, or in attention.

    Those of the MLP are gone when attention has its turn. 4 bits are unpacked a matrix at a time.
    """
    unpacked = max((weight.size for weight in run.weights.of_layer(layer) if weight.four_bits), default=0)
    residual = run.tokens * 2 * run.shape.hidden * FP32
    behind = attention_backward(run) - _mlp_kept(run, run.weights.learned(layer), run.shape.experts_in(layer))
    return layer_activations(run, layer) + residual + max(_mlp_backward(run, layer), behind) + unpacked * run.width


def _mlp_backward(run: Run, layer: int) -> int:
    """Gradients alive at once in the backward of the gated MLP, or of experts."""
    experts = run.shape.experts_in(layer)
    if experts is None:
        return _tile_backward(run, layer) if run.tile else run.tokens * 3 * run.shape.intermediate * run.width
    sums = adapted_experts(run, run.weights.learned(layer), experts)  # their gradients are made, for the adapters'
    return experts_backward(run, experts) + max(sums, default=0)


def _tile_backward(run: Run, layer: int) -> int:
    """A tile of the MLP computed again with its gradients, all tokens' output and gradient, and sums of its weights'.

    These are float32, and at the end there in the dtype that computes, too.
    """
    assert run.tile is not None
    s, learned = run.shape, run.weights.learned(layer)
    tile = run.tile * (gates_kept(run, learned, "mlp", s.intermediate) + 3 * s.intermediate * run.width)
    sums = sum(w.size for w in run.weights.of_layer(layer) if w.trained and ".mlp." in w.name)
    return tile + sums * (FP32 + run.width) + 2 * run.tokens * s.hidden * run.width


def outside_layers(run: Run) -> int:
    """Embeddings, the last norm, the mask: alive from the first layer to the loss."""
    h = run.shape.hidden
    norm = h * (FP32 + 2 * run.width)
    mask = run.pairs if run.masked and run.sdpa else 0
    return run.tokens * (norm + h * run.width) + mask


def chunk_logits(run: Run, tokens: int) -> int:
    """Logits of a chunk (`model/loss.py`), as the product leaves them, and on a CPU in float32 too."""
    chunk = min(tokens, max(1, CHUNK_BYTES // (FP32 * run.shape.vocab)))
    return chunk * run.shape.vocab * (run.width + (FP32 if run.half and run.lazy else 0))


def loss_inputs(run: Run) -> int:
    """Hidden states of supervised tokens and their gradients: what the loss keeps beside its chunk."""
    return 2 * supervised(run) * run.shape.hidden * run.width
