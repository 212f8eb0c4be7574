"""What a step costs: arithmetic, bytes sent, seconds; and how a run's steps add up."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_sft.plan.attention import exchanged_width
from ds_sft.plan.run import Engine, Run, planned_weights
from ds_sft.plan.shape import Shape
from ds_sft.plan.states import kept_between_layers
from ds_sft.plan.weights import ALL, Choice


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the ranks run on. Rates are those reached, not those on a data sheet."""

    nodes: int
    gpus_per_node: int
    flops: float  # a second and GPU
    inside: float  # bytes a second and GPU between GPUs of a node
    between: float  # bytes a second and GPU between nodes: of each GPU's own card, or its part of a shared one
    host: float = 20e9  # bytes a second and GPU between a GPU and its node's memory, for offloading

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def ring(self) -> float:
        """Bytes a second that each GPU sends in collectives over all nodes (NCCL calls it the bus bandwidth).

        There are as many rings as cards, each with a part of the data, and each leaves a node at another GPU. Of what a
        GPU sends, one part in `gpus_per_node` takes its card and the others stay inside; the slower link decides.
        """
        inside = self.gpus_per_node - 1
        over_cards = self.between * self.gpus_per_node
        return min(over_cards, self.inside * self.gpus_per_node / inside) if inside else over_cards


def model_flops_per_token(shape: Shape, length: int, choice: Choice = ALL) -> float:
    """Forward and backward: 6 a multiplied parameter, and attention's scores (PaLM, arXiv 2204.02311, appendix B).

    Of experts those count that a token chooses. 4 a frozen parameter, which has no gradient of its own, and 2 below
    the first layer that has something trained.
    """
    weights = planned_weights(shape, choice)
    scores = 12.0 * (shape.layers - weights.first) + 4.0 * weights.first
    return sum(weights.flops()) + scores * shape.attended * length


def step_flops(run: Run) -> float:
    """Of one micro batch of one rank; checkpointing computes the forward of the layers that backward reaches again."""
    flops = model_flops_per_token(run.shape, run.length, run.choice)
    if run.checkpointing:
        reached = run.shape.layers - run.weights.first
        flops += 2.0 * run.weights.multiplied_again + 4.0 * reached * run.shape.attended * run.length
    if run.tile and not run.checkpointing:  # computed again; else checkpointing leaves that to the tiles
        flops += 6.0 * run.shape.layers * run.shape.hidden * run.shape.intermediate
    return run.tokens * flops


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, beside computation and after it."""

    inside: float = 0.0  # in collectives of one node's ranks
    between: float = 0.0  # in collectives of ranks on several nodes: `Hardware.ring` says how fast
    host: float = 0.0
    after_inside: float = 0.0
    after_between: float = 0.0
    heads_inside: float = 0.0  # attention's, in groups of ranks that share a row, which wait for it
    heads_between: float = 0.0

    @property
    def total(self) -> float:
        after = self.after_inside + self.after_between
        return self.inside + self.between + after + self.heads_inside + self.heads_between


def collectives(
    engine: Engine, weights: float, ranks: int, accumulation: int, *, frozen: float = 0.0
) -> tuple[float, float]:
    """Bytes that a rank sends in a step: beside computation, and after it.

    psi is the bytes of all trained weights (`weights`; `frozen` ones are gathered in stage 3 alone): a ring sends (n -
    1) / n psi to gather or to reduce-scatter them, twice that to all-reduce (ZeRO paper, section 7). As DeepSpeed 0.19
    does it (`runtime/zero/stage_1_and_2.py`, `average_tensor`): stage 2 reduces the gradients of every micro batch,
    stage 1 and no DeepSpeed once a step; `reduce_scatter` is an all-reduce of whole buckets of which each rank keeps
    its part, 2 psi, and one reduce for each rank's part, psi, only without `use_multi_rank_bucket_allreduce`. Then both
    gather the weights, psi. Stage 3: weights gathered for forward and for backward, gradients reduce-scattered, 3 psi
    each micro batch.
    """
    psi, still = (size * (ranks - 1) / ranks for size in (weights, frozen))
    if engine.stage is None:
        return 2 * psi, 0.0
    if engine.stage == 3:
        return (3 * psi + 2 * still) * accumulation, 0.0
    return (2 if engine.allreduce else 1) * psi * (accumulation if engine.stage == 2 else 1), psi


def traffic(run: Run, gpus_per_node: int) -> Traffic:
    """Bytes of a step, by where they go.

    With hierarchical partitioning (ZeRO++, arXiv 2306.10209) the weights for backward stay inside the node.
    """
    trained, frozen = run.weights.number_trained * run.weight, run.weights.frozen_bytes(run.width)
    beside, after = collectives(run.engine, trained, run.ranks, run.accumulation, frozen=frozen)
    heads_inside, heads_between = _heads(run, gpus_per_node)
    waited = Traffic(host=_offloaded(run), heads_inside=heads_inside, heads_between=heads_between)
    if run.ranks <= gpus_per_node:
        return replace(waited, inside=beside, after_inside=after)
    gathered = (trained + frozen) * (run.ranks - 1) / run.ranks * run.accumulation  # once for backward
    within = gathered if run.engine.stage == 3 and run.engine.hierarchical > 1 else 0.0
    return replace(waited, inside=within, between=beside - within, after_between=after)


def exchanged(shape: Shape, tokens: int, group: int, width: int, *, again: bool) -> float:
    """Bytes that a rank sends to the others of its group in a micro batch of `tokens` that they share.

    Queries, keys and values there, attention's output back, in forward, in backward and, where layers are computed
    `again`, once more (DeepSpeed Ulysses, arXiv 2309.14509); `width` bytes a number.
    """
    of_a_token = exchanged_width(shape, group) + shape.v_size
    return (2 + again) * shape.layers * tokens / group * (group - 1) / group * of_a_token * width


def _heads(run: Run, gpus_per_node: int) -> tuple[float, float]:
    """What attention sends in a step, inside a node and between nodes: each other rank of a group gets as much."""
    sent = exchanged(run.shape, run.batch_tokens, run.sequence, run.width, again=run.checkpointing) * run.accumulation
    others = run.sequence - 1
    near = min(gpus_per_node, run.sequence) - 1
    return (sent * near / others, sent * (others - near) / others) if others else (0.0, 0.0)


def _offloaded(run: Run) -> float:
    """Gradients to the host and weights back, of a rank's share; offloaded weights also on their way into a gather.

    Layers' inputs go there and come back.
    """
    engine = run.engine
    trained, frozen = run.weights.number_trained * run.weight, run.weights.frozen_bytes(run.width)
    states = trained * (run.accumulation + 1) if engine.offload_optimizer else 0.0
    gathered = 2 * (trained + frozen) * run.accumulation if engine.offload_param else 0.0
    layers = run.shape.layers - run.weights.first - 1
    inputs = 2 * layers * kept_between_layers(run) * run.accumulation if run.inputs_on_host else 0.0
    return (states + gathered) / run.ranks + inputs


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step."""

    compute: float
    communication: float
    total: float

    @property
    def efficiency(self) -> float:
        """Share of a step in which GPUs compute."""
        return self.compute / self.total


def step_time(run: Run, hardware: Hardware, *, overlap: float = 1.0) -> Step:
    """Seconds of a step; `overlap` is the share of the traffic during computation that can hide behind it."""
    sent = traffic(run, hardware.gpus_per_node)
    compute = run.accumulation * step_flops(run) / hardware.flops
    beside = sent.inside / hardware.inside + sent.between / hardware.ring + sent.host / hardware.host
    after = sent.after_inside / hardware.inside + sent.after_between / hardware.ring
    after += sent.heads_inside / hardware.inside + sent.heads_between / hardware.between
    hidden = min(compute, beside * overlap) if run.engine.overlap else 0.0
    return Step(compute, beside + after, compute + beside - hidden + after)


def hiding_bandwidth(run: Run, hardware: Hardware) -> float:
    """Bytes a second that each GPU must send (`Hardware.ring`) for communication to hide behind computation."""
    sent = traffic(run, hardware.gpus_per_node)
    compute = run.accumulation * step_flops(run) / hardware.flops
    return (sent.inside + sent.between) / compute
