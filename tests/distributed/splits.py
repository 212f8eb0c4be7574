"""Started by test_trajectory.py through a launcher: several runs of train.py, one after the other in one process group.

A launch costs ten seconds, a run two. Arguments: the YAML file of each run. Between runs what belongs to a process and
not to a run is put back: accelerate's state. Only the last run ends the process group.
"""

from __future__ import annotations

import sys

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState

import ds_sft.training.arguments
from ds_sft.config import load_config
from ds_sft.runtime.distributed import read_launch
from ds_sft.train import run
from ds_sft.training.trainer import SFTTrainer

start_gloo, end = ds_sft.training.arguments.start_gloo, SFTTrainer.end


def start_once(*args: int, **kwargs: bool) -> None:
    if not dist.is_initialized():
        start_gloo(*args, **kwargs)


if __name__ == "__main__":
    files = sys.argv[1:]
    ds_sft.training.arguments.start_gloo = start_once
    SFTTrainer.end = lambda self: None
    for file in files:
        if file == files[-1]:
            SFTTrainer.end = end
        print(f"---- {file}", flush=True)
        run(load_config(["--config", file]), read_launch())
        AcceleratorState._reset_state()
        GradientState._reset_state()
        PartialState._reset_state()
