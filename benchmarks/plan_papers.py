"""The planner's formulas beside published figures: `python benchmarks/plan_papers.py` prints the table of README.

Papers name parameters, not shapes, so bytes are counted for Llama-2-7B and scaled to the paper's number of parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.plan.cost import Hardware, hiding_bandwidth, traffic
from ds_sft.plan.memory import Engine, Run, gradients, kept_between_layers, states
from ds_sft.plan.shape import Shape

LLAMA = Shape(family="llama", hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_dim=128,
              vocab=32000, tied=False)  # fmt: skip
GB, GIB, TIB = 1e9, 2**30, 2**40
# Table 1 of the ZeRO paper (arXiv 1910.02054v3), GB of a device: degree of data parallelism -> stages 1, 2, 3 of 7.5 B
# parameters.
ZERO_TABLE_1 = {
    1: (120, 120, 120),
    4: (52.5, 41.3, 30),
    16: (35.6, 21.6, 7.5),
    64: (31.4, 16.6, 1.88),
    256: (30.4, 15.4, 0.47),
    1024: (30.1, 15.1, 0.12),
}


@dataclass(frozen=True)
class Row:
    """A published figure beside ours."""

    what: str
    source: str
    published: float
    ours: float
    unit: str
    why: str = ""  # they differ

    @property
    def difference(self) -> float:
        return self.ours / self.published - 1


def run(stage: int, ranks: int, **keys: int | bool) -> Run:
    """A step of Llama-2-7B in bf16, one row of 1024 tokens, buckets and prefetching left out as papers do."""
    engine = Engine(stage=stage, reduce_bucket=0, prefetch_bucket=0, persistence_threshold=0)
    made = Run(shape=LLAMA, engine=engine, ranks=ranks, micro_batch=1, length=1024, accumulation=1, checkpointing=True,
               half=True, lazy=True)  # fmt: skip
    return replace(made, **keys)  # type: ignore[arg-type]


def states_bytes(stage: int, ranks: int, rank: int | None = None) -> float:
    """Bytes of states of a rank for each parameter of the model."""
    asked = run(stage, ranks)
    held = gradients(asked, ranks // 2 if rank is None else rank, LLAMA.parameters)
    return (sum(states(asked).values()) + held) / LLAMA.parameters


def zero_table() -> Iterator[Row]:
    for ranks, published in ZERO_TABLE_1.items():
        for stage, figure in enumerate(published, start=1):
            why = "DeepSpeed keeps gradients whole that lie across a border" if stage == 2 and ranks > 16 else ""
            ours = states_bytes(stage, ranks) * 7.5e9 / GB
            yield Row(f"7.5 B, {ranks} GPUs, stage {stage}", "ZeRO, table 1", figure, ours, "GB", why)


def zero_infinity() -> Iterator[Row]:
    """Figure 2a of ZeRO-Infinity (arXiv 2104.07857); its rows are 32 of 1024 tokens."""
    source, why = "ZeRO-Infinity, figure 2a", "the paper counts float32 gradients as well: 20 bytes a parameter, not 16"
    for name, layers, hidden, states_tib, checkpoints_tib in (
        ("0.1 T", 80, 10240, 1.83, 0.05),
        ("1 T", 128, 25600, 18.31, 0.20),
    ):
        ours = states_bytes(2, 1) * 12 * layers * hidden**2 / TIB
        yield Row(f"{name}, all states", source, states_tib, ours, "TiB", why)
        shape = replace(LLAMA, layers=layers, hidden=hidden)
        kept = kept_between_layers(replace(run(3, 1), shape=shape, micro_batch=32)) * layers / TIB
        yield Row(f"{name}, activation checkpoints", source, checkpoints_tib, kept, "TiB", "rounding")


def estimators() -> Iterator[Row]:
    """DeepSpeed's documentation, docs/code-docs/source/memory.rst: t5-3b, 2851 M parameters, one node of 8 GPUs."""
    p = 2851e6 / GIB
    offload = replace(run(2, 8), engine=replace(run(2, 8).engine, offload_optimizer=True))
    on_gpu = sum(states(offload).values()) / LLAMA.parameters
    source = "DeepSpeed's estimators"
    yield Row("t5-3b, 8 GPUs, ZeRO-2 offload", source, 5.31, on_gpu * p, "GiB")
    yield Row("t5-3b, 8 GPUs, ZeRO-2", source, 15.93, states_bytes(2, 8) * p, "GiB", "they do not divide gradients")
    yield Row("t5-3b, 8 GPUs, ZeRO-3", source, 6.10, states_bytes(3, 8) * p, "GiB",
              "they count float32 gradients, and the largest layer")  # fmt: skip


def communication() -> Iterator[Row]:
    weights = LLAMA.parameters * 2
    many = 1 << 20  # (ranks - 1) / ranks is 1
    ours = traffic(run(3, many), 1).total / weights
    yield Row("stage 3, traffic in weights", "ZeRO, section 7.2.2", 3, ours, "")
    within = replace(run(3, many), engine=replace(run(3, many).engine, hierarchical=8))
    yield Row("hierarchical, between nodes", "ZeRO++, table 1", 2, traffic(within, 8).between / weights, "")
    gpus = Hardware(nodes=64, gpus_per_node=8, flops=70e12, inside=1, between=1)
    yield Row("bandwidth for half efficiency, one row", "ZeRO-Infinity, figure 3a", 70,
              hiding_bandwidth(run(3, 512), gpus) / GB, "GB/s",
              "recomputation and backward share one gathering: three passes over the weights, not four")  # fmt: skip


def rows() -> list[Row]:
    return [*zero_table(), *zero_infinity(), *estimators(), *communication()]


def main() -> None:
    print("| what | source | published | ours | difference | why |\n|---|---|--:|--:|--:|---|")
    for r in rows():
        figures = f"{r.published:g} {r.unit} | {r.ours:.3g} {r.unit} | {r.difference:+.1%}"
        print(f"| {r.what} | {r.source} | {figures} | {r.why} |")


if __name__ == "__main__":
    main()
