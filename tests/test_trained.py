"""What a checkpoint has of a model with frozen weights, and the base that it goes on beside."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_sft.checkpoints.base import begin_to_hash_base, hash_base
from ds_sft.checkpoints.identity import base_differs, changes, changes_in_words, identity
from ds_sft.checkpoints.other_run import refuse_another_run
from ds_sft.checkpoints.trained import expect_trained_only, load_trained, save_trained, trained_weights
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.model.adapters import choose_weights
from ds_sft.ranks.launch import Launch
from ds_sft.training.resumable import ResumableTrainer, StepBoundary

ALONE = Launch(launcher="python")
CHOICES = {
    "lora": ["--adapter", "lora"],
    "dora": ["--adapter", "dora", "--lora_targets", "[q_proj, down_proj]"],
    "tied head": ["--adapter", "lora", "--lora_modules_to_save", "[lm_head, embed_tokens]"],
    "layers": ["--train_only", "[layers.1.]"],
}


def config(model_dir: Path, *flags: str) -> Config:
    return load_config(
        ["--model_name_or_path", str(model_dir), "--train_file", "r.jsonl", "--output_dir", "out", *flags]
    )


def chosen(model_dir: Path, *flags: str) -> Any:
    """The model with its weights chosen, as for training without DeepSpeed."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    args: Any = SimpleNamespace(bf16=False, fp16=False, deepspeed=None, seed=0, activation_checkpointing_kwargs=None)
    choose_weights(model, config(model_dir, *flags), args, ALONE)
    return model


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_trained_comes_back_bit_for_bit(model_dir: Path, tmp_path: Path, choice: str) -> None:
    model, other = (chosen(model_dir, *CHOICES[choice]) for _ in range(2))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    save_trained(model, trained_weights(model, keep=True), tmp_path)
    files = ["trained.safetensors"] if choice == "layers" else ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    load_trained(other, tmp_path)
    wanted = trained(model)
    assert trained(other).keys() == wanted.keys()
    assert [name for name, value in trained(other).items() if not torch.equal(value, wanted[name])] == []


@pytest.mark.parametrize("choice", ["lora", "layers"])
def test_a_part_that_is_missing_is_never_passed_over(model_dir: Path, tmp_path: Path, choice: str) -> None:
    model = chosen(model_dir, *CHOICES[choice])
    save_trained(model, trained_weights(model, keep=True), tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    values = load_file(file)
    left_out = sorted(values)[0]
    save_file({name: value for name, value in values.items() if name != left_out}, file)
    with pytest.raises(KeyError, match=f"{file.name} lacks {left_out}"):
        load_trained(model, tmp_path)


@pytest.mark.parametrize("choice", ["lora", "tied head", "layers"])
def test_a_share_is_never_written_as_the_whole(model_dir: Path, tmp_path: Path, choice: str) -> None:
    """Under ZeRO-3 a parameter that was not gathered looks empty: peft writes that with a warning."""
    model = chosen(model_dir, *CHOICES[choice])
    weights = trained_weights(model, keep=True)
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    for name in weights:
        with pytest.raises(AssertionError, match=r": \(0,\) of \(.*\): the parameter was not gathered"):
            save_trained(model, {**weights, name: torch.empty(0)}, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_state_may_lack_frozen_weights_and_no_others(model_dir: Path) -> None:
    """DeepSpeed loads it strictly."""
    model = chosen(model_dir, *CHOICES["layers"])
    expect_trained_only(model)
    model.load_state_dict(trained(model), strict=True)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "model.layers.1.mlp.up_proj.weight"'):
        model.load_state_dict({n: v for n, v in trained(model).items() if "up_proj" not in n}, strict=True)


def test_a_weight_that_is_unfrozen_in_mid_run_ends_it(model_dir: Path) -> None:
    """No optimizer has it: it would stay as it was, and nothing would say so."""
    model = chosen(model_dir, *CHOICES["lora"])
    trainer: Any = ResumableTrainer.__new__(ResumableTrainer)
    trainer.frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    boundary: Any = StepBoundary(trainer)
    boundary.on_step_begin(None, None, None)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match=r"unfrozen after the optimizer was made, .*: model\.norm\.weight$"):
        boundary.on_step_begin(None, None, None)


# ---- The base


def test_a_base_is_known_by_its_weights_wherever_it_lies(model_dir: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    assert hash_base(str(copied)) == hash_base(str(model_dir))
    (copied / "tokenizer_config.json").write_text("{}", encoding="utf-8")  # shows in the rows
    assert hash_base(str(copied)) == hash_base(str(model_dir))
    change_a_weight(copied)
    assert hash_base(str(copied)) != hash_base(str(model_dir))


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"rope_theta": 5e5}, False),
        ({"text_config": {"rms_norm_eps": 1e-3, "use_cache": False}}, False),
        ({"transformers_version": "9.9", "torch_dtype": "float16", "eos_token_id": [1, 2], "rope_scaling": None}, True),
    ],
)
def test_a_base_is_known_by_what_its_config_computes(
    model_dir: Path, tmp_path: Path, changed: dict[str, Any], same: bool
) -> None:
    """The same weights with another base of rotations are another model, under which an adapter is of no use."""
    copied = shutil.copytree(model_dir, tmp_path / "copied")
    config_file = copied / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text(encoding="utf-8")) | changed), encoding="utf-8")
    then, now = hash_base(str(model_dir)), hash_base(str(copied))
    assert base_differs(then, now) == (None if same else "config.json")
    assert base_differs(then.partition("-")[0], now) is None  # a checkpoint from before config.json counted


def change_a_weight(folder: Path) -> None:
    values = load_file(folder / "model.safetensors")
    values["model.norm.weight"][0] += 1
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("flags", "launch", "hashed"),
    [(["--adapter", "lora"], ALONE, True), (["--train_only", "[norm]"], ALONE, True), ([], ALONE, False),
     (["--adapter", "lora"], Launch(launcher="torchrun", rank=1, world_size=2), False)],
)  # fmt: skip
def test_the_first_rank_alone_hashes_the_base_of_frozen_weights(
    model_dir: Path, flags: list[str], launch: Launch, hashed: bool
) -> None:
    found = begin_to_hash_base(config(model_dir, *flags), launch).result(timeout=300)
    assert found == (hash_base(str(model_dir)) if hashed else "")


def test_a_base_that_is_not_there_is_for_the_loading_to_say(tmp_path: Path) -> None:
    assert begin_to_hash_base(config(tmp_path, "--adapter", "lora"), ALONE).result(timeout=300) == ""


def test_a_resumed_run_wants_the_same_base(model_dir: Path, tmp_path: Path) -> None:
    given = config(model_dir, "--adapter", "lora")
    then = identity(given, None, "rows", base="abc")
    moved = identity(config(tmp_path, "--adapter", "lora"), None, "rows", base="abc")
    other = identity(given, None, "rows", base="def")
    assert then["base"] == "abc"
    assert "base" not in identity(config(model_dir), None, "rows")
    assert changes(then, moved) == {}
    found = changes(then, other)
    assert found == {"base": (str(model_dir), str(model_dir))}
    with pytest.raises(UserError) as raised:
        refuse_another_run(Path("out/checkpoint-4"), found, other, given)
    assert str(raised.value) == (
        f"out/checkpoint-4 cannot go on with the weights or the config.json in {model_dir}, which have changed: "
        "a checkpoint has no frozen weights, and what this one has was trained beside others. Write it as before, or "
        "take another output_dir, or --resume never to start anew"
    )
    elsewhere = identity(config(tmp_path, "--adapter", "lora"), None, "rows", base="def")
    said = changes_in_words(changes(then, elsewhere))
    assert said == f"the weights or the config.json in {tmp_path} (it began with {model_dir})"


@pytest.mark.parametrize("choice", ["lora", "layers"])
def test_a_state_has_no_frozen_weight_under_any_of_its_names(model_dir: Path, choice: str) -> None:
    """DeepSpeed saves the module's state without frozen weights by the first name of each: a tied head has two."""
    model = chosen(model_dir, *CHOICES[choice])
    assert "lm_head.weight" in model.state_dict()
    expect_trained_only(model)
    assert list(model.state_dict()) == list(trained(model))


def test_the_base_of_a_hub_model_in_another_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what transformers would load is fetched: safetensors, and where there are none PyTorch's own files."""
    fetched: list[list[str]] = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        fetched.append(allow_patterns)
        if allow_patterns[0].startswith("pytorch"):
            (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
            (tmp_path / "config.json").write_text("{}", encoding="utf-8")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    found = hash_base("someone/model")
    assert fetched == [["model*.safetensors", "*.json"], ["pytorch_model*.bin", "*.json"]]
    assert found == hash_base(str(tmp_path))
    assert found != ""
