"""Two "nodes" on one machine: a torchrun for each, with an output folder of its own or with one between them."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import (
    BIN,
    ROOT,
    TRAIN,
    Done,
    free_port,
    run_nodes,
    script,
    step_losses,
    train,
    write_yaml,
)
from tests.distributed.test_trajectory import engine

pytestmark = pytest.mark.distributed
ENGINES, NUM_ROWS = ["none", "zero2", "zero3"], 24  # six steps


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
        **({"deepspeed": engine_file(rows.parent, name)} if name != "none" else {}),
        **changes,
    }


def engine_file(folder: Path, name: str) -> str:
    return str((folder / str(engine(name, folder))).rename(folder / f"{name}.json"))


def two_nodes(argv: list[str], folders: list[Path]) -> list[Done]:
    port = str(free_port())
    commands = [
        [str(BIN / "torchrun"), "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1", "--master_addr=127.0.0.1",
         "--master_port", port, *argv]
        for node in range(2)
    ]  # fmt: skip
    done = run_nodes(commands, folders, env={"PYTHONPATH": str(ROOT)})
    for node in done:
        assert node.code == 0, "\n\n".join(each.output[-4000:] for each in done)
    return done


def all_engines(keys: dict[str, dict[str, Any]], folders: list[Path]) -> dict[str, list[str]]:
    """A run of each engine, one after the other in one launch; what each node says of each."""
    files = [str(write_yaml(folders[0].parent / f"{name}.yaml", each)) for name, each in keys.items()]
    done = two_nodes([script("splits"), *files], folders)
    said = [re.split(r"^---- .*\n", node.output, flags=re.MULTILINE)[1:] for node in done]
    return {name: [node[number] for node in said] for number, name in enumerate(keys)}


@dataclass(frozen=True)
class Nodes:
    """What the two nodes wrote, `folders`, and said, for each engine: of the first run and of the one that goes on."""

    folders: list[Path]
    first: dict[str, list[str]]
    losses: dict[str, list[float]]  # of the first
    resumed: dict[str, list[str]]


@pytest.fixture(scope="module", params=[True, False], ids=["shared", "own"])
def nodes(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Nodes:
    """Trained, and resumed from an earlier checkpoint.

    With a disk for each node the second has lost the newest checkpoint, and the nodes agree on one that both have.
    """
    shared, tmp_path = request.param, tmp_path_factory.mktemp("nodes")
    rows = write_rows(tmp_path / "train.jsonl", questions_and_answers(NUM_ROWS))
    folders = [tmp_path / "0", tmp_path / ("0" if shared else "1")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    wrong = shared  # the setting contradicts what the disks say, and is corrected
    keys = {
        name: settings(model_dir, rows, name, output_dir=f"out-{name}", save_on_each_node=wrong, save_total_limit=2)
        for name in ENGINES
    }
    first = all_engines(keys, folders)
    losses = {name: step_losses(folders[0] / f"out-{name}") for name in ENGINES}
    for name in ENGINES:
        for folder in folders:
            assert (folder / f"out-{name}" / "checkpoint-4").is_dir()
            (folder / f"out-{name}" / "run.json").unlink(missing_ok=True)  # else it is finished
        if shared:
            keys[name]["resume_from_checkpoint"] = f"out-{name}/checkpoint-4"
        else:
            shutil.rmtree(folders[1] / f"out-{name}" / "checkpoint-6")
    return Nodes(folders, first, losses, all_engines(keys, folders))


@pytest.mark.parametrize("name", ENGINES)
def test_two_nodes_save_and_resume(model_dir: Path, tmp_path: Path, nodes: Nodes, name: str) -> None:
    """Against one run of two ranks on one node."""
    rows = write_rows(tmp_path / "train.jsonl", questions_and_answers(NUM_ROWS))
    done = train("forked", 2, settings(model_dir, rows, name), cwd=tmp_path)
    assert done.code == 0, done.output[-4000:]
    shared = nodes.folders[0] == nodes.folders[1]
    first, second = nodes.first[name]
    found = "share output_dir: save_on_each_node is set to no" if shared else (
        "have an output_dir each: save_on_each_node is set to yes")  # fmt: skip
    assert first.count(f"The 2 nodes {found}.") == 1
    assert "save_on_each_node is set" not in second
    assert nodes.losses[name] == pytest.approx(step_losses(tmp_path / "out"), rel=1e-5)

    again, out = nodes.resumed[name][0], nodes.folders[0] / f"out-{name}"
    if shared:
        assert again.count(f"Resuming from out-{name}/checkpoint-4, step 4.") == 1
        assert [path.name for path in out.glob("earlier-*/*")] == ["checkpoint-6"]
    else:
        assert again.count(f"Passed over out-{name}/checkpoint-6: it is not there (rank 1).") == 1
        assert again.count(f"Resuming from out-{name}/checkpoint-4, step 4, the newest usable checkpoint.") == 1
    assert step_losses(out) == nodes.losses[name]
    assert not list(nodes.folders[0].parent.rglob(".probe-*"))


def test_a_setting_that_fits_is_left_alone(model_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "train.jsonl", questions_and_answers(4))
    keys = settings(model_dir, rows, "zero2", save_on_each_node=False)
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    first, _ = two_nodes([TRAIN, *flags], [tmp_path, tmp_path])
    assert "save_on_each_node is set" not in first.output
