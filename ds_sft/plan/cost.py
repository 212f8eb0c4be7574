"""What a step costs: arithmetic, bytes sent, seconds; and how a run's steps add up."""

from __future__ import annotations

from dataclasses import dataclass

from ds_sft.plan.memory import FP32, Run
from ds_sft.plan.shape import Shape


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What the ranks run on. Rates are those reached, not those on a data sheet."""

    nodes: int
    gpus_per_node: int
    flops: float  # a second and GPU
    inside: float  # bytes a second and GPU between GPUs of a node
    between: float  # bytes a second and GPU between nodes
    host: float = 20e9  # bytes a second and GPU between a GPU and its node's memory, for offloading

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node


def model_flops_per_token(shape: Shape, length: int) -> float:
    """Forward and backward: 6 a multiplied parameter, and attention's scores (PaLM, arXiv 2204.02311, appendix B)."""
    return 6.0 * shape.multiplied + 12.0 * shape.layers * shape.q_size * length


def step_flops(run: Run) -> float:
    """Of one micro batch of one rank; checkpointing computes the layers' forward again."""
    head = 6.0 * run.shape.embedding
    layers = model_flops_per_token(run.shape, run.length) - head
    return run.tokens * (head + layers * (4 / 3 if run.checkpointing else 1))


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step, beside computation and after it, over each kind of link."""

    inside: float = 0.0
    between: float = 0.0
    host: float = 0.0
    after_inside: float = 0.0
    after_between: float = 0.0

    @property
    def total(self) -> float:
        return self.inside + self.between + self.after_inside + self.after_between


def traffic(run: Run, gpus_per_node: int) -> Traffic:
    """Bytes of a step, as ring collectives move them; psi is the bytes of all weights (ZeRO paper, section 7).

    No DeepSpeed, stage 1: gradients all-reduced once, 2 psi (stage 1 gathers the weights again: psi more). Stage 2 does
    so for every micro batch, and reduces buckets with an all-reduce (`use_multi_rank_bucket_allreduce`): 2 psi each,
    psi for the weights. Stage 3: weights gathered for forward and for backward, gradients scattered: 3 psi each micro
    batch; with hierarchical partitioning (ZeRO++, arXiv 2306.10209) those for backward stay inside the node.
    """
    engine, ranks = run.engine, run.ranks
    psi = run.shape.parameters * run.weight * (ranks - 1) / max(ranks, 1)
    micro = run.accumulation
    nodes = ranks > gpus_per_node
    host = _offloaded(run)
    if engine.stage is None:
        volume = 2 * run.shape.parameters * FP32 * (ranks - 1) / ranks
        return Traffic(0.0 if nodes else volume, volume if nodes else 0.0)
    if engine.stage < 3:
        volume = 2 * psi * (micro if engine.stage == 2 else 1)
        moved = (0.0, volume) if nodes else (volume, 0.0)
        return Traffic(*moved, host, *((0.0, psi) if nodes else (psi, 0.0)))
    if engine.hierarchical > 1 and nodes:
        return Traffic(micro * psi, micro * 2 * psi, host)
    return Traffic(0.0, micro * 3 * psi, host) if nodes else Traffic(micro * 3 * psi, 0.0, host)


def _offloaded(run: Run) -> float:
    """Gradients to the host and weights back, of a rank's share; offloaded weights also on their way into a gather."""
    engine = run.engine
    share = run.shape.parameters * run.weight / run.ranks
    states = share * (run.accumulation + 1) if engine.offload_optimizer else 0.0
    return states + (2 * share * run.accumulation if engine.offload_param else 0.0)


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
    beside = sent.inside / hardware.inside + sent.between / hardware.between + sent.host / hardware.host
    after = sent.after_inside / hardware.inside + sent.after_between / hardware.between
    hidden = min(compute, beside * overlap) if run.engine.overlap else 0.0
    return Step(compute, beside + after, compute + beside - hidden + after)


def hiding_bandwidth(run: Run, hardware: Hardware) -> float:
    """Bytes a second and GPU below which communication no longer hides behind computation."""
    sent = traffic(run, hardware.gpus_per_node)
    compute = run.accumulation * step_flops(run) / hardware.flops
    return (sent.inside + sent.between) / compute
