"""One cluster for all tests of this folder, and what they submit to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, read_lines, train
from tests.slurm.cluster import SLURM, Cluster, Job, missing, start_cluster, wait_for

FAULTY, SLOW = ROOT / "tests" / "distributed" / "faulty.py", Path(__file__).with_name("slow.py")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = missing()
    if reason:
        pytest.skip(reason)
    with start_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def jobs(cluster: Cluster) -> Iterator[list[Job]]:
    """Jobs of this test, cancelled at its end; a node that was killed in it is replaced."""
    submitted: list[Job] = []
    yield submitted
    for job in submitted:
        cluster.client("scancel", job.id, check=False)
    cluster.mend()
    wait_for(cluster.idle, "the nodes are idle again", 300)


def settings(model_dir: Path, folder: Path, stage: int = 2, rows: int = 24, **changes: Any) -> dict[str, Any]:
    """float32, steps of four rows, a checkpoint every second."""
    write_rows(folder / "train.jsonl", questions_and_answers(rows))
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
        "verify_export": False,  # a process more in each job
        "deepspeed": str(ROOT / "ds_configs" / f"zero{stage}.json"),
        **changes,
    }


@pytest.fixture(scope="session")
def whole(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of these settings on one machine, without Slurm and without a stop."""
    cwd = tmp_path_factory.mktemp("whole")
    done = train("torchrun", 2, settings(model_dir, cwd), cwd=cwd)
    assert done.code == 0, done.output[-4000:]
    return cwd / "out"


def python_that_starts(script: Path, folder: Path) -> str:
    """A `python` that starts `script` where it is told to start train.py."""
    shim = folder / f"python-{script.stem}"
    shim.write_text(
        f'#!/bin/sh\ncase $1 in\n*/train.py) shift; exec {sys.executable} {script} "$@" ;;\nesac\n'
        f'exec {sys.executable} "$@"\n',
        encoding="utf-8",
    )
    shim.chmod(0o755)
    return str(shim)


@pytest.fixture
def submit(cluster: Cluster, jobs: list[Job]) -> Callable[..., Job]:
    def submit_to_cluster(
        cwd: Path,
        keys: dict[str, Any],
        *flags: str,
        template: str = "train.sbatch",
        script: Path | None = None,
        env: Mapping[str, str] | None = None,
        more: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
    ) -> Job:
        """Write `keys` as a config and submit it; the doctor was tested by others."""
        file = cwd / f"run-{len(jobs)}.yaml"
        file.write_text(yaml.safe_dump({k: v for k, v in keys.items() if k not in without}), encoding="utf-8")
        environment = {"DS_SFT_DOCTOR": "no", **(env or {})}
        if script is not None:
            environment["PYTHON"] = python_that_starts(script, cwd)
        words = ["--gpus-per-node=0", "--oversubscribe", *flags, str(SLURM / template), file.name, *more]
        jobs.append(cluster.sbatch(*words, cwd=cwd, env=environment))
        return jobs[-1]

    return submit_to_cluster


def steps_done(output_dir: Path) -> int:
    """The last step that was logged."""
    if not (output_dir / "metrics.jsonl").exists():
        return 0
    return max((row["step"] for row in read_lines(output_dir / "metrics.jsonl")), default=0)


def wait_for_step(job: Job, step: int, seconds: float = 400, output_dir: str = "out") -> None:
    try:
        wait_for(lambda: steps_done(job.cwd / output_dir) >= step, f"step {step}", seconds, every=0.05)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{job.logs()}") from None
