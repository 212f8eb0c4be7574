"""A run that pushes: once, at its end, what was verified."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import TRAIN, Done, run, script, train, write_yaml
from tests.hub import TOKEN, Hub, serve_hub

pytestmark = pytest.mark.distributed


def push_from(model_dir: Path, folder: Path, program: str, hub: Hub, **env: str) -> Done:
    rows = write_rows(folder / "rows.jsonl", questions_and_answers(8))
    keys: dict[str, Any] = {
        "model_name_or_path": str(model_dir), "train_file": str(rows), "output_dir": "out", "max_steps": 2,
        "save_steps": 1, "num_predictions": 0, "bf16": False, "push_to_hub": True, "hub_model_id": "me/model",
    }  # fmt: skip
    write_yaml(folder / "run.yaml", keys)
    told = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return run([sys.executable, program, "--config", "run.yaml"], cwd=folder, env=told | env)


def test_a_run_pushes_its_final_model_once(model_dir: Path, tmp_path: Path) -> None:
    """And no checkpoint, though two are saved; where to is in run.json."""
    with serve_hub() as hub:
        done = push_from(model_dir, tmp_path, TRAIN, hub)
    assert done.code == 0, done.output[-6000:]
    out, repo = tmp_path / "out", hub.repos["me/model"]
    assert len(repo.messages) == 1
    assert sorted(repo.files) == [
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert repo.private is True
    for name, content in repo.files.items():
        assert name == "README.md" or content == (out / name).read_bytes(), name
        assert str(tmp_path).encode() not in content, name
    pushed = json.loads((out / "run.json").read_text(encoding="utf-8"))["pushed"]
    assert pushed["commit"].startswith(f"{hub.url}/me/model/commit/")
    assert done.output.count(f"Pushed: {pushed['commit']}\n") == 1
    assert "The files were loaded in a fresh process" in repo.files["README.md"].decode()


def test_a_push_that_could_not_succeed_is_said_once_and_ends_every_rank(model_dir: Path, tmp_path: Path) -> None:
    """Before training; there is no network in tests."""
    rows = write_rows(tmp_path / "rows.jsonl", questions_and_answers(8))
    keys = {"model_name_or_path": str(model_dir), "train_file": str(rows), "output_dir": "out", "push_to_hub": True,
            "hub_model_id": "me/model", "hub_token": TOKEN}  # fmt: skip
    done = train("forked", 2, keys, cwd=tmp_path)
    assert done.codes == (2, 2)
    assert done.output.count("me/model: nothing was pushed: HF_HUB_OFFLINE is set") == 1
    assert "Traceback" not in done.output
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_run_whose_weights_on_disk_are_wrong_pushes_nothing(model_dir: Path, tmp_path: Path) -> None:
    with serve_hub() as hub:
        done = push_from(model_dir, tmp_path, script("damaged"), hub, DAMAGE="swapped")
    assert done.code == 1
    assert "Export NOT verified: out" in done.output
    assert (hub.repos, hub.objects) == ({}, {})
    assert not [line for line in hub.asked if line.startswith(("POST", "PUT"))]
