"""One rank of a measured training: `train.py` as it is, with its memory written down.

    python plan_worker.py RESULTS_DIR --config ...       # started by plan_accuracy.py and tests, under torchrun

`rank-R.json` holds, in bytes: `states`, the storages of all tensors alive when the optimizer is about to step;
`peak`, the largest anonymous resident memory (without mapped files) above that before the model was loaded, or
`torch.cuda.max_memory_allocated` where there is a GPU; `phases`, the peak of each part of a step.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# A process of its own: a thread would wait for Python's lock just when memory is fullest.
POLL = """
import sys, time
pid, page = sys.argv[1], 4096
with open(sys.argv[2], "w") as out:
    last = 0
    while True:
        try:
            with open(f"/proc/{pid}/statm") as file:
                fields = file.read().split()
        except (FileNotFoundError, ProcessLookupError):
            break
        if fields[1] == "0":  # it has ended, and whoever started it has not noticed yet
            break
        size = (int(fields[1]) - int(fields[2])) * page
        if abs(size - last) > 1 << 20:
            out.write(f"{time.time()} {size}\\n")
            out.flush()
            last = size
        time.sleep(0.002)
"""


class Recorder:
    """Marks of time and the states, for this rank."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rank = folder, int(os.environ.get("RANK", "0"))
        self.series = folder / f"series-{self.rank}.txt"
        self.marks: list[tuple[float, str]] = []
        self.states = 0
        self.steps = 0

    def start(self) -> None:
        """The baseline: libraries are loaded and the process group is up, the model is not there yet."""
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # blocks freed until now, as of hashing the base, would be taken for in use
        self.series.unlink(missing_ok=True)  # of a run before that was killed
        poll = subprocess.Popen([sys.executable, "-c", POLL, str(os.getpid()), str(self.series)])
        while not (self.series.exists() and self.series.read_text().endswith("\n")):
            assert poll.poll() is None, "nobody watches the memory"
            time.sleep(0.05)
        self.mark("loading")

    def mark(self, name: str) -> None:
        self.marks.append((time.time(), name))

    def count_states(self) -> None:
        self.steps += 1
        if self.steps == 3:  # optimizer states exist, gradients too
            time.sleep(0.5)  # gloo's threads let go of what they have sent
            self.states = all_tensors()

    def finish(self) -> None:
        import torch

        time.sleep(0.05)
        lines = [line.split() for line in self.series.read_text().splitlines()]
        samples = [(float(t), int(size)) for t, size in lines]
        base = max((size for t, size in samples if t <= self.marks[0][0]), default=0)
        phases: dict[str, int] = {}
        for (start, name), (end, _) in zip(self.marks, [*self.marks[1:], (time.time(), "")], strict=True):
            inside = [size for t, size in samples if start <= t < end]
            before = [size for t, size in samples if t < start][-1:]
            phases[name] = max([phases.get(name, 0), *(size - base for size in inside + before)])
        result = {
            "states": self.states,
            "baseline": base,
            "peak": max(phases.values()),
            "phases": phases,
            "marks": self.marks,
        }
        if torch.cuda.is_available():
            result["peak"] = torch.cuda.max_memory_allocated()
            result["reserved"] = torch.cuda.max_memory_reserved()
        (self.folder / f"rank-{self.rank}.json").write_text(json.dumps(result))


def all_tensors() -> int:
    """Bytes of the storages of every tensor that Python knows, each once."""
    import torch

    seen: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()

    gc.unfreeze()  # those from before training are frozen, and not listed then
    for found in gc.get_objects():
        try:
            if isinstance(found, torch.Tensor):
                add(found)
                if found.grad is not None:
                    add(found.grad)
        except (ReferenceError, RuntimeError):  # a dead proxy; a tensor without storage
            continue
    return sum(seen.values())


def give_back_memory() -> None:
    """Have glibc return every freed block of 64 KiB or more at once, so that resident memory is what is in use."""
    ctypes.CDLL(None).mallopt(-3, 64 * 1024)  # M_MMAP_THRESHOLD


def own_frozen(model: Any) -> None:
    """Give frozen weights memory of this process: as loaded they are pages of their file, which are not counted."""
    for parameter in model.parameters():
        if not (parameter.requires_grad or hasattr(parameter, "ds_tensor") or hasattr(parameter, "quant_state")):
            parameter.data = parameter.data.clone()


def around(owner: Any, name: str, before: Any, after: Any = None) -> None:
    """Call `before` ahead of a function, and `after` behind it with what it returned."""
    original = getattr(owner, name)

    @wraps(original)  # train.py looks at what some of them take (ds_sft/upstream/check.py)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        result = original(*args, **kwargs)
        if after is not None:
            after(result)
        return result

    setattr(owner, name, wrapped)


def main() -> None:
    recorder = Recorder(Path(sys.argv[1]))
    import accelerate
    import peft  # noqa: F401  (imported before the baseline, as the others)
    import torch
    import transformers

    import ds_sft.export.weights
    import ds_sft.model.load
    from ds_sft import train
    from ds_sft.training.muon import MuonAndAdamW
    from ds_sft.training.optimizer import StochasticAdamW
    from ds_sft.training.trainer import SFTTrainer

    around(ds_sft.model.load, "load_model", recorder.start, lambda _: (give_back_memory(), recorder.mark("engine")))
    around(train, "load_model_to_train", lambda: None, own_frozen)
    around(transformers.Trainer, "compute_loss", lambda: recorder.mark("forward"))
    around(SFTTrainer, "evaluate", lambda: recorder.mark("validation"), lambda _: recorder.mark("after"))
    around(accelerate.Accelerator, "backward", lambda: recorder.mark("backward"), lambda _: recorder.mark("after"))

    def step() -> None:
        recorder.count_states()
        recorder.mark("step")

    if "--deepspeed" in sys.argv:
        from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
        from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

        around(DeepSpeedZeroOptimizer, "step", step, lambda _: recorder.mark("after"))
        around(DeepSpeedZeroOptimizer_Stage3, "step", step, lambda _: recorder.mark("after"))
    else:
        import bitsandbytes

        for optimizer in (torch.optim.AdamW, MuonAndAdamW, StochasticAdamW, bitsandbytes.optim.AdamW):
            around(optimizer, "step", step, lambda _: recorder.mark("after"))

    def end() -> None:
        recorder.finish()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        os._exit(0)

    around(ds_sft.export.weights, "export_model", end)
    sys.exit(train.main(sys.argv[2:]))


if __name__ == "__main__":
    main()
