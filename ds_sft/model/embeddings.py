"""Embeddings with a row for every token of the tokenizer (`resize_embeddings`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_sft.config.keys import Config
from ds_sft.errors import UserError, first_line
from ds_sft.plan.shape import resized_vocab

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Under `resize_embeddings` let a model have a row for every token."""
    if config.resize_embeddings:
        resize_embeddings(model, resized_vocab(model.config.get_text_config().vocab_size, tokenizer))


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give input and output embeddings so many rows, if they have fewer; new ones are the mean of the others.

    As transformers, which draws them from a narrow normal distribution around that mean; here every engine and rank
    starts from the same, so the mean is summed in float64 and rounded to bfloat16, what weights are published in.
    Under ZeRO-3 the new tensors are whole on every rank until the engine is made, which partitions them.

    Raises:
        UserError: a model whose embeddings transformers cannot resize.
    """
    import torch

    before = model.get_input_embeddings().num_embeddings  # ZeRO-3 leaves the weight itself no shape
    if rows <= before:
        return
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)
    except (NotImplementedError, TypeError) as error:
        raise UserError(f"resize_embeddings: {type(model).__name__}: {first_line(error)}") from error
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if values is not None:
                    values[before:] = _mean(values[:before])


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Over the first dimension, without a copy of all rows in float64."""
    import torch

    parts = [rows[start : start + 8192].sum(0, dtype=torch.float64) for start in range(0, len(rows), 8192)]
    return (torch.stack(parts).sum(0) / len(rows)).to(torch.bfloat16)
