"""A run with `rope_scaling` trains the model that a config.json with it would load, and leaves that model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ds_sft.cli import main
from ds_sft.config.read import load_config
from ds_sft.data.dataset import load_data
from ds_sft.export.verify import loss_on_disk
from ds_sft.model.adapter_files import load_on_disk
from ds_sft.model.tokenizer import load_tokenizer
from ds_sft.ranks.launch import Launch
from tests.conftest import write_rows
from tests.distributed.harness import TRAIN, run_forked, step_losses, train

pytestmark = pytest.mark.distributed

ROWS = [{"question": f"q{i}", "answer": "The capital of France is Paris. " * (90 + i)} for i in range(4)]
YARN = {"rope_type": "yarn", "factor": 4.0}
WRITTEN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 10000.0}
KEYS = {"train_file": "rows.jsonl", "output_dir": "out", "system_prompt": "S", "max_steps": 1, "save_steps": 1,
        "logging_steps": 1, "bf16": False, "num_predictions": 0, "rope_scaling": YARN}  # fmt: skip


def published(model_dir: Path, folder: Path, **changes: Any) -> Path:
    """The same model, computed in float32, with these changes in its config.json."""
    shutil.copytree(model_dir, folder)
    file = folder / "config.json"
    keys = json.loads(file.read_text()) | {"dtype": "float32"} | changes
    file.write_text(json.dumps({name: value for name, value in keys.items() if value is not None}))
    return folder


def loss_of(folder: Path, rows: Any) -> float:
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    return float(loss_on_disk(str(folder), rows, use_cpu=True, trust_remote_code=False)["loss"])


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_it_trains_and_leaves_the_scaled_model(model_dir: Path, tmp_path: Path, adapter: str) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    keys = (
        KEYS
        | {"model_name_or_path": str(model_dir)}
        | ({"adapter": "lora", "merge": "yes"} if adapter != "none" else {})
    )
    done = train("forked", None, keys, cwd=tmp_path)
    assert done.code == 0, done.output
    assert "more than the" not in done.output
    config = load_config(["--config", str(tmp_path / "run.yaml"), "--train_file", str(tmp_path / "rows.jsonl")])
    launch = Launch(launcher="python")
    rows = load_data(config, load_tokenizer(config, launch), launch).train
    assert min(map(len, rows["input_ids"])) > 512
    first = step_losses(tmp_path / "out")[0]
    by_hand = published(
        model_dir, tmp_path / "by_hand", rope_parameters=None, rope_scaling=WRITTEN, max_position_embeddings=2048
    )
    assert first == pytest.approx(loss_of(by_hand, rows), abs=2e-6)
    assert abs(first - loss_of(published(model_dir, tmp_path / "plain"), rows)) > 1e-4
    assert json.loads((tmp_path / "out/run.json").read_text())["export"]["verified"] is True
    assert main(["export", str(tmp_path / "out/checkpoint-1"), str(tmp_path / "exported")]) == 0
    for folder in (tmp_path / "out", tmp_path / "exported"):
        written = json.loads((folder / "config.json").read_text())
        assert (written["rope_parameters"], written["max_position_embeddings"]) == (WRITTEN, 2048)
        assert "rope_scaling" not in written
        if adapter != "none":
            asked = load_on_disk(folder / "adapter", dtype="auto", trust_remote_code=False).config
            assert (asked.rope_parameters, asked.max_position_embeddings) == (WRITTEN, 2048)
    if adapter != "none":
        overrides = {"rope_parameters": WRITTEN, "max_position_embeddings": 2048}
        said = done.output.partition("vllm serve --hf-overrides '")[2].partition("'")[0]
        assert json.loads(said) == overrides
        return
    changed = run_forked(
        [TRAIN, "--config", "run.yaml", "--rope_scaling", "{rope_type: yarn, factor: 8.0}"],
        None,
        cwd=tmp_path,
    )
    assert changed.code == 2
    assert "is of another run, which differs in: rope_scaling: {" in changed.output
