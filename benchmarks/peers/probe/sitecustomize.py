"""Measures the training phase of whichever program's Trainer runs: Python imports this file by itself at its start.

`benchmarks/train_speed.py` puts this folder on PYTHONPATH of ours and of every peer alike, and names a folder in
DS_SFT_PROBE. All of them train with a subclass of transformers' Trainer; what is wrapped here is that class, when its
module is imported. Each rank leaves `rank-N.json` there: the clock (seconds) and the CPU time of the process (seconds,
all threads) when training begins and after every step, CPU seconds inside the optimizer, tokens, supervised tokens and
positions computed in each step, the logged losses with their step and clock, and the peak at the last step of what
torch allocated on a GPU, without one of resident memory (GiB; VmHWM, for ru_maxrss would be inherited from whatever
called exec). Nothing here waits for a GPU: what is counted there is read at the end.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

MODULE = "transformers.trainer"


class WhenImported(importlib.abc.MetaPathFinder):
    """Calls `watch` on transformers.trainer as soon as it is loaded."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_watch(module: ModuleType) -> None:
            load(module)
            watch(module)

        spec.loader.exec_module = load_and_watch  # type: ignore[method-assign]
        return spec


def watch(module: Any) -> None:
    if "DS_SFT_PROBE_GLOO" in os.environ and "RANK" in os.environ:
        start_group()
    trainer = module.Trainer
    init, get_batches = trainer.__init__, trainer.get_batch_samples
    probe = make_probe(module)

    @functools.wraps(init)  # ms-swift asks for the signature
    def init_and_add(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(probe)

    @functools.wraps(get_batches)
    def get_and_count(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = get_batches(self, *args, **kwargs)
        probe.count(found[0])
        return found

    trainer.__init__, trainer.get_batch_samples = init_and_add, get_and_count


def start_group() -> None:
    """Start DeepSpeed's process group as ds_sft does, before transformers starts torch's.

    On CPUs DeepSpeed else takes itself for the only rank under ZeRO-3 and refuses the batch size. It would also compile
    an all-reduce, for minutes, that training never calls.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)


def make_probe(module: Any) -> Any:
    class Probe(module.TrainerCallback):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []
            self.optimizer: list[float] = []
            self.tokens: list[int] = []
            self.supervised: list[int] = []
            self.computed: list[int] = []
            self.losses: list[float] = []
            self.logged: list[tuple[int, float]] = []  # whose loss has been read, so the GPU has done the step
            self.updating, self.memory, self.weights = 0.0, 0.0, ""

        def count(self, batches: Any) -> None:
            for values, add in ((self.tokens, real), (self.supervised, learned), (self.computed, positions)):
                values.append(sum(add(batch) for batch in batches))

        def mark(self) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.weights = str(next(model.parameters()).dtype).removeprefix("torch.")
            self.mark()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.updating = time.process_time()

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            self.optimizer.append(time.process_time() - self.updating)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.mark()
            self.memory = peak()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.losses.append(float(logs["loss"]))
                self.logged.append((state.global_step, time.perf_counter()))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            rank = os.environ.get("RANK", "0")
            found = {key: value for key, value in vars(self).items() if key != "updating"}
            found |= {key: [int(count) for count in found[key]] for key in ("tokens", "supervised", "computed")}
            (Path(os.environ["DS_SFT_PROBE"]) / f"rank-{rank}.json").write_text(json.dumps(found))

    return Probe()


def positions(batch: Any) -> int:
    """Positions the model computes, padding included."""
    return int(batch["input_ids"].numel())


def real(batch: Any) -> Any:
    """Those of them that are not padding; where the batch is."""
    mask = batch.get("attention_mask")
    if mask is None or not hasattr(mask, "dim"):
        return positions(batch)
    if mask.dim() == 4:  # [batch, 1, seq, seq], additive: a real token sees itself
        mask = mask.diagonal(dim1=-2, dim2=-1) == 0
    return (mask != 0).sum()


def learned(batch: Any) -> Any:
    return (batch["labels"][..., 1:] != -100).sum()


def peak() -> float:
    """Peak memory of this process so far, in GiB."""
    cuda = sys.modules["torch"].cuda
    if cuda.is_initialized():
        return float(cuda.max_memory_allocated()) / 2**30
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 2**20 if found else 0.0


if "DS_SFT_PROBE" in os.environ:
    sys.meta_path.insert(0, WhenImported())
