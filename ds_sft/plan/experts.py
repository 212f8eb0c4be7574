"""What autograd keeps of a mixture of experts, and what its backward takes."""

from __future__ import annotations

from ds_sft.plan.blocks import Experts
from ds_sft.plan.run import Run, gates_backward, gates_kept, inputs_kept
from ds_sft.plan.weights import FP32, Learned

EXPERT_BLOCK = 16  # tokens of an expert are filled up to it on a CPU in 16 bits (`model/experts.py`)
INDEX = 8  # an int64
# oneDNN keeps what it compiled for products of each number of rows, up to so many: 0.55 MiB each (a CPU in bfloat16,
# torch 2.13, 256 x 384 to 512 x 384).
PRIMITIVE, PRIMITIVES = 576 * 1024, 1024


def routed(run: Run, experts: Experts) -> int:
    """Pairs of a token and an expert, whatever the router chooses: all tokens at one expert are as many.

    On a CPU each expert's are filled up to whole blocks, by half of one on average.
    """
    pairs = run.tokens * experts.chosen
    filled = min(experts.number, pairs) * (EXPERT_BLOCK - 1) // 2
    return pairs + (filled if run.lazy and run.half else 0)


def experts_kept(run: Run, learned: Learned, experts: Experts) -> int:
    """A mixture in all: its router, its experts by grouped products, and the one that all tokens pass.

    On a GPU transformers' `grouped_mm_experts_forward` (`integrations/moe.py`): copies of the tokens sorted by expert,
    both projections in one, the activation, the product, and what comes out, which is weighted there. On a CPU
    `model/experts.py`, which weights what goes into the second matrix.
    """
    h, inner, w = run.shape.hidden, experts.intermediate, run.width
    rows = _between(run, learned, experts)
    # Of tokens, and on a CPU the biases of the second matrix, on a GPU what comes out.
    copies = 1 + experts.biased if run.lazy else 1 + inputs_kept(run, learned, "mlp.experts.gate_up_proj")
    # Where each pair is, and its expert for the biases; on a GPU also the order's inverse, and its token.
    indices = ((1 if run.lazy else 3) + experts.biased) * INDEX
    pairs = rows * inner * w + copies * h * w + indices
    shared = gates_kept(run, learned, experts.shared_name, experts.shared)
    if experts.shared_gate:
        shared += (h + 1) * w  # what it weights, and the factor
    own_copy = experts.number * h * FP32 if experts.sigmoid and run.half else 0  # of the router's weight
    own_copy += sum(adapted_experts(run, learned, experts))
    return routed(run, experts) * pairs + run.tokens * (_router(run, learned, experts) + shared) + own_copy


def _between(run: Run, learned: Learned, experts: Experts) -> int:
    """Tensors between the matrices of experts that are kept; on a CPU also the product, and what was weighted of it."""
    gates = 6 if experts.biased else 3  # gpt-oss clamps both, adds to one and multiplies twice
    return gates + (2 if run.lazy else inputs_kept(run, learned, "mlp.experts.down_proj"))


def adapted_experts(run: Run, learned: Learned, experts: Experts) -> list[int]:
    """Bytes of each tensor of experts with an adapter: peft adds the product to a copy of it, which backward needs."""
    matrix = experts.number * experts.intermediate * run.shape.hidden * run.width
    sizes = {"mlp.experts.gate_up_proj": 2 * matrix, "mlp.experts.down_proj": matrix}
    return [size for name, size in sizes.items() if learned.get(name, True) is False]


def compiled_products(run: Run) -> int:
    """What a CPU keeps of experts' products in 16 bits: one for each number of blocks that an expert has had.

    Of those up to a batch's tokens three quarters, as in runs of a few steps (`benchmarks/plan_accuracy.py`). Of two
    matrices forward, for the gradient of what comes in, and for their own where they are trained.
    """
    experts = run.shape.experts
    if experts is None or not (run.lazy and run.half):
        return 0
    learned = run.weights.learned(experts.layers[-1])
    kinds = 4 + sum(f"mlp.experts.{name}_proj" in learned for name in ("gate_up", "down"))
    met = -(-run.tokens // EXPERT_BLOCK) * 3 // 4
    return PRIMITIVE * min(PRIMITIVES, kinds * met)


def _router(run: Run, learned: Learned, experts: Experts) -> int:
    """Scores, the chosen ones' indices and weights, a token."""
    w = run.width
    weight = FP32 if experts.float_weights else w
    kept = experts.chosen * (INDEX + weight)
    if experts.biased:
        return kept + experts.chosen * w
    normalised = experts.normalised * (experts.chosen + 1) * FP32
    own_copy = experts.sigmoid and run.half and inputs_kept(run, learned, experts.router)
    return kept + normalised + experts.number * FP32 + own_copy * run.shape.hidden * FP32


def experts_backward(run: Run, learned: Learned, experts: Experts) -> int:
    """Of a mixture, beside what was kept: of what its experts wrote, or between their matrices when that is fullest.

    Weights in float32 make what they weight float32: on a GPU that is behind the experts, on a CPU between them.
    """
    h, inner, w = run.shape.hidden, experts.intermediate * run.width, run.width
    rows, pairs = _between(run, learned, experts), routed(run, experts)
    if run.lazy:
        widened = 4 * (experts.float_weights and run.half)
        behind = (pairs + run.tokens) * 2 * h * w  # with the residual, before and behind
        between = pairs * (7 + 3 * experts.biased + widened - rows) * inner
    else:
        behind = pairs * (2 * (FP32 if experts.float_weights else w) + w) * h
        # Of gpt-oss that is when they are computed again; the experts' own output is gone, or not there yet.
        between = pairs * ((6 + 4 * experts.biased - rows) * inner - h * w)
    shared = (run, learned, experts.shared_name, experts.shared)
    if not experts.shared_gate:  # the shared one is computed last, and gone by then
        between -= run.tokens * gates_kept(*shared)
    return max(behind, between, run.tokens * gates_backward(*shared))
