"""Where a run writes: what cannot be is said before data are encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_sft.checkpoints import storage
from ds_sft.checkpoints.storage import require_no_model, require_writable
from ds_sft.errors import UserError


def test_a_folder_that_can_be_made_is_not_made(tmp_path: Path) -> None:
    require_writable(tmp_path)
    require_writable(tmp_path / "runs" / "one")
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").touch()
    for name in ("my.yaml", "my.yaml/out"):
        with pytest.raises(UserError, match=r"^output_dir: .*: cannot be written: .*my\.yaml is a file$"):
            require_writable(tmp_path / name)


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.os, "access", lambda *given: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"^output_dir: .*out: cannot be written: no permission to write in "):
        require_writable(tmp_path / "out")


def test_no_model_is_replaced_but_a_runs_own(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    for folder in (model, out):
        folder.mkdir()
    require_no_model(out, str(model))
    require_no_model(tmp_path / "new", "Qwen/Qwen3-0.6B")
    (model / "model.safetensors").touch()
    for other in ("Qwen/Qwen3-0.6B", str(out)):
        with pytest.raises(UserError, match=r"model: has a model that no run has left \(model.safetensors\)"):
            require_no_model(model, other)
    (model / "config.yaml").touch()  # a run's, which the next may replace, but not start from and replace
    require_no_model(model, str(out))
    with pytest.raises(UserError, match="model: is the model to start from, which the result would replace"):
        require_no_model(model, f"{model}/")
