"""What holds of the templates without running them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import INSTALL, ROOT, SLURM

TEMPLATES = sorted(SLURM.glob("*.sbatch"))
SCRIPTS = [*TEMPLATES, *sorted(SLURM.glob("*.sh"))]


@pytest.mark.parametrize("file", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_shellcheck_is_silent(file: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip(f"shellcheck is not installed: {INSTALL}")
    done = subprocess.run(
        ["shellcheck", "--external-sources", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_site_edits_ten_lines_at_most() -> None:
    """Those of train.sbatch and site.sh together."""
    edits = []
    for name in ("train.sbatch", "site.sh"):
        text = (SLURM / name).read_text(encoding="utf-8")
        part = re.split(r"^# ---- .*\n", text, flags=re.M)[1]
        edits += part.splitlines()
    assert 5 <= len(edits) <= 10, edits


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_every_template(file: Path) -> None:
    """Says how it is used, appends to its log, and shares its code with the others."""
    text = file.read_text(encoding="utf-8")
    assert f" slurm/{file.name} CONFIG.yaml [--key value ...]" in text
    assert "#SBATCH --open-mode=append\n" in text
    assert '. "$DS_SFT_HOME/slurm/job.sh"\n' in text


def in_job(
    folder: Path, script: str, programs: dict[str, str], env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a script with the functions of job.sh, and with programs in place of Slurm's."""
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "15007", "SLURM_JOB_NAME": "j", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2"}
    return subprocess.run(
        ["bash", "-c", f". {SLURM}/job.sh; {script}"], capture_output=True, text=True, check=False, cwd=folder,
        env={"PATH": f"{folder}:/usr/bin:/bin", "DS_SFT_HOME": str(ROOT), "SLURM_SUBMIT_DIR": str(folder),
             "SEEN": "0", "PYTHON": "py", **slurm, **env},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("env", "expected", "bound"),
    [
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32"}, "2 nodes x 4 ranks (4 GPUs a node), 8 cores", True),
        ({"SLURM_CPUS_ON_NODE": "9", "SEEN": "3"}, "2 nodes x 3 ranks (3 GPUs a node), 3 cores", True),  # by nvidia-smi
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "0", "SEEN": "3"}, "1 ranks (0 GPUs a node), 8", False),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "a100:2", "SEEN": "3"}, "(2 GPUs a node), 4", True),
        (
            {"SLURM_CPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2"},
            "2 nodes x 2 ranks (0 GPUs a node), 4 cores",
            False,
        ),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "4"}, "8 ranks on a node, but 4 cores: ask for more", False),
    ],
)
def test_ranks_and_cores_of_a_node(tmp_path: Path, env: dict[str, str], expected: str, bound: bool) -> None:
    """One rank for each GPU, the cores shared out; what srun is told, with programs in place of Slurm's."""
    programs = {
        "scontrol": "echo first; echo second",
        "srun": 'echo "srun $*"',
        "nvidia-smi": 'for i in $(seq "$SEEN"); do echo "GPU $i: of some kind"; done',
    }
    done = in_job(tmp_path, "set_ranks; say_job; on_ranks --x -- train.py --config c", programs, env)
    assert expected in done.stdout + done.stderr
    if done.returncode:
        assert expected.endswith("ask for more")
        return
    assert "rank 0 at first:15007\n" in done.stdout
    assert ("--gpu-bind=none" in done.stdout) == bound
    assert "--distribution=block" in done.stdout  # the labels that srun puts before lines are then ranks
    assert done.stdout.rstrip().endswith(f"--label --x {ROOT}/slurm/task.sh py train.py --config c")


@pytest.mark.parametrize(
    ("tasks", "node", "local", "expected"),
    [
        ("8", 0, 7, "7 7 8"),
        ("1(x2)", 1, 0, "1 0 1"),
        ("8(x12),4", 12, 3, "99 3 4"),
        ("2,1(x3),16", 4, 10, "15 10 16"),
    ],
)
def test_ranks_of_a_node_are_consecutive(tasks: str, node: int, local: int, expected: str) -> None:
    """Of nodes that have as many tasks as `tasks` says; not Slurm's number of the task, which srun's --distribution
    decides."""
    step = {"SLURM_PROCID": "0", "SLURM_NTASKS": "200", "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node),
            "SLURM_LOCALID": str(local)}  # fmt: skip
    said = "echo $RANK $LOCAL_RANK $LOCAL_WORLD_SIZE of $WORLD_SIZE on $NODE_RANK"
    command = [str(SLURM / "task.sh"), "sh", "-c", said]
    done = subprocess.run(command, env={**os.environ, **step}, capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected} of 200 on {node}\n"


@pytest.mark.parametrize(
    ("silent", "state", "said", "code"),
    [
        (0, "RUNNING", ["requeue 15007"], 0),
        (3, "RUNNING", ["requeue 15007"], 0),  # slurmctld is restarted
        (99, "", ["slurmctld does not answer: the job is taken to be running", "requeue 15007"], 0),
        (3, "COMPLETING", ["The job is COMPLETING: Slurm decides what happens to it"], 7),
    ],
)
def test_a_stopped_run_is_requeued_though_slurmctld_is_away(
    tmp_path: Path, silent: int, state: str, said: list[str], code: int
) -> None:
    scontrol = f"""
        if [ "$1" = requeue ]; then echo "$*"; exit; fi
        echo >>asked
        [ "$(wc -l <asked)" -gt {silent} ] || {{ echo "Unable to contact slurm controller" >&2; exit 1; }}
        echo "   JobState={state} Reason=None"
    """
    done = in_job(tmp_path, "still_ours 7 && go_on", {"scontrol": scontrol, "sleep": ""}, {})
    assert done.returncode == code
    assert [text for text in said if text not in done.stdout] == []
    assert ("requeue 15007" in done.stdout) == (code == 0)


@pytest.mark.parametrize(("answer", "requeued", "code"), [(0, True, 0), (3, False, 5), (4, False, 1), (1, False, 1)])
def test_what_the_answer_about_a_stopped_run_does(tmp_path: Path, answer: int, requeued: bool, code: int) -> None:
    """A Python that fails ends with 1, which is no answer: it is said, and nothing is requeued."""
    programs = {
        "scontrol": '[ "$1" != requeue ] || echo "$*"; echo "JobState=RUNNING"',
        "srun": 'case "$*" in *train.py*) exit 5 ;; esac',
        "py": f'[ "$3" = begin ] || exit {answer}',
    }
    env = {"SLURM_CPUS_ON_NODE": "2", "SLURM_GPUS_ON_NODE": "0", "DS_SFT_DOCTOR": "no"}
    done = in_job(tmp_path, "tail() { :; }; train c.yaml", programs, env)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("requeue 15007" in done.stdout) == requeued
    assert ("could not be found out" in done.stderr) == (answer == 1)
