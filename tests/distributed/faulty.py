"""Started by test_failures.py through a launcher: train.py, in which one rank fails.

FAULT in the environment: PLACE KIND RANK. PLACE is load, train, eval, save, export or predict; KIND is raise, oom,
kill, hang, or slow: then every rank's clock is one that only the slow rank's steps move.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import ds_sft.export.predict
import ds_sft.export.weights
import ds_sft.model.load
from ds_sft.ranks.launch import print_line
from ds_sft.train import main
from ds_sft.training.metrics import Clock
from ds_sft.training.trainer import SFTTrainer

PLACES = {
    "load": (ds_sft.model.load, "load_model"),
    "train": (SFTTrainer, "training_step"),
    "eval": (SFTTrainer, "evaluation_loop"),
    "save": (SFTTrainer, "_save_checkpoint"),
    "export": (ds_sft.export.weights, "full_weights"),
    "predict": (ds_sft.export.predict, "predict"),
}


def install(place: str, kind: str) -> None:
    """Let the function of a place fail instead of doing its work."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        print_line("here is the fault")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(600)
        if kind == "oom":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        raise ValueError(f"a fault in {place}")

    setattr(*PLACES[place], fail)


CLOCK = Path("clock")  # as many bytes as seconds have passed


def install_slow_steps(slow: bool) -> None:
    """A step of the slow rank takes three seconds, and no other thing any, on the clocks of both ranks.

    They pass when the other rank waits for the slow one in a collective of its backward pass. Not so in the first two
    steps: in the second DDP makes its buckets anew, for which ranks meet before the forward pass.
    """
    training_step, backward, begin = SFTTrainer.training_step, Accelerator.backward, Clock.begin
    now: dict[str, Any] = {"step": 0, "backward": False}

    def someone_waits() -> Path:
        return Path(f"waits-{now['step']}")

    def note_step(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
        now["step"] = self.state.global_step
        if slow and now["step"] >= 2:
            while not someone_waits().exists():
                time.sleep(0.01)
            with CLOCK.open("ab") as clock:
                clock.write(b"sss")
        return training_step(self, *args, **kwargs)

    def note_backward(*args: Any, **kwargs: Any) -> None:
        now["backward"] = True
        backward(*args, **kwargs)
        now["backward"] = False

    def note_begin(self: Clock, part: str) -> None:
        begin(self, part)
        if part == "communication" and now["backward"]:
            someone_waits().touch()

    SFTTrainer.training_step = note_step  # type: ignore[method-assign]
    Accelerator.backward = note_backward
    Clock.begin = note_begin  # type: ignore[method-assign]
    Clock._now = lambda self: float(CLOCK.stat().st_size) if CLOCK.exists() else 0.0  # type: ignore[method-assign]


if __name__ == "__main__":
    place, kind, rank = os.environ["FAULT"].split()
    faulty = os.environ.get("RANK", "0") == rank
    if kind == "slow":
        install_slow_steps(faulty)
    elif faulty:
        install(place, kind)
    sys.exit(main())
