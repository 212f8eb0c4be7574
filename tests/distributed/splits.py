"""Started by test_trajectory.py: several runs of train.py, one after the other in one process group.

A launch costs ten seconds, a run two. Arguments: the YAML file of each run. Between runs what belongs to a process and
not to a run is put back: accelerate's state. The process group ends with the last one, and the device is measured once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cache

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

import ds_sft.training.arguments
import ds_sft.training.trainer
from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.config.read import load_config
from ds_sft.ranks.collectives import end_group
from ds_sft.ranks.launch import read_launch
from ds_sft.ranks.stop import watch_for_stop
from ds_sft.train import run

start_gloo = ds_sft.training.arguments.start_gloo


def start_once(*args: int, **kwargs: bool) -> None:
    if not dist.is_initialized():
        start_gloo(*args, **kwargs)


def main(files: Sequence[str], before_each: Callable[[str], None] = lambda file: None) -> None:
    ds_sft.training.arguments.start_gloo = start_once
    ds_sft.training.trainer.device_peak = cache(ds_sft.training.trainer.device_peak)
    launch = read_launch()
    for file in files:
        print(f"---- {file}", flush=True)
        before_each(file)
        config = load_config(["--config", file])
        with watch_for_stop(launch) as stop, FolderLock(config.output_dir) as lock:
            run(config, launch, stop, lock)
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()
    end_group()


if __name__ == "__main__":
    main(sys.argv[1:])
