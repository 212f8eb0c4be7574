"""train.py that something happens to; test_resume.py and test_nonfinite.py start it.

In the environment: AT is when a rank is signalled, "PLACE STEP SIGNAL RANK", where PLACE is step, eval, save, end,
start, encode, export or predict. FILE_LIMIT is how many bytes a file may have: the disk is full beyond it. POISON, as
JSON, makes losses no numbers: see poisoned.py.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

import ds_sft.data.dataset
import ds_sft.export.predict
import ds_sft.export.weights
from ds_sft.ranks import stop as stop_module
from ds_sft.train import main
from ds_sft.training.resumable import StepBoundary
from ds_sft.training.trainer import SFTTrainer
from tests.distributed.poisoned import poison


def signal_self(name: str) -> None:
    """Send this process a signal and wait until it has been noticed."""
    os.kill(os.getpid(), getattr(signal, name))
    while STOP and STOP[0].reason is None:
        time.sleep(0.01)


STOP: list[stop_module.StopRequests] = []


def install(at: str) -> None:
    place, step, name, rank = at.split()
    if os.environ.get("RANK", "0") != rank:
        return
    start = stop_module.StopRequests.start
    stop_module.StopRequests.start = lambda self: (STOP.append(self), start(self))[1]  # type: ignore[method-assign, func-returns-value]
    owner, method = {
        "step": (StepBoundary, "on_step_end"),
        "eval": (SFTTrainer, "token_mean"),
        "save": (SFTTrainer, "_save_checkpoint"),
        "end": (SFTTrainer, "_finalize_training"),
        "start": (SFTTrainer, "train"),
        "encode": (ds_sft.data.dataset, "load_data"),
        "export": (ds_sft.export.weights, "export_model"),
        "predict": (ds_sft.export.predict, "predict"),
    }[place]
    original = getattr(owner, method)

    def reached(args: tuple[Any, ...]) -> bool:
        state = args[2] if place == "step" else getattr(args[0], "state", None)
        return place in ("start", "encode", "export", "predict") or state.global_step == int(step)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if reached(args) and STOP[0].reason is None:
            signal_self(name)
        return original(*args, **kwargs)

    setattr(owner, method, signalled)


if __name__ == "__main__":
    if at := os.environ.get("AT"):
        install(at)
    if limit := int(os.environ.get("FILE_LIMIT", 0)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    poison(json.loads(os.environ.get("POISON", "{}")))
    sys.exit(main())
