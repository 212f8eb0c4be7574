"""Noise on input embeddings while a model trains: NEFTune (Jain et al., 2310.05914).

Each number of a token's embedding gets noise between -a and a, drawn uniformly, with a = alpha / sqrt(tokens of the row
x width). Trainer's own counts all places of a micro batch as the row's, padding and other rows included: a row's noise
would depend on the rows beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_sft.data.batch import METADATA, BatchMetadata

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EmbeddingNoise:
    """Adds the noise in training, to batches that come with their `BatchMetadata`."""

    def __init__(self, model: PreTrainedModel, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None  # tokens of each place's row, [batch, seq] or [batch, 1]
        model.register_forward_pre_hook(self._take_lengths, with_kwargs=True)
        model.get_input_embeddings().register_forward_hook(self._add)

    def __str__(self) -> str:
        return f"at most {self.alpha:g} / sqrt(tokens of a row x width), in training (NEFTune)"

    def _take_lengths(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        metadata: BatchMetadata | None = kwargs.get(METADATA)
        if metadata is None or not model.training:
            self.lengths = None
        elif metadata.starts is None:
            self.lengths = kwargs["attention_mask"].sum(-1, keepdim=True)
        else:
            of_rows = metadata.starts.diff()
            self.lengths = of_rows.repeat_interleave(of_rows, output_size=metadata.places)[None]  # waits for no device

    def _add(self, embeddings: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        """Output: [batch, seq, width]."""
        if self.lengths is None:
            return output
        most = self.alpha / (self.lengths.float() * output.shape[-1]).sqrt()  # int32 ends at 262,144 x 8,192
        return output + torch.empty_like(output).uniform_(-1, 1) * most[..., None].to(output.dtype)


def add_noise(model: PreTrainedModel, alpha: float | None) -> EmbeddingNoise | None:
    """Add noise to a model's input embeddings in training; none where `alpha` is None or 0."""
    return EmbeddingNoise(model, alpha) if alpha else None
