"""The run's loss, row by row: cross-entropy over supervised tokens, of a model as anybody loads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ds_sft.data.batch import METADATA, collate_padded
from ds_sft.plan.activations import CHUNK_BYTES

PLACES = 8192  # of a batch, padding included
LOGITS_BYTES = 2**30  # of a batch, in float32: its supervised tokens are projected alone


def loss_batches(lengths: Sequence[int], supervised: Sequence[int], vocab: int) -> list[list[int]]:
    """Which rows share a batch: of about one length, the longest first; the same on any number of ranks.

    Args:
        lengths, supervised: tokens of each row.
    """
    most = LOGITS_BYTES // (4 * max(vocab, 1))
    batches: list[list[int]] = []
    longest = logits = 0
    for row in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        logits += supervised[row]
        if not batches or longest * (len(batches[-1]) + 1) > PLACES or logits > most:
            batches.append([])
            longest, logits = lengths[row], supervised[row]
        batches[-1].append(row)
    return batches


def row_losses(model: Any, rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> list[tuple[float, int]]:
    """Of each row the sum of the cross-entropy over its supervised tokens, in float32, and their number.

    Args:
        rows: input_ids and labels, [tokens] each. They are padded on the right, where no causal model looks.
    """
    batch = collate_padded(rows, pad_token_id=pad_token_id)
    metadata = batch[METADATA]
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with torch.inference_mode(), only_at(model, metadata.positions):
        logits = model(**inputs, use_cache=False).logits.flatten(0, -2)
        if len(logits) != metadata.supervised:  # a model without an output projection to hook
            logits = logits[metadata.positions.to(logits.device)]
        losses = _cross_entropy(logits, metadata.targets.to(logits.device)).double().cpu().numpy()
    row_of = metadata.positions.numpy() // batch["input_ids"].shape[1]
    sums = np.bincount(row_of, weights=losses, minlength=len(rows))
    counts = np.bincount(row_of, minlength=len(rows))
    return list(zip(sums.tolist(), counts.tolist(), strict=True))


@contextmanager
def only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Let the output projection see the hidden states at these positions alone, as a batch of one row.

    Args:
        positions: [supervised], in [batch x seq].
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return

    def choose(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0].flatten(0, -2)  # [batch x seq, hidden]
        return (hidden.index_select(0, positions.to(hidden.device))[None], *args[1:])

    hook = head.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Of each token, [supervised], in float32; logits [supervised, vocab] in the model's dtype."""
    size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    parts = [
        F.cross_entropy(logits[i : i + size].float(), targets[i : i + size], reduction="none")
        for i in range(0, len(targets), size)
    ]
    return torch.cat(parts)
