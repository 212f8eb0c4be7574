"""A model that is not there is said at once, in one line, with what is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from ds_sft.errors import UserError
from ds_sft.plan import source
from ds_sft.plan.shape import read_shape
from ds_sft.plan.source import require_model

COMMIT = "a" * 40


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models/Qwen3, and a hub that cannot be reached: .invalid never resolves, RFC 2606."""
    (tmp_path / "models" / "Qwen3" / "base").mkdir(parents=True)
    (tmp_path / "models" / "Qwen3" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(source, "getproxies", dict)
    return tmp_path


def refusal(name: str) -> str:
    with pytest.raises(UserError) as refused:
        require_model(name)
    return str(refused.value).removeprefix(f"model_name_or_path: {name}: ")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("./models/Qwn3", "models/Qwen3"),
        ("models/Qwn3", "models/Qwen3"),  # as a hub id would be written
        ("models/qwen-3/", "models/Qwen3"),
        ("./modles/Qwen3", "models/Qwen3"),
        ("modles/Qwen3/base", "models/Qwen3/base"),
        ("./model/Llama", "models"),
        ("{here}/models/Qwn3", "{here}/models/Qwen3"),
        ("~/Qwn3", "~/Qwen3"),
    ],
)
def test_a_path_with_a_slip(here: Path, monkeypatch: pytest.MonkeyPatch, name: str, near: str) -> None:
    monkeypatch.setenv("HOME", str(here / "models"))
    said = refusal(name.format(here=here))
    assert said == f"no such folder; did you mean {near.format(here=here)}?"


@pytest.mark.parametrize("name", ["/none/there", "./none", ".none/x", "a/b/c", "none/", "models/Llama", "two words"])
def test_a_path_like_no_other(here: Path, name: str) -> None:
    assert (
        refusal(name) == f"no such folder (the current directory is {here}), and not a hub id such as Qwen/Qwen3-0.6B"
    )


def test_what_is_there_and_no_model(here: Path) -> None:
    assert refusal("empty") == "this folder has no config.json, so it is not a model"
    assert refusal("file") == "is a file; give the folder of a model, or a hub id"
    assert require_model("models/Qwen3") is None


def test_a_hub_that_cannot_be_reached(here: Path) -> None:
    """Not after six attempts at each file."""
    said = refusal("some/model")
    assert said.startswith("no such folder, not in the hub's cache, and hub.invalid cannot be reached (")
    assert said.endswith("); give the folder of a model, or fetch it where there is a network: hf download some/model")
    with pytest.raises(UserError, match=r"hub\.invalid cannot be reached"):
        read_shape("some/model")
    assert refusal("models1").startswith("no such folder (did you mean models?), not in the hub's cache, and ")


def test_offline_as_asked(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "not in the hub's cache, and HF_HUB_OFFLINE is set; give the folder" in refusal("some/model")


def test_what_the_cache_has_needs_no_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's library would ask for it all the same, unless it is told not to, and so would a later process's."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    cached = here / "hub" / "models--some--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(COMMIT)
    (cached / "snapshots" / COMMIT).mkdir(parents=True)
    (cached / "snapshots" / COMMIT / "config.json").write_text("{}")
    remark = require_model("some/model")
    assert remark is not None
    assert remark.startswith("some/model comes from the hub's cache: hub.invalid cannot be reached (")
    assert source.os.environ["HF_HUB_OFFLINE"] == "1"
    assert constants.HF_HUB_OFFLINE is True
    assert require_model("some/model") is None  # it is said


def test_before_anything_heavy_is_imported(tmp_path: Path) -> None:
    code = """
import sys
from ds_sft.train import main
try:
    main(["--model_name_or_path", "./none", "--train_file", "t", "--output_dir", "out"])
except SystemExit as end:
    print(end.code, sorted({"torch", "transformers"} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 []\n"
    assert "ds_sft: error: model_name_or_path: ./none: no such folder (the current directory is " in done.stderr
    assert not (tmp_path / "out").exists()
