"""Where ranks communicate: functions of DeepSpeed, DDP and attention, timed while a run trains."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ds_sft.model.lend import lend
from ds_sft.model.sequence import SequenceGroup
from ds_sft.training.clock import Clock

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


class Timers:
    """Puts a clock around what ranks wait for each other in, and around DeepSpeed's optimizer step."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.replaced = ExitStack()  # functions of others, that are timed

    def restore(self) -> None:
        """Training is over: what was timed is as it was."""
        self.replaced.close()

    def time_engine(self, engine: Any) -> None:
        """Time the collectives and the optimizer step of a DeepSpeed engine, until `restore`.

        Collectives are functions of a backend that a process has once. They are timed while this engine computes, and
        nobody else's. One that DeepSpeed goes on beside is timed when it is started and when it is waited for.
        """
        import deepspeed.comm.comm as comm

        if self.clock.talking == "communication":
            timed = {name: self._timed_collective(getattr(comm.cdb, name)) for name in COLLECTIVES}
            for name in ("forward", "backward", "step"):
                self._lend(engine, name, _while_replaced(getattr(engine, name), comm.cdb, timed))
            for path in WAITS if self.clock.on_gpu else ():
                self._time_wait(engine.optimizer, path)
        self._lend(engine, "step", self.clock.timed(engine.step, "optimizer"))

    def _time_wait(self, optimizer: Any, path: str) -> None:
        """Time a method where an optimizer has it; what is on its path differs between stages."""
        *owners, name = path.split(".")
        owner = functools.reduce(lambda found, part: getattr(found, part, None), owners, optimizer)
        if hasattr(owner, name):
            self._lend(owner, name, self.clock.timed(getattr(owner, name), "communication"))

    def _lend(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.replaced.callback(lend(owner, {name: function}))

    def _timed_collective(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.clock.part("communication"):
                work = function(*args, **kwargs)
            return TimedWork(work, self.clock) if hasattr(work, "wait") else work

        return timed

    def time_exchange(self, group: SequenceGroup) -> None:
        """Time what ranks that share rows exchange in attention, until `restore`."""
        self._lend(group, "exchange", self.clock.timed(group.exchange, "communication"))

    def time_reduction(self, model: Any, accelerator: Any) -> None:
        """Time what a model under DistributedDataParallel waits for: before forward, and after the last gradient.

        Until `restore`. It reduces from C++ while gradients are still computed. Autograd calls what was queued for the
        end of backward in the order in which it came: `begin` before DDP's own, which waits.
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
