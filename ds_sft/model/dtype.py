"""The dtypes of a run: of weights in memory, of forward and backward, and of what is written at the end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_sft.config.keys import Config

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments


def training_dtype(config: Config, args: TrainingArguments) -> torch.dtype:
    """The dtype of the weights in the model.

    DeepSpeed keeps float32 masters beside 16-bit weights. Without it the weights themselves are the masters and stay
    float32 (model/working_copy.py): at a learning rate of 1e-5 bfloat16 weights lose 85 % of their updates to
    rounding to nearest. Under `optimizer_dtype: bfloat16` nothing is float32 (training/optimizer.py).
    """
    import torch

    bare = args.deepspeed is None and config.optimizer_dtype == "float32"
    return torch.float32 if bare else computing_dtype(args)


def computing_dtype(args: TrainingArguments) -> torch.dtype:
    """The dtype of forward and backward."""
    import torch

    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32


def loading_dtype(config: Config, args: TrainingArguments) -> torch.dtype:
    """The dtype the model is loaded in: beside an adapter that of forward and backward, as what is never changed needs
    no masters. Modules trained whole have some, which begin as they were published, not rounded: `choose_weights`
    rounds the others of a float32 model. (4 bits are made of what was rounded, see `model/quantized.py`.)
    """
    import torch
    from transformers import AutoConfig

    if config.adapter == "none":
        return training_dtype(config, args)
    if config.lora_modules_to_save and config.quantization == "none":
        published = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        if published.dtype == torch.float32:
            return training_dtype(config, args)
    return computing_dtype(args)


def computed_in(config: Config) -> str:
    """The dtype of forward and backward."""
    return "bfloat16" if config.training.get("bf16") else "float16" if config.training.get("fp16") else "float32"


def export_dtype(config: Config) -> torch.dtype:
    """`export_dtype`; auto is the dtype that was trained in, so every launcher leaves the same files."""
    import torch

    name = computed_in(config) if config.export_dtype == "auto" else config.export_dtype
    dtype: torch.dtype = getattr(torch, name)
    return dtype
