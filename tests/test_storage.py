"""Where a run writes: what cannot be is said before data are encoded."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_sft.errors import UserError
from ds_sft.runtime import storage
from ds_sft.runtime.storage import require_writable


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
