"""Models whose rows ranks cannot share: one line before data are encoded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.attention_kernels import Attention
from ds_sft.model.loss import OwnLoss
from ds_sft.model.sequence import SequenceGroup
from ds_sft.model.sequence_support import require_shareable, require_shared
from ds_sft.ranks.launch import Launch, require_groups
from tests.test_loss import SMALL

SCALED = {"factor": 2.0, "rope_theta": 10000.0}


def saved(folder: Path, family: str, **changes: Any) -> Config:
    keys = {**SMALL, "num_key_value_heads": 4, "bos_token_id": None, "eos_token_id": None, **changes}
    AutoConfig.for_model(family, **keys).save_pretrained(folder)
    return Config(model_name_or_path=str(folder), train_file="rows.jsonl", sequence_parallel=2)


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma3_text", "qwen3_moe", "cohere", "gpt_neox"])
def test_models_whose_rows_ranks_share(tmp_path: Path, family: str) -> None:
    quiet = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    require_shareable(saved(tmp_path, family, **(quiet if family == "gpt_neox" else {})))


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("llama", {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 24},
         "LlamaForCausalLM has 3 heads, and ranks get some each: write 1, 3"),
        ("llama", {"attention_dropout": 0.1},
         "LlamaForCausalLM drops out by chance, which would depend on the number of ranks (attention_dropout in "
         "config.json): write 1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", **SCALED}},
         "LlamaForCausalLM has rotary positions that look at the longest row of a batch (rope_type: dynamic): write 1"),
        ("gemma2", {}, "Gemma2ForCausalLM caps its scores: write 1"),
        ("mamba", {}, "MambaForCausalLM would mix rows that are laid end to end (linear_attention): "
                      "write 1"),
    ],
)  # fmt: skip
def test_models_whose_rows_ranks_cannot_share(
    tmp_path: Path, family: str, changes: dict[str, Any], reason: str
) -> None:
    config = saved(tmp_path, family, **changes)
    with pytest.raises(UserError) as error:
        require_shareable(config)
    assert str(error.value) == f"sequence_parallel: 2: {reason}"


def test_positions_are_those_of_the_run(tmp_path: Path) -> None:
    """`rope_scaling` takes the place of those that look at the longest row."""
    config = saved(tmp_path, "llama", rope_parameters={"rope_type": "dynamic", **SCALED})
    require_shareable(replace(config, rope_scaling={"rope_type": "yarn", "factor": 2.0}))


def test_one_rank_asks_nothing(tmp_path: Path) -> None:
    require_shareable(Config(model_name_or_path=str(tmp_path / "absent"), train_file="rows.jsonl"))


def test_a_model_that_keeps_its_own_loss_all_the_same() -> None:
    """It would shift labels within a part."""
    attention, loss = Attention("row by row", "", group=SequenceGroup(2, None)), OwnLoss("its loss is another")
    with pytest.raises(UserError, match=r"^sequence_parallel: 2: with what is trained of it the model keeps a loss"):
        require_shared(attention, loss)
    require_shared(replace(attention, group=None), loss)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (3, "sequence_parallel: 2: the run has 3 ranks, no groups of 2: write 1, 3, or start a multiple of "
            "2 ranks (deepspeed, torchrun, srun)"),
        (1, "sequence_parallel: 2: the run has 1 rank, no groups of 2: write 1, or start a multiple of 2 "
            "ranks (deepspeed, torchrun, srun)"),
    ],
)  # fmt: skip
def test_ranks_that_make_no_groups(ranks: int, message: str) -> None:
    with pytest.raises(UserError) as error:
        require_groups(2, Launch(launcher="torchrun", world_size=ranks))
    assert str(error.value) == message
    require_groups(2, Launch(launcher="torchrun", world_size=4))
