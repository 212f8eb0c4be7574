"""The dtypes of a run, by its keys: what forward and backward compute in, and what the final weights are written in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_sft.config.keys import Config

if TYPE_CHECKING:
    import torch


def computed_in(config: Config) -> str:
    """The dtype of forward and backward."""
    return "bfloat16" if config.training.get("bf16") else "float16" if config.training.get("fp16") else "float32"


def export_dtype(config: Config) -> torch.dtype:
    """`export_dtype`; auto is the dtype that was trained in, so every launcher leaves the same files."""
    import torch

    name = computed_in(config) if config.export_dtype == "auto" else config.export_dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype
