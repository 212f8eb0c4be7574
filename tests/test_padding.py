"""Masks of padded batches: transformers' own, without a look at the batch."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, masking_utils

from ds_sft.config.keys import Config
from ds_sft.data.batch import METADATA, collate_padded
from ds_sft.model.padding import know_padding
from ds_sft.ranks.launch import Launch
from ds_sft.train import load_model_to_train
from ds_sft.training.trainer import without_metadata
from tests.dispatch import NoReads

SIZES: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
# Linear attention beside the usual one: rows of one sequence would mix, so its batches are padded without being asked.
HYBRID = {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8,
          "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "num_experts": 0,
          "mlp_only_layers": [0, 1]}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "window": ("mistral", {"sliding_window": 5}),
    "windows_in_some_layers": ("cohere2", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
                                           "eos_token_id": 2}),
    "hybrid": ("qwen3_next", HYBRID),
}  # fmt: skip


def make(name: str, kind: str) -> Any:
    family, changes = CASES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kind).train()
    know_padding(model)
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    return model


def batch_of(lengths: tuple[int, ...]) -> dict[str, Any]:
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": [-100, *range(4, 3 + n)]} for n in lengths]
    return collate_padded(rows, pad_token_id=0)


@pytest.mark.parametrize("lengths", [(9, 14, 5), (7, 7), (6,)], ids=["padded", "equal", "alone"])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_masks_are_the_same_and_nothing_is_read(name: str, kind: str, lengths: tuple[int, ...]) -> None:
    """Loss and gradients, to the last bit, of a batch with its metadata and of one that transformers has to look at."""
    model, batch = make(name, kind), batch_of(lengths)
    without = {key: value for key, value in batch.items() if key != METADATA}
    found: list[tuple[torch.Tensor, ...]] = []
    for inputs, looking in ((without, nullcontext()), (batch, NoReads())):
        with looking:
            loss = model(**inputs, use_cache=False).loss
            loss.backward()
        found.append((loss, *(p.grad for p in model.parameters() if p.grad is not None)))
        model.zero_grad()
    assert len(found[0]) > 10
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_transformers_is_as_it_was_after_each_forward(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("hybrid", "sdpa")
    own = sys.modules[type(model).__module__]
    before = masking_utils.fast_all, own.create_recurrent_attention_mask
    during: list[Any] = []

    def watch(module: Any, args: Any) -> None:
        during.extend([masking_utils.fast_all, own.create_recurrent_attention_mask])
        if fails:
            raise OSError("in the middle")

    model.model.layers[0].register_forward_pre_hook(watch)
    with pytest.raises(OSError, match="in the middle") if fails else nullcontext():
        model(**batch_of((3, 4)), use_cache=False)
    assert len(during) == 2
    assert not set(during) & set(before)
    assert (masking_utils.fast_all, own.create_recurrent_attention_mask) == before


def test_a_run_with_padded_batches_reads_nothing(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    config = Config(model_name_or_path=str(model_dir), train_file="t", batching="padded")
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    model = load_model_to_train(config, args, tokenizer, Launch(launcher="python"), padded=True, largest=7)
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    with NoReads():
        model(**batch_of((4, 9)), use_cache=False).loss.backward()
