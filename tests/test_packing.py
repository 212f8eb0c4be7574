"""Which rows share a sequence, and that a packed row is learned as if it were alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

from ds_sft.config.keys import Config
from ds_sft.data.batch import METADATA, collate_flat
from ds_sft.data.dataset import load_data
from ds_sft.data.loader import NOTHING, GlobalBatches, dataset_and_collator
from ds_sft.data.micro_batches import Batching
from ds_sft.data.packing import PackedRows, pack_rows
from ds_sft.data.rows import lengths_of
from ds_sft.model.padding_free_support import why_rows_mix
from ds_sft.ranks.launch import Launch
from tests.conftest import questions_and_answers, write_rows

ALONE = Launch(launcher="python")


@pytest.mark.parametrize("seed", range(20))
def test_every_row_once_and_none_too_long(seed: int) -> None:
    numbers = np.random.default_rng(seed)
    lengths = numbers.integers(1, 101, size=int(numbers.integers(0, 400)))
    packing = pack_rows(lengths, 100, seed=seed)
    assert sorted(row for pack in packing.packs for row in pack) == list(range(len(lengths)))
    assert all(pack and lengths[pack].sum() <= 100 for pack in packing.packs)
    assert packing.tokens == lengths.sum()
    assert packing == pack_rows(lengths, 100, seed=seed)


def test_best_fit_is_near_full() -> None:
    lengths = np.random.default_rng(0).integers(20, 400, size=5000)
    packing = pack_rows(lengths, 1024, seed=0)
    assert packing.efficiency > 0.99
    assert packing.packs != pack_rows(lengths, 1024, seed=1).packs
    assert "5,000 rows in " in packing.in_words(5000)
    assert "% full" in packing.in_words(5000)


def test_literal_packs() -> None:
    """60 takes 40; 50 takes 50; 30 and 20 share what is left over."""
    packing = pack_rows([50, 60, 30, 40, 50, 20], 100, seed=0)
    assert sorted(map(sorted, packing.packs)) == [[0, 4], [1, 3], [2, 5]]


def test_positions_start_at_0_with_every_row_and_no_row_predicts_the_next() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    packed = PackedRows(rows, pack_rows([3, 2], 5, seed=0))
    assert {name: ids.tolist() for name, ids in packed[0].items()} == {
        "input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "position_ids": [0, 1, 2, 0, 1],
    }  # fmt: skip
    batch = collate_flat([packed[0], rows[1]])  # a row that is not packed, as in evaluation
    assert {name: ids.tolist() for name, ids in batch.items() if name != METADATA} == {
        "input_ids": [[1, 2, 3, 4, 5, 4, 5]],
        "labels": [[-100, 2, 3, -100, 5, -100, 5]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_learned_as_if_alone(model_dir: Path, tokenizer: Any, tmp_path: Path, attention: str) -> None:
    """Loss and gradients of a packed batch are those of the rows one by one."""
    from transformers import AutoModelForCausalLM

    file = write_rows(tmp_path / "train.jsonl", questions_and_answers(7))
    config = Config(
        model_name_or_path="m", train_file=str(file), packing="concat", max_length=200, cache_dir=str(tmp_path)
    )
    data = load_data(config, tokenizer, ALONE)
    packed, collate = dataset_and_collator(data.train, config, tokenizer, ALONE, padded=False)
    assert len(packed) < len(data.train)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=attention)
    assert why_rows_mix(type(model), model.config) is None

    def learn(batches: list[dict[str, torch.Tensor]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total = sum(model(**batch, use_cache=False, num_items_in_batch=1).loss for batch in batches)
        total.backward()
        return total.item(), [p.grad.clone() for p in model.parameters()]

    alone, gradients = learn([{name: torch.tensor([ids]) for name, ids in row.items()} for row in data.train])
    together, packed_gradients = learn([collate([packed[i] for i in range(len(packed))])])
    assert together == pytest.approx(alone, rel=1e-5)
    for one, other in zip(gradients, packed_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_has_as_many_micro_batches(tokenizer: Any, tmp_path: Path, ranks: int) -> None:
    """The packing is the same for any number of ranks; together they learn from every sequence once."""
    file = write_rows(tmp_path / "train.jsonl", questions_and_answers(50))
    config = Config(model_name_or_path="m", train_file=str(file), packing="concat", max_length=300)
    packed, _ = dataset_and_collator(load_data(config, tokenizer, ALONE).train, config, tokenizer, ALONE, padded=False)
    batching = Batching(lengths=lengths_of(packed), micro_batch=2, accumulation=1, ranks=ranks, padded=False, seed=0)
    shares = [list(GlobalBatches(batching, rank)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    learned = sorted(i for share in shares for batch in share for i in batch if i != NOTHING)
    assert learned == list(range(len(packed)))


SIZES: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2,
                         "intermediate_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 1, "head_dim": 16}
WINDOWED: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED, "mistral": GROUPED, "qwen2": GROUPED, "qwen3": GROUPED, "phi3": SIZES, "gpt2": SIZES,
    "gemma3_text": GROUPED | WINDOWED, "olmo2": SIZES, "smollm3": GROUPED, "qwen3_moe": GROUPED,
    "gpt_oss": {**GROUPED, "num_local_experts": 2, "num_experts_per_tok": 1}, "bloom": SIZES,
    "opt": {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "falcon": {**SIZES, "alibi": False},
}  # fmt: skip
LEAKING = {"gpt_oss", "bloom", "opt"}  # their masks are made without position ids
if Version(transformers.__version__) < Version("5.24"):
    LEAKING.add("falcon")


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_would_mix_are_known(name: str) -> None:
    """What is said of a family is what its models do: with two rows end to end, and with each alone."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**FAMILIES[name]), dtype=torch.float32).eval()
    rows = [torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])]
    with torch.no_grad():
        alone = torch.cat([model(row, use_cache=False).logits for row in rows], 1)
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
        together = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    leaks = not torch.allclose(alone, together, atol=1e-5)
    assert leaks == (name in LEAKING)
    assert bool(why_rows_mix(type(model), model.config)) == leaks


@pytest.mark.distributed
def test_a_packed_run_ends_well(model_dir: Path, tmp_path: Path) -> None:
    from tests.distributed.harness import step_losses, train
    from tests.distributed.test_trajectory import engine

    write_rows(tmp_path / "train.jsonl", questions_and_answers(24))
    write_rows(tmp_path / "eval.jsonl", questions_and_answers(3))
    keys: dict[str, Any] = {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "eval_file": "eval.jsonl",
        "output_dir": "out",
        "packing": "concat",
        "max_length": 300,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "deepspeed": engine("zero2", tmp_path),
        "num_predictions": 0,
    }
    done = train("torchrun", 2, keys, cwd=tmp_path, timeout=240)
    assert done.code == 0, done.output[-6000:]
    assert "Packing: 24 rows in " in done.output
    losses = step_losses(tmp_path / "out")
    assert all(late < early for early, late in pairwise((losses[0], losses[len(losses) // 2], losses[-1])))
