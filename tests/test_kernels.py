"""No process of ours meets cuDNN's plan for every new length of attention."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.export.predict import generate
from ds_sft.export.verify import loss_on_disk
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import watch_for_stop
from ds_sft.train import run
from tests.conftest import questions_and_answers, write_rows


class Attended(Exception):
    """Training has come to its model."""


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether cuDNN was allowed, at each call of the attention that it would come first in."""
    torch.backends.cuda.enable_cudnn_sdp(True)  # as torch starts
    calls: list[bool] = []
    attend = F.scaled_dot_product_attention

    def watch(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    return calls


def predicting(model_dir: Path, tokenizer: Any) -> None:
    config = Config(model_name_or_path=str(model_dir), train_file="t", training={"use_cpu": True},
                    predict_max_new_tokens=3)  # fmt: skip
    generate(str(model_dir), [[5, 6, 7]], tokenizer, config)


def verifying(model_dir: Path, tokenizer: Any) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}]
    loss_on_disk(str(model_dir), rows, use_cpu=True, trust_remote_code=False)


@pytest.mark.parametrize("work", [predicting, verifying])
def test_predictions_and_verification(
    work: Callable[[Path, Any], None], allowed: list[bool], model_dir: Path, tokenizer: Any
) -> None:
    work(model_dir, tokenizer)
    assert set(allowed) == {False}


def test_training(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    found: list[bool] = []

    def stop_here(*args: Any, **kwargs: Any) -> None:
        found.append(torch.backends.cuda.cudnn_sdp_enabled())
        raise Attended

    monkeypatch.setattr("ds_sft.model.load.load_model", stop_here)
    rows, launch = write_rows(tmp_path / "train.jsonl", questions_and_answers(4)), Launch(launcher="python")
    flags = {"model_name_or_path": model_dir, "train_file": rows, "output_dir": tmp_path / "out", "max_length": 256}
    config = load_config([f"--{name}={value}" for name, value in flags.items()], "train.py")
    with watch_for_stop(launch) as stop, FolderLock(config.output_dir) as lock, pytest.raises(Attended):
        run(config, launch, stop, lock)
    assert found == [False]


def test_nothing_gives_cudnn_back() -> None:
    """But attention, for lone long rows, of which a plan serves many."""
    package = Path(__file__).resolve().parents[1] / "ds_sft"
    named = {path.name for path in package.rglob("*.py") if re.search("cudnn_sdp|CUDNN_ATT|sdpa_kernel|sdp_kernel",
                                                                     path.read_text(encoding="utf-8"))}  # fmt: skip
    assert named == {"kernels.py", "attention_kernels.py"}
    assert "sdp(True" not in (package / "export" / "kernels.py").read_text(encoding="utf-8")
