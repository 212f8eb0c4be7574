"""Peak memory of a rank, by part: what PyTorch, transformers and DeepSpeed allocate, followed through one step.

Sizes are bytes, counts are elements. The formulas follow the papers where those say enough (ZeRO, arXiv 1910.02054) and
the code that allocates where they do not: DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`partitioned_param_coordinator.py`), transformers 5.23 (`models/*/modeling_*.py`, `integrations/moe.py`,
`loss/loss_utils.py`). `benchmarks/plan_accuracy.py` measures them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

from ds_sft.plan.blocks import Experts
from ds_sft.plan.shape import TAKEN, Shape
from ds_sft.plan.weights import ALL, FP32, Choice, Learned, Weights, weights_of

MOMENTS = 8  # Adam's two, in float32
# Float32 logits of a chunk of the loss, bytes: 1,365 tokens at a vocabulary of 49,152, 441 at 151,936. On a CPU the
# time is the same from 128 tokens on; a GPU reads the weight three times and its gradient once a chunk, which takes as
# long as the products of some 300 tokens (H100: 3.3 TB/s, 800 TFLOP/s).
CHUNK_BYTES = 256 * 2**20
# Tokens of a row up to which attention on a CPU in 16 bits computes its scores again: 4 MiB a head, for a moment.
SHORT_ROW = 1024
EXPERT_BLOCK = 16  # tokens of an expert are filled up to it on a CPU in 16 bits (`training/experts.py`)
INDEX = 8  # an int64
# oneDNN keeps what it compiled for products of each number of rows, up to so many: 0.55 MiB each (a CPU in bfloat16,
# torch 2.13, 256 x 384 to 512 x 384).
PRIMITIVE, PRIMITIVES = 576 * 1024, 1024
NORM = 8  # DeepSpeed sums squares of gradients in float64 (runtime/zero/utils.py, get_norm_dtype)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the states are divided: the stage and the DeepSpeed options that have a size, in elements."""

    stage: int | None  # None: no DeepSpeed, torch's DistributedDataParallel where there are several ranks
    offload_optimizer: bool = False
    offload_param: bool = False
    overlap: bool = True  # overlap_comm: two reduction buffers
    allreduce: bool = True  # stages 1 and 2 all-reduce whole buckets; else one reduce for each rank's part
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000  # parameters up to this size stay whole on every rank
    max_reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000  # stage 3 steps through its share in groups of this size
    hierarchical: int = 1  # zero_hpz_partition_size: ranks that share a second copy of the weights


@dataclass(frozen=True, kw_only=True)
class Run:
    """What decides the memory of one rank."""

    shape: Shape
    engine: Engine
    ranks: int
    micro_batch: int  # rows
    length: int  # tokens of a row
    accumulation: int
    checkpointing: bool
    half: bool  # bf16 or fp16
    padded: bool = False  # rows of different lengths in a batch: attention gets a mask
    packed: bool = False  # a micro batch is one sequence of `micro_batch` x `length` tokens, of several rows
    flat: bool = False  # the same of rows that are not packed
    max_tokens: int | None = None  # of a micro batch, where it has fewer than `micro_batch` x `length`
    attention: str = "rows"  # training/attention.py where rows are packed or flat, else `sdpa`
    eval_batch: int = 0  # rows of a validation batch; 0: no validation
    learned: float = 1.0  # share of the tokens that are supervised, at most
    lazy: bool = False  # a CPU: memory counts once it is written to, not when it is allocated
    fused: bool = False  # norms, rotations and gates by Liger (`training/fused.py`)
    choice: Choice = ALL  # of what is trained

    @property
    def weights(self) -> Weights:
        return trained_weights(self.shape, self.choice)

    @property
    def refused(self) -> bool:
        """Whether no such run starts: stage 3 cannot divide what is packed into 4 bits."""
        return self.choice.four_bits and self.engine.stage == 3

    @property
    def weight(self) -> int:
        """Bytes of a trained parameter in the model: DeepSpeed keeps float32 masters beside 16-bit weights."""
        return self.width if self.engine.stage is not None else FP32

    @property
    def width(self) -> int:
        """Bytes of a number in activations, and in the weights that compute or are frozen."""
        return 2 if self.half else FP32

    @property
    def tokens(self) -> int:
        tokens = self.micro_batch * self.length
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)

    @property
    def way(self) -> str:
        """The attention that a model takes: of sinks transformers' `sdpa` knows nothing, nor does ours."""
        return "eager" if self.shape.sinks and self.attention in ("rows", "sdpa") else self.attention

    @property
    def masked(self) -> bool:
        return self.padded or (not self.row_by_row and (self.packed or (self.flat and self.micro_batch > 1)))

    @property
    def row_by_row(self) -> bool:
        """Whether rows that lie end to end are attended to one by one: there is no mask then."""
        return self.way == "rows" and (self.packed or self.flat)

    @property
    def sdpa(self) -> bool:
        return self.way in ("sdpa", "rows")

    @property
    def pairs(self) -> int:
        """Pairs of tokens that attention's mask or scores cover."""
        return self.tokens * (self.tokens if self.packed or self.flat else self.length)


@lru_cache(maxsize=64)
def trained_weights(shape: Shape, choice: Choice) -> Weights:
    taken = TAKEN.get(shape.family, ())
    return weights_of(shape.shapes(), choice, layers=shape.layers, met=shape.met, taken=taken)


@dataclass(frozen=True)
class Memory:
    """A rank's peak: the parts alive at the fullest moment of a step."""

    moment: str
    device: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def peak(run: Run, *, loading: bool = True) -> Memory:
    """The fullest moment of the fullest rank; `loading`: also before the first step."""
    on_host = host(run)
    fixed = states(run) | {"compiled products": compiled_products(run)}
    moments = ((name, {**fixed, **parts}) for name, parts in _moments(run) if loading or name != "loading")
    name, device = max(moments, key=lambda moment: sum(moment[1].values()))
    return Memory(name, {part: size for part, size in device.items() if size}, on_host)


# ---- States


def states(run: Run) -> dict[str, int]:
    """What stays on the device from step to step (ZeRO paper, section 3.1, figure 1), gradients and buckets apart."""
    engine, share, weights = run.engine, owned(run), run.weights
    frozen = frozen_bytes(run)
    if engine.stage is None:
        trained = weights.number_trained
        return {"parameters": trained * FP32, "frozen weights": frozen, "optimizer states": trained * MOMENTS}
    whole = weights.number_trained if engine.stage < 3 else 0
    masters = 0 if engine.stage == 3 and run.weight == FP32 else share * FP32  # float32 shares are their own masters
    on_device = {"parameters": (whole or (0 if engine.offload_param else share)) * run.weight,
                 "frozen weights": 0 if engine.offload_param else frozen}  # fmt: skip
    if engine.stage == 3:
        on_device["parameters"] += persistent(run) * run.weight
        on_device["parameters"] += -(-weights.number // engine.hierarchical) * run.weight * (engine.hierarchical > 1)
    if not engine.offload_optimizer:
        on_device |= {"master weights": masters, "optimizer states": share * MOMENTS}
    return on_device


def frozen_bytes(run: Run) -> int:
    """Weights that are never changed: of the dtype that computes, or 4 bits; stage 3 divides them as all others."""
    if run.engine.stage != 3:
        return run.weights.frozen_bytes(run.width)
    return _shares(run, [weight.size for weight in run.weights.every if not weight.trained]) * run.width


def host(run: Run) -> dict[str, int]:
    """What a rank keeps in host memory because of offloading (`stage_1_and_2.py` and `stage3.py`, `__init__`)."""
    engine, share = run.engine, owned(run)
    parts: dict[str, int] = {}
    if engine.offload_param:
        parts |= {"parameters": share * run.weight, "frozen weights": frozen_bytes(run)}
    if engine.offload_optimizer:
        parts |= {"master weights": share * FP32, "optimizer states": share * MOMENTS, "gradients": share * FP32}
        if engine.stage == 3:
            parts["gradients"] += share * run.weight  # grad_partitions_flat_buffer
        else:
            parts["buckets"] = share * run.weight + _largest_copy(run)
            if run.accumulation > 1:
                parts["gradients"] += max(_partition(run, rank) for rank in _ranks(run)) * run.weight
    return {part: size for part, size in parts.items() if size}


def _largest_copy(run: Run) -> int:
    """Stage 2 with offloading: a buffer for the largest gradient, on the device and on the host each."""
    return max(run.weights.trained) * run.weight


def owned(run: Run) -> int:
    """Elements of the states that a rank keeps."""
    if run.engine.stage is None:
        return run.weights.number_trained
    if run.engine.stage == 3:
        return _shares(run, run.weights.trained)
    return _share(run)


def _share(run: Run) -> int:
    """Elements of what stages 1 and 2 divide that a rank has."""
    return -(-run.weights.number_trained // run.ranks)


def _shares(run: Run, sizes: Iterable[int]) -> int:
    """Stage 3 cuts every parameter by itself."""
    return sum(-(-size // run.ranks) for size in sizes)


def persistent(run: Run) -> int:
    """Elements of small parameters that stage 3 keeps whole (stage3_param_persistence_threshold)."""
    return sum(size for size in run.weights.sizes if size <= run.engine.persistence_threshold)


def model_states(run: Run) -> int:
    """Parameters, their 16-bit copy, gradients, masters and optimizer states of the fullest rank when that steps next.

    Wherever they are, and with the buffers that DeepSpeed never frees; without DDP's, which Python cannot see.
    """
    held = max(step_gradients(run, rank) for rank in _ranks(run))
    buckets = 0 if run.engine.stage is None else _buckets(replace(run, lazy=False))
    return sum(states(run).values()) + sum(host(run).values()) + held + buckets + copy_that_stays(run)


# ---- Activations


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
    if mixture is None:
        mlp = run.tokens * _gates(run, learned, "mlp", run.shape.intermediate)
    else:
        mlp = _experts(run, learned, mixture)
    kept = _norms(run, learned, mixture) + _attention(run, learned) + _adapters(run, layer)
    return run.tokens * kept + mlp + _scores(run)


def _gates(run: Run, learned: Learned, name: str, intermediate: int) -> int:
    """A gated MLP, a token: both projections, their product where down_proj wants it; eager the activation too."""
    return ((2 if run.fused else 3) + _inputs(run, learned, f"{name}.down_proj")) * intermediate * run.width


def routed(run: Run, experts: Experts) -> int:
    """Pairs of a token and an expert, whatever the router chooses: all tokens at one expert are as many.

    On a CPU each expert's are filled up to whole blocks, by half of one on average.
    """
    pairs = run.tokens * experts.chosen
    filled = min(experts.number, pairs) * (EXPERT_BLOCK - 1) // 2
    return pairs + (filled if run.lazy and run.half else 0)


def _experts(run: Run, learned: Learned, experts: Experts) -> int:
    """A mixture in all: its router, its experts by grouped products, and the one that all tokens pass.

    On a GPU transformers' `grouped_mm_experts_forward` (`integrations/moe.py`): copies of the tokens sorted by expert,
    both projections in one, the activation, the product, and what comes out, which is weighted there. On a CPU
    `training/experts.py`, which weights what goes into the second matrix.
    """
    h, inner, w = run.shape.hidden, experts.intermediate, run.width
    first, second = (_inputs(run, learned, f"mlp.experts.{name}_proj") for name in ("gate_up", "down"))
    gates = 6 if experts.biased else 3  # gpt-oss clamps both, adds to one and multiplies twice
    if run.lazy:
        rows = gates + 2  # the product, and weighted
        copies = 1 + experts.biased  # of tokens, and the biases of the second matrix
    else:
        rows, copies = gates + second, first + 1
    # Where each pair is, and its expert for the biases; on a GPU also the order's inverse, and its token.
    indices = ((1 if run.lazy else 3) + experts.biased) * INDEX
    pairs = rows * inner * w + copies * h * w + indices
    shared = _gates(run, learned, experts.shared_name, experts.shared)
    if experts.shared_gate:
        shared += (h + 1) * w  # what it weights, and the factor
    own_copy = experts.number * h * FP32 if experts.sigmoid and run.half else 0  # of the router's weight
    own_copy += sum(adapted_experts(run, learned, experts))
    return routed(run, experts) * pairs + run.tokens * (_router(run, learned, experts) + shared) + own_copy


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
    own_copy = experts.sigmoid and run.half and _inputs(run, learned, experts.router)
    return kept + normalised + experts.number * FP32 + own_copy * run.shape.hidden * FP32


def _inputs(run: Run, learned: Learned, *names: str) -> bool:
    """Whether backward needs what comes into these matrices; adapters with dropout have copies of their own."""
    return any(learned.get(name, False) or (name in learned and not run.choice.dropout) for name in names)


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
    outputs = _inputs(run, learned, *_of_attention(run)) + _inputs(run, learned, *_behind_norm(run, experts))
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


def _attention(run: Run, learned: Learned) -> int:
    """Queries, keys, values, output and their norms, a token."""
    s, w = run.shape, run.width
    if s.latent is not None:
        return _latent_attention(run, learned)
    keys_values = 2 * (s.kv_size if _groups_inside(run) else s.q_size)
    # gpt-oss: a sink's own share, and which score is the largest.
    log_sums = s.heads * FP32 if run.way != "eager" else s.heads * (w + INDEX) * s.sinks
    behind = _inputs(run, learned, "self_attn.o_proj")
    # Of each row, and all rows' in one; eager attention does not need its own.
    outputs = 1 + behind if run.row_by_row else behind if run.way == "eager" else 1
    kept = (s.q_size + keys_values + outputs * s.q_size) * w + log_sums
    if s.head_norms and run.fused:  # their inputs; what they write is rotated where it lies
        kept += (s.q_size + s.kv_size) * w + (s.heads + s.kv_heads) * FP32
    elif s.head_norms:
        normalised = ("self_attn.q_norm" in learned) * s.q_size + ("self_attn.k_norm" in learned) * s.kv_size
        kept += (s.q_size + s.kv_size) * FP32 + normalised * w + (s.heads + s.kv_heads) * FP32
    return kept


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
            used = _inputs(run, learned, f"self_attn.{name}_b_proj")
            kept += size * (FP32 + (normalised + used) * w) + FP32
    if not run.half:
        kept += latent.rotated * w  # in one with the vector of keys and values
    behind = _inputs(run, learned, "self_attn.o_proj") * s.v_size * w
    if _keeps_scores(run):
        return kept + (2 * s.q_size + s.v_size) * FP32 + behind
    made = s.v_size if run.way == "eager" else s.heads * (latent.plain + latent.value)
    outputs = 0 if run.way == "eager" or run.lazy else s.v_size * w + s.heads * FP32
    return kept + (2 * s.q_size + made) * w + outputs + (behind if run.row_by_row or run.way == "eager" else 0)


def _keeps_scores(run: Run) -> bool:
    """Whether a CPU keeps the scores of latent attention."""
    short = run.row_by_row and run.half and run.length <= SHORT_ROW
    return run.shape.latent is not None and run.lazy and run.way != "eager" and not short


def _groups_inside(run: Run) -> bool:
    """Whether attention reads grouped keys as they are; with a mask transformers repeats them for each query."""
    return run.way.startswith("flash") or (run.sdpa and not run.masked)


def _scores(run: Run) -> int:
    """Attention's quadratic part in a layer: the mask as numbers, or the scores themselves where eager keeps them."""
    s = run.shape
    if run.way == "eager":  # softmax in float32, and cast; gpt-oss has it in the dtype that computes
        return run.pairs * s.heads * (run.width if s.sinks else FP32 + (2 if run.half else 0))
    mask = run.pairs * run.width if run.masked and run.sdpa else 0
    if _keeps_scores(run):
        pairs = run.tokens * run.length if run.row_by_row else run.pairs
        return mask + pairs * s.heads * FP32
    return mask


def kept_between_layers(run: Run) -> int:
    """What checkpointing keeps of a layer: its input."""
    return run.tokens * run.shape.hidden * run.width


def activations(run: Run, *, checkpointing: bool) -> int:
    """Activations at their most: of all layers, or what checkpointing keeps of them and one layer computed again."""
    layers = [layer_activations(run, layer) for layer in range(run.shape.layers)]
    reached = run.shape.layers - run.weights.first
    inside = reached * kept_between_layers(run) + max(layers) if checkpointing else sum(layers)
    return outside_layers(run) + inside


def layer_backward(run: Run, layer: int) -> int:
    """Gradients of activations alive at once in a layer's backward: of the residual and of the gated MLP.

    4 bits are unpacked a matrix at a time.
    """
    unpacked = max((weight.size for weight in run.weights.of_layer(layer) if weight.four_bits), default=0)
    residual, experts = run.tokens * 2 * run.shape.hidden * FP32, run.shape.experts_in(layer)
    if experts is None:
        return residual + run.tokens * 3 * run.shape.intermediate * run.width + unpacked * run.width
    sums = adapted_experts(run, run.weights.learned(layer), experts)  # their gradients are made, for the adapters'
    return residual + _experts_backward(run, experts) + max(sums, default=0) + unpacked * run.width


def _experts_backward(run: Run, experts: Experts) -> int:
    """Of a mixture: of what its experts wrote, weighted and not, or of what is between their matrices.

    Weights in float32 make what they weight float32, on a GPU, where that is behind the experts.
    """
    behind = 2 * run.width if run.lazy else 2 * (FP32 if experts.float_weights else run.width) + run.width
    return routed(run, experts) * max(
        behind * run.shape.hidden, (5 + 2 * experts.biased) * experts.intermediate * run.width
    )


def outside_layers(run: Run) -> int:
    """Embeddings, the last norm, the mask: alive from the first layer to the loss."""
    h = run.shape.hidden
    norm = h * (FP32 + 2 * run.width)
    mask = run.pairs if run.masked and run.sdpa else 0
    return run.tokens * (norm + h * run.width) + mask


def supervised(run: Run) -> int:
    """Supervised tokens of a micro batch."""
    return round(run.tokens * run.learned)


def chunk_logits(run: Run, tokens: int) -> int:
    """Logits of a chunk (`training/loss.py`), as the product leaves them, and on a CPU in float32 too."""
    chunk = min(tokens, max(1, CHUNK_BYTES // (FP32 * run.shape.vocab)))
    return chunk * run.shape.vocab * (run.width + (FP32 if run.half and run.lazy else 0))


def loss_inputs(run: Run) -> int:
    """Hidden states of supervised tokens and their gradients: what the loss keeps beside its chunk."""
    return 2 * supervised(run) * run.shape.hidden * run.width


def working_copy(run: Run) -> int:
    """Without DeepSpeed bfloat16 weights are made once a step (`training/working_copy.py`).

    float16 and `torch_compile` stay under autocast, which takes 5 to 14 % more in all, and is not followed here.
    """
    return run.weights.number_trained * run.width if run.width != run.weight else 0


def copy_that_stays(run: Run) -> int:
    """What is left of the copy when the optimizer steps: on a CPU, and under DistributedDataParallel, nothing."""
    return working_copy(run) if run.ranks == 1 and not run.lazy else 0


# ---- One step, moment by moment


def _moments(run: Run) -> Iterator[tuple[str, dict[str, int]]]:
    """The parts beside `states` at each moment that could be the fullest."""
    yield "loading", loading(run)
    yield "validation", validation(run)
    for rank in _ranks(run):
        yield from _backward(run, rank)
        yield "optimizer step", step(run, rank)


def _ranks(run: Run) -> list[int]:
    """Ranks whose share differs: the first hold the embedding, the last the output projection."""
    return sorted({0, 1, run.ranks - 2, run.ranks - 1} & set(range(run.ranks)))


def _backward(run: Run, rank: int) -> Iterator[tuple[str, dict[str, int]]]:
    s, weights, reached = run.shape, run.weights, reductions(run, rank)
    layers = [layer_activations(run, i) for i in range(s.layers)]
    kept = layers
    if run.checkpointing:
        kept = [kept_between_layers(run) if i >= weights.first else 0 for i in range(s.layers)]
    below = [0, *accumulate(kept)]
    gathered, head = gathered_at(run), weights.head * run.width  # bytes of the projection's gradient

    def moment(layers: int, at: Reduction, waiting: int = 0, **parts: int) -> dict[str, int]:
        """`layers` still to go backward, `waiting` bytes of a gradient in autograd."""
        return {
            "activations": outside_layers(run) + below[layers],
            "working copy": working_copy(run),
            "gathered parameters": gathered[layers],
            "gradients": at.kept + at.passing + waiting,
            "buckets": at.buckets,
            **parts,
        }

    # The projection's gradient is formed in forward.
    at = Reduction(gradients_before(run, rank), head, _buckets(run))
    yield "loss", moment(s.layers, at, logits=chunk_logits(run, supervised(run)) + loss_inputs(run))
    waiting = head if s.tied else 0  # for the embedding's own, to be added
    done = weights.trained_behind
    at = _fullest(reached[:done] or [replace(at, passing=0)])
    yield "output projection", moment(s.layers, at, waiting, logits=loss_inputs(run))
    for i in reversed(range(weights.first, s.layers)):
        here = weights.trained_in_layers[i]
        at = _fullest(reached[done : done + here] or [at])
        done += here
        parts = moment(i, at, waiting)
        parts["activations"] += layers[i] + layer_backward(run, i)
        yield f"backward of layer {i}", parts
    if weights.embedding:
        at = replace(reached[-2], passing=max(waiting + weights.embedding * run.width, reached[-2].passing))
        yield "embedding", moment(0, at)
    last = reached[-1]
    at_end = {"gathered parameters": gathered[0], "buckets": last.buckets, "working copy": copy_that_stays(run)}
    yield "end of backward", {**at_end, "gradients": last.kept + last.passing}


@dataclass(frozen=True)
class Reduction:
    """Bytes of gradients at one point of backward."""

    kept: int  # for the step
    passing: int  # the newest, and what reducing others takes
    buckets: int


def _fullest(points: list[Reduction]) -> Reduction:
    return max(points, key=lambda point: point.kept + point.passing + point.buckets)


def reductions(run: Run, rank: int) -> list[Reduction]:
    """Gradients as each parameter gets its own, from the model's end to its start, and when the last are reduced."""
    # The batch does not matter: the search for the largest one asks again and again.
    same = Run(shape=run.shape, engine=run.engine, ranks=run.ranks, micro_batch=1, length=1, half=run.half,
               accumulation=min(run.accumulation, 2), checkpointing=False, lazy=run.lazy,
               choice=run.choice)  # fmt: skip
    return _reductions(same, rank)


@lru_cache(maxsize=256)
def _reductions(run: Run, rank: int) -> list[Reduction]:
    engine, w = run.engine, run.weight
    kept, buckets = gradients_before(run, rank), _buckets(run)
    if engine.stage is None:
        cast = run.width if run.width != w else 0  # the gradient of a working copy is there in 16 bits too
        sizes = [*reversed(run.weights.trained), 0]
        done = [0, *accumulate(sizes[:-1])]
        return [Reduction(kept or d * w, size * (w + cast), buckets) for d, size in zip(done, sizes, strict=True)]
    if engine.stage == 1 and (run.accumulation > 1 or not engine.overlap):
        return _reduced_at_the_end(run, rank)
    mine, partition = {start for start, *_ in _in_share(run, rank)}, _partition(run, rank)
    points, after, reducing, own, touched = [], kept, 0, 0, [0, 0]
    for number, bucket in enumerate(_bucketed(run)):
        large, size, filled = _large(run, bucket), _size(bucket), 0
        for _, one in bucket:
            filled += 0 if large else one
            touched[number % 2] = max(touched[number % 2], filled)
            cloned = large and engine.offload_optimizer and engine.stage < 3  # where it stays, and on its way there
            points.append(Reduction(kept, one * w * (1 + cloned) + reducing, buckets + _double(run, touched)))
            kept, reducing = after, 0
        if engine.stage < 3 and not engine.offload_optimizer:
            inside = sum(one for start, one in bucket if start in mine)
            after += (inside if run.lazy else partition if inside and not own else 0) * w  # one buffer takes all
            own += inside
            if engine.stage == 1:
                after += (size - inside) * w * large  # nobody takes them, nobody frees them
        reducing = max(_copies(run, bucket), after - kept) + size * w * large  # a large one until it has been copied
    return [*points, Reduction(kept, reducing, buckets + _double(run, touched))]


def _reduced_at_the_end(run: Run, rank: int) -> list[Reduction]:
    """Stage 1 but for the last micro batch, and without overlap for all: gradients stay where they are.

    They are reduced behind the last micro batch's backward (`reduce_gradients`).
    """
    w, buckets, whole = run.weight, _buckets(run), gradients_before(run, rank)
    sizes = [*reversed(run.weights.trained)]
    done = [0, *accumulate(sizes)]
    points = [Reduction(whole or d * w, size * w, buckets) for d, size in zip(done, sizes, strict=False)]
    bucketed = _bucketed(run)
    filled = [0 if _large(run, bucket) else _size(bucket) for bucket in bucketed]
    touched = [max(filled[buffer::2], default=0) for buffer in (0, 1)]
    copies = max(_copies(run, bucket) for bucket in bucketed)
    return [*points, Reduction(done[-1] * w, copies, buckets + _double(run, touched))]


def _size(bucket: list[tuple[int, int]]) -> int:
    return sum(size for _, size in bucket)


def _bucketed(run: Run) -> list[list[tuple[int, int]]]:
    """Start and size of the parameters of each bucket, from the model's end.

    One is reduced when the next gradient does not fit (`reduce_independent_p_g_buckets_and_remove_grads`).
    """
    made: list[list[tuple[int, int]]] = []
    start, room = run.weights.number_trained, 0
    for size in reversed(run.weights.trained):
        start -= size
        if size > room:
            made.append([])
            room = run.engine.reduce_bucket
        made[-1].append((start, size))
        room -= size
    return made


def _large(run: Run, bucket: list[tuple[int, int]]) -> bool:
    """Whether it is one gradient with no room in DeepSpeed's buffer: it stays where it is, alone."""
    return bucket[0][1] > run.engine.reduce_bucket


def _copies(run: Run, bucket: list[tuple[int, int]]) -> int:
    """Bytes that reducing a bucket takes: in stage 3 `reduce_scatter_coalesced`, else `allreduce_bucket`.

    Both put what several ranks keep parts of into one piece, up to a bucket's size, and gloo copies what it scatters.
    Offloading takes norms in float64. (Stage 2 divides weights with decay and those without each by themselves; here
    all are divided as one, which can move a border within a layer.)
    """
    engine, size = run.engine, _size(bucket)
    if engine.stage == 3:
        joined = len(bucket) > 1 or size % run.ranks > 0
        copies = (joined + run.lazy) * size
        norm = max(-(-size // run.ranks) for _, size in bucket)
    else:
        share = _share(run)
        copies = joined_parts(bucket[-1][0], bucket[0][0] + bucket[0][1], share, engine.reduce_bucket)
        copies *= engine.allreduce
        norm = max(min(one, share) for _, one in bucket)
    return max(copies * run.weight, norm * NORM * engine.offload_optimizer)


def joined_parts(start: int, end: int, share: int, room: int) -> int:
    """Elements of the largest piece that the parts of several ranks are put into (`allreduce_and_scatter`).

    A piece is closed once it is larger than `room`; one part alone is not copied.
    """
    largest = piece = parts = 0
    while start < end:
        part = min(end, (start // share + 1) * share) - start
        start, piece, parts = start + part, piece + part, parts + 1
        if piece > room or start == end:
            largest = max(largest, piece if parts > 1 else 0)
            piece = parts = 0
    return largest


def gradients_before(run: Run, rank: int) -> int:
    """Bytes of gradients that a rank has before backward: of earlier micro batches; in stage 3 one buffer takes all."""
    engine, w = run.engine, run.weight
    if engine.stage == 3:
        return 0 if engine.offload_optimizer else owned(run) * w
    if run.accumulation == 1:
        return 0
    if engine.stage in (None, 1):
        return run.weights.number_trained * w
    return 0 if engine.offload_optimizer else _partition(run, rank) * w


def gradients(run: Run, rank: int) -> int:
    """Bytes of gradients that a rank has when backward ends.

    With accumulation those of earlier micro batches are there from the start. Without DeepSpeed and in stage 1 new ones
    are added to them, in stage 2 they lie beside them (`all_grad_tensors`), in stage 3 one buffer takes both.
    """
    engine = run.engine
    if engine.stage == 3:
        return gradients_before(run, rank)
    if engine.stage in (None, 1):
        return run.weights.number_trained * run.weight
    return 0 if engine.offload_optimizer else (1 + (run.accumulation > 1)) * _partition(run, rank) * run.weight


def step_gradients(run: Run, rank: int) -> int:
    """Gradients left when the optimizer steps: in stages 1 and 2 those of a rank's share (`_clear_param_grad_only`)."""
    if run.engine.stage in (1, 2):
        return 0 if run.engine.offload_optimizer else _partition(run, rank) * run.weight
    return gradients(run, rank)


def _partition(run: Run, rank: int) -> int:
    """Elements of all parameters that lie in a rank's share, those that lie in it with a part only as well.

    Stage 2 keeps their gradients whole (`copy_grads_in_partition`).
    """
    return sum(size for _, size, _ in _in_share(run, rank))


def _in_share(run: Run, rank: int) -> Iterator[tuple[int, int, int]]:
    """Start, size and size within the share of each parameter that a rank of stages 1 and 2 has a part of."""
    share = _share(run)
    start = 0
    for size in run.weights.trained:
        inside = min(start + size, (rank + 1) * share) - max(start, rank * share)
        if inside > 0:
            yield start, size, inside
        start += size


def _buckets(run: Run) -> int:
    """Bytes of the reduction buffers that are there all the time.

    DistributedDataParallel's (`gradient_as_bucket_view` is off), stage 3's, and what stage 2 sends to the host from.
    """
    engine = run.engine
    if engine.stage is None:
        return run.weights.number_trained * FP32 if run.ranks > 1 else 0
    if engine.stage < 3:
        return _largest_copy(run) if engine.offload_optimizer else 0
    filled = max((_size(bucket) for bucket in _bucketed(run) if not _large(run, bucket)), default=0)
    return (filled if run.lazy else engine.reduce_bucket) * run.weight


def _double(run: Run, touched: list[int]) -> int:
    """Bytes of the buffers that stages 1 and 2 make for a backward, two where communication overlaps."""
    engine = run.engine
    if engine.stage == 3:
        return 0
    if run.lazy:
        return (sum(touched) if engine.overlap else max(touched)) * run.weight
    return (1 + engine.overlap) * engine.reduce_bucket * run.weight


def gathered_at(run: Run) -> list[int]:
    """Bytes of whole parameters that stage 3 holds when `i` layers are still to go backward, i = 0 ... layers.

    A parameter stays after its use while the next is nearer than `max_reuse_distance` elements
    (`partitioned_param_coordinator.py`, `__params_to_release`): models up to about half of it stay whole from forward
    to backward. `stage3_prefetch_bucket_size` more are fetched ahead.
    """
    s, engine = run.shape, run.engine
    if engine.stage != 3:
        return [0] * (s.layers + 1)
    modules = [_gathered_modules(run, layer) for layer in range(s.layers)]
    whole = [sum(sizes) for sizes in modules]
    behind = [*accumulate(reversed(whole), initial=0)][::-1]  # in all layers from this one on
    passes = 3 if run.checkpointing else 2  # a layer's recomputation uses its parameters once more

    def stays(first: int) -> bool:
        """Whether what the layers from `first` on follow is kept; the projection is used by forward and backward."""
        return 2 * s.embedding + passes * behind[first] < engine.max_reuse_distance

    embedding = s.embedding if stays(0) else 0  # waits for its own backward, as output projection or beside it
    held = []
    for i in range(s.layers + 1):
        near = sum(whole[number] for number in range(i) if stays(number + 1))
        if i in (0, s.layers):
            current = s.embedding + (embedding if i and not s.tied else 0)
        else:
            current = (whole[i] if stays(i + 1) else max(modules[i], default=0)) + embedding
        held.append((near + current + min(engine.prefetch_bucket, run.weights.number)) * run.weight)
    return held


def _gathered_modules(run: Run, layer: int) -> list[int]:
    """Elements of each module of a layer that stage 3 gathers: small parameters stay whole.

    A module's own parameters are gathered together: of a mixture all experts' matrices.
    """
    found: dict[str, int] = {}
    for weight in run.weights.of_layer(layer):
        if weight.used and weight.size > run.engine.persistence_threshold:
            module = weight.name.rpartition(".")[0]
            found[module] = found.get(module, 0) + weight.size
    return [*found.values()]


def step(run: Run, rank: int) -> dict[str, int]:
    """The optimizer step: gradients as they were reduced, then flattened, then in float32 for the fused Adam."""
    engine, share = run.engine, owned(run)
    held = step_gradients(run, rank)
    if engine.stage is None or engine.offload_optimizer:
        return {"gradients": held, "buckets": _buckets(run), "working copy": copy_that_stays(run)}
    part = min(share, engine.sub_group) if engine.stage == 3 else share
    flat = part * (run.weight + FP32 if run.weight != FP32 else FP32)
    if engine.stage == 3:
        norm = NORM * -(-max(run.weights.trained) // run.ranks)
    else:
        norm = NORM * max((inside for *_, inside in _in_share(run, rank)), default=0)
    return {"gradients": held, "step buffers": max(flat, norm), "buckets": _buckets(run)}


def validation(run: Run) -> dict[str, int]:
    """A validation batch: a chunk of its logits."""
    s = run.shape
    wide = run.eval_batch * run.length * max(s.hidden, s.intermediate) * 2 * FP32
    if s.experts is not None:  # sorted tokens, both projections, the product
        routes = run.eval_batch * run.length * s.experts.chosen
        wide = max(wide, routes * (2 * s.hidden + 3 * s.experts.intermediate) * run.width)
    size = chunk_logits(run, run.eval_batch * run.length) if run.eval_batch else 0
    copy = working_copy(run) if run.eval_batch else 0
    return {"logits": size, "activations": wide, "working copy": copy, "gathered parameters": gathered_at(run)[-1],
            "buckets": _buckets(run)}  # fmt: skip


def loading(run: Run) -> dict[str, int]:
    """Before the states exist: stages 1 and 2 copy the weights into one flat buffer."""
    if run.engine.stage in (1, 2) and not run.engine.offload_optimizer:
        return {"master weights": 0, "optimizer states": 0, "flat copy": run.weights.number_trained * run.weight}
    return {}
