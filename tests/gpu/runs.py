"""Started by the tests of this folder: several runs of train.py, one after the other in one process.

Arguments: the YAML file of each run; what it says comes after a line "---- run NAME". Loading libraries and starting
CUDA take longer than a run. Between two of them is put back what belongs to a process and not to a run: accelerate's
state, what was compiled, the peak of memory. With STRICT_STEPS="4 7" in the environment nothing may wait for the device
from the beginning of the fifth step to the end of the seventh.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from ds_sft.ranks.devices import grow_segments
from ds_sft.ranks.launch import read_launch

grow_segments(os.environ)  # as train.py does before torch is there

import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

import ds_sft.training.profile  # noqa: E402
from ds_sft.checkpoints.folder_lock import FolderLock  # noqa: E402
from ds_sft.config.read import load_config  # noqa: E402
from ds_sft.ranks.collectives import end_group  # noqa: E402
from ds_sft.ranks.stop import watch_for_stop  # noqa: E402
from ds_sft.train import run  # noqa: E402


class Strict(TrainerCallback):
    """Lets PyTorch raise where the host waits for the device, in the steps between two that are logged."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first:
            set_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.last:
            set_mode("default")


def set_mode(mode: str) -> None:
    print(f"waiting for the device: {mode}", flush=True)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode(mode)


def forget() -> None:
    """Make the process ready for another run."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def main() -> None:
    launch = read_launch()
    if steps := os.environ.get("STRICT_STEPS"):
        ds_sft.training.profile.profiling = lambda *_: [Strict(*map(int, steps.split()))]
    for file in sys.argv[1:]:
        print(f"---- run {Path(file).stem}", flush=True)
        config = load_config(["--config", file])
        try:
            with watch_for_stop(launch) as stop, FolderLock(config.output_dir) as lock:
                run(config, launch, stop, lock)
        except Exception:
            traceback.print_exc()
        print(f"cuDNN's attention allowed: {torch.backends.cuda.cudnn_sdp_enabled()}", flush=True)
        forget()
    end_group()


if __name__ == "__main__":
    main()
