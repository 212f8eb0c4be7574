"""The final weights: in shards, in the dtype asked for, checked by a process that knows only the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.distributed.harness import asked, listing, run_forked, script, train, write_yaml
from tests.distributed.test_trajectory import settings, untied_dir

pytestmark = pytest.mark.distributed
__all__ = ["untied_dir"]  # a fixture


def check_record(out: Path, *, rows: int) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "run.json").read_text(encoding="utf-8"))["export"]
    assert record["verified"] is True
    assert record["rows"] == rows
    assert record["difference"] == pytest.approx(abs(record["loss_on_disk"] - record["loss_trained"]))
    return record


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
def test_a_fresh_process_finds_the_trained_loss(
    untied_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In shards, an untied model, float32; the trained loss is that of the last evaluation, to the last digit.

    The checkpoint is asked as the model is, exported on the way.
    """
    keys = settings(untied_dir, tmp_path, name, 2, 2, verify_export=True, export_max_shard_size="100KB", max_steps=2)
    keys |= {"save_strategy": "steps", "save_steps": 2}
    done = train("forked", 2, keys, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    out = tmp_path / "out"
    record = check_record(out, rows=3)
    assert record["difference"] < 1e-5
    assert (
        f"Export verified: out, loaded in a fresh process, has loss {record['loss_on_disk']:.6f} on 3 rows"
        in done.output
    )
    assert record["loss_trained"] == json.loads((out / "run.json").read_text(encoding="utf-8"))["eval_loss"]
    files = json.loads((out / "model.safetensors.index.json").read_text(encoding="utf-8"))["weight_map"]
    assert len(set(files.values())) > 2
    assert set(files) == set(AutoModelForCausalLM.from_pretrained(untied_dir).state_dict())  # lm_head is its own here
    assert all((out / file).is_file() for file in files.values())
    assert not (out / "model.safetensors").exists()
    before = listing(out)
    assert asked(out / "checkpoint-2", capsys) == asked(out, capsys) != ""
    assert listing(out) == before


def test_rounded_to_bfloat16_within_its_bound(model_dir: Path, tmp_path: Path) -> None:
    """Trained in float32, exported in bfloat16; without validation rows the first training rows are asked."""
    keys = settings(model_dir, tmp_path, "zero3", 2, 2, verify_export=True, export_dtype="bfloat16", max_steps=2)
    del keys["eval_file"]
    done = train("forked", 2, keys, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    record = check_record(tmp_path / "out", rows=8)
    assert 0 < record["difference"] < record["bound"] == pytest.approx(1e-2 * record["loss_trained"])
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("damage", ["swapped", "truncated"])
def test_wrong_weights_on_disk_end_the_run(model_dir: Path, tmp_path: Path, damage: str) -> None:
    keys = settings(model_dir, tmp_path, "zero2", 2, 2, verify_export=True, max_steps=1)
    file = write_yaml(tmp_path / "run.yaml", keys)
    done = run_forked([script("damaged"), "--config", str(file)], 2, cwd=tmp_path, env={"DAMAGE": damage})
    assert done.code == 1
    assert "Export NOT verified: out" in done.output
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["export"]["verified"] is False
    assert not (tmp_path / "out" / "predictions.jsonl").exists()
