"""Peak memory of a rank, by part: what PyTorch, transformers and DeepSpeed allocate, followed through one step.

Sizes are bytes, counts are elements. The formulas follow the papers where those say enough (ZeRO, arXiv 1910.02054) and
the code that allocates where they do not: DeepSpeed 0.19 (`runtime/zero/stage_1_and_2.py`, `stage3.py`,
`partitioned_param_coordinator.py`), transformers 5.23 (`models/*/modeling_*.py`, `integrations/moe.py`,
`loss/loss_utils.py`). `benchmarks/plan_accuracy.py` measures them. What is at work at once is here; each part has a
file: `states.py`, `gradients.py`, `gathered.py`, `activations.py` (`attention.py`, `experts.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate

from ds_sft.plan.activations import (
    chunk_logits,
    layer_activations,
    layer_backward,
    loss_inputs,
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
from ds_sft.plan.run import Run, supervised
from ds_sft.plan.states import (
    copy_that_stays,
    differing_ranks,
    host,
    in_share,
    kept_between_layers,
    owned,
    states,
    working_copy,
)
from ds_sft.plan.weights import FP32

# A step of bfloat16 states is computed in float32, so many elements at once; bytes of each.
NARROW_CHUNK, NARROW_STEP = 2**22, 6 * FP32


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
    on_host = host(run)
    fixed = states(run) | {"compiled products": compiled_products(run)}
    moments = ((name, {**fixed, **parts}) for name, parts in _moments(run) if loading or name != "loading")
    name, device = max(moments, key=lambda moment: sum(moment[1].values()))
    return Memory(name, {part: size for part, size in device.items() if size}, on_host)


def model_states(run: Run) -> int:
    """Parameters, their 16-bit copy, gradients, masters and optimizer states of the fullest rank when that steps next.

    Wherever they are, and with the buffers that DeepSpeed never frees; without DDP's, which Python cannot see.
    """
    held = max(step_gradients(run, rank) for rank in differing_ranks(run))
    buckets = 0 if run.engine.stage is None and not in_buckets(run) else standing_buckets(replace(run, lazy=False))
    return sum(states(run).values()) + sum(host(run).values()) + held + buckets + copy_that_stays(run)


def _moments(run: Run) -> Iterator[tuple[str, dict[str, int]]]:
    """The parts beside `states` at each moment that could be the fullest."""
    yield "loading", loading(run)
    yield "validation", validation(run)
    layers = _layers(run)
    for rank in differing_ranks(run):
        yield from _backward(run, rank, layers)
        yield "optimizer step", step(run, rank)


@dataclass(frozen=True)
class Layers:
    """Bytes that are the same on all ranks, when `i` layers are still to go backward, i = 0 ... layers."""

    outside: int
    below: list[int]  # kept of these layers
    backward: list[int]  # of the layer behind these
    gathered: list[int]


def _layers(run: Run) -> Layers:
    s, first = run.shape, run.weights.first
    if run.checkpointing:
        kept = [kept_between_layers(run) if i >= first else 0 for i in range(s.layers)]
    else:
        kept = [layer_activations(run, i) for i in range(s.layers)]
    below = [0, *accumulate(kept)]
    if run.inputs_on_host:
        below = [min(size, kept_between_layers(run)) for size in below]  # the next one to go backward
    backward = [layer_backward(run, i) if i >= first else 0 for i in range(s.layers)]
    return Layers(outside_layers(run), below, backward, gathered_at(run))


def _backward(run: Run, rank: int, layers: Layers) -> Iterator[tuple[str, dict[str, int]]]:
    s, weights, reached = run.shape, run.weights, reductions(run, rank)
    head = weights.head * run.width  # bytes of the projection's gradient

    def moment(number: int, at: Reduction, waiting: int = 0, **parts: int) -> dict[str, int]:
        """`number` of layers still to go backward, `waiting` bytes of a gradient in autograd."""
        return {
            "activations": layers.outside + layers.below[number],
            "working copy": working_copy(run),
            "gathered parameters": layers.gathered[number],
            "gradients": at.kept + at.passing + waiting,
            "buckets": at.buckets,
            **parts,
        }

    # The projection's gradient is formed in forward.
    at = Reduction(gradients_before(run, rank), head, standing_buckets(run))
    yield "loss", moment(s.layers, at, logits=chunk_logits(run, supervised(run)) + loss_inputs(run))
    waiting = head if s.tied else 0  # for the embedding's own, to be added
    done = weights.trained_behind
    at = fullest(reached[:done] or [replace(at, passing=0)])
    yield "output projection", moment(s.layers, at, waiting, logits=loss_inputs(run))
    for i in reversed(range(weights.first, s.layers)):
        here = weights.trained_in_layers[i]
        at = fullest(reached[done : done + here] or [at])
        done += here
        parts = moment(i, at, waiting)
        parts["activations"] += layers.backward[i]
        yield f"backward of layer {i}", parts
    if weights.embedding:
        at = replace(reached[-2], passing=max(waiting + weights.embedding * run.width, reached[-2].passing))
        yield "embedding", moment(0, at)
    last = reached[-1]
    at_end = {"gathered parameters": layers.gathered[0], "buckets": last.buckets, "working copy": copy_that_stays(run)}
    yield "end of backward", {**at_end, "gradients": last.kept + last.passing}


def step(run: Run, rank: int) -> dict[str, int]:
    """The optimizer step: gradients as they were reduced, then flattened, then in float32 for the fused Adam."""
    engine, share = run.engine, owned(run)
    held = step_gradients(run, rank)
    chunk = NARROW_STEP * min(NARROW_CHUNK, share) if run.narrow else 0
    if engine.stage is None or engine.offload_optimizer:
        return {"gradients": held, "buckets": standing_buckets(run), "working copy": copy_that_stays(run),
                "step buffers": chunk}  # fmt: skip
    part = min(share, engine.sub_group) if engine.stage == 3 else share
    flat = part * (run.weight + FP32 if run.weight != run.master else run.weight) + chunk
    if engine.stage == 3:
        norm = NORM * -(-max(run.weights.trained) // run.ranks)
    else:
        norm = NORM * max((inside for *_, inside in in_share(run, rank)), default=0)
    return {"gradients": held, "step buffers": max(flat, norm), "buckets": standing_buckets(run)}


def validation(run: Run) -> dict[str, int]:
    """A validation batch: a chunk of its logits."""
    s = run.shape
    tokens = -(-run.eval_batch * run.length // run.sequence)
    wide = tokens * max(s.hidden, s.intermediate) * 2 * FP32
    if s.experts is not None:  # sorted tokens, both projections, the product
        routes = tokens * s.experts.chosen
        wide = max(wide, routes * (2 * s.hidden + 3 * s.experts.intermediate) * run.width)
    size = chunk_logits(run, tokens) if run.eval_batch else 0
    copy = working_copy(run) if run.eval_batch else 0
    return {"logits": size, "activations": wide, "working copy": copy, "gathered parameters": gathered_at(run)[-1],
            "buckets": standing_buckets(run)}  # fmt: skip


def loading(run: Run) -> dict[str, int]:
    """Before the states exist: stages 1 and 2 copy the weights into one flat buffer."""
    if run.engine.stage in (1, 2) and not run.engine.offload_optimizer:
        return {"master weights": 0, "optimizer states": 0, "flat copy": run.weights.number_trained * run.weight}
    return {}
