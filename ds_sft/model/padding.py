"""Masks of padded batches, made without a look at the device.

Transformers leaves a mask out where nothing is padded, and reads the whole attention mask to know: once or twice a
micro batch, and once more for linear attention, the host waits until the device has come that far. Whoever put the
batch together knows. While a model computes a batch that comes with its `BatchMetadata`, the functions of transformers'
that look are answered from it; in between, and for whoever computes without, they are as they were. They are functions
of the process, and nothing of a model's that transformers would call instead; so the model that computes has them
exchanged, for its forward alone. The masks are the same, bit for bit. (Eager attention looks at nothing by itself;
flash-attention looks for the rows in any case.)
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import masking_utils

from ds_sft.data.batch import METADATA, BatchMetadata
from ds_sft.model.lend import lend

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Padding:
    """How the masks of a model's padded batches are made."""

    attention: str
    why: str

    def __str__(self) -> str:
        return f"{self.attention}, with a mask for each batch {self.why}"


def know_padding(model: PreTrainedModel, *, compiled: bool = False) -> Padding:
    """Let the masks of a model's padded batches be made from what the batches say of themselves.

    `compiled`: `torch_compile` compiles the whole model: no values are looked at there, every mask is made.
    """
    attention = str(model.config._attn_implementation)
    if compiled:
        return Padding(attention, "(made by transformers in what torch_compile compiles)")
    own, answers = sys.modules[type(model.base_model).__module__], ExitStack()

    def begin(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        metadata: BatchMetadata | None = kwargs.get(METADATA)
        if metadata is None or kwargs.get("attention_mask") is None:
            return
        whole = metadata.tokens == metadata.places
        known = {"fast_all": lambda mask: whole, "create_recurrent_attention_mask": _nothing if whole else _as_it_is}
        for module in (masking_utils, own):  # a model has imported the second one into its own
            there = {name: function for name, function in known.items() if hasattr(module, name)}
            answers.callback(lend(module, there))

    model.register_forward_pre_hook(begin, with_kwargs=True)
    model.register_forward_hook(lambda model, args, output: answers.close(), always_call=True)
    return Padding(attention, "of its lengths (functions of transformers' are exchanged during forward)")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """The mask of linear attention where nothing is padded."""


def _as_it_is(config: Any, inputs_embeds: Any, attention_mask: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """The mask of linear attention, [rows, longest], where something is."""
    return attention_mask
