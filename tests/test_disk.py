"""How large a checkpoint will be, and what is said where there is no room."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_sft.errors import UserError
from ds_sft.runtime.checkpoint import Site
from ds_sft.runtime.disk import bytes_a_parameter, check_space, no_room, predict_size
from ds_sft.runtime.distributed import Launch

ALONE = Site(Launch(launcher="python"), shared=True)


def free(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(size)))


def arguments(**changes: Any) -> Any:
    known = {"save_steps": 10, "save_total_limit": None, "num_train_epochs": 2, "save_strategy": "steps"} | changes
    if known["save_strategy"] != "no":
        known["save_strategy"] = SimpleNamespace(value=known["save_strategy"])
    return SimpleNamespace(**known)


def test_bytes_a_parameter() -> None:
    """Weights, Adam's two averages, float32 masters; below ZeRO-3 the engine keeps the weights as well."""
    plain, bf16 = bytes_a_parameter(4, None), {stage: bytes_a_parameter(2, stage) for stage in (1, 2, 3)}
    assert (plain, bf16, bytes_a_parameter(4, 2)) == (12, {1: 16, 2: 16, 3: 14}, 20)


def test_nodes_with_disks_of_their_own_keep_their_share() -> None:
    model = torch.nn.Linear(10, 10, bias=False)
    assert predict_size(model, None, ALONE) == 1200
    node = Launch(launcher="torchrun", rank=2, local_rank=0, world_size=4, local_world_size=2)
    assert predict_size(model, 3, Site(node, shared=False)) == 800


def test_not_even_one_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free(monkeypatch, 3.9e9)
    with pytest.raises(UserError, match=r"a checkpoint takes about 4\.0 GB, the disk has 3\.9 GB free: make room"):
        check_space(tmp_path, 4 * 10**9, arguments(), 100, ALONE)
    check_space(tmp_path, 4 * 10**9, arguments(save_strategy="no"), 100, ALONE)


@pytest.mark.parametrize(
    ("changes", "number"),
    [({}, 10), ({"save_total_limit": 2}, 3), ({"save_strategy": "epoch"}, 2), ({"save_steps": 60}, 2)],
)
def test_not_all_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, number: int
) -> None:
    free(monkeypatch, 4e9 * number - 1)
    check_space(tmp_path, 4 * 10**9, arguments(**changes), 100, ALONE)
    said = f"{number} checkpoints of about 4.0 GB will be there at once, the disk has {(4e9 * number - 1) / 1e9:.1f} GB"
    assert said in capsys.readouterr().out
    free(monkeypatch, 4e9 * number)
    check_space(tmp_path, 4 * 10**9, arguments(**changes), 100, ALONE)
    assert capsys.readouterr().out == ""


def test_before_a_save(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free(monkeypatch, 2e6)
    assert no_room(tmp_path, 2 * 10**6) is None
    assert no_room(tmp_path, 3 * 10**6) == "it takes about 3.0 MB, the disk has 2.0 MB free"
