"""Started by test_release.py, with a launcher or without: runs of train.py as in splits.py, whose memory is counted.

Arguments: the YAML file of each run. For every run and rank a line of JSON in the file FOUND.RANK: the bytes of tensors
that are alive before the end, and after the engine's memory was given back, beyond those before the run; parameters;
models that are alive.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import ds_sft.engine.release
import tests.distributed.splits as splits

release = ds_sft.engine.release.release
found: dict[str, Any] = {}


def alive() -> int:
    """Bytes of the storages of all tensors that anything refers to; a storage in several tensors counts once."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if isinstance(value, torch.Tensor)]
    for tensor in list(tensors):  # what only C++ refers to: a parameter's gradient, its share under ZeRO-3
        tensors += [
            t for t in (tensor.grad if tensor.is_leaf else None, getattr(tensor, "ds_tensor", None)) if t is not None
        ]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta"]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def release_and_count(trainer: Any) -> None:
    found["parameters"] = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
    found["trained"] = alive() - found["before"]
    release(trainer)
    found["left"] = alive() - found["before"]
    found["models"] = sum(isinstance(value, PreTrainedModel) for value in gc.get_objects())
    with Path(f"{os.environ['FOUND']}.{os.environ.get('RANK', '0')}").open("a", encoding="utf-8") as file:
        file.write(json.dumps(found) + "\n")


def count_before(file: str) -> None:
    found.clear()
    found.update(run=Path(file).stem, before=alive())


if __name__ == "__main__":
    ds_sft.engine.release.release = release_and_count
    splits.main(sys.argv[1:], before_each=count_before)
