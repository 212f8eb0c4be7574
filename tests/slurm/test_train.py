"""`sbatch slurm/train.sbatch` and its siblings on two nodes of a real Slurm, to the end or to an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_sft.cli import main
from tests.distributed.harness import step_losses, train
from tests.installed import Installed
from tests.slurm.cluster import SLURM, Cluster, Job, path_with_sbin, wait_for
from tests.slurm.conftest import FAULTY, SLOW, settings, wait_for_step

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]
Submit = Callable[..., Job]


@pytest.mark.parametrize("stage", [2, 3])
def test_two_nodes_to_the_end(
    submit: Submit,
    model_dir: Path,
    tmp_path: Path,
    stage: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `launch` foretold, the numbers of two ranks on one machine, each log in its place, and no key in any."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    job = submit(tmp_path, settings(model_dir, tmp_path, stage), env={"DS_SFT_DOCTOR": "yes"})
    assert job.wait() == "COMPLETED", job.logs()
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (run["launcher"], run["world_size"], run["zero_stage"], run["steps"]) == ("slurm", 2, stage, 6)
    assert sorted(path.name for path in tmp_path.glob(f"ds_sft-{job.id}/*.log")) == ["node1.log", "node2.log"]
    log = job.log()
    assert f"2 nodes x 1 ranks (0 GPUs a node), 1 cores a rank; rank 0 at node1:{15000 + int(job.id)}\n" in log
    assert "0: pass  output       shared by the nodes\n" in log
    assert "0: pass  names        node1 10.77.0.11, node2 10.77.0.12\n" in log
    assert "The run is complete" in log
    assert "HF_HUB_OFFLINE=1\n" in log
    assert "hf_secret" not in job.logs()

    monkeypatch.chdir(tmp_path)
    assert main(["launch", "--dry-run", "--json", "run-0.yaml", "--nodes", "2", "--gpus-per-node", "0"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == 6
    checkpoints = [tmp_path / "out" / f"checkpoint-{step}" for step in plan["checkpoints"]]
    assert sorted((tmp_path / "out").glob("checkpoint-*")) == checkpoints
    size = sum(file.stat().st_size for file in checkpoints[0].rglob("*") if file.is_file())
    assert plan["checkpoint_bytes"] == pytest.approx(size, rel=0.15)  # of a model smaller than its tokenizer

    alone = tmp_path / "alone"
    alone.mkdir()
    done = train("torchrun", 2, settings(model_dir, alone, stage), cwd=alone)
    assert done.code == 0, done.output[-4000:]
    assert step_losses(tmp_path / "out") == step_losses(alone / "out")
    weights = [folder / "out" / "model.safetensors" for folder in (tmp_path, alone)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_failing_rank_ends_the_job(submit: Submit, model_dir: Path, tmp_path: Path) -> None:
    """At once, with its error at the end of the job's log, and without starting again."""
    job = submit(tmp_path, settings(model_dir, tmp_path), script=FAULTY, env={"FAULT": "train raise 1"})
    wait_for(lambda: "here is the fault" in job.log("node2"), "the fault", 400)
    assert job.wait() == "FAILED", job.logs()  # long before `ddp_timeout` would end those that lost a rank
    assert "ValueError: a fault in train" in job.log()
    assert job.log().splitlines()[-1].endswith(f"the first error is in {tmp_path}/ds_sft-{job.id}/")
    assert job.restarts == 0


def test_a_mistake_in_the_config(submit: Submit, model_dir: Path, tmp_path: Path) -> None:
    """Exit code 2, one line, no second start; what only the ranks see ends the same."""
    keys = settings(model_dir, tmp_path)
    typo = submit(tmp_path, keys, more=("--learning_rat", "1"))
    (tmp_path / "2").mkdir()
    absent = submit(tmp_path / "2", {**keys, "train_file": "absent.jsonl"})
    assert typo.wait() == "FAILED"
    assert (typo.facts()["ExitCode"], typo.restarts) == ("2:0", 0)
    assert typo.log().endswith("\nds_sft: error: --learning_rat: unknown key: did you mean --learning_rate?\n")
    assert absent.wait() == "FAILED"
    assert absent.restarts == 0
    assert absent.log().count("ds_sft: error: absent.jsonl: no such file") == 1


def test_scancel_is_the_end(submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, settings(model_dir, tmp_path, rows=400), script=SLOW, env={"STEP_SECONDS": "0.2"})
    wait_for_step(job, 2)
    cluster.client("scancel", job.id)
    assert job.wait() == "CANCELLED"
    wait_for(cluster.idle, "nothing is left running", 300)
    assert job.state == "CANCELLED"
    assert job.restarts == 0


def test_a_node_that_cannot_reach_the_address(
    submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path
) -> None:
    """The doctor says which node and what to look at, and the job ends before a model is loaded."""
    rule = ["to", "10.77.0.11", "ipproto", "tcp", "dport", "15000-29999", "prohibit"]
    cluster.nodes["node2"].run("ip", "rule", "add", *rule)
    try:
        env = {"DS_SFT_DOCTOR": "yes", "DS_SFT_CONNECT_SECONDS": "15"}  # node2 may start so much later
        job = submit(tmp_path, settings(model_dir, tmp_path), env=env)
        assert job.wait() == "FAILED", job.logs()
    finally:
        cluster.nodes["node2"].run("ip", "rule", "delete", *rule)
    address = f"node1:{15000 + int(job.id)}"
    assert f"fail  network  rank 1 on node2 cannot reach {address}" in job.log()
    assert "-> a firewall between the nodes, another program on that port, or the wrong network card" in job.log()
    assert "The doctor found what would stop this run" in job.log()
    assert not list((tmp_path / f"ds_sft-{job.id}").glob("*.log"))
    assert job.restarts == 0


def test_ranks_of_a_group_are_on_one_node(cluster: Cluster, model_dir: Path, tmp_path: Path) -> None:
    """Though srun deals tasks to the nodes in turn; what the doctor measures between them."""
    keys = settings(model_dir, tmp_path, sequence_parallel=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    words = ["srun", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--distribution=cyclic", "--mpi=none"]
    words += [str(SLURM / "task.sh"), sys.executable, "-m", "ds_sft", "doctor", "--json", "run.yaml"]
    env = {"MASTER_ADDR": "node1", "MASTER_PORT": "14999"}
    done = cluster.client(*words, cwd=tmp_path, env=env)
    (exchange,) = [check for check in json.loads(done.stdout) if check["name"] == "exchange"]
    assert exchange["status"] == "pass"
    assert exchange["value"].startswith("groups of 2 ranks, each in one node: ")


def test_several_jobs_at_once(submit: Submit, cluster: Cluster, model_dir: Path, tmp_path: Path, whole: Path) -> None:
    """A sweep of two and a job on two nodes, at the same time on the same nodes and from the same files."""
    keys = settings(model_dir, tmp_path)
    both = submit(tmp_path, keys)
    array = submit(
        tmp_path,
        keys,
        "--array=0-1,5",
        template="sweep.sbatch",
        env={"LEARNING_RATES": "1e-3 1e-4"},
        without=("output_dir",),
    )
    rates = {rate: Job(cluster, f"{array.id}_{number}", tmp_path) for number, rate in enumerate(("1e-3", "1e-4"))}
    for job in (both, *rates.values()):
        assert job.wait() == "COMPLETED", job.logs()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    for rate, job in rates.items():
        assert f"ds_sft-sweep-{job.id}/; Python" in job.log()
        config = yaml.safe_load((tmp_path / "output" / "sweep" / f"lr-{rate}" / "config.yaml").read_text())
        assert (config["learning_rate"], config["run_name"]) == (float(rate), f"lr-{rate}")
        assert len(step_losses(tmp_path / "output" / "sweep" / f"lr-{rate}")) == 12  # one rank: twice the steps
    absent = Job(cluster, f"{array.id}_5", tmp_path)
    assert absent.wait() == "FAILED"
    assert "there are 2 learning rates, and this is number 5: see --array" in absent.log()


def test_one_node(submit: Submit, model_dir: Path, tmp_path: Path, whole: Path) -> None:
    """Two ranks on it give what two ranks on two nodes give."""
    job = submit(tmp_path, settings(model_dir, tmp_path), "--ntasks-per-node=2", "--cpus-per-task=1",
                 template="one_node.sbatch")  # fmt: skip
    assert job.wait() == "COMPLETED", job.logs()
    assert "1 nodes x 2 ranks (0 GPUs a node), 1 cores a rank" in job.log()
    assert len(list(tmp_path.glob(f"ds_sft-{job.id}/*.log"))) == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_without_a_clone(submit: Submit, installed: Installed, model_dir: Path, tmp_path: Path, whole: Path) -> None:
    """Templates that `ds-sft init` wrote, the package of an environment that is active, its configuration by name."""
    assert installed.ds_sft("init", "--slurm", cwd=tmp_path).returncode == 0
    keys = settings(model_dir, tmp_path, deepspeed="zero2")
    path = f"{installed.bin}:{path_with_sbin()}"
    outside = {"PYTHON": "", "PYTHONPATH": "", "PATH": path}
    job = submit(tmp_path, keys, template=str(tmp_path / "slurm" / "train.sbatch"), env=outside)
    assert job.wait() == "COMPLETED", job.logs()
    (site,) = installed.folder.glob("lib/python*/site-packages")
    assert f"Python: {installed.bin}/python3; code: {site}/ds_sft\n" in job.log()
    run = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert (run["launcher"], run["world_size"], run["zero_stage"], run["git_commit"]) == ("slurm", 2, 2, None)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_without_the_package(submit: Submit, installed: Installed, model_dir: Path, tmp_path: Path) -> None:
    assert installed.ds_sft("init", "--slurm", cwd=tmp_path).returncode == 0
    outside = {"PYTHON": "/usr/bin/python3", "PYTHONPATH": ""}
    template = str(tmp_path / "slurm" / "train.sbatch")
    job = submit(tmp_path, settings(model_dir, tmp_path), template=template, env=outside)
    assert job.wait() == "FAILED"
    assert job.log().endswith(
        "/usr/bin/python3 has no ds_sft: name its environment in slurm/site.sh, or activate it before sbatch\n"
    )
    assert job.restarts == 0


def test_the_debug_job(submit: Submit, model_dir: Path, tmp_path: Path) -> None:
    """Five steps on 2 x 1 ranks into a folder of its own; a key that is given wins."""
    job = submit(tmp_path, settings(model_dir, tmp_path), template="debug.sbatch", more=("--max_steps", "4"))
    assert job.wait() == "COMPLETED", job.logs()
    output = tmp_path / f"ds_sft-debug-{job.id}" / "output"
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert len(step_losses(output)) == 4
    assert not (tmp_path / "out").exists()
    assert "NCCL_DEBUG=INFO" in job.log()


def test_prepare_and_then_train(submit: Submit, model_dir: Path, tmp_path: Path) -> None:
    """The training waits for the data, finds it encoded, and does not start where that failed."""
    keys = settings(model_dir, tmp_path, cache_dir="cache")

    def pair(keys: dict[str, Any]) -> tuple[Job, Job]:
        prepared = submit(tmp_path, keys, "--cpus-per-task=2", template="prepare.sbatch")
        after = (f"--dependency=afterok:{prepared.id}", "--kill-on-invalid-dep=yes")
        return prepared, submit(tmp_path, keys, *after)

    prepared, training = pair(keys)
    failed, never = pair({**keys, "train_file": "absent.jsonl"})
    assert training.wait() == "COMPLETED", prepared.logs() + training.logs()
    assert prepared.state == "COMPLETED"
    assert prepared.facts()["EndTime"] <= training.facts()["StartTime"]
    assert "train.jsonl: reading and encoding into cache/" in prepared.log()
    assert "train.jsonl: already encoded in cache/" in training.log("node1")
    assert failed.wait() == "FAILED"
    assert "absent.jsonl: no such file" in failed.log()
    assert never.wait() == "CANCELLED"
    assert never.log() == ""
