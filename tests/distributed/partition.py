"""Started by test_loading.py: train.py, saying what each rank holds after the model was loaded.

One line of JSON a rank into the folder FOUND: how the weights were asked for, the parameters that are not partitioned,
the elements this rank holds and those of the whole model; after the run, whether a process group is left.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import AutoModelForCausalLM

import ds_sft.model.load
from ds_sft.train import main

load_model = ds_sft.model.load.load_model
from_pretrained = AutoModelForCausalLM.from_pretrained
found: dict[str, Any] = {}


def watched(*args: Any, **kwargs: Any) -> Any:
    found.setdefault("asked", sorted(kwargs))
    return from_pretrained(*args, **kwargs)


def load_and_look(*args: Any) -> Any:
    model = load_model(*args)
    parameters = dict(model.named_parameters())
    found["whole"] = [name for name, p in parameters.items() if not hasattr(p, "ds_id") or p.numel()]
    found["held"] = sum(p.ds_tensor.numel() for p in parameters.values())
    found["elements"] = sum(p.ds_numel for p in parameters.values())
    return model


if __name__ == "__main__":
    ds_sft.model.load.load_model = load_and_look
    AutoModelForCausalLM.from_pretrained = watched
    code = main()
    found["group_left"] = dist.is_initialized()
    Path(os.environ["FOUND"], os.environ["RANK"]).write_text(json.dumps(found), encoding="utf-8")
    sys.exit(code)
