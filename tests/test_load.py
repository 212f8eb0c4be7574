"""Models as they are published: what is mended, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.dtype import training_dtype
from ds_sft.model.load import load_model, read_ahead, say_not_loaded
from ds_sft.ranks.launch import Launch

ALONE = Launch(launcher="python")


def make(name: Path | str, **keys: Any) -> Config:
    return Config(model_name_or_path=str(name), train_file="t", training={"output_dir": "o"}, **keys)


def arguments(*, bf16: bool = False, fp16: bool = False, deepspeed: Any = None) -> Any:
    return SimpleNamespace(bf16=bf16, fp16=fp16, deepspeed=deepspeed, device=torch.device("cpu"))


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
    file = copy / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"temperature": 0.7, "eos_token_id": 1}))
    plain, mended = AutoModelForCausalLM.from_pretrained(copy), load_model(make(copy), arguments())
    plain.generation_config.eos_token_id = mended.generation_config.eos_token_id = 2
    with pytest.raises(ValueError, match="temperature"):
        plain.save_pretrained(tmp_path / "plain")
    mended.save_pretrained(tmp_path / "mended")
    assert json.loads((tmp_path / "mended" / "generation_config.json").read_text())["temperature"] == 0.7


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
