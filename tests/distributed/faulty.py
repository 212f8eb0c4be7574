"""Started by test_failures.py through a launcher: train.py, in which one rank fails.

FAULT in the environment: PLACE KIND RANK. PLACE is load, train, eval, save, export or predict; KIND is raise, oom,
kill, hang, or slow: then the place works, three seconds later.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

import ds_sft.predict
import ds_sft.runtime.export
import ds_sft.training.model
from ds_sft.runtime.distributed import print_line
from ds_sft.train import main
from ds_sft.training.trainer import SFTTrainer

PLACES = {
    "load": (ds_sft.training.model, "load_model"),
    "train": (SFTTrainer, "training_step"),
    "eval": (SFTTrainer, "evaluation_loop"),
    "save": (SFTTrainer, "_save_checkpoint"),
    "export": (ds_sft.runtime.export, "full_weights"),
    "predict": (ds_sft.predict, "predict"),
}


def install(place: str, kind: str) -> None:
    """Let the function of a place fail instead of doing its work."""
    work = getattr(*PLACES[place])

    def fail(*args: Any, **kwargs: Any) -> Any:
        print_line(f"the fault at {time.time():.1f} s")
        if kind == "slow":
            time.sleep(3)
            return work(*args, **kwargs)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(600)
        if kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        raise ValueError(f"a fault in {place}")

    setattr(*PLACES[place], fail)


if __name__ == "__main__":
    place, kind, rank = os.environ["FAULT"].split()
    if os.environ.get("RANK", "0") == rank:
        install(place, kind)
    sys.exit(main())
