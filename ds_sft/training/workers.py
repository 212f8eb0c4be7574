"""Processes that read batches for a rank: how they are started, and that they end with it."""

from __future__ import annotations

import atexit
import os
import signal
from functools import cache, partial
from multiprocessing import Event
from typing import Any

from transformers import TrainingArguments


def loader_options(args: TrainingArguments) -> dict[str, Any]:
    """What `DataLoader` is told of them."""
    return {
        "num_workers": args.dataloader_num_workers,
        "pin_memory": args.dataloader_pin_memory,
        "persistent_workers": args.dataloader_persistent_workers,
        "prefetch_factor": args.dataloader_prefetch_factor,
        "worker_init_fn": partial(_end_with_parent, _process_ends()) if args.dataloader_num_workers else None,
    }


@cache
def _process_ends() -> Any:
    """Is set before multiprocessing terminates the workers at the end of the process, and waits for them."""
    ending = Event()
    atexit.register(ending.set)
    return ending


def _end_with_parent(ending: Any, worker: int) -> None:
    """Whoever signals all processes of a job must not kill the loader's workers before their parent has saved."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.is_set() else None)
