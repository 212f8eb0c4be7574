"""What a model has no room for is said from its configuration alone: no test here has weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_sft.cli import main
from ds_sft.config.keys import Config
from ds_sft.data.dataset import load_data
from ds_sft.errors import UserError
from ds_sft.model.limits import check_limits, positions_left, table_of_positions
from ds_sft.plan.shape import positions_of
from ds_sft.ranks.launch import Launch
from tests.conftest import write_rows

ALONE = Launch(launcher="python")
SMALL = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PLAIN = {"question": "q", "answer": "Paris"}


@pytest.fixture
def check(tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Check a model of this configuration on these rows; what was said."""

    def checked(model: dict[str, Any], rows: list[Any], tokens: tuple[str, ...] = (), **keys: Any) -> str:
        config = AutoConfig.for_model(**{**SMALL, **model})
        config.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        if "pad" in keys:
            tokenizer.pad_token = keys.pop("pad")
        given = Config(model_name_or_path=str(tmp_path), train_file=str(write_rows(tmp_path / "train.jsonl", rows)),
                       cache_dir=str(tmp_path / "cache"), system_prompt="S", training={"output_dir": "o"},
                       **keys)  # fmt: skip
        data = load_data(given, tokenizer, ALONE)
        capsys.readouterr()
        check_limits(given, tokenizer, data, ALONE)
        return capsys.readouterr().out

    return checked


QWEN = {"model_type": "qwen3", "max_position_embeddings": 512}
NEW = ("<|a|>", "<|b|>", "<|c|>", "<|d|>", "<|e|>")


def test_tokens_without_a_row_are_named(check: Any, tmp_path: Path) -> None:
    rows = [PLAIN, {"question": "q", "answer": "<|b|>x<|c|>"}, {"question": "q", "answer": "<|a|>"}]
    with pytest.raises(UserError) as caught:
        check(QWEN, rows, NEW)
    assert str(caught.value) == (
        f"model_name_or_path: {tmp_path}: the model has 400 embedding rows (vocab_size), none for the tokens '<|a|>' "
        f"(400), '<|b|>' (401), '<|c|>' (402), the first used by {tmp_path}/train.jsonl:3: "
        "write resize_embeddings: yes"
    )
    with pytest.raises(UserError, match=r"'<\|a\|>' \(400\), '<\|b\|>' \(401\), '<\|c\|>' \(402\) and 2 more, the f"):
        check(QWEN, [{"question": "q", "answer": "".join(NEW)}], NEW)


def test_so_is_what_pads_rows(check: Any) -> None:
    with pytest.raises(UserError, match=r"tokens '<\|b\|>' \(401\), the first used by "):
        check(QWEN, [PLAIN], NEW, pad="<|b|>")


def test_tokens_that_no_row_has_need_none(check: Any) -> None:
    assert check(QWEN, [PLAIN], NEW) == ""
    assert check({**QWEN, "vocab_size": 405}, [{"question": "q", "answer": "".join(NEW)}], NEW) == ""


def test_validation_rows_count(check: Any, tmp_path: Path) -> None:
    file = str(write_rows(tmp_path / "eval.jsonl", [PLAIN, {"question": "q", "answer": "<|a|>" + "x" * 90}]))
    with pytest.raises(UserError, match=r"first used by .*/eval\.jsonl:2: "):
        check(QWEN, [PLAIN], NEW, eval_file=file)
    assert f"{file}:2 has 111 tokens" in check(ROTARY, [PLAIN], NEW, eval_file=file, resize_embeddings=True)


def test_prepare_says_it_too(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model_dir, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|a|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    file = write_rows(tmp_path / "train.jsonl", [{"question": "q", "answer": "<|a|>"}])
    keys = {"model_name_or_path": tmp_path / "model", "train_file": file, "output_dir": "o", "cache_dir": tmp_path}
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    assert main(["prepare", *words]) == 2
    assert "none for the tokens '<|a|>' (400), the first used by " in capsys.readouterr().err
    assert main(["prepare", *words, "--resize_embeddings", "yes"]) == 0


@pytest.mark.parametrize(
    ("vocab", "said"),
    [
        (400, "resize_embeddings: 400 -> 448 embedding rows for 405 tokens, a multiple of 64; new ones are the mean of "
              "the others.\n"),
        (405, "resize_embeddings: the model's 405 rows have room for all 405 tokens: none are added.\n"),
        (1000, "resize_embeddings: the model's 1,000 rows have room for all 405 tokens: none are added.\n"),
    ],
)  # fmt: skip
def test_what_resizing_will_do_is_said(check: Any, vocab: int, said: str) -> None:
    rows = [{"question": "q", "answer": "<|a|>"}]
    assert check({**QWEN, "vocab_size": vocab}, rows, NEW, resize_embeddings=True) == said


# ---- Positions

LONG = [PLAIN, {"question": "q", "answer": "x" * 90}, {"question": "q", "answer": "x" * 80}]  # 110 and 100 tokens
TABLES: list[dict[str, Any]] = [
    {"model_type": "gpt2", "n_positions": 64},
    {"model_type": "gpt_neo", "max_position_embeddings": 64, "attention_types": [[["global", "local"], 1]]},
    {"model_type": "gpt_bigcode", "n_positions": 64},
    {"model_type": "opt", "max_position_embeddings": 64, "ffn_dim": 32, "word_embed_proj_dim": 32},
    {"model_type": "biogpt", "max_position_embeddings": 64, "intermediate_size": 32},
    {"model_type": "gptj", "n_positions": 64, "rotary_dim": 8},
    {"model_type": "codegen", "n_positions": 64, "rotary_dim": 4, "num_attention_heads": 4},
]


@pytest.mark.parametrize("model", TABLES, ids=lambda model: model["model_type"])
def test_a_row_beyond_a_table_of_positions_is_refused(check: Any, tmp_path: Path, model: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check(model, LONG)
    assert str(caught.value) == (
        f"max_length: 2048: {tmp_path}/train.jsonl:2 has 110 tokens, and the model a table of 64 positions: write "
        "max_length: 64"
    )
    assert check(model, LONG, max_length=64) == ""  # rows as they are trained: cut
    assert check(model, [PLAIN]) == ""


def test_it_would_have_been_an_index_error() -> None:
    for model in TABLES:
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **model})).eval()
        assert table_of_positions(made, 64)
        made(input_ids=torch.zeros(1, 64, dtype=torch.int64))
        with pytest.raises((IndexError, RuntimeError)):
            made(input_ids=torch.zeros(1, 65, dtype=torch.int64))


ROTARY = {"model_type": "llama", "intermediate_size": 32, "max_position_embeddings": 64}
THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 64, **THETA}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (ROTARY, "64 positions | {rope_type: yarn, factor: 2.0, original_max_position_embeddings: 64}."),
        ({**ROTARY, "rope_parameters": {"rope_type": "linear", "factor": 1.5, **THETA}},
         "96 positions | {rope_type: linear, factor: 2.0}."),
        ({"model_type": "nemotron_h", "max_position_embeddings": 64}, "64 positions | "),
    ],
)  # fmt: skip
def test_rotary_positions_that_were_not_trained_are_a_warning(
    check: Any, tmp_path: Path, model: dict[str, Any], said: str
) -> None:
    limit, remedy = said.split(" | ")
    remedy = f", or write rope_scaling: {remedy}" if remedy else "."
    assert check(model, LONG) == (
        f"Warning: {tmp_path}/train.jsonl:2 has 110 tokens, more than the {limit} that the model was made for "
        f"(max_position_embeddings): lower max_length{remedy}\n"
    )
    assert check(model, LONG, max_length=64) == ""


@pytest.mark.parametrize("rope", [{}, {"rope_type": "linear", "factor": 1.5, **THETA}], ids=["plain", "scaled"])
def test_what_the_warning_advises_ends_it(check: Any, rope: dict[str, Any]) -> None:
    model = ROTARY | ({"rope_parameters": rope} if rope else {})
    said = check(model, LONG)
    advised = yaml.safe_load(said[said.index("{") : said.index("}") + 1])
    assert check(model, LONG, rope_scaling=advised) == f"Positions: {advised['rope_type']} x 2, 64 -> 128.\n"


def test_scaling_that_does_not_reach_is_a_warning_too(check: Any) -> None:
    said = check(ROTARY, LONG, rope_scaling={"rope_type": "yarn", "factor": 1.5})
    assert said.endswith("lower max_length, or write rope_scaling: {rope_type: yarn, factor: 2.0}.\n")


LONGROPE = {
    "model_type": "phi3",
    "intermediate_size": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "original_max_position_embeddings": 64,
    "rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
}
DYNAMIC = {**ROTARY, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **THETA}}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (LONGROPE, "(longrope) depend on other rows: it turns all rows of a micro batch by the longest: write "
                   "max_length: 64, or packing: none with per_device_train_batch_size: 1 and "
                   "per_device_eval_batch_size: 1"),
        (DYNAMIC, "(dynamic) depend on other rows: it turns all rows of a micro batch by the longest so far: write "
                  "max_length: 64, or rope_scaling: {rope_type: yarn, factor: 4.0}"),
    ],
    ids=["longrope", "dynamic"],
)  # fmt: skip
def test_no_row_is_turned_by_the_length_of_another(
    check: Any, tmp_path: Path, model: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError) as caught:
        check(model, LONG, max_tokens_per_batch=512)
    where = f"max_length: 2048: {tmp_path}/train.jsonl:2 has 110 tokens, and beyond 64 the model's rotary positions "
    assert str(caught.value) == where + said
    assert check(model, LONG, max_tokens_per_batch=512, max_length=64) == ""
    if model is DYNAMIC:
        said = check(model, LONG, rope_scaling={"rope_type": "yarn", "factor": 4.0})
        assert said == "Positions: yarn x 4, 64 -> 256.\n"
    else:
        assert check(model, LONG) == ""  # one row a micro batch


def test_they_would_be() -> None:
    """A row of 40 tokens beside one of 100: laid end to end it is no longer what it is alone."""
    for keys in (LONGROPE, DYNAMIC):
        config = AutoConfig.for_model(**{**SMALL, **keys})
        rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
        alone, _ = rotary(torch.zeros(1), torch.arange(40)[None])
        beside, _ = rotary(torch.zeros(1), torch.cat([torch.arange(40), torch.arange(100)])[None])
        assert not torch.equal(alone[0], beside[0, :40])


def test_rows_that_share_a_sequence_count_alone(check: Any) -> None:
    rows = [{"question": "q", "answer": "x" * 20}] * 8
    assert check(ROTARY, rows, packing="concat", max_length=512) == ""


@pytest.mark.parametrize(
    ("keys", "positions"),
    [
        ({}, None),
        ({"max_position_embeddings": 4096}, 4096),
        ({"max_position_embeddings": 4096, "rope_scaling": None, "rope_theta": 1e6}, 4096),
        # Qwen3 with YaRN as its authors write it, Vicuna 16k, Llama 3.1, DeepSeek-V3, Gemma 3.
        ({"max_position_embeddings": 40960, "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                                                             "original_max_position_embeddings": 32768}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0},
          "rope_parameters": {"rope_type": "linear", "factor": 2.0}}, 16384),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
                                                              "original_max_position_embeddings": 8192}}, 131072),
        ({"max_position_embeddings": 163840, "rope_scaling": {"type": "yarn", "factor": 40,
                                                              "original_max_position_embeddings": 4096}}, 163840),
        ({"max_position_embeddings": 131072,
          "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 131072),
    ],
)  # fmt: skip
def test_positions_of_published_models(keys: dict[str, Any], positions: int | None) -> None:
    assert positions_of(keys) == positions


def test_room_of_an_answer() -> None:
    gpt2 = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **TABLES[0]}))
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**SMALL, **ROTARY}))
    assert (positions_left(gpt2), positions_left(llama)) == (64, None)
