"""Whole parameters that stage 3 holds while it goes through the layers."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from ds_sft.plan.run import Run, without_batch


def gathered_at(run: Run) -> list[int]:
    """Bytes of whole parameters that stage 3 holds when `i` layers are still to go backward, i = 0 ... layers.

    A parameter stays after its use while the next is nearer than `max_reuse_distance` elements
    (`partitioned_param_coordinator.py`, `__params_to_release`): models up to about half of it stay whole from forward
    to backward. `stage3_prefetch_bucket_size` more are fetched ahead.
    """
    if run.engine.stage != 3:
        return [0] * (run.shape.layers + 1)
    return _gathered_at(without_batch(run))


@lru_cache(maxsize=256)
def _gathered_at(run: Run) -> list[int]:
    s, engine = run.shape, run.engine
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

    A module's own parameters are gathered together: of a mixture all experts' matrices, of an MLP in tiles all three.
    """
    found: dict[str, int] = {}
    for weight in run.weights.of_layer(layer):
        if weight.used and weight.size > run.engine.persistence_threshold:
            module = weight.name.rpartition(".mlp." if run.tile and ".mlp." in weight.name else ".")[0]
            found[module] = found.get(module, 0) + weight.size
    return [*found.values()]
