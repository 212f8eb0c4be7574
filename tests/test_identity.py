"""Which changes a checkpoint can go on with: the table of docs/resume.md, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ds_sft.checkpoints.content import SAMPLES, content
from ds_sft.checkpoints.identity import CLASSES, changes, identity, unchangeable
from ds_sft.config.keys import Config
from ds_sft.config.upstream_keys import all_keys

TABLE = (Path(__file__).resolve().parents[1] / "docs" / "resume.md").read_text(encoding="utf-8")


def test_the_documented_table_is_the_codes() -> None:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in TABLE.splitlines() if line.startswith("| ")]
    classes = {row[0]: set(re.findall("`([^`]+)`", row[1])) for row in rows[1 : 1 + len(CLASSES)]}
    assert rows[0] == ["class", "keys", "what happens"]
    assert classes == CLASSES


def test_a_key_is_in_one_class() -> None:
    names = [name for keys in CLASSES.values() for name in keys]
    assert len(names) == len(set(names))
    assert {name for name in names if not name.startswith("deepspeed.")} <= all_keys().keys()


def now(stage: int | None = None, **config: Any) -> dict[str, Any]:
    return {"config": config, "zero_stage": stage}


@pytest.mark.parametrize(
    ("changed", "run", "refused"),
    [
        (["learning_rate", "weight_decay", "max_steps", "template", "data"], now(), []),
        (["optim", "learning_rate"], now(), ["optim"]),
        (["resize_embeddings"], now(), ["resize_embeddings"]),
        (["bf16"], now(), []),
        (["bf16"], now(2), ["bf16"]),
        (["fp16"], now(), ["fp16"]),
        (["learning_rate"], now(lr_scheduler_type="reduce_lr_on_plateau"), ["learning_rate"]),
        (["deepspeed.optimizer.params.lr", "deepspeed.scheduler.params.total_num_steps"], now(2), []),
        (["deepspeed.optimizer.params.torch_adam"], now(2), ["deepspeed.optimizer.params.torch_adam"]),
        (["deepspeed.scheduler.type", "deepspeed.gradient_clipping"], now(2), ["deepspeed.scheduler.type"]),
        (["deepspeed.zero_optimization.reduce_bucket_size"], now(3), []),
        (["deepspeed.zero_optimization.sub_group_size"], now(3), ["deepspeed.zero_optimization.sub_group_size"]),
        (["deepspeed.zero_optimization.offload_optimizer.device"], now(3),
         ["deepspeed.zero_optimization.offload_optimizer.device"]),
    ],
)  # fmt: skip
def test_what_no_checkpoint_goes_on_with(changed: list[str], run: dict[str, Any], refused: list[str]) -> None:
    assert list(unchangeable(dict.fromkeys(changed, (1, 2)), run)) == refused


def test_a_schedule_with_a_rate_of_its_own_is_neither_left_nor_entered() -> None:
    changed: dict[str, tuple[Any, Any]] = {"lr_scheduler_type": ("greedy", "linear"), "warmup_steps": (0, 2)}
    assert unchangeable(changed, now(lr_scheduler_type="linear")) == {
        "lr_scheduler_type": "the rate of reduce_lr_on_plateau and greedy is what the run came to"
    }


def test_where_a_layers_input_waits_is_no_difference() -> None:
    def known(**training: Any) -> dict[str, Any]:
        needed = {"model_name_or_path": "m", "train_file": "t"}
        return identity(Config(**needed, training={"output_dir": "o", **training}), None, "rows")

    offloaded = known(activation_checkpointing="offload")
    assert changes(known(activation_checkpointing=True), offloaded) == {}
    assert changes(known(activation_checkpointing=False), offloaded) == {"activation_checkpointing": (False, True)}


def test_a_folder_that_is_named_otherwise_is_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is started from another folder names its model and its template in full."""
    for name in ("model", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "chat.jinja").touch()
    monkeypatch.chdir(tmp_path)

    def known(model: Path | str, template: Path | str) -> dict[str, Any]:
        config = Config(model_name_or_path=str(model), train_file="t", template=str(template))
        return json.loads(json.dumps(identity(config, None, "rows")))  # as in a manifest

    then = known("model", "chat.jinja")
    assert changes(then, known(tmp_path / "model", tmp_path / "chat.jinja")) == {}
    assert changes(then, known("other", "tokenizer")) == {
        "model_name_or_path": ("model", "other"), "template": ("chat.jinja", "tokenizer"),
    }  # fmt: skip
    del then["places"]  # of an older checkpoint
    assert changes(then, known("model", "chat.jinja")) == {}
    assert changes(then, known("./model", "chat.jinja")) == {"model_name_or_path": ("model", "./model")}


def test_a_project_that_was_moved_is_the_same_run(tmp_path: Path) -> None:
    """Its model and its template are the same where they lie now; others under such a name are not."""
    weights = bytes(range(256)) * 40_000
    then, moved = tmp_path / "then", tmp_path / "moved"
    (then / "model").mkdir(parents=True)
    (then / "model" / "model.safetensors").write_bytes(weights)
    (then / "model" / "config.json").write_text('{"hidden_size": 8, "transformers_version": "5"}')
    (then / "chat.jinja").write_text("{{ messages }}")
    shutil.copytree(then, moved)

    def known(folder: Path) -> dict[str, Any]:
        config = Config(model_name_or_path=str(folder / "model"), train_file="t", template=str(folder / "chat.jinja"))
        return json.loads(json.dumps(identity(config, None, "rows")))

    before = known(then)
    (moved / "model" / "config.json").write_text('{"hidden_size": 8, "transformers_version": "6"}')
    assert changes(before, known(moved)) == {}
    (moved / "chat.jinja").write_text("{{ tools }}")
    assert list(changes(before, known(moved))) == ["template"]
    (moved / "chat.jinja").write_text("{{ messages }}")
    for file, other in (
        ("config.json", b'{"hidden_size": 9}'),
        ("model.safetensors", bytes(256) * 40_000),
        ("model.safetensors", b"!" + weights[1:]),
        ("model.safetensors", weights[:-1] + b"!"),
        ("model-2.safetensors", b""),
        ("code.py", b""),
    ):
        changed = shutil.copytree(moved, tmp_path / "changed")
        (changed / "model" / file).write_bytes(other)
        assert list(changes(before, known(changed))) == ["model_name_or_path"], file
        shutil.rmtree(changed)
    del before["contents"]  # of an older checkpoint
    assert list(changes(before, known(moved))) == ["model_name_or_path", "template"]


def test_a_model_of_which_one_small_tensor_was_trained_is_another(tmp_path: Path) -> None:
    """As a model that `train_only` has left: all around the tensor is as in the base."""
    tensors = {
        f"layers.{n}.{part}": torch.zeros(size) for n in range(90) for part, size in (("q", 60_000), ("norm", 8))
    }
    names = ("base", "trained", "same")
    for name in names:
        changed = {"layers.41.norm": torch.ones(8)} if name == "trained" else {}
        (tmp_path / name).mkdir()
        save_file(tensors | changed, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    base, trained, same = (content(tmp_path / name) for name in names)
    assert base == same != trained


def test_few_places_of_a_model_of_many_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    monkeypatch.setattr(
        "os.pread", lambda file, size, begin, pread=os.pread: read.append(size) or pread(file, size, begin)
    )
    (tmp_path / "config.json").write_text("{}")
    for number in range(128):
        save_file({f"expert.{n}": torch.zeros(2) for n in range(100)}, tmp_path / f"model-{number}.safetensors")
    assert content(tmp_path) is not None
    assert len(read) <= 128 * (SAMPLES // 128 + 2)  # and what says where tensors are


def test_one_rank_alone_reads_what_keys_name(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    config = Config(model_name_or_path="m", train_file="t", template=str(tmp_path / "chat.jinja"))
    found = [identity(config, None, "rows", reads=reads)["contents"].keys() for reads in (True, False)]
    assert found == [{"template"}, set()]
