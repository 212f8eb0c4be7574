"""Two "nodes" on one machine: a torchrun for each, with an output folder of its own or with one between them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import BIN, TRAIN, Done, free_port, run_nodes, step_losses, train
from tests.distributed.test_trajectory import engine

pytestmark = pytest.mark.distributed


def settings(model_dir: Path, rows: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "model_name_or_path": str(model_dir),
        "train_file": str(rows),
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "bf16": False,
        "save_steps": 2,
        "save_total_limit": 1,  # a race between two nodes that rotate would show
        "logging_steps": 1,
        "verify_export": False,
        "num_predictions": 0,
        **({"deepspeed": str(rows.parent / str(engine(name, rows.parent)))} if name != "none" else {}),
        **changes,
    }


def two_nodes(keys: dict[str, Any], folders: list[Path]) -> list[Done]:
    port = str(free_port())
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    commands = [
        [str(BIN / "torchrun"), "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
         "--master_port", port, TRAIN, *flags]
        for node in range(2)
    ]  # fmt: skip
    done = run_nodes(commands, folders)
    for node in done:
        assert node.code == 0, "\n\n".join(each.output[-4000:] for each in done)
    return done


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
def test_two_nodes_save_and_resume(model_dir: Path, tmp_path: Path, name: str, shared: bool) -> None:
    """Resumed from an earlier checkpoint, against one run of two ranks on one node.

    With a disk for each node the second has lost the newest checkpoint, and the nodes agree on one that both have.
    """
    rows = write_rows(tmp_path / "train.jsonl", questions_and_answers(24))  # six steps
    whole = tmp_path / "whole"
    whole.mkdir()
    done = train("torchrun", 2, settings(model_dir, rows, name), cwd=whole)
    assert done.code == 0, done.output[-4000:]

    folders = [tmp_path / "0", tmp_path / ("0" if shared else "1")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    wrong = shared  # the setting contradicts what the disks say, and is corrected
    keys = settings(model_dir, rows, name, save_on_each_node=wrong, save_total_limit=2)
    first, second = two_nodes(keys, folders)
    found = "share output_dir: save_on_each_node is set to no" if shared else (
        "have an output_dir each: save_on_each_node is set to yes")  # fmt: skip
    assert first.output.count(f"The 2 nodes {found}.") == 1
    assert "save_on_each_node is set" not in second.output
    losses = step_losses(folders[0] / "out")
    assert losses == pytest.approx(step_losses(whole / "out"), rel=1e-5)

    resumed = [folder / "out" / "checkpoint-4" for folder in folders]
    assert all(checkpoint.is_dir() for checkpoint in resumed)
    for folder in folders:
        (folder / "out" / "run.json").unlink(missing_ok=True)  # else it is finished
    if shared:
        first, _ = two_nodes({**keys, "resume_from_checkpoint": "out/checkpoint-4"}, folders)
        assert first.output.count("Resuming from out/checkpoint-4, step 4.") == 1
        assert [path.name for path in (folders[0] / "out").glob("earlier-*/*")] == ["checkpoint-6"]
    else:
        shutil.rmtree(folders[1] / "out" / "checkpoint-6")
        first, _ = two_nodes(keys, folders)
        assert first.output.count("Passed over out/checkpoint-6: it is not there (rank 1).") == 1
        assert first.output.count("Resuming from out/checkpoint-4, step 4, the newest usable checkpoint.") == 1
    assert step_losses(folders[0] / "out") == losses
    assert not list(tmp_path.rglob(".probe-*"))


def test_a_setting_that_fits_is_left_alone(model_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.jsonl", questions_and_answers(4))
    first, _ = two_nodes(settings(model_dir, rows, "zero2", save_on_each_node=False), [tmp_path, tmp_path])
    assert "save_on_each_node is set" not in first.output
