"""A job that is stopped, preempted, requeued, or loses a node ends with the weights of one that was left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.harness import read_lines, train
from tests.slurm.cluster import Cluster, Job, wait_for
from tests.slurm.conftest import SLOW, settings, wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]
Submit = Callable[..., Job]
PATIENT = {"DS_SFT_MAX_STALLS": "20"}  # a slow machine may need its time for the start alone


def check_equal(output: Path, whole: Path, *files: str) -> None:
    """The weights of the uninterrupted run, bit for bit, and every step logged once."""
    for file in ("model.safetensors", *files):
        assert (output / file).read_bytes() == (whole / file).read_bytes()
    steps = [row["step"] for row in read_lines(output / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4, 5, 6]


def starts(job: Job) -> list[int]:
    """The step from which each start went on."""
    return [row["step"] for row in read_lines(next(job.cwd.glob(f"*-{job.id}/starts.jsonl")))]


def test_time_limit(submit: Submit, model_dir: Path, tmp_path: Path, whole: Path) -> None:
    # Slurm looks every half minute, and sends the signal up to a minute early.
    job = submit(
        tmp_path, settings(model_dir, tmp_path), "--time=3", "--signal=B:USR1@90",
        script=SLOW, env={"STEP_SECONDS": "15", **PATIENT},
    )  # fmt: skip
    assert job.wait(1500) == "COMPLETED", job.logs()
    assert job.restarts >= 1
    assert starts(job)[0] == 0 < starts(job)[-1]
    log = job.log()
    assert "Slurm sent USR1: asking the ranks to save and stop" in log
    assert "The run was stopped at step " in log
    assert f"Requeueing job {job.id}" in log
    assert log.count("start 1,") == log.count("start 2,") == 1  # appended over starts
    check_equal(tmp_path / "out", whole)


def test_requeue_with_node_local_scratch(submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path) -> None:
    """`scontrol requeue` of a run that trains an adapter; output and encoded data are on disks of the nodes' own."""
    adapter = settings(model_dir, tmp_path, adapter="lora", lora_rank=4, lora_dropout=0.1)
    done = train("forked", 2, adapter, cwd=tmp_path)
    assert done.code == 0, done.output[-4000:]
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    keys = {**adapter, "output_dir": f"{cluster.scratch}/out", "cache_dir": f"{cluster.scratch}/cache"}
    job = submit(tmp_path, keys, script=SLOW, env={"STEP_SECONDS": "5"})
    outputs = [cluster.scratch_of(name) / "out" for name in ("node1", "node2")]
    wait_for_step(job, 3, output_dir=str(outputs[0]))
    cluster.client("scontrol", "requeue", job.id)
    assert job.wait() == "COMPLETED", job.logs()
    assert job.restarts == 1
    assert "Slurm decides what happens to it" in job.log()
    assert starts(job)[1] >= 3
    assert not (tmp_path / "out").exists()
    for output in outputs:
        assert (output / "checkpoint-6" / "manifest.json").exists()
        assert (output / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert sorted(path.name for path in cluster.scratch_of("node2").glob("cache/*"))
    check_equal(outputs[0], whole, "adapter/adapter_model.safetensors")


def test_preemption(submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path) -> None:
    """A job of more importance takes the nodes: Slurm's TERM, a save, and on when they are free again.

    Of ranks that share rows: two on each node, in one group there, though tasks were to be dealt to the nodes in turn.
    """
    keys = settings(model_dir, tmp_path, sequence_parallel=2)
    done = train("forked", 4, keys, cwd=tmp_path)
    assert done.code == 0, done.output[-4000:]
    whole = (tmp_path / "out").rename(tmp_path / "whole")
    two_a_node = ("--ntasks-per-node=2", "--cpus-per-task=1", "--distribution=cyclic")
    job = submit(tmp_path, keys, *two_a_node, script=SLOW, env={"STEP_SECONDS": "5"})
    wait_for_step(job, 2)
    (tmp_path / "urgent").write_text("#!/bin/sh\nexec sleep 2\n", encoding="utf-8")
    urgent = cluster.sbatch("--partition=urgent", "--nodes=2", "--exclusive", str(tmp_path / "urgent"), cwd=tmp_path)
    assert job.wait() == "COMPLETED", job.logs()
    assert urgent.state == "COMPLETED"
    assert job.restarts == 1
    assert starts(job)[1] >= 2
    assert "2 nodes x 2 ranks (0 GPUs a node)" in job.log()
    assert "2 groups of 2 ranks = 4 rows a step" in job.log("node1")
    assert "nodes (ranks" not in job.log("node1")  # what is said of a group that spans nodes
    check_equal(tmp_path / "out", whole)


@pytest.mark.parametrize(("name", "instant"), [("node2", "step"), ("node1", "save")])
def test_a_node_dies(
    submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path, whole: Path, name: str, instant: str
) -> None:
    """node1 runs rank 0 and the batch script. The job starts again when the node is replaced."""
    env: dict[str, Any] = {"STEP_SECONDS": "2", "SAVE_SECONDS": "6"}  # time enough to be killed in it
    job = submit(tmp_path, settings(model_dir, tmp_path), script=SLOW, env=env)
    if instant == "step":
        wait_for_step(job, 3)
    else:
        wait_for(
            (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").exists, "the save of step 4", 400, every=0.05
        )
    cluster.kill_node(name)
    incomplete = tmp_path / "out" / "checkpoint-4" / "manifest.json"
    assert not incomplete.exists()
    wait_for(lambda: job.restarts == 1, f"the job is requeued\n{job.logs()}", 400)
    cluster.mend()
    assert job.wait() == "COMPLETED", job.logs()
    assert starts(job) == [0, 2]
    check_equal(tmp_path / "out", whole)


def test_no_progress(submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path) -> None:
    """Stopped before its first step, with a limit of one such start."""
    job = submit(tmp_path, settings(model_dir, tmp_path), env={"DS_SFT_MAX_STALLS": "1"})
    wait_for(lambda: "Logs of the nodes" in job.log(), "the job starts", 300, every=0.05)
    cluster.client("scancel", "--batch", "--signal=USR1", job.id)
    assert job.wait() == "FAILED", job.logs()
    assert job.restarts == 0
    assert json.loads((tmp_path / "out" / "PREEMPTED.json").read_text(encoding="utf-8"))["step"] == 0
    assert "No progress: the last start of this job came no further than step 0; it is not requeued." in job.log()
