"""`ds-sft init`: what it writes, and that it replaces nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ds_sft.cli import main
from ds_sft.commands.init import next_steps
from ds_sft.config.keys import ENGINES
from ds_sft.config.read import load_config
from tests.test_house import ROOT

TEMPLATES = ["README.md", "debug.sbatch", "job.sh", "one_node.sbatch", "prepare.sbatch", "site.sh", "sweep.sbatch",
             "task.sh", "train.sbatch"]  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_configuration_that_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init"]) == 0
    assert [path.name for path in folder.iterdir()] == ["run.yaml"]
    config = load_config(["--config", "run.yaml"])
    assert (config.model_name_or_path, config.train_file) == ("Qwen/Qwen3-0.6B", "data/train.jsonl")
    assert config.training["deepspeed"] in ENGINES
    wrote, then, *steps = capsys.readouterr().out.splitlines()
    assert (wrote, then) == ("Wrote run.yaml", "Next: name your model and data in run.yaml, then")
    assert [step.split("#")[0].strip() for step in steps] == [
        "ds-sft preview run.yaml",
        "ds-sft plan run.yaml",
        "ds-sft train run.yaml",
        f"torchrun --nproc_per_node 2 {ROOT}/ds_sft/train.py run.yaml",  # of this clone
    ]


def test_all_gpus_are_proposed_where_there_are_any(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere torchrun would end with "gpu"; two processes run anywhere."""
    for there, said in ((True, "torchrun --nproc_per_node gpu "), (False, "torchrun --nproc_per_node 2 ")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert said in next_steps(Path("run.yaml"), slurm=False)


def test_every_key_has_its_comment(folder: Path) -> None:
    assert main(["init", "my run.yaml"]) == 0
    lines = [line for line in Path("my run.yaml").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    obvious = ("system_prompt", "num_train_epochs", "lr_scheduler_type", "logging_steps", "eval_steps")
    assert [line for line in lines if " # " not in line and not line.startswith(obvious)] == []


def test_the_templates_of_jobs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the repository has them; srun starts task.sh as a program."""
    assert main(["init", "--slurm"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml", "slurm"]
    assert sorted(path.name for path in (folder / "slurm").iterdir()) == TEMPLATES
    for name in TEMPLATES:
        assert (folder / "slurm" / name).read_bytes() == (ROOT / "slurm" / name).read_bytes()
    assert [name for name in TEMPLATES if os.access(folder / "slurm" / name, os.X_OK)] == ["task.sh"]
    assert "ds-sft launch run.yaml --nodes 2 --gpus-per-node 8" in capsys.readouterr().out


def test_templates_beside_an_earlier_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run.yaml").write_text("mine", encoding="utf-8")
    assert main(["init", "--slurm"]) == 0
    assert capsys.readouterr().out.startswith("run.yaml stays as it is.\nWrote slurm/README.md\n")
    assert (folder / "run.yaml").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("there", "words"),
    [("run.yaml", []), ("other.yaml", ["other.yaml"]), ("slurm/site.sh", ["--slurm"])],
)
@pytest.mark.parametrize("dangling", [False, True], ids=["a file", "a link to nothing"])
def test_nothing_is_replaced(
    folder: Path, capsys: pytest.CaptureFixture[str], there: str, words: list[str], dangling: bool
) -> None:
    """Nor is anything else written then."""
    (folder / there).parent.mkdir(exist_ok=True)
    if dangling:
        (folder / there).symlink_to("absent")
    else:
        (folder / there).write_text("mine", encoding="utf-8")
    assert main(["init", *words]) == 2
    said = f"ds_sft: error: {there} is there already, and nothing is replaced: move it away\n"
    assert capsys.readouterr().err == said
    assert [path for path in folder.rglob("*") if path.is_file()] == ([] if dangling else [folder / there])


def test_a_folder_is_no_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "runs").mkdir()
    for words in (["runs"], ["runs", "--slurm"]):
        assert main(["init", *words]) == 2
        said = "ds_sft: error: runs is there already, and nothing is replaced: move it away\n"
        assert capsys.readouterr() == ("", said)
    assert [path.name for path in folder.iterdir()] == ["runs"]


def test_where_it_cannot_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").write_text("", encoding="utf-8")
    assert main(["init", "file/run.yaml"]) == 2
    assert capsys.readouterr().err == "ds_sft: error: file/run.yaml: cannot be written: file: File exists\n"
