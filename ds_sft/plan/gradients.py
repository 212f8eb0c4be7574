"""Gradients through backward: where they wait, in which buckets they are reduced, what stays of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from ds_sft.plan.run import Run, without_batch
from ds_sft.plan.states import in_share, largest_copy, muon_gathered, muon_updates, owned, partition, share_of

NORM = 8  # DeepSpeed sums squares of gradients in float64 (runtime/zero/utils.py, get_norm_dtype)


@dataclass(frozen=True)
class Reduction:
    """Bytes of gradients at one point of backward."""

    kept: int  # for the step
    passing: int  # the newest, and what reducing others takes
    buckets: int


def fullest(points: list[Reduction]) -> Reduction:
    return max(points, key=lambda point: point.kept + point.passing + point.buckets)


def reductions(run: Run, rank: int) -> list[Reduction]:
    """Gradients as each parameter gets its own, from the model's end to its start, and when the last are reduced."""
    same = replace(without_batch(run), checkpointing=False)
    return _reductions(same, rank)


@lru_cache(maxsize=256)
def _reductions(run: Run, rank: int) -> list[Reduction]:
    engine, w = run.engine, run.weight
    kept, buckets = gradients_before(run, rank), standing_buckets(run)
    if engine.stage is None:
        cast = run.width if run.width != w else 0  # the gradient of a working copy is there in 16 bits too
        if in_buckets(run):
            return [Reduction(0, size * w, buckets) for size in [*reversed(run.weights.trained), 0]]
        sizes = [*reversed(run.weights.trained), 0]
        done = [0, *accumulate(sizes[:-1])]
        return [Reduction(kept or d * w, size * (w + cast), buckets) for d, size in zip(done, sizes, strict=True)]
    if engine.stage == 1 and (run.accumulation > 1 or not engine.overlap):
        return _reduced_at_the_end(run, rank)
    mine, whole = {start for start, *_ in in_share(run, rank)}, partition(run, rank)
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
            after += (inside if run.lazy else whole if inside and not own else 0) * w  # one buffer takes all
            own += inside
            if engine.stage == 1:
                after += (size - inside) * w * large  # nobody takes them, nobody frees them
        reducing = max(_copies(run, bucket), after - kept) + size * w * large  # a large one until it has been copied
    return [*points, Reduction(kept, reducing, buckets + _double(run, touched))]


def _reduced_at_the_end(run: Run, rank: int) -> list[Reduction]:
    """Stage 1 but for the last micro batch, and without overlap for all: gradients stay where they are.

    They are reduced behind the last micro batch's backward (`reduce_gradients`).
    """
    w, buckets, whole = run.weight, standing_buckets(run), gradients_before(run, rank)
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
        share = share_of(run)
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
    if run.accumulation == 1 or in_buckets(run):
        return 0
    if engine.stage in (None, 1):
        return run.weights.number_trained * w
    return 0 if engine.offload_optimizer else partition(run, rank) * w


def gradients(run: Run, rank: int) -> int:
    """Bytes of gradients that a rank has when backward ends.

    With accumulation those of earlier micro batches are there from the start. Without DeepSpeed and in stage 1 new ones
    are added to them, in stage 2 they lie beside them (`all_grad_tensors`), in stage 3 one buffer takes both.
    """
    engine = run.engine
    if engine.stage == 3:
        return gradients_before(run, rank)
    if engine.stage in (None, 1):
        return 0 if in_buckets(run) else run.weights.number_trained * run.weight
    return 0 if engine.offload_optimizer else (1 + (run.accumulation > 1)) * partition(run, rank) * run.weight


def step_gradients(run: Run, rank: int) -> int:
    """Gradients left when the optimizer steps: in stages 1 and 2 those of a rank's share (`_clear_param_grad_only`)."""
    if run.engine.stage in (1, 2):
        return 0 if run.engine.offload_optimizer else partition(run, rank) * run.weight + muon_updates(run)
    return gradients(run, rank)


def standing_buckets(run: Run) -> int:
    """Bytes of the reduction buffers that are there all the time.

    DistributedDataParallel's, stage 3's, and what stage 2 sends to the host from.
    """
    return _standing_buckets(without_batch(run))


def in_buckets(run: Run) -> bool:
    """Whether gradients are in DistributedDataParallel's buckets alone (`gradient_as_bucket_view`)."""
    return run.narrow and run.engine.stage is None and run.ranks > 1


@lru_cache(maxsize=256)
def _standing_buckets(run: Run) -> int:
    engine = run.engine
    if engine.stage is None:
        return run.weights.number_trained * run.weight if run.ranks > 1 else 0
    if engine.stage < 3:
        return largest_copy(run) if engine.offload_optimizer else 0
    filled = max((_size(bucket) for bucket in _bucketed(run) if not _large(run, bucket)), default=0)
    return (filled if run.lazy else engine.reduce_bucket) * run.weight + muon_gathered(run)


def _double(run: Run, touched: list[int]) -> int:
    """Bytes of the buffers that stages 1 and 2 make for a backward, two where communication overlaps."""
    engine = run.engine
    if engine.stage == 3:
        return 0
    if run.lazy:
        return (sum(touched) if engine.overlap else max(touched)) * run.weight
    return (1 + engine.overlap) * engine.reduce_bucket * run.weight
