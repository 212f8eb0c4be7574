"""Which DeepSpeed configuration a run uses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ds_sft.config import Config
from ds_sft.errors import UserError
from ds_sft.runtime.distributed import Launch
from ds_sft.runtime.zero import engine_config, stage

ALONE = Launch(launcher="python")
LAUNCHED = Launch(launcher="torchrun", world_size=2)


def make(engine: Any) -> Config:
    return Config(model_name_or_path="m", train_file="t", training={"output_dir": "o", "deepspeed": engine})


def test_a_file_a_mapping_and_nothing(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 3}}', encoding="utf-8")
    assert engine_config(make(str(file)), LAUNCHED) == {"zero_optimization": {"stage": 3}}
    assert engine_config(make({"zero_optimization": {"stage": 1}}), LAUNCHED) == {"zero_optimization": {"stage": 1}}
    assert engine_config(make(None), LAUNCHED) is None


def test_without_a_launcher_it_is_ignored_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_config(make({"zero_optimization": {"stage": 2}}), ALONE) is None
    assert capsys.readouterr().out.startswith("No launcher: plain Trainer in one process, the deepspeed key is ignored")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "deepspeed: {path}: no such file; ds_configs/ has zero2.json and others"),
        (b'{"a": 1,\n "b" 2}', "{path}:2: not JSON: Expecting ':' delimiter"),
        (b'["stage", 2]', "{path}: expected a JSON object of DeepSpeed options"),
        (b'{"a": "\xff"}', "{path}: not UTF-8; save the file as UTF-8"),
    ],
)
@pytest.mark.parametrize("launch", [ALONE, LAUNCHED], ids=["alone", "launched"])
def test_unusable_files(tmp_path: Path, content: bytes | None, said: str, launch: Launch) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        engine_config(make(str(path)), launch)
    assert str(caught.value) == said.format(path=path)


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        engine_config(make(str(tmp_path)), LAUNCHED)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [(None, None), ({}, 0), ({"zero_optimization": {}}, 0), ({"zero_optimization": {"stage": 3}}, 3)],
)
def test_stage(engine: Any, expected: int | None) -> None:
    assert stage(engine) == expected
