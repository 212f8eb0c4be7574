"""What stays from step to step: weights, masters, optimizer states, on the device or on the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from ds_sft.config.keys import MUON
from ds_sft.plan.optimizer import ADAMW, EIGHT_BITS, MOMENTS, eight_bits, is_hidden, whole_moments
from ds_sft.plan.run import Run, without_batch
from ds_sft.plan.weights import FP32

MUON_KEPT = 256 * 2**20  # bytes of buffers that DeepSpeed's Muon keeps, at most
PINNED = 32 * 2**20  # bytes of a buffer that layers' inputs are offloaded to, at most (`model/offload.py`)


def states(run: Run) -> dict[str, int]:
    """What stays on the device from step to step (ZeRO paper, section 3.1, figure 1), gradients and buckets apart."""
    engine, share, weights = run.engine, owned(run), run.weights
    frozen = frozen_bytes(run)
    if engine.stage is None:
        trained = weights.number_trained
        return {"parameters": trained * run.weight, "frozen weights": frozen, "optimizer states": moments(run)}
    whole = weights.number_trained if engine.stage < 3 else 0
    own = engine.stage == 3 and run.weight == FP32  # float32 shares are their own masters
    on_device = {"parameters": (whole or (0 if engine.offload_param else share)) * run.weight,
                 "frozen weights": 0 if engine.offload_param else frozen}  # fmt: skip
    if engine.stage == 3:
        on_device["parameters"] += persistent(run) * run.weight
        on_device["parameters"] += -(-weights.number // engine.hierarchical) * run.weight * (engine.hierarchical > 1)
    if not engine.offload_optimizer:
        on_device |= {"master weights": 0 if own else share * run.master, "optimizer states": moments(run)}
    return on_device


def moments(run: Run) -> int:
    """States of the optimizer for what a rank owns: of DeepSpeed's flat parts all are alike."""
    if run.engine.stage is None and run.optimizer != ADAMW:
        return whole_moments(run.optimizer, (w for w in run.weights.every if w.trained))
    if run.optimizer == EIGHT_BITS:
        return eight_bits(owned(run))
    if run.optimizer == MUON:
        return _muon_parts(run)
    return owned(run) * MOMENTS * run.master // FP32


def _muon_parts(run: Run) -> int:
    """DeepSpeed's momentum has the dtype of gradients; stages 1 and 2 keep that of the step under way beside it."""
    others = [w.size for w in run.weights.every if w.trained and not is_hidden(w)]
    momentum = run.weight if run.engine.stage == 3 else 2 * run.weight
    return _divided(run, hidden_sizes(run)) * momentum + _divided(run, others) * MOMENTS


def hidden_sizes(run: Run) -> list[int]:
    """Elements of each matrix that Muon updates."""
    return [w.size for w in run.weights.every if w.trained and is_hidden(w)]


def muon_updates(run: Run) -> int:
    """DeepSpeed's Muon in stages 1 and 2: what it made of gradients, beside the buffer that has all of them."""
    if run.optimizer != MUON or run.engine.stage not in (1, 2) or run.engine.offload_optimizer:
        return 0
    return _divided(run, hidden_sizes(run)) * run.weight


def muon_gathered(run: Run) -> int:
    """Buffers that stage 3 keeps for the matrices that it gathers to update them, whole and a rank's part."""
    if run.optimizer != MUON or run.engine.stage != 3 or run.ranks == 1:
        return 0
    size = sum(hidden_sizes(run)) * run.weight
    return min(size + -(-size // run.ranks), MUON_KEPT)


def muon_step(run: Run) -> int:
    """Gradients and momentum of the whole matrices that stage 3 updates at a time, a bucket, and the momentum's part.

    Beside the buffers that stay (`stage3.py`, `_muon_update_sub_group`).
    """
    if run.optimizer != MUON or run.engine.stage != 3 or run.ranks == 1:
        return 0
    sizes = hidden_sizes(run)
    bucket = min(sum(sizes), max([run.engine.reduce_bucket, *sizes])) * run.weight
    return 2 * bucket + -(-bucket // run.ranks)


def frozen_bytes(run: Run) -> int:
    """Weights that are never changed: of the dtype that computes, or 4 bits; stage 3 divides them as all others."""
    if run.engine.stage != 3:
        return run.weights.frozen_bytes(run.width)
    return _shares(run, [weight.size for weight in run.weights.every if not weight.trained]) * run.width


def host(run: Run) -> dict[str, int]:
    """What a rank keeps in host memory because of offloading."""
    inputs = max(run.shape.layers - run.weights.first - 1, 0) * _pinned(run) if run.inputs_on_host else 0
    return _states_on_host(without_batch(run)) | ({"layer inputs": inputs} if inputs else {})


@lru_cache(maxsize=256)
def _states_on_host(run: Run) -> dict[str, int]:
    """As `stage_1_and_2.py` and `stage3.py` have it, `__init__`."""
    engine, share = run.engine, owned(run)
    parts: dict[str, int] = {}
    if engine.offload_param:
        parts |= {"parameters": share * run.weight, "frozen weights": frozen_bytes(run)}
    if engine.offload_optimizer:
        parts |= {"master weights": share * FP32, "optimizer states": moments(run), "gradients": share * FP32}
        if engine.stage == 3:
            parts["gradients"] += share * run.weight  # grad_partitions_flat_buffer
        else:
            parts["buckets"] = share * run.weight + largest_copy(run)
            if run.accumulation > 1:
                parts["gradients"] += max(partition(run, rank) for rank in differing_ranks(run)) * run.weight
    return {part: size for part, size in parts.items() if size}


def kept_between_layers(run: Run) -> int:
    """What checkpointing keeps of a layer: its input."""
    return run.tokens * run.shape.hidden * run.width


def _pinned(run: Run) -> int:
    """A layer's input in whole buffers of pinned memory; the last layer's stays on the device."""
    size = kept_between_layers(run)
    buffer = min(PINNED, 1 << (size - 1).bit_length())
    return -(-size // buffer) * buffer


def largest_copy(run: Run) -> int:
    """Stage 2 with offloading: a buffer for the largest gradient, on the device and on the host each."""
    return max(run.weights.trained) * run.weight


def owned(run: Run) -> int:
    """Elements of the states that a rank keeps."""
    if run.engine.stage is None:
        return run.weights.number_trained
    return _divided(run, run.weights.trained)


def _divided(run: Run, sizes: Sequence[int]) -> int:
    """Elements of parameters that a rank of a ZeRO stage has."""
    return _shares(run, sizes) if run.engine.stage == 3 else -(-sum(sizes) // run.ranks)


def share_of(run: Run) -> int:
    """Elements of what stages 1 and 2 divide that a rank has."""
    return -(-run.weights.number_trained // run.ranks)


def _shares(run: Run, sizes: Iterable[int]) -> int:
    """Stage 3 cuts every parameter by itself."""
    return sum(-(-size // run.ranks) for size in sizes)


def persistent(run: Run) -> int:
    """Elements of small parameters that stage 3 keeps whole (stage3_param_persistence_threshold)."""
    return sum(size for size in run.weights.sizes if size <= run.engine.persistence_threshold)


def partition(run: Run, rank: int) -> int:
    """Elements of all parameters that lie in a rank's share, those that lie in it with a part only as well.

    Stage 2 keeps their gradients whole (`copy_grads_in_partition`).
    """
    return sum(size for _, size, _ in in_share(run, rank))


def in_share(run: Run, rank: int) -> Iterator[tuple[int, int, int]]:
    """Start, size and size within the share of each parameter that a rank of stages 1 and 2 has a part of."""
    share = share_of(run)
    start = 0
    for size in run.weights.trained:
        inside = min(start + size, (rank + 1) * share) - max(start, rank * share)
        if inside > 0:
            yield start, size, inside
        start += size


def working_copy(run: Run) -> int:
    """Without DeepSpeed bfloat16 weights are made once a step (`model/working_copy.py`).

    float16 and `torch_compile` stay under autocast, which takes 5 to 14 % more in all, and is not followed here.
    """
    return run.weights.number_trained * run.width if run.width != run.weight else 0


def copy_that_stays(run: Run) -> int:
    """What is left of the copy when the optimizer steps: on a CPU, and under DistributedDataParallel, nothing."""
    return working_copy(run) if run.ranks == 1 and not run.lazy else 0


def differing_ranks(run: Run) -> list[int]:
    """Ranks whose share differs: the first hold the embedding, the last the output projection."""
    return sorted({0, 1, run.ranks - 2, run.ranks - 1} & set(range(run.ranks)))
