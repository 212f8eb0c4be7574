"""Without a clone: what the archives hold, and that an environment with the wheel does what a clone does."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest

from ds_sft import __version__
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import BIN, free_port, run
from tests.installed import Installed, build
from tests.test_house import PACKAGE
from tests.test_init import TEMPLATES

BESIDE_CODE = [
    *(f"ds_sft/ds_configs/{name}.yaml" for name in ("demo", "qwen3_dialog", "run")),
    *(f"ds_sft/ds_configs/{name}.json" for name in ("zero2", "zero2_offload", "zero3", "zero3_offload")),
    *(f"ds_sft/slurm/{name}" for name in TEMPLATES),
]


def contents(wheel: Path) -> dict[str, bytes]:
    """Name -> bytes, but for what describes the package itself."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


def test_what_the_wheel_has(installed: Installed) -> None:
    """The code and what is shipped beside it: no tests, no benchmarks; task.sh is a program."""
    code = [str(file.relative_to(PACKAGE.parent)) for file in PACKAGE.rglob("*.py")]
    assert sorted(contents(installed.wheel)) == sorted([*code, *BESIDE_CODE])
    with zipfile.ZipFile(installed.wheel) as archive:
        modes = {name: archive.getinfo(name).external_attr >> 16 for name in BESIDE_CODE}
    assert [name for name, mode in modes.items() if mode & stat.S_IXUSR] == ["ds_sft/slurm/task.sh"]


def test_a_source_archive_makes_the_same_wheel(installed: Installed, tmp_path: Path) -> None:
    archive = build("sdist", installed.source, tmp_path / "sdist")
    shutil.unpack_archive(archive, tmp_path, filter="data")
    (source,) = tmp_path.glob("ds_sft-*")
    assert not (source / "tests").exists()
    assert contents(build("wheel", source, tmp_path / "wheel")) == contents(installed.wheel)


def test_an_editable_installation_is_a_path(installed: Installed, tmp_path: Path) -> None:
    """Python asks a hook behind all paths, and would take a clone called ds_sft for the package in the folder above."""
    assert contents(build("editable", installed.source, tmp_path)) == {
        f"__editable__.ds_sft-{__version__}.pth": f"{installed.source}\n".encode()
    }


def test_commands(installed: Installed, model_dir: Path, tmp_path: Path) -> None:
    """From an empty folder: what `init` writes is planned, and `launch` prints what works without train.py."""
    where = [str(installed.bin / "python"), "-c", "import ds_sft; print(ds_sft.__file__)"]
    here = run(where, cwd=tmp_path, env=installed.env)
    assert here.output.startswith(f"{installed.folder}/lib/")
    assert installed.ds_sft("--version", cwd=tmp_path).stdout == f"ds_sft {__version__}\n"
    assert " -m ds_sft train run.yaml  # " in installed.ds_sft("init", cwd=tmp_path).stdout.splitlines()[-1]
    write_rows(tmp_path / "rows.jsonl", questions_and_answers(50))
    keys = ["run.yaml", "--model_name_or_path", str(model_dir), "--train_file", "rows.jsonl"]
    planned = installed.ds_sft("plan", *keys, "--gpus-per-node", "2", "--json", cwd=tmp_path)
    assert json.loads(planned.stdout)["configured"] == "ZeRO-2"

    launch = ("launch", *keys, "--dry-run")
    moved = installed.ds_sft(*launch, "--deepspeed", "ds_configs/zero2.json", cwd=tmp_path)  # written in a clone
    assert (moved.returncode, moved.stderr) == (
        2, "ds_sft: error: deepspeed: ds_configs/zero2.json: no such file; write zero2, which needs none\n"
    )  # fmt: skip
    rest = f"--config run.yaml --model_name_or_path {shlex.quote(str(model_dir))} --train_file rows.jsonl"
    found: dict[str, Any] = json.loads(installed.ds_sft(*launch, "--json", cwd=tmp_path).stdout)
    assert found["nodes"][0]["torchrun"].endswith(f" --max-restarts=0 -m ds_sft train {rest}")
    assert found["deepspeed"] == f"deepspeed --hostfile hosts --master_port 29500 --module ds_sft train {rest}"
    assert found["sbatch"].startswith("sbatch --nodes=1 --gpus-per-node=1 slurm/train.sbatch run.yaml ")
    told = "With Slurm (there is no slurm/train.sbatch here: `ds-sft init --slurm` writes the templates):\n"
    assert told in installed.ds_sft(*launch, cwd=tmp_path).stdout
    assert installed.ds_sft("init", "--slurm", cwd=tmp_path).returncode == 0
    after = installed.ds_sft(*launch, cwd=tmp_path).stdout
    assert "With Slurm:\n" in after
    assert "  It starts slurm/task.sh python -m ds_sft train ... once on each node" in after


def test_nothing_is_submitted_without_templates(installed: Installed, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "sbatch").write_text("#!/bin/sh\necho submitted\n", encoding="utf-8")
    (tmp_path / "sbatch").chmod(0o755)
    write_rows(tmp_path / "rows.jsonl", questions_and_answers(50))
    path = f"{tmp_path}{os.pathsep}{installed.env['PATH']}"
    assert installed.ds_sft("init", cwd=tmp_path).returncode == 0
    words = ["launch", "run.yaml", "--model_name_or_path", str(model_dir), "--train_file", "rows.jsonl"]
    done = run([str(installed.bin / "ds-sft"), *words], cwd=tmp_path, env={**installed.env, "PATH": path})
    assert done.code == 2
    assert done.output.endswith(
        "ds_sft: error: there is no slurm/train.sbatch here: `ds-sft init --slurm` writes the templates\n"
    )
    assert "submitted" not in done.output


@pytest.mark.distributed
def test_training(installed: Installed, model_dir: Path, tmp_path: Path) -> None:
    """Two ranks by either launcher, from a folder that has nothing but rows and what `init` wrote; one result."""
    write_rows(tmp_path / "rows.jsonl", questions_and_answers(50))
    assert installed.ds_sft("init", cwd=tmp_path).returncode == 0
    keys = ["--config", "run.yaml", "--model_name_or_path", str(model_dir), "--train_file", "rows.jsonl",
            "--max_steps", "2", "--logging_steps", "1", "--num_predictions", "0", "--use_cpu", "yes"]  # fmt: skip

    def launched(launcher: str, ranks: str, *program: str) -> dict[str, Any]:
        port = ("--master_port", str(free_port()))
        start = [str(installed.bin / "python"), str(BIN / launcher), ranks, "2", *port, *program]
        done = run([*start, *keys, "--output_dir", launcher], cwd=tmp_path, env=installed.env)
        assert done.code == 0, done.output[-4000:]
        record: dict[str, Any] = json.loads((tmp_path / launcher / "run.json").read_text(encoding="utf-8"))
        assert (record["launcher"], record["world_size"], record["zero_stage"]) == (launcher, 2, 2)
        assert (record["versions"]["ds_sft"], record["git_commit"]) == (__version__, None)
        assert "\ndeepspeed: zero2\n" in (tmp_path / launcher / "config.yaml").read_text(encoding="utf-8")
        return record

    found = launched("torchrun", "--nproc_per_node", "-m", "ds_sft", "train", "--deepspeed", "zero2")
    assert found["export"]["verified"] is True  # by a fresh process, which finds the package, too
    launched("deepspeed", "--num_accelerators", "--module", "ds_sft", "train", "--verify_export", "no")
    weights = [(tmp_path / launcher / "model.safetensors").read_bytes() for launcher in ("torchrun", "deepspeed")]
    assert weights[0] == weights[1]
