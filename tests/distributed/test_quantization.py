"""Adapters beside a base in 4 bits under the engines that can have it: bit-equal after a stop, and nothing of the base
on the disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.harness import asked, listing
from tests.distributed.test_adapters import (
    LORA,
    RANKS,
    assert_went_on_as_if_never_stopped,
    run_all,
    stopped_and_resumed,
    tensors,
)
from tests.distributed.test_resume import STEPS, dropout_dir

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs
__all__ = ["dropout_dir"]  # a fixture

ENGINES = ["ddp", "zero2"]
SAID = "nf4 (bitsandbytes 0.50.2): 73,728 of 99,712 parameters in 4.5 bits; 0.1 MiB instead of 0.2\n"


@pytest.fixture(scope="module")
def folder(dropout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantization")
    keys = {**LORA, "quantization": "nf4"}
    run_all(folder, [made for name in ENGINES for made in stopped_and_resumed(dropout_dir, folder, name, "nf4", keys)])
    return folder


@pytest.mark.parametrize("name", ENGINES)
def test_it_goes_on_beside_the_same_4_bits(folder: Path, name: str) -> None:
    """Quantised again from the base: losses, validation losses and weights are those of a run that nobody stopped."""
    assert_went_on_as_if_never_stopped(folder, f"{name}-nf4")
    for log in ("reference", "stop", "resumed"):
        text = (folder / f"{name}-nf4-{log}.log").read_text(encoding="utf-8")
        assert text.count(SAID) == 1  # by rank 0
        assert "kernels-community" not in text


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_asked_beside_the_same_4_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """The adapter that a run has left, and its last checkpoint."""
    monkeypatch.chdir(folder)
    run = Path(f"{name}-nf4")
    assert asked(run, capsys) == asked(run / f"checkpoint-{STEPS}", capsys) != ""


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_has_nothing_of_the_4_bits(folder: Path, name: str) -> None:
    checkpoint = folder / f"{name}-nf4" / "checkpoint-1"
    assert {value.dtype for value in tensors(folder, f"{name}-nf4", 1).values()} == {torch.float32}
    if name == "ddp":
        assert not [file for file in listing(checkpoint) if file.startswith(("model", "global_step"))]
        return
    (file,) = checkpoint.glob("global_step1/mp_rank_00_model_states.pt")
    states = torch.load(file, weights_only=False)
    assert {value.dtype for value in states["module"].values()} == {torch.bfloat16}
    assert [name for name in states["module"] if "lora_" not in name] == []
    assert RANKS[name] == states["dp_world_size"]
