"""Tokenizers and models as they are published: what is mended, what is refused."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.dtype import training_dtype
from ds_sft.model.load import (
    load_model,
    load_tokenizer,
    make_room,
    read_ahead,
    resize_embeddings,
    say_not_loaded,
    uses_padding,
)
from ds_sft.ranks.launch import Launch

ALONE = Launch(launcher="python")
NO_FOLDER = "no such folder (the current directory is {here}), and not a hub id such as Qwen/Qwen3-0.6B"


def make(name: Path | str, **keys: Any) -> Config:
    return Config(model_name_or_path=str(name), train_file="t", training={"output_dir": "o"}, **keys)


def arguments(*, bf16: bool = False, fp16: bool = False, deepspeed: Any = None) -> Any:
    return SimpleNamespace(bf16=bf16, fp16=fp16, deepspeed=deepspeed, device=torch.device("cpu"))


def edit(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None takes a key out."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.mark.parametrize("engine", [None, {"zero_optimization": {"stage": 2}}], ids=["none", "zero2"])
def test_weights_go_to_the_gpu_directly(engine: Any, model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every rank's whole model through host memory; a rank's own GPU and no other. ZeRO-3 wants to partition them
    itself, one by one."""
    asked: list[Any] = []
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda name, **options: asked.append(options.get("device_map")) or SimpleNamespace(generation_config=None),
    )
    args = arguments(bf16=True, deepspeed=engine)
    for device, zero3 in (("cpu", False), ("cuda:3", False), ("cuda:3", True)):
        monkeypatch.setattr("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda on=zero3: on)
        args.device = torch.device(device)
        load_model(make(model_dir), args)
    assert asked == [None, {"": torch.device("cuda", 3)}, None]


def test_a_tokenizer_with_a_pad_token_is_left_alone(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = load_tokenizer(make(model_dir), ALONE)
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side) == (
        "<|endoftext|>",
        "<|im_end|>",
        "right",
    )
    assert capsys.readouterr().out == ""


def test_without_a_pad_token_eos_ends_the_answers(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(copy / "tokenizer_config.json", pad_token=None)
    assert load_tokenizer(make(copy), ALONE).pad_token == "<|im_end|>"
    assert capsys.readouterr().out == "The tokenizer has no pad token: '<|im_end|>' (eos) ends the answers instead.\n"


def test_without_either_the_model_is_refused(copy: Path) -> None:
    edit(copy / "tokenizer_config.json", pad_token=None, eos_token=None)
    with pytest.raises(UserError, match="its tokenizer has neither a pad nor an eos token"):
        load_tokenizer(make(copy), ALONE)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", NO_FOLDER),
        ("a/b/c", NO_FOLDER),
        ("empty", "this folder has no config.json, so it is not a model"),
        ("file", "is a file; give the folder of a model, or a hub id"),
    ],
)
def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        load_tokenizer(make(name), ALONE)
    assert str(caught.value) == f"model_name_or_path: {name}: {said.format(here=tmp_path)}"


def test_a_model_that_the_hub_does_not_give(model_dir: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_tokenizer(make("nobody/nothing"), ALONE)
    assert str(caught.value).startswith("model_name_or_path: nobody/nothing: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_broken_files(copy: Path, file: str) -> None:
    (copy / file).write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"^model_name_or_path: ") as caught:
        load_tokenizer(make(copy), ALONE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["absent", "truncated"])
def test_unusable_weights(copy: Path, damage: str) -> None:
    file = copy / "model.safetensors"
    file.unlink() if damage == "absent" else file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^model_name_or_path: ") as caught:
        load_model(make(copy), arguments())
    assert "\n" not in str(caught.value)


def test_weights_that_transformers_leaves_out_are_told_of(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layers behind the last one, as those of DeepSeek and GLM that predict further tokens; and some of another name.
    A pattern that names a layer the model has is of another size of the family."""
    config = make(copy)
    patterns = [r"model\.layers\.1.*", r"model\.layers\.2.*", r"^mtp.*"]
    monkeypatch.setattr(Qwen3ForCausalLM, "_keys_to_ignore_on_load_unexpected", patterns)
    say_not_loaded(load_model(config, arguments()), str(copy), ALONE)
    assert capsys.readouterr().out == ""
    weights = load_file(copy / "model.safetensors")
    more = {name: torch.zeros(2) for name in ("model.layers.2.eh_proj.weight", "mtp.fc.weight")}
    save_file(weights | more, copy / "model.safetensors", metadata={"format": "pt"})
    say_not_loaded(load_model(config, arguments()), str(copy), ALONE)
    assert capsys.readouterr().out == (
        f"{copy}: 2 of its tensors are not loaded, model.layers.2.eh_proj.weight the first: transformers has no layers "
        "for them (multi-token prediction, as a rule). They are not trained, and the final model is without them.\n"
    )


def test_an_attention_that_does_not_exist(model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"^attn_implementation: nonsense: Specified `attn_implementation="):
        load_model(make(model_dir, attn_implementation="nonsense"), arguments())


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("qwen3_next", "full_attention, linear_attention"),
        ("mamba", "linear_attention"),
        ("gpt_oss", "its mask knows no position ids"),
        ("none_of_them", None),
    ],
)
def test_a_model_that_would_mix_rows_is_given_padded_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, layers: str | None
) -> None:
    """And packing is refused, by its configuration alone: there are no weights here."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind if layers else "vit"}), encoding="utf-8")
    assert uses_padding(make(tmp_path), ALONE)
    said = capsys.readouterr().out
    assert said.count("would mix rows that are laid end to end") == 1
    assert f"({layers or 'its own code'})" in said
    with pytest.raises(UserError, match=r"^packing: concat: ") as caught:
        uses_padding(make(tmp_path, packing="concat"), ALONE)
    assert f"Config ({layers or 'its own code'}) does not keep packed rows apart; write none" in str(caught.value)


def test_rows_are_laid_end_to_end_unless_asked_otherwise(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not uses_padding(make(model_dir), ALONE)
    assert not uses_padding(make(model_dir, packing="concat"), ALONE)
    assert uses_padding(make(model_dir, batching="padded"), ALONE)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("args", "optimizer_dtype", "expected"),
    [
        (arguments(bf16=True), "float32", torch.float32),  # no engine that keeps masters: the weights are the masters
        (arguments(bf16=True), "bfloat16", torch.bfloat16),
        (arguments(deepspeed={}), "float32", torch.float32),
        (arguments(bf16=True, deepspeed={}), "float32", torch.bfloat16),
        (arguments(bf16=True, deepspeed={}), "bfloat16", torch.bfloat16),
        (arguments(fp16=True, deepspeed={}), "float32", torch.float16),
    ],
)
def test_dtype_of_the_weights(model_dir: Path, args: Any, optimizer_dtype: str, expected: torch.dtype) -> None:
    config = make(model_dir, optimizer_dtype=optimizer_dtype)
    assert training_dtype(config, args) == expected
    assert {p.dtype for p in load_model(config, args).parameters()} == {expected}


def test_a_generation_config_that_contradicts_itself_can_be_saved(copy: Path, tmp_path: Path) -> None:
    """Trainer sets the tokenizer's special tokens in it; transformers saves a changed one only if it is consistent."""
    edit(copy / "generation_config.json", temperature=0.7, eos_token_id=1)
    plain, mended = AutoModelForCausalLM.from_pretrained(copy), load_model(make(copy), arguments())
    plain.generation_config.eos_token_id = mended.generation_config.eos_token_id = 2
    with pytest.raises(ValueError, match="temperature"):
        plain.save_pretrained(tmp_path / "plain")
    mended.save_pretrained(tmp_path / "mended")
    assert json.loads((tmp_path / "mended" / "generation_config.json").read_text())["temperature"] == 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 2}),
        ("llama", {"tie_word_embeddings": False}),
        ("phi", {"tie_word_embeddings": False}),  # its projection has a bias
        ("gpt2", {}),
    ],
)
def test_new_rows_are_the_mean_of_the_others(family: str, keys: dict[str, Any], dtype: torch.dtype) -> None:
    """Rounded to bfloat16, so that they are the same whatever is trained in; the rest of the model is untouched."""
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=90, **small, **keys), dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    resize_embeddings(model, 128)
    assert model.config.vocab_size == 128
    grown = []
    for name, value in model.state_dict().items():
        known = before[name]
        assert value.dtype == known.dtype
        torch.testing.assert_close(value[: len(known)], known, rtol=0, atol=0)
        if len(value) != len(known):
            grown.append(name)
            mean = known.double().mean(0).to(torch.bfloat16).to(dtype)
            torch.testing.assert_close(value[90:], mean.expand_as(value[90:]), rtol=0, atol=0)
    head, tokens = model.get_output_embeddings(), model.get_input_embeddings()
    assert len(grown) == (3 if family == "phi" else 2)
    assert (head.weight is tokens.weight) == (family in ("qwen3", "gpt2"))
    assert (head.out_features, tokens.num_embeddings) == (128, 128)
    assert model(input_ids=torch.tensor([[127, 0]]), use_cache=False).logits.shape == (1, 2, 128)


def test_rows_are_never_taken_away(model_dir: Path, tokenizer: Any) -> None:
    model = load_model(make(model_dir), arguments())
    weight = model.get_input_embeddings().weight
    resize_embeddings(model, 64)
    make_room(model, tokenizer, make(model_dir, resize_embeddings=True))  # 400 tokens, 400 rows
    assert model.get_input_embeddings().weight is weight
    assert len(weight) == 400


def test_a_model_that_cannot_be_resized(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make(model_dir), arguments())

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("has embeddings of its own")

    monkeypatch.setattr(type(model), "resize_token_embeddings", refuse)
    with pytest.raises(UserError, match=r"^resize_embeddings: Qwen3ForCausalLM: has embeddings of its own$"):
        resize_embeddings(model, 448)


def test_rows_are_added_where_asked(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_tokens(["<|a|>"])
    model = load_model(make(model_dir), arguments())
    make_room(model, tokenizer, make(model_dir))
    assert len(model.get_input_embeddings().weight) == 400
    make_room(model, tokenizer, make(model_dir, resize_embeddings=True))
    assert len(model.get_input_embeddings().weight) == 448


@pytest.mark.parametrize("hub", [False, True])
def test_weights_are_read_ahead_once_a_node(copy: Path, monkeypatch: pytest.MonkeyPatch, hub: bool) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda fd, start, size, what: asked.append((os.readlink(f"/proc/self/fd/{fd}"), what))
    )
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(copy / file))
    config = make("Qwen/Qwen3-0.6B" if hub else copy)
    read_ahead(config, Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2))
    assert asked == []
    read_ahead(config, Launch(launcher="torchrun", rank=2, local_rank=0, world_size=4))
    assert asked == [(str(copy / "model.safetensors"), os.POSIX_FADV_WILLNEED)]


def test_a_model_that_is_still_to_be_downloaded_is_not_read_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr(os, "posix_fadvise", lambda *words: pytest.fail("nothing is there"))
    read_ahead(make("Qwen/Qwen3-0.6B"), ALONE)
