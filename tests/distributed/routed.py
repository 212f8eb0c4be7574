"""Started by test_experts.py: runs of train.py one after the other, in some of which the ranks use other experts.

Arguments: the YAML file of each run. In one whose name begins with `elsewhere` all tokens of a micro batch go to the
same experts, those that its number of tokens chooses.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

import ds_sft.train
import tests.distributed.listed  # noqa: F401, it registers its model
from ds_sft.model.experts import experts_of
from tests.distributed.splits import main

load_model_to_train = ds_sft.train.load_model_to_train


def send_elsewhere(experts: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden_states, index, *others = args
    chosen = (len(hidden_states) + torch.arange(index.shape[-1])) % experts.num_experts
    return hidden_states, chosen.expand_as(index), *others


def load_routed(*args: Any, **kwargs: Any) -> Any:
    model = load_model_to_train(*args, **kwargs)
    for experts in experts_of(model):
        experts.register_forward_pre_hook(send_elsewhere)
    return model


def choose(file: str) -> None:
    elsewhere = Path(file).name.startswith("elsewhere")
    ds_sft.train.load_model_to_train = load_routed if elsewhere else load_model_to_train


if __name__ == "__main__":
    main(sys.argv[1:], choose)
