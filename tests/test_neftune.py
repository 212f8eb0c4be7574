"""Noise on embeddings depends on a row's own length, not on what the row is batched with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.neftune import activate_neftune

from ds_sft.data.batch import collate_flat, collate_padded
from ds_sft.model.neftune import add_noise
from ds_sft.training.trainer import without_metadata
from tests.test_trainer import SIZES

ALPHA, WIDTH = 5.0, SIZES["hidden_size"]
ROWS = [{"input_ids": list(range(1, length + 1)), "labels": list(range(1, length + 1))} for length in (3, 14, 40)]


def noise_of(batch: dict[str, Any], *, training: bool = True, theirs: bool = False) -> torch.Tensor:
    """What is added to the embeddings of a batch, [batch, seq, width]; `theirs`: by Trainer's own."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).train(training)
    if theirs:
        activate_neftune(model, ALPHA)
    else:
        add_noise(model, ALPHA)
    found: list[torch.Tensor] = []
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, args, output: found.append(output))
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    torch.manual_seed(1)
    model(**batch)
    return (found[0] - embeddings.weight[batch["input_ids"]]).detach()


def test_of_a_lone_row_it_is_trainers() -> None:
    row = collate_flat(ROWS[1:2])
    known = noise_of({"input_ids": row["input_ids"]}, theirs=True)
    torch.testing.assert_close(noise_of(row), known, rtol=0, atol=1e-6)
    assert known.abs().max() > 0.2


@pytest.mark.parametrize("padded", [False, True])
def test_each_row_has_that_of_its_own_length(padded: bool) -> None:
    noise = noise_of(collate_padded(ROWS, pad_token_id=0) if padded else collate_flat(ROWS))
    lengths = [len(row["input_ids"]) for row in ROWS]
    rows = [row[:length] for row, length in zip(noise, lengths, strict=True)] if padded else noise[0].split(lengths)
    for row in rows:
        most = ALPHA / (row.numel()) ** 0.5
        assert row.numel() in (3 * WIDTH, 14 * WIDTH, 40 * WIDTH)
        assert 0.95 * most < row.abs().max() <= most * 1.0001
        assert row.abs().mean() == pytest.approx(most / 2, rel=0.2)  # uniform


def test_nothing_is_added_where_nothing_is_learned() -> None:
    batch = collate_flat(ROWS)
    assert not noise_of(batch, training=False).any()
    assert not noise_of({"input_ids": batch["input_ids"]}).any()  # who computes without metadata


def test_of_the_longest_rows_it_is_a_number() -> None:
    """Their tokens x width are more than int32 has."""
    noise = add_noise(LlamaForCausalLM(LlamaConfig(**SIZES)), ALPHA)
    assert noise is not None
    noise.lengths = torch.tensor([[2**18]], dtype=torch.int32)
    added = noise._add(torch.nn.Identity(), (), torch.zeros(1, 1, 2**13))
    assert 0.95 * ALPHA / 2**15.5 < added.abs().max() <= ALPHA / 2**15.5


def test_its_part_says_how_much_or_is_not_there() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert add_noise(model, None) is None
    assert not model.get_input_embeddings()._forward_hooks
    assert str(add_noise(model, ALPHA)) == "at most 5 / sqrt(tokens of a row x width), in training (NEFTune)"
