"""train.py in which the loss of some micro batches is no number; see disturbed.py.

`poison(TOKENS)`: {token: KIND}. A micro batch that has the token among its input_ids gets a loss of NaN (KIND "nan"),
an infinite one whose gradients are finite ("inf"), or gradients of NaN with its own loss ("gradient").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import wraps
from typing import Any

import torch
from transformers import Trainer


def poison(tokens: Mapping[str, str]) -> None:
    """Take the place of what Trainer computes, under our own Trainer."""
    compute_loss = Trainer.compute_loss

    @wraps(compute_loss)  # train.py looks at what it takes (ds_sft/upstream/check.py)
    def poisoned(self: Trainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        loss: torch.Tensor = compute_loss(self, model, inputs, *args, **kwargs)
        for token, kind in tokens.items():
            if (inputs["input_ids"] == int(token)).any():
                loss = spoil(loss, kind)
        return loss

    Trainer.compute_loss = poisoned


def spoil(loss: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "gradient":
        loss = loss * 1
        loss.register_hook(lambda gradient: gradient * math.nan)
        return loss
    return loss + {"nan": math.nan, "inf": math.inf}[kind]
