"""Bytes that an optimizer keeps of each parameter, by its keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ds_sft.config.keys import ADAFACTOR, MUON, TORCH_ADAMW, Config
from ds_sft.plan.weights import EMBEDDING, FP32, Weight

ADAMW, EIGHT_BITS = "adamw_torch", "adamw_8bit"
OTHER = "other"  # one whose states nobody knows here: counted as AdamW's
# What transformers calls them -> which of these has as many states.
OPTIMIZERS = {
    **dict.fromkeys(TORCH_ADAMW, ADAMW),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit"), EIGHT_BITS),
    MUON: MUON,
}
MOMENTS = 8  # Adam's two, in float32; half of that in bfloat16
# bitsandbytes 0.50: numbers that share a float32 scale, and tensors too small for 8 bits, in elements.
BLOCK, SMALL = 256, 4096
MOMENTUM = 4  # Muon's one, in float32


class StateBytes(NamedTuple):
    """Of a parameter, on average."""

    master: int  # what the optimizer updates
    moments: float


FLOAT32 = StateBytes(FP32, MOMENTS)


def planned_optimizer(config: Config) -> str:
    """The optimizer whose states are planned, and which decides what engines it has."""
    optim = str(config.training.get("optim", ADAMW))
    return ADAFACTOR if optim == ADAFACTOR else OPTIMIZERS.get(optim, OTHER)


def state_bytes(config: Config) -> StateBytes:
    """Of all parameters alike: small ones and, under Muon, matrices are a few per cent off."""
    if config.optimizer_dtype == "bfloat16":
        return StateBytes(FP32 // 2, MOMENTS / 2)
    return StateBytes(FP32, eight_bits(BLOCK) / BLOCK if planned_optimizer(config) == EIGHT_BITS else MOMENTS)


def eight_bits(elements: int) -> int:
    """Two moments of a flat tensor, with the scale of each block."""
    return 2 * elements + 2 * FP32 * -(-elements // BLOCK)


def whole_moments(optimizer: str, weights: Iterable[Weight]) -> int:
    """States of trained parameters that an optimizer has one by one, as it has without DeepSpeed.

    Trainer keeps an embedding's in float32 (`create_optimizer`).
    """
    total = 0
    for weight in weights:
        if optimizer == MUON and is_hidden(weight):
            total += MOMENTUM * weight.size
        elif optimizer == EIGHT_BITS and weight.size >= SMALL and EMBEDDING not in weight.name.split("."):
            total += eight_bits(weight.size)
        else:
            total += MOMENTS * weight.size
    return total


def is_hidden(weight: Weight) -> bool:
    """Whether Muon updates it: a matrix between embedding and head."""
    return weight.layer is not None and len(weight.shape) == 2
