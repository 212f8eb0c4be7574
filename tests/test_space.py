"""How large a checkpoint will be, and what is said where there is no room."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from ds_sft.checkpoints.space import check_space, export_size, no_room, predict_size
from ds_sft.checkpoints.storage import Site
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.steps import Steps
from ds_sft.ranks.launch import Launch

ALONE = Site(Launch(launcher="python"), shared=True)
STEPS = Steps(micro=1, accumulation=1, ranks=1, num_rows=50, epochs=2)  # 100 steps
GIB = 2**30


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))


def config(folder: Path, **changes: Any) -> Config:
    training = {"output_dir": str(folder), "save_steps": 10, "save_strategy": "steps"} | changes
    return Config(model_name_or_path="m", train_file="t", training=training)


def test_nodes_with_disks_of_their_own_keep_their_share(model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert predict_size(model, None, ALONE) == 12 * count
    node = Launch(launcher="torchrun", rank=2, local_rank=0, world_size=4, local_world_size=2)
    assert predict_size(model, 3, Site(node, shared=False)) == 8 * count


def test_not_even_one_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free(monkeypatch, 3.9 * GIB)
    with pytest.raises(UserError, match=r"a checkpoint takes about 4\.0 GiB, the disk has 3\.9 GiB free: make room"):
        check_space(config(tmp_path), 4 * GIB, STEPS, ALONE)
    check_space(config(tmp_path, save_strategy="no"), 4 * GIB, STEPS, ALONE)


def test_only_saves_that_are_left_need_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    free(monkeypatch, 3.9 * GIB)
    check_space(config(tmp_path), 4 * GIB, STEPS, ALONE, done=100)
    free(monkeypatch, 4 * GIB)
    check_space(config(tmp_path), 4 * GIB, STEPS, ALONE, done=90)
    assert capsys.readouterr().out == ""
    with pytest.raises(
        UserError, match=r"the final weights take about 5\.0 GiB, the disk has 4\.0 GiB free: make room"
    ):
        check_space(config(tmp_path, save_strategy="no"), 4 * GIB, STEPS, ALONE, export=5 * GIB)


def test_the_final_weights_are_written_by_rank_0(model_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="float32")
    count = sum(parameter.numel() for parameter in model.parameters())
    assert export_size(model, config(tmp_path, bf16=True), ALONE) == 2 * count
    other = Site(Launch(launcher="torchrun", rank=1, world_size=2), shared=True)
    assert export_size(model, config(tmp_path), other) == 0


@pytest.mark.parametrize(
    ("changes", "number"),
    [({}, 10), ({"save_total_limit": 2}, 3), ({"save_strategy": "epoch"}, 2), ({"save_steps": 60}, 2)],
)
def test_not_all_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, number: int
) -> None:
    free(monkeypatch, 4 * GIB * number - 1)
    check_space(config(tmp_path, **changes), 4 * GIB, STEPS, ALONE)
    assert f"{number} checkpoints of about 4.0 GiB will be there at once, the disk has" in capsys.readouterr().out
    free(monkeypatch, 4 * GIB * number)
    check_space(config(tmp_path, **changes), 4 * GIB, STEPS, ALONE)
    assert capsys.readouterr().out == ""


def test_the_final_weights_come_beside_the_checkpoints(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the first checkpoint fits and the last weights do not the run starts: who stays may make room."""
    for room, said in (
        (9 * GIB, ""),
        (9 * GIB - 1, "2 checkpoints of about 4.0 GiB and final weights of about 1.0 GiB"),
    ):
        free(monkeypatch, room)
        check_space(config(tmp_path, save_steps=60), 4 * GIB, STEPS, ALONE, export=GIB)
        out = capsys.readouterr().out
        assert (said in out, bool(out)) == (True, bool(said))


def test_before_a_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free(monkeypatch, 2 * GIB)
    assert no_room(tmp_path, 2 * GIB) is None
    assert no_room(tmp_path, 3 * GIB) == "it takes about 3.0 GiB, the disk has 2.0 GiB free"
