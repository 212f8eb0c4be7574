"""`ds-sft launch --dry-run`: the plan of a run, without a GPU or a cluster."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_sft.cli import main
from ds_sft.errors import UserError
from ds_sft.plan.schedule import slurm_seconds
from tests.conftest import questions_and_answers, write_rows
from tests.test_house import ROOT

TRAIN = shlex.quote(str(ROOT / "ds_sft" / "train.py"))  # these run outside of the clone


@pytest.fixture
def config(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "train.jsonl", questions_and_answers(100))
    write_rows(tmp_path / "bad.jsonl", [*questions_and_answers(1), "{"])
    keys = {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "output_dir": "out",
        "deepspeed": str(ROOT / "ds_configs" / "zero3.json"),
        "save_steps": 2,
        "save_total_limit": 2,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return tmp_path / "run.yaml"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["launch", "--dry-run", "--json", "run.yaml", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_in_the_clone_the_script_has_a_short_name(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (config.parent / "ds_sft").symlink_to(ROOT / "ds_sft")
    assert " 29500 ds_sft/train.py --config run.yaml" in plan(capsys)["deepspeed"]


def test_the_plan(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--nodes", "2", "--gpus-per-node", "4", "--time", "2:00:00", "--learning_rate", "2e-5")
    keys = "--config run.yaml --learning_rate 2e-5"
    torchrun = (
        "torchrun --nnodes=2 --node_rank={} --nproc_per_node=4 --master_addr=node0 --master_port=29500 "
        f"--max-restarts=0 {TRAIN} " + keys
    )
    assert found.pop("nodes") == [
        {"rank": 0, "ranks": [0, 3], "torchrun": torchrun.format(0)},
        {"rank": 1, "ranks": [4, 7], "torchrun": torchrun.format(1)},
    ]
    template = shlex.quote(str(ROOT / "slurm" / "train.sbatch"))
    parameters = found.pop("parameters")
    assert found.pop("trained_parameters") == parameters
    assert found == {
        "ranks_per_node": 4,
        "world_size": 8,
        "sequence_parallel": 1,
        "across_nodes": None,
        "zero_stage": 3,
        "sbatch": f"sbatch --nodes=2 --gpus-per-node=4 --time=2:00:00 {template} run.yaml --learning_rate 2e-5",
        "deepspeed": f"deepspeed --hostfile hosts --master_port 29500 {TRAIN} {keys}",
        "master_addr": "node0",
        "master_port": 29500,
        "rows": 100,
        "known": "exact",
        "rows_per_step": 32,
        "steps_per_epoch": 4,
        "steps": 8,
        "checkpoints": [2, 4, 6, 8],
        "checkpoints_kept": 2,
        "checkpoint_bytes": parameters * 14,
        "final_model_bytes": parameters * 2,
        "batch": "Batch: 1 rows x 4 accumulated x 8 ranks = 32 rows a step; 100 rows => 4 steps an epoch, "
        "8 steps in all.",
    }


def test_names_and_port(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--nodes", "2", "--hosts", "a,b", "--port", "1234")
    assert "--node_rank=1 --nproc_per_node=1 --master_addr=a --master_port=1234 " in found["nodes"][1]["torchrun"]


def test_rows_of_an_epoch(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, limits, rows set aside and rows skipped are counted as the run counts them."""
    files = "[{path: train.jsonl, weight: 2, limit: 40}, bad.jsonl]"
    words = ["--train_file", files, "--on_bad_row", "skip"]
    assert plan(capsys, *words)["rows"] == 81
    assert plan(capsys, "--val_size", "0.1")["rows"] == 90
    assert plan(capsys, "--val_size", "7")["rows"] == 93


def test_packed_rows_are_fewer_sequences(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as the mean length of an earlier report says; without one at most one for each row, and it is said."""
    words = ["--packing", "concat", "--max_length", "400"]
    found = plan(capsys, *words)
    assert (found["rows"], found["steps"], found["known"]) == (100, 50, "at most")
    Path("out").mkdir()
    Path("out/data_report.json").write_text('{"train": {"tokens": 4000, "rows_kept": 100}}', encoding="utf-8")
    found = plan(capsys, *words)
    assert (found["rows"], found["steps"], found["known"]) == (10, 6, "about")
    assert main(["launch", "--dry-run", "run.yaml", *words]) == 0
    assert (
        "into sequences: about that number of them, from the mean length in data_report.json" in capsys.readouterr().out
    )


def test_a_number_of_tokens(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """100 rows of at most 400 tokens, two in a micro batch; of 40 tokens twenty."""
    words = ["--max_tokens_per_batch", "800", "--max_length", "400"]
    found = plan(capsys, *words)
    assert (found["rows"], found["rows_per_step"], found["known"]) == (100, None, "at most")
    at_most = found["steps"]
    Path("out").mkdir()
    Path("out/data_report.json").write_text('{"train": {"tokens": 4000, "rows_kept": 100}}', encoding="utf-8")
    assert plan(capsys, *words)["steps"] < at_most
    assert main(["launch", "--dry-run", "run.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "100 rows in 5 micro batches" in said
    assert "Rows are filled into micro batches: about that number of them, from the mean length" in said


def test_ranks_that_share_rows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step has the rows of as many groups; one that would span nodes is named before anything is submitted."""
    group = ["--sequence_parallel", "2"]
    found = plan(capsys, "--nodes", "2", "--gpus-per-node", "4", *group)
    assert (found["rows_per_step"], found["steps"], found["across_nodes"]) == (16, 14, None)
    assert found["batch"].startswith("Batch: 1 rows x 4 accumulated x 4 groups of 2 ranks = 16 rows a step; ")
    assert found["sbatch"].endswith(" run.yaml --sequence_parallel 2")
    filled = plan(capsys, "--nodes", "2", "--max_tokens_per_batch", "800", "--max_length", "400", *group)
    assert filled["batch"].startswith("Batch: at most 800 tokens x 4 accumulated x 1 group of 2 ranks = 3,200")
    assert main(["launch", "--dry-run", "run.yaml", "--nodes", "2", "--gpus-per-node", "3", *group]) == 0
    assert capsys.readouterr().out.splitlines()[1] == (
        "sequence_parallel: 2: 1 of 3 groups of 2 ranks spans nodes (ranks 2-3), so every layer's attention waits for "
        "the network between them; a node has 3 ranks: start a multiple of 2 on each, or write sequence_parallel: 3."
    )


def test_without_gpus_a_node_is_one_rank(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--nodes", "3", "--gpus-per-node", "0")
    assert (found["world_size"], found["ranks_per_node"]) == (3, 1)
    assert "--gpus-per-node=0" in found["sbatch"]


def test_as_text(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--dry-run", "run.yaml", "--nodes", "9", "--gpus-per-node", "2", "--save_steps", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "9 nodes x 2 ranks = 18 ranks, ZeRO-3."
    assert lines[2].startswith("Checkpoints: 4, of which the last 2 stay; ")
    shown = [line.split(":")[0].strip() for line in lines if line.startswith("  node ") or line == "  ..."]
    assert shown == ["node 0, ranks 0-1", "node 1, ranks 2-3", "node 2, ranks 4-5", "...", "node 8, ranks 16-17"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus-per-node", "4"], "Ranks that have rows: 100 of 104."),  # which trains as one rank would
        (["--gpus-per-node", "8", "--sequence_parallel", "2"], "Groups that have rows: 100 of 104."),
    ],
)
def test_fewer_rows_than_ranks_are_trained(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["launch", "--dry-run", "run.yaml", "--nodes", "26", *words]) == 0
    (batch,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Batch: ")]
    assert batch.endswith(f"steps in all. {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes 0 --gpus-per-node 1: expected 1 or more nodes"),
        (["--val_size", "100"], "train_file: no row is left to learn from: give more rows, or a smaller val_size"),
        (["--nodes", "3", "--sequence_parallel", "2"], "sequence_parallel: 2: the run has 3 ranks, "),
        (["--time", "10"], "--time 10: slurm/train.sbatch saves 600 s before the limit, so it would stop at once"),
        (["--time", "soon"], "time limit 'soon': expected a time such as 30 (minutes), 24:00:00 or 2-12:00:00"),
        (["--nodes", "2", "--hosts", "a"], "--hosts a: 1 names for 2 nodes"),
        (["--train_file", "absent.jsonl"], "absent.jsonl: no such file"),
        (["--train_file", "bad.jsonl"], "bad.jsonl:2: "),
        (["--learning_rat", "1"], "--learning_rat: unknown key: did you mean --learning_rate?"),
        (["--deepspeed", "{train_batch_size: 12, zero_optimization: {stage: 2}}"], "train_batch_size: 12"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(
    config: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["launch", "--dry-run", "run.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ds_sft: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_a_broken_model_is_refused(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"x")
    assert main(["launch", "--dry-run", "run.yaml", "--model_name_or_path", "model"]) == 2
    assert "model_name_or_path: model: model/model.safetensors: not a safetensors file" in capsys.readouterr().err


def test_without_dry_run_it_is_submitted(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "got $*"\nexit 7\n', encoding="utf-8")
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main(["launch", "run.yaml", "--nodes", "2"]) == 7
    template = ROOT / "slurm" / "train.sbatch"
    assert f"got --nodes=2 --gpus-per-node=1 {template} run.yaml\n" in capfd.readouterr().out
    monkeypatch.setenv("PATH", "")
    assert main(["launch", "run.yaml", "--nodes", "2"]) == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86400),
        ("2-0", 172800),
        ("10:30", 630),
        ("1-2:30", 95400),
        ("1-00:00:05", 86405),
    ],
)
def test_slurm_times(text: str, seconds: int) -> None:
    assert slurm_seconds(text) == seconds
    with pytest.raises(UserError):
        slurm_seconds(text + "x")


def test_the_template_saves_when_this_command_says() -> None:
    from ds_sft.commands.launch import SIGNAL_SECONDS

    assert f"#SBATCH --signal=B:USR1@{SIGNAL_SECONDS} " in (ROOT / "slurm" / "train.sbatch").read_text()
