"""Peak memory of a rank, by part: what PyTorch, transformers and DeepSpeed allocate, followed through one step.

Sizes are bytes, counts are elements. The formulas follow the papers where those say enough (ZeRO, arXiv 1910.02054) and
the code that allocates where they do not: DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`partitioned_param_coordinator.py`), transformers 5.23 (`models/*/modeling_*.py`, `integrations/moe.py`,
`loss/loss_utils.py`). `benchmarks/plan_accuracy.py` measures them. What is at work at once is here; each part has a
file: `states.py`, `gradients.py`, `gathered.py`, `activations.py` (`attention.py`, `experts.py`), `validation.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise

from ds_sft.plan.activations import (
    chunk_logits,
    last_norm,
    layer_activations,
    layer_backward,
    loss_inputs,
    norm_backward,
    outside_layers,
)
from ds_sft.plan.experts import compiled_products
from ds_sft.plan.gathered import gathered_at
from ds_sft.plan.gradients import (
    NORM,
    Reduction,
    fullest,
    gradients_before,
    in_buckets,
    reductions,
    standing_buckets,
    step_gradients,
)
from ds_sft.plan.optimizer import EIGHT_BITS
from ds_sft.plan.run import Run, supervised, without_batch
from ds_sft.plan.states import (
    copy_that_stays,
    differing_ranks,
    host,
    in_share,
    kept_between_layers,
    muon_step,
    owned,
    states,
    working_copy,
)
from ds_sft.plan.validation import validation
from ds_sft.plan.weights import FP32

# A step of bfloat16 states is computed so many elements at once (`training/optimizer.py`), with nine numbers of 4 bytes
# for each.
CHUNK, CHUNK_ON_GPU, CHUNK_BYTES = 2**18, 2**23, 9 * FP32


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
    alive, products = _activations(run), {"compiled products": compiled_products(run)}
    moments = [moment for moment in _moments(without_batch(run)) if loading or moment.name != "loading"]
    fullest = max(moments, key=lambda moment: moment.size + sum(alive.at(moment)))
    parts = fullest.parts | products | dict(zip(("activations", "logits"), alive.at(fullest), strict=True))
    return Memory(fullest.name, {part: size for part, size in parts.items() if size}, host(run))


def model_states(run: Run) -> int:
    """Parameters, their 16-bit copy, gradients, masters and optimizer states of the fullest rank when that steps next.

    Wherever they are, and with the buffers that DeepSpeed never frees; without DDP's, which Python cannot see.
    """
    held = max(step_gradients(run, rank) for rank in differing_ranks(run))
    buckets = 0 if run.engine.stage is None and not in_buckets(run) else standing_buckets(replace(run, lazy=False))
    return (
        sum(states(run).values())
        + sum(host(replace(run, inputs_on_host=False)).values())
        + held
        + buckets
        + copy_that_stays(run)
    )


@dataclass(frozen=True)
class Moment:
    """A point of a step that could be the fullest: bytes that do not depend on the batch, and what is beside them."""

    name: str
    parts: dict[str, int]
    layers: int | None = None  # that backward has not reached; None: there are no activations
    inside: int = 0  # 1: backward is in the layer behind these
    behind: int = 0  # all layers: 1: the loss; 2: the gradient of its inputs; 3: of the last norm's

    @cached_property
    def size(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Activations:
    """Bytes that depend on the batch, the same on all ranks."""

    outside: int
    below: list[int]  # kept of so many layers
    backward: list[int]  # in that of each layer
    behind: tuple[tuple[int, int], ...]  # all layers, and of the loss: as `Moment.behind` counts
    validation: tuple[int, int]

    def at(self, moment: Moment) -> tuple[int, int]:
        """Activations of layers, and of the loss."""
        if moment.layers is None:
            return self.validation if moment.name == "validation" else (0, 0)
        inside = self.backward[moment.layers] if moment.inside else 0
        behind, loss = self.behind[moment.behind]
        return self.outside + self.below[moment.layers] + inside + behind, loss


def _activations(run: Run) -> Activations:
    first, between = run.weights.first, kept_between_layers(run)
    if run.checkpointing:
        kept = [between if i >= first else 0 for i in range(run.shape.layers)]
    else:
        kept = _of_layers(run, layer_activations)
    below = [0, *accumulate(kept)]
    if run.inputs_on_host:
        below = [min(size, between) for size in below]  # the next one to go backward
    norm, inputs = last_norm(run), loss_inputs(run)
    behind = (
        (0, 0),
        (norm, inputs + chunk_logits(run, supervised(run))),
        (norm + between, inputs),
        (run.tokens * norm_backward(run, run.shape.hidden), 0),
    )
    return Activations(outside_layers(run), below, _of_layers(run, layer_backward), behind, validation(run))


def _of_layers(run: Run, ask: Callable[[Run, int], int]) -> list[int]:
    """A size of each layer, asked of those alone that differ from the ones before."""
    alike = run.weights.alike
    asked = {layer: ask(run, layer) if layer >= run.weights.first else 0 for layer in set(alike)}
    return [asked[layer] for layer in alike]


@lru_cache(maxsize=256)
def _moments(run: Run) -> list[Moment]:
    """Of each rank that differs from the others."""
    stay = states(run)
    whole = {"working copy": working_copy(run), "gathered parameters": gathered_at(run)[-1],
             "buckets": standing_buckets(run)}  # fmt: skip
    # Stage 3 has its buffer of gradients all the time, and no micro batch has left any in others.
    held = gradients_before(run, 0) if run.engine.stage == 3 else 0
    found = [Moment("loading", stay | loading(run)), Moment("validation", stay | whole | {"gradients": held})]
    for rank in differing_ranks(run):
        found += [*_backward(run, rank, stay), Moment("optimizer step", stay | step(run, rank))]
    return found


def _backward(run: Run, rank: int, stay: dict[str, int]) -> Iterator[Moment]:
    s, weights, reached, gathered = run.shape, run.weights, reductions(run, rank), gathered_at(run)
    head = weights.head * run.width  # bytes of the projection's gradient

    def moment(name: str, layers: int, at: Reduction, waiting: int = 0, **alive: int) -> Moment:
        """`waiting` bytes of a gradient in autograd."""
        parts = {"working copy": working_copy(run), "gathered parameters": gathered[layers],
                 "gradients": at.kept + at.passing + waiting, "buckets": at.buckets}  # fmt: skip
        return Moment(name, stay | parts, layers, **alive)

    # The projection's gradient is formed in forward.
    at = Reduction(gradients_before(run, rank), head, standing_buckets(run))
    yield moment("loss", s.layers, at, behind=1)
    waiting = head if s.tied else 0  # for the embedding's own, to be added
    done = weights.trained_behind
    at = fullest(reached[:done] or [replace(at, passing=0)])
    yield moment("output projection", s.layers, at, waiting, behind=2)
    yield moment("last norm", s.layers, at, waiting, behind=3)
    for i in reversed(range(weights.first, s.layers)):
        here = weights.trained_in_layers[i]
        at = fullest(reached[done : done + here] or [at])
        done += here
        yield moment(f"backward of layer {i}", i, at, waiting, inside=1)
    if weights.embedding:
        at = replace(reached[-2], passing=max(waiting + weights.embedding * run.width, reached[-2].passing))
        yield moment("embedding", 0, at)
    last = reached[-1]
    at_end = {"gathered parameters": gathered[0], "buckets": last.buckets, "working copy": copy_that_stays(run)}
    yield Moment("end of backward", stay | at_end | {"gradients": last.kept + last.passing})


def step(run: Run, rank: int) -> dict[str, int]:
    """The optimizer step: gradients as they were reduced, then flattened, then in float32 for the fused Adam."""
    engine, share = run.engine, owned(run)
    held = step_gradients(run, rank)
    chunk = CHUNK_BYTES * min(CHUNK if run.lazy else CHUNK_ON_GPU, share) if run.narrow else 0
    if engine.stage is None or engine.offload_optimizer:
        made = chunk + _unpacked(run, max(run.weights.trained)) + _roots(run, run.weights.trained)
        return {"gradients": held, "buckets": standing_buckets(run), "working copy": copy_that_stays(run),
                "step buffers": made}  # fmt: skip
    part = min(share, engine.sub_group) if engine.stage == 3 else share
    flat = part * (run.weight + FP32 if run.weight != run.master else run.weight) + chunk
    if engine.stage == 3:
        norm = NORM * -(-max(run.weights.trained) // run.ranks)
    else:
        norm = NORM * max((inside for *_, inside in in_share(run, rank)), default=0)
    update = part * run.master  # of gradients that were cast, the flat ones are gone
    update += _unpacked(run, part) + _roots(run, [part])
    made = max(flat, norm, update, muon_step(run))
    return {"gradients": held, "step buffers": made, "buckets": standing_buckets(run)}


def _roots(run: Run, sizes: list[int]) -> int:
    """Of AdamW without a kernel of its own: a root of each second moment.

    On a GPU of all at once; on a CPU one after the other, each with its quotient beside the quotient before.
    """
    if run.fused_steps or run.narrow or run.engine.offload_optimizer:
        return 0
    beside = max((before + 2 * size for before, size in pairwise([0, *sizes])), default=0)
    return FP32 * (beside if run.lazy else sum(sizes))


def _unpacked(run: Run, elements: int) -> int:
    """On a CPU bitsandbytes unpacks 8 bits: both moments, the gradient, and two parts of the update, in float32."""
    return 5 * FP32 * elements if run.lazy and run.optimizer == EIGHT_BITS else 0


def loading(run: Run) -> dict[str, int]:
    """Before the states exist: stages 1 and 2 copy the weights into one flat buffer."""
    if run.engine.stage in (1, 2) and not run.engine.offload_optimizer:
        return {"master weights": 0, "optimizer states": 0, "flat copy": run.weights.number_trained * run.weight}
    return {}
