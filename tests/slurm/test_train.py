"""`sbatch slurm/train.sbatch` on two nodes of a real Slurm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, step_losses, train
from tests.slurm.cluster import SLURM, Cluster, Job

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def settings(model_dir: Path, folder: Path, stage: int, **changes: Any) -> dict[str, Any]:
    """float32, six steps of four rows."""
    write_rows(folder / "train.jsonl", questions_and_answers(24))
    return {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "learning_rate": "1e-3",
        "bf16": False,
        "save_steps": 2,
        "logging_steps": 1,
        "num_predictions": 0,
        "deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"),
        **changes,
    }


def submit(cluster: Cluster, cwd: Path, keys: dict[str, Any], *flags: str, template: str = "train.sbatch") -> Job:
    (cwd / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return cluster.sbatch("--gpus-per-node=0", "--oversubscribe", *flags, str(SLURM / template), "run.yaml", cwd=cwd)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_nodes_to_the_end(
    cluster: Cluster, model_dir: Path, tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers as two ranks on one machine, each log in its place, and no key in any."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    job = submit(cluster, tmp_path, settings(model_dir, tmp_path, stage))
    assert job.wait() == "COMPLETED", job.logs()
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (run["launcher"], run["world_size"], run["zero_stage"], run["steps"]) == ("slurm", 2, stage, 6)
    assert sorted(path.name for path in tmp_path.glob(f"ds_sft-{job.id}/*.log")) == ["node1.log", "node2.log"]
    log = job.log()
    assert f"2 nodes x 1 ranks (0 GPUs a node), 1 cores a rank; rank 0 at node1:{15000 + int(job.id)}\n" in log
    assert "The run is complete" in log
    assert "HF_HUB_OFFLINE=1\n" in log
    assert "hf_secret" not in job.logs()

    alone = tmp_path / "alone"
    alone.mkdir()
    done = train("torchrun", 2, settings(model_dir, alone, stage), cwd=alone)
    assert done.code == 0, done.output[-4000:]
    assert step_losses(tmp_path / "out") == step_losses(alone / "out")
    weights = [folder / "out" / "model.safetensors" for folder in (tmp_path, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
