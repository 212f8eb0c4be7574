"""The planner's formulas beside published figures: `python benchmarks/plan_papers.py` prints docs/plan.md's tables.

Papers name parameters, not shapes, so bytes are counted for Llama-2-7B and scaled to the paper's number of parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.plan.cost import Hardware, hiding_bandwidth, step_flops, step_time, traffic
from ds_sft.plan.gradients import gradients
from ds_sft.plan.run import Engine, Run
from ds_sft.plan.shape import Shape
from ds_sft.plan.states import kept_between_layers, states

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
    held = gradients(asked, ranks // 2 if rank is None else rank)
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


# ---- Step times: published throughputs, TFLOP/s of a GPU with recomputation counted as `step_flops` does


def gpt(layers: int, hidden: int, vocab: int) -> Shape:
    """GPT's shape: a layer of 12 hidden^2, here with a gated MLP of as many parameters."""
    return replace(LLAMA, layers=layers, hidden=hidden, intermediate=round(8 * hidden / 3), heads=hidden // 128,
                   kv_heads=hidden // 128, vocab=vocab, tied=True)  # fmt: skip


def asked(shape: Shape, gpus: int, micro_batch: int, length: int) -> Run:
    """One micro batch a step under ZeRO-3, as all of the runs below are."""
    return replace(run(3, gpus), shape=shape, micro_batch=micro_batch, length=length)


def links(nodes: int, gpus_per_node: int, rate: float, ring: float) -> Hardware:
    """`rate`: FLOP/s of a GPU; `ring`: bytes a second that each sends in collectives of all nodes."""
    return Hardware(nodes=nodes, gpus_per_node=gpus_per_node, flops=rate, inside=1e15, between=ring / gpus_per_node)


def throughput(asked: Run, hardware: Hardware, overlap: float) -> float:
    """TFLOP/s of a GPU."""
    return step_flops(asked) / step_time(asked, hardware, overlap=overlap).total / 1e12


def ring_of(asked: Run, tflops: float) -> float:
    """Bytes a second that a run which waits for communication alone sends, from its throughput."""
    return traffic(asked, 8).between / (step_flops(asked) / (tflops * 1e12))


def megatron() -> Iterator[Row]:
    """Table 2 of Megatron-LM (arXiv 2104.04473): ZeRO-3 on Selene, 8 A100 and 8 cards of 200 Gbit/s a node.

    Two of its cells are inputs: the rate of computation (384 GPUs) and the bandwidth (768 GPUs); ours are the others.
    """
    source = "Megatron-LM, table 2"
    small, large = gpt(96, 12288, 51200), gpt(105, 20480, 51200)
    first = asked(small, 384, 4, 2048)
    days = 300e9 / (1536 * 2048) * step_flops(first) / 144e12 / 86400
    yield Row("174.6 B, 384 GPUs: 300 B tokens at 144 TFLOP/s", source, 90, days, "days")
    ring = ring_of(asked(small, 768, 2, 2048), 88)
    for shape, name, gpus, micro, published, why in (
        (small, "174.6 B", 1536, 1, 44, ""),
        (large, "529.6 B", 640, 4, 138, "ours has the rate of 174.6 B"),
        (large, "529.6 B", 1120, 2, 98, f"ours has the bandwidth of 174.6 B, {ring / GB:.0f} GB/s"),
        (large, "529.6 B", 2240, 1, 48, "the same"),
    ):
        ours = throughput(asked(shape, gpus, micro, 2048), links(gpus // 8, 8, 144e12, ring), 1.0)
        yield Row(f"{name}, ZeRO-3, {gpus} GPUs, {micro} x 2048 tokens", source, published, ours, "TFLOP/s", why)


def azure() -> Iterator[Row]:
    """Figure 6 of "Azure empowers easy-to-use, high-performance ... training using DeepSpeed" (DeepSpeed's blog, 2022).

    530 B on 512 A100, ZeRO-3, rows of 1024 tokens. Inputs: 64.5 at one row (bandwidth), 170.42 at eight (rate). All but
    the last are read from the bars, to 1 TFLOP/s.
    """
    shape = gpt(105, 20480, 51200)
    ring = ring_of(asked(shape, 512, 1, 1024), 64.5)
    for micro, published in ((2, 119.5), (4, 159.5)):
        ours = throughput(asked(shape, 512, micro, 1024), links(64, 8, 170.42e12, ring), 1.0)
        yield Row(f"530 B, ZeRO-3, 512 GPUs, {micro} x 1024 tokens", "DeepSpeed on Azure, figure 6", published, ours,
                  "TFLOP/s", "not all that could hide did")  # fmt: skip


def zero_plus_plus() -> Iterator[Row]:
    """Baselines (ZeRO-3) of DeepSpeed's post on ZeRO++, figures 6 to 8: 384 V100, 16 a node, IB cards of 100 Gbit/s.

    Input: the rate, from the cell with most cards of each size and micro batch. Nothing is taken to hide.
    """
    for name, layers, hidden, tokens, most, cells in (
        ("18 B", 40, 6144, 2048, (8, 47), {4: 40, 2: 37, 1: 26}),
        ("138 B", 96, 10944, 2048, (8, 48), {4: 36, 2: 32, 1: 20}),
        ("18 B", 40, 6144, 1024, (4, 25), {1: 14}),
        ("138 B", 96, 10944, 1024, (4, 23), {1: 11}),
    ):
        question = asked(gpt(layers, hidden, 50304), 384, 1, tokens)
        card = 12.5e9
        seconds = step_flops(question) / (most[1] * 1e12) - traffic(question, 16).between / (card * most[0])
        rate = step_flops(question) / seconds
        for cards, published in cells.items():
            ours, hidden_all = (throughput(question, links(24, 16, rate, card * cards), part) for part in (0.0, 1.0))
            yield Row(f"{name}, ZeRO-3, {cards} x 100 Gbit/s a node, {tokens} tokens", "ZeRO++, figures 6 to 8",
                      published, ours, "TFLOP/s", f"{hidden_all:.0f} if all hid that can")  # fmt: skip


def rows() -> list[Row]:
    return [*zero_table(), *zero_infinity(), *estimators(), *communication(), *megatron(), *azure(), *zero_plus_plus()]


def main() -> None:
    print("| what | source | published | ours | difference | why |\n|---|---|--:|--:|--:|---|")
    for r in rows():
        figures = f"{r.published:g} {r.unit} | {r.ours:.3g} {r.unit} | {r.difference:+.1%}"
        print(f"| {r.what} | {r.source} | {figures} | {r.why} |")


if __name__ == "__main__":
    main()
