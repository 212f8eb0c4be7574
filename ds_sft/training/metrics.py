"""How fast a run is and where its time goes, over all ranks: tokens/s, MFU, padding, waiting, shares of time.

Every rank counts and times by itself; at a logging step one small collective brings the numbers together. Nothing here
waits for the device between logging steps.
"""

from __future__ import annotations

import functools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ds_sft.data.batch import Layout
from ds_sft.model.lend import lend
from ds_sft.model.loss import output_projection
from ds_sft.model.quantized import elements
from ds_sft.model.sequence import SequenceGroup
from ds_sft.model.targets import whole_shape
from ds_sft.plan.weights import is_matrix, layer_of, met_by_token
from ds_sft.ranks.collectives import gather_numbers
from ds_sft.results import peak_memory
from ds_sft.training.peak import Peak

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The parts of training; "other" is what is none of the rest: callbacks, schedule, logging.
PARTS = ("data_wait", "forward_backward", "communication", "optimizer", "save", "other")
WORK = ("data_wait", "forward_backward", "optimizer", "other")  # what a rank does while others may wait for it
EVALUATION = "evaluation"  # no part of training: left out of every figure
WHOLE = ("save", EVALUATION)  # what happens inside them counts as them
COUNTS = ("tokens", "places", "supervised", "pairs")  # of a batch, as its `Layout` has them
SENT = (*COUNTS, "peak_flops", "memory_gib", *PARTS)  # what a rank tells the others, before its laps
MARKS_KEPT = 10_000
# Where the compute stream waits for what DeepSpeed does in streams of its own: methods of the engine's optimizer.
WAITS = (
    "overlapping_partition_gradients_reduce_epilogue",
    "average_tensor",
    "parameter_offload.param_coordinator.fetch_sub_module",
)
# Collectives of DeepSpeed's backend (deepspeed/comm/torch.py) that training uses.
COLLECTIVES = (
    "all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor", "broadcast",
    "all_gather", "all_gather_into_tensor", "all_gather_coalesced", "all_to_all_single", "barrier",
)  # fmt: skip


class Clock:
    """Seconds of each part, every moment in one: a part that begins inside another one interrupts it.

    A mark is a reading of the host's clock or, on a GPU, an event in the stream that computes: parts are then what
    passed in it, each after the other, and reading them waits for nothing until `settle`. What is sent in another
    stream beside the computation takes no time here, but for what the computation waits for it.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        self.on_gpu = device_type == "cuda"
        self.stream = torch.cuda.current_stream() if self.on_gpu else None  # DeepSpeed switches the current one
        self.open = ["other"]  # parts begun and not ended
        self.restart()

    def restart(self) -> None:
        """Forget what was measured."""
        self.marks: deque[tuple[Any, str, bool]] = deque()  # when, the part that was going on until then, end of a lap?
        self.last = self._now()
        self.seconds = dict.fromkeys((*PARTS, EVALUATION), 0.0)
        self.laps: list[float] = []  # seconds of work in each
        self.work = 0.0  # in the lap going on

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def begin(self, part: str) -> None:
        self._mark()
        self.open.append(self.open[-1] if self.open[-1] in WHOLE else part)

    def end(self) -> None:
        self._mark()
        self.open.pop()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def lap(self) -> None:
        """Ranks meet here: the work of each since the last meeting can be compared."""
        self._mark(lap=True)
        if len(self.marks) >= MARKS_KEPT:
            self.settle(wait=False)

    def _mark(self, *, lap: bool = False) -> None:
        self.marks.append((self._now(), self.open[-1], lap))

    def settle(self, *, wait: bool = True) -> None:
        """Turn marks into seconds; on a GPU this waits for the last of them, or takes those alone that have come."""
        if self.on_gpu and self.marks and wait:
            self.marks[-1][0].synchronize()
        while self.marks and (wait or not self.on_gpu or self.marks[0][0].query()):
            when, part, lap = self.marks.popleft()
            passed = self.last.elapsed_time(when) / 1000 if self.on_gpu else when - self.last
            self.last = when
            self.seconds[part] += passed
            self.work += passed if part in WORK else 0.0
            if lap:
                self.laps.append(self.work)
                self.work = 0.0

    def take(self) -> tuple[dict[str, float], list[float]]:
        """Seconds by part, and of work in each lap, since the last call."""
        taken = self.seconds, self.laps
        self.seconds, self.laps = dict.fromkeys(taken[0], 0.0), []
        return taken


@dataclass(frozen=True)
class Flops:
    """Floating-point operations that learning needs: forward and backward; recomputation is no use and not counted."""

    layers: float  # a token, in the layers' matrices
    head: float  # a token, in the output projection
    attention: float  # a pair of a token and one that it sees

    def of(self, *, tokens: float, pairs: float, head_tokens: float) -> float:
        return self.layers * tokens + self.attention * pairs + self.head * head_tokens


def count_flops(model: PreTrainedModel) -> Flops | None:
    """6 a parameter that a token is multiplied with, 12 a pair, layer and width of attention.

    Backward forms no gradient of what is frozen, so 4, and goes down to the first layer that has something trained:
    below it 2, and 4 a pair. As in PaLM, appendix B (arXiv 2204.02311), but pairs are those that causal attention
    needs: L (L + 1) / 2 of a row of L tokens. Of experts those count that a token chooses. None where experts are not
    single tensors, or where the configuration does not say how many a token chooses or how wide attention is.
    """
    config = model.config.get_text_config()
    width, layers = attention_width(config), getattr(config, "num_hidden_layers", None)
    met = share_of_experts(model)
    if met is None or not width or not layers:
        return None
    head, first = getattr(output_projection(model), "weight", None), min(first_reached(model), layers)
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    return Flops(
        layers=float(
            sum(
                factor * elements(p) * met_by_token(name, met)
                for name, p, factor in factors(model)
                if id(p) not in left_out and is_matrix(name, whole_shape(p))
            )
        ),
        head=0.0 if head is None else float((6 if head.requires_grad else 4) * elements(head)),
        attention=float((12 * (layers - first) + 4 * first) * width),
    )


def attention_width(config: Any) -> float | None:
    """Of all heads, for what a pair of tokens costs: a score from a key, and a part in a sum of values."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_key, of_value = (getattr(config, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim"))
    return float(heads * (of_key + of_value) / 2)


def share_of_experts(model: PreTrainedModel) -> float | None:
    """How many of a layer's experts a token meets, 1 in a dense model; None where that cannot be told."""
    config = model.config.get_text_config()
    if not any("expert" in name for name in config.to_dict()):
        return 1.0
    chosen = getattr(config, "num_experts_per_tok", None)
    fused = (whole_shape(p) for name, p in model.named_parameters() if ".experts." in name)
    number = next((shape[0] for shape in fused if len(shape) == 3), None)
    return chosen / number if chosen and number else None


def factors(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
    """Each parameter that a token is multiplied with, and in how many floating-point operations."""
    first = first_reached(model)
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:  # which peft keeps beside the copy that is trained
            layer = layer_of(name)
            below = layer is not None and layer < first
            yield name, parameter, 6 if parameter.requires_grad else 2 if below else 4


def first_reached(model: torch.nn.Module) -> int:
    """The first layer that backward goes through: below it nothing is trained.

    0 where the embedding or nothing is, more than there are where only what is behind the layers is.
    """
    layers_seen = False
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if parameter.requires_grad:
            return layer if layer is not None else sys.maxsize if layers_seen else 0
        layers_seen |= layer is not None
    return 0


@dataclass(frozen=True)
class Interval:
    """What all ranks did between two logging steps; `+` joins two that follow each other."""

    tokens: float = 0.0  # of all ranks, without padding
    places: float = 0.0  # with padding
    supervised: float = 0.0  # that the loss counts
    flops: float = 0.0  # useful ones
    possible_flops: float = 0.0  # at every device's peak, all the time
    seconds: float = 0.0  # of training: no evaluation
    waiting: float = 0.0
    data_wait: float = 0.0  # this and the following: seconds, mean over ranks
    forward_backward: float = 0.0
    communication: float = 0.0
    optimizer: float = 0.0
    save: float = 0.0
    other: float = 0.0

    def __add__(self, later: Interval) -> Interval:
        return Interval(*(getattr(self, f.name) + getattr(later, f.name) for f in fields(self)))

    def figures(self) -> dict[str, float]:
        """What is logged.

        `waiting_share`: time in which a rank had done its work and another had not, mean over ranks. Work is all but
        communication; between two meetings a rank waits as long as the slowest one's work is longer than its own.
        """
        seconds = max(self.seconds, 1e-9)
        rates = {
            "tokens_per_second": self.tokens / seconds,
            "supervised_tokens_per_second": self.supervised / seconds,
            **({"mfu": self.flops / self.possible_flops} if self.flops and self.possible_flops else {}),
            "padding_share": 1 - self.tokens / max(self.places, 1),
            "waiting_share": self.waiting / seconds,
        }
        shares = {f"{part}_share": getattr(self, part) / seconds for part in PARTS}
        return {name: round(value, 6) for name, value in {**rates, **shares, "interval_seconds": seconds}.items()}


class Meter:
    """Counts and times one rank's training; `interval` brings the ranks' numbers together."""

    def __init__(self, model: PreTrainedModel, device: torch.device, *, head_everywhere: bool, world_size: int) -> None:
        """`head_everywhere`: the loss has logits computed at every token, not only at those that are supervised."""
        self.device, self.head_everywhere = device, head_everywhere
        self.clock = Clock(device.type)
        self.talking = "communication" if world_size > 1 else "other"  # what ranks do together is nothing for one
        self.flops = count_flops(model)
        self.peak = Peak(0.0, "unknown")
        self.counts = dict.fromkeys(COUNTS, 0)
        self.total = Interval()
        self.memory_gib = 0.0  # the fullest rank's peak
        self.replaced = ExitStack()  # functions of others, that were timed

    def start(self, peak: Peak) -> None:
        """Training begins now."""
        self.peak = peak
        self.clock.restart()

    def stop(self) -> None:
        """Training is over: what was timed is as it was."""
        self.replaced.close()

    def count(self, layout: Layout) -> None:
        """Count a micro batch."""
        for name in COUNTS:
            self.counts[name] += getattr(layout, name)

    def interval(self) -> Interval:
        """All ranks' numbers since the last call; all must call it, after equally many laps."""
        self.clock.lap()
        self.clock.settle()
        seconds, laps = self.clock.take()
        peaks = peak_memory()
        mine = {**self.counts, **seconds, "peak_flops": self.peak.flops,
                "memory_gib": peaks.get("gpu_gib", peaks["host_gib"])}  # fmt: skip
        self.counts = dict.fromkeys(COUNTS, 0)
        ranks = gather_numbers([*(mine[name] for name in SENT), *laps], device=self.device)
        told = [dict(zip(SENT, rank, strict=False)) for rank in ranks]
        self.memory_gib = max(rank["memory_gib"] for rank in told)
        done = self._join(told, [rank[len(SENT) :] for rank in ranks])
        self.total += done
        return done

    def _join(self, ranks: list[dict[str, float]], laps: list[list[float]]) -> Interval:
        def total(name: str) -> float:
            return sum(rank[name] for rank in ranks)

        count, tokens, supervised = len(ranks), total("tokens"), total("supervised")
        parts = {part: total(part) / count for part in PARTS}
        seconds = sum(parts.values())
        head_tokens = tokens if self.head_everywhere else supervised
        useful = self.flops.of(tokens=tokens, pairs=total("pairs"), head_tokens=head_tokens) if self.flops else 0.0
        return Interval(
            tokens=tokens,
            places=total("places"),
            supervised=supervised,
            flops=useful,
            possible_flops=seconds * total("peak_flops"),
            seconds=seconds,
            waiting=sum(max(lap) - sum(lap) / count for lap in zip(*laps, strict=True)),
            **parts,
        )

    def logged(self) -> dict[str, float]:
        """The figures since the last logging step; all ranks must call it."""
        return self.interval().figures() | {"peak_memory_gib": self.memory_gib}

    def summary(self) -> dict[str, float]:
        """The figures of this start of the run, for its record; after the last `interval`."""
        figures = self.total.figures()
        figures["seconds"] = figures.pop("interval_seconds")
        return figures | {"tokens": int(self.total.tokens), "supervised_tokens": int(self.total.supervised)}

    # ---- Where communication happens

    def time_engine(self, engine: Any) -> None:
        """Time the collectives and the optimizer step of a DeepSpeed engine, until `stop`.

        Collectives are functions of a backend that a process has once. They are timed while this engine computes, and
        nobody else's. One that DeepSpeed goes on beside is timed when it is started and when it is waited for.
        """
        import deepspeed.comm.comm as comm

        if self.talking == "communication":
            timed = {name: self._timed_collective(getattr(comm.cdb, name)) for name in COLLECTIVES}
            for name in ("forward", "backward", "step"):
                self._lend(engine, name, _while_replaced(getattr(engine, name), comm.cdb, timed))
            for path in WAITS if self.clock.on_gpu else ():
                self._time_wait(engine.optimizer, path)
        self._lend(engine, "step", self._timed(engine.step, "optimizer"))

    def _time_wait(self, optimizer: Any, path: str) -> None:
        """Time a method where an optimizer has it; what is on its path differs between stages."""
        *owners, name = path.split(".")
        owner = functools.reduce(lambda found, part: getattr(found, part, None), owners, optimizer)
        if hasattr(owner, name):
            self._lend(owner, name, self._timed(getattr(owner, name), "communication"))

    def _lend(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.replaced.callback(lend(owner, {name: function}))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.part(part):
                return function(*args, **kwargs)

        return timed

    def _timed_collective(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.part("communication"):
                work = function(*args, **kwargs)
            return TimedWork(work, self.clock) if hasattr(work, "wait") else work

        return timed

    def time_exchange(self, group: SequenceGroup) -> None:
        """Time what ranks that share rows exchange in attention, until `stop`."""
        self._lend(group, "exchange", self._timed(group.exchange, "communication"))

    def time_reduction(self, model: Any, accelerator: Any) -> None:
        """Time what a model under DistributedDataParallel waits for: before forward, and after the last gradient.

        Until `stop`. It reduces from C++ while gradients are still computed. Autograd calls what was queued for the end
        of backward in the order in which it came: `begin` before DDP's own, which waits.
        """
        backward = accelerator.backward
        if isinstance(model, DistributedDataParallel):  # what torch_compile has compiled would break at a hook
            waits = [model.register_forward_pre_hook(lambda *_: self.clock.begin("communication")),
                     model.module.register_forward_pre_hook(self._end_of_wait, prepend=True)]  # fmt: skip
            for hook in waits:
                self.replaced.callback(hook.remove)

        def begin() -> None:
            self.clock.begin("communication")

        def timed(loss: torch.Tensor, **kwargs: Any) -> None:
            depth = len(self.clock.open)
            engine = torch.autograd.Variable._execution_engine
            loss.register_hook(lambda _: engine.queue_callback(begin))  # type: ignore[no-untyped-call]
            backward(loss, **kwargs)
            if len(self.clock.open) > depth:
                self.clock.end()

        self._lend(accelerator, "backward", timed)

    def _end_of_wait(self, *_: Any) -> None:
        """The model's own forward begins; in an evaluation nobody has waited."""
        if self.clock.open[-1] == "communication":
            self.clock.end()


def _while_replaced(
    function: Callable[..., Any], owner: Any, functions: dict[str, Callable[..., Any]]
) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        take_off = lend(owner, functions)
        try:
            return function(*args, **kwargs)
        finally:
            take_off()

    return wrapped


class TimedWork:
    """A collective under way, timed while it is waited for."""

    def __init__(self, work: Any, clock: Clock) -> None:
        self.work, self.clock = work, clock

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.part("communication"):
            return self.work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.work, name)
