"""What decides the memory of one rank: the model, the engine, the batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

from ds_sft.config.keys import ADAFACTOR, MUON
from ds_sft.plan.optimizer import ADAMW
from ds_sft.plan.shape import TAKEN, Shape
from ds_sft.plan.weights import ALL, FP32, Choice, Learned, Weights, weights_of

# Tokens of a tile of the MLP; and of a micro batch from which on `auto` has tiles, beside checkpointing (`tiled_mlp`).
TILE, TILED_FROM = 4096, 16_384


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
    attention: str = "rows"  # model/attention.py where rows are packed or flat, else `sdpa`
    eval_batch: int = 0  # rows of a validation batch; 0: no validation
    learned: float = 1.0  # share of the tokens that are supervised, at most
    lazy: bool = False  # a CPU: memory counts once it is written to, not when it is allocated
    fused: bool = False  # norms, rotations and gates by Liger (`model/fused.py`)
    choice: Choice = ALL  # of what is trained
    sequence: int = 1  # ranks that share each row (`sequence_parallel`)
    inputs_on_host: bool = False  # what checkpointing keeps of layers (`activation_checkpointing: offload`)
    tiling: str = "auto"  # `tiled_mlp`
    optimizer: str = ADAMW  # or another of `plan/optimizer.py`
    clipped: bool = False  # gradients (`max_grad_norm`)
    fused_steps: bool = True  # the optimizer steps in one kernel (`optim: adamw_torch` does not)
    smoothed: bool = False  # labels (`label_smoothing_factor`)
    narrow: bool = False  # weights, gradients and states are bfloat16 (`optimizer_dtype`)

    @property
    def weights(self) -> Weights:
        return planned_weights(self.shape, self.choice)

    @property
    def refused(self) -> bool:
        """Whether no such run starts: stage 3 cannot divide what is packed into 4 bits, DeepSpeed's CPU Adam is the
        one optimizer of the host and has float32 states alone, its Muon clips no gradients and has weights on the
        device, and Adafactor needs whole matrices."""
        engine = self.engine
        if engine.offload_optimizer and (self.narrow or self.optimizer != ADAMW):
            return True
        if self.optimizer == ADAFACTOR and engine.stage is not None:
            return True
        if self.optimizer == MUON and engine.stage is not None and (self.clipped or engine.offload_param):
            return True
        return self.choice.four_bits and engine.stage == 3

    @property
    def weight(self) -> int:
        """Bytes of a trained parameter in the model: DeepSpeed keeps masters beside 16-bit weights."""
        return self.width if self.engine.stage is not None or self.narrow else FP32

    @property
    def master(self) -> int:
        """Bytes of a parameter in what DeepSpeed updates."""
        return 2 if self.narrow else FP32

    @property
    def width(self) -> int:
        """Bytes of a number in activations, and in the weights that compute or are frozen."""
        return 2 if self.half else FP32

    @property
    def batch_tokens(self) -> int:
        """Of a micro batch, which the ranks of a sequence group share."""
        tokens = self.micro_batch * self.length
        return tokens if self.max_tokens is None else min(tokens, self.max_tokens)

    @property
    def tokens(self) -> int:
        """Of a micro batch that are a rank's."""
        return -(-self.batch_tokens // self.sequence)

    @property
    def tile(self) -> int | None:
        """Tokens that an MLP computes at a time; None: all."""
        s = self.shape
        if self.tiling == "no" or s.experts is not None or self.choice.dropout:
            return None
        pays = self.checkpointing and self.tokens >= TILED_FROM and 7 * s.intermediate >= 16 * s.hidden
        if self.tokens <= TILE or not (self.tiling == "yes" or pays):
            return None
        return math.ceil(self.tokens / math.ceil(self.tokens / TILE))  # tiles of about equal size

    @property
    def groups(self) -> int:
        """Of ranks with different rows."""
        return self.ranks // self.sequence

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
        return self.batch_tokens * (self.batch_tokens if self.packed or self.flat else self.length)


@lru_cache(maxsize=64)
def planned_weights(shape: Shape, choice: Choice) -> Weights:
    taken = TAKEN.get(shape.family, ())
    return weights_of(shape.shapes(), choice, layers=shape.layers, met=shape.met, taken=taken)


def without_batch(run: Run) -> Run:
    """What does not depend on the batch is asked again and again in search of the largest one: with this, once.

    But for whether MLPs are computed in tiles, as those of a row of this length can be.
    """
    return replace(run, micro_batch=1, length=TILE + 1, max_tokens=None, accumulation=min(run.accumulation, 2),
                   eval_batch=0, learned=1.0,
                   checkpointing=run.checkpointing and run.engine.stage == 3, sequence=1,
                   padded=False, packed=False, flat=False, inputs_on_host=False,
                   tiling="no" if run.tile is None else "yes")  # fmt: skip


def inputs_kept(run: Run, learned: Learned, *names: str) -> bool:
    """Whether backward needs what comes into these matrices; adapters with dropout have copies of their own."""
    return any(learned.get(name, False) or (name in learned and not run.choice.dropout) for name in names)


def supervised(run: Run) -> int:
    """Supervised tokens of a rank's part of a micro batch, which can have all of them."""
    return min(run.tokens, round(run.batch_tokens * run.learned))


def gates_kept(run: Run, learned: Learned, name: str, intermediate: int) -> int:
    """A gated MLP, a token: both projections, their product where down_proj wants it; eager the activation too."""
    return ((2 if run.fused else 3) + inputs_kept(run, learned, f"{name}.down_proj")) * intermediate * run.width


def gates_backward(run: Run, learned: Learned, name: str, intermediate: int) -> int:
    """What a gated MLP's backward has beside what was kept, a token, when it is fullest.

    Eager that is when the product's gradient becomes those of both factors, and the product itself is gone; Liger's
    writes over what was kept.
    """
    inside = intermediate * run.width
    return inside if run.fused else 6 * inside - gates_kept(run, learned, name, intermediate)
