"""Which layout to take: of those that fit, the one that recomputes and sends least, with the largest micro batch."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ds_sft.config.keys import Config
from ds_sft.config.rules import AGAINST_SEQUENCE_PARALLEL
from ds_sft.plan.cost import Hardware
from ds_sft.plan.layouts import NAMED, Option, option
from ds_sft.plan.run import Run

MOST_NODES = 64  # that are proposed where nothing fits


@dataclass(frozen=True)
class Way:
    """How a layer's activations are kept, and how many ranks share a row."""

    checkpointing: bool
    inputs_on_host: bool = False
    sequence: int = 1

    @property
    def word(self) -> str:
        """The value of `activation_checkpointing`."""
        return "offload" if self.inputs_on_host else "yes" if self.checkpointing else "no"

    @property
    def keys(self) -> str:
        """What to write."""
        shared = f", sequence_parallel: {self.sequence}" if self.sequence > 1 else ""
        return f"activation_checkpointing: {self.word}{shared}"

    def of(self, run: Run) -> Run:
        """The run in this way; groups of several ranks take more micro batches for the same step."""
        micro_batches = run.accumulation * self.sequence // run.sequence
        return replace(run, checkpointing=self.checkpointing, inputs_on_host=self.inputs_on_host,
                       sequence=self.sequence, accumulation=micro_batches)  # fmt: skip


def way_of(run: Run) -> Way:
    return Way(run.checkpointing, run.inputs_on_host, run.sequence)


def group_sizes(config: Config, run: Run, per_node: int) -> list[int]:
    """How many ranks of a node could share a row: as asked, and more, by doubling."""
    keys = config.to_dict()
    excluded = any(keys.get(name, allowed) != allowed for name, (allowed, _) in AGAINST_SEQUENCE_PARALLEL.items())
    if excluded or not run.row_by_row or run.lazy or config.fused_kernels == "compile":
        return [run.sequence]
    doubled = [run.sequence * 2**power for power in range(per_node.bit_length())]
    return [size for size in doubled if size == run.sequence or (per_node % size == run.shape.heads % size == 0)]


def ways(groups: Sequence[int], *, lazy: bool = False) -> list[list[Way]]:
    """In the order in which they are advised: each takes less memory than the ones before, and costs more.

    Nothing computed again, or layers again, whichever is faster with the micro batch that it leaves room for; layers'
    inputs on the host, where copies hide behind computation; then rows over two ranks, which wait for each other in
    attention, four ...
    """
    found = []
    for group in groups:
        found.append([Way(False, sequence=group), Way(True, sequence=group)])
        if not lazy:  # on a CPU they are there already
            found.append([Way(True, True, group)])
    return found


def recommend(base: Mapping[str, Run], hardware: Hardware, gpu_memory: float, host: float | None, *,
              groups: Sequence[int] = (1,), filled: bool = False) -> Option | None:  # fmt: skip
    """The layout that divides least among those that fit and are about as fast as the fastest.

    Over layouts, `ways`, and micro batches that keep the global batch, in rows or, where tokens fill micro batches
    (`filled`), in tokens. An optimizer on the host is taken where nothing else fits: its times leave out Adam there.
    Estimated times that differ by less than a quarter are taken as equal: they leave out what dividing further costs in
    latency.
    """
    named = {name: run for name, run in base.items() if name in NAMED or (name == "no DeepSpeed" and run.ranks == 1)}
    for offloaded in (False, True):
        runs = {name: run for name, run in named.items() if run.engine.offload_optimizer == offloaded}
        for equals in ways(groups, lazy=any(run.lazy for run in runs.values())):
            found = [best for name, run in runs.items() for way in equals
                     for best in _largest(name, way.of(run), hardware, gpu_memory, host, filled=filled)]  # fmt: skip
            if found:
                return _least_divided(found)
    return None


@dataclass(frozen=True)
class Remedy:
    """A change with which something fits: keys of the run, or flags of `ds-sft plan`."""

    words: tuple[str, ...]
    best: Option


def remedies(base: Callable[[int], Mapping[str, Run]], hardware: Hardware, gpu_memory: float, host: float | None, *,
             groups: Sequence[int], filled: bool, narrow_too: bool) -> Iterator[Remedy]:  # fmt: skip
    """What would fit where nothing does as it is asked: states in bfloat16, more nodes.

    Args:
        base: the layouts on so many ranks.
    """

    def tried(runs: Mapping[str, Run], there: Hardware) -> Option | None:
        return recommend(runs, there, gpu_memory, host, groups=groups, filled=filled)

    if narrow_too:
        runs = {name: replace(run, narrow=True) for name, run in base(hardware.ranks).items()}
        if best := tried(runs, hardware):
            yield Remedy(("optimizer_dtype: bfloat16",), best)
    for nodes in (hardware.nodes * 2**power for power in range(1, MOST_NODES.bit_length())):
        there = replace(hardware, nodes=nodes)
        if nodes <= MOST_NODES and (best := tried(base(there.ranks), there)):
            yield Remedy((f"--nodes {nodes}",), best)
            return


def _least_divided(found: Sequence[Option]) -> Option:
    fastest = min(option.step.total for option in found)
    layout = next(option.name for option in found if option.step.total <= 1.25 * fastest)
    return min((option for option in found if option.name == layout), key=lambda option: option.step.total)


def micro_batches(rows: int) -> list[int]:
    """Ways to split a rank's `rows` of a step into equal micro batches, largest first."""
    return [micro for micro in range(rows, 0, -1) if rows % micro == 0]


def _splits(run: Run, *, filled: bool) -> Sequence[int]:
    """Numbers of micro batches that a rank's part of a step can be split into, fewest first."""
    if filled:
        return range(1, run.batch_tokens * run.accumulation // run.length + 1)  # a row of any length must fit
    rows = run.micro_batch * run.accumulation
    return [rows // micro for micro in micro_batches(rows)]


def _split(run: Run, accumulation: int, *, filled: bool) -> Run:
    """A rank's part of a step in so many micro batches: of rows, or `filled` with tokens."""
    if filled:
        most = run.batch_tokens * run.accumulation // accumulation
        return replace(run, micro_batch=math.ceil(most / run.length), accumulation=accumulation, max_tokens=most,
                       padded=not run.flat and most > run.length)  # fmt: skip
    micro = run.micro_batch * run.accumulation // accumulation
    limit = run.max_tokens if micro <= run.micro_batch else None  # more rows could be above it
    return replace(run, micro_batch=micro, accumulation=accumulation, padded=micro > 1 and not run.flat,
                   max_tokens=limit)  # fmt: skip


def _largest(name: str, run: Run, hardware: Hardware, gpu_memory: float, host: float | None, *,
             filled: bool) -> Iterator[Option]:  # fmt: skip
    """The largest fitting micro batch, if there is one.

    A smaller micro batch takes less memory, so halving finds where one fits. It need not take less than a larger one
    whose MLPs are computed in tiles: such are tried first. One alone is tried apart: others also keep gradients from
    one micro batch to the next.
    """
    splits = _splits(run, filled=filled)

    def split(accumulation: int) -> Run:
        return _split(run, accumulation, filled=filled)

    def tried(accumulation: int) -> Option:
        return option(name, split(accumulation), hardware, gpu_memory, host)

    whole = tried(1)
    if whole.fits:
        yield whole
        return
    tiled = bisect_left(splits, True, lo=1, key=lambda accumulation: split(accumulation).tile is None)
    for start, end in ((1, tiled), (tiled, len(splits))):
        first = bisect_left(splits, True, lo=start, hi=end, key=lambda accumulation: tried(accumulation).fits)
        if first < end:
            yield tried(splits[first])
            return
