"""The loss of a model on disk, from a process that knows only the folder."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ds_sft.runtime.verify import ExportError, loss_on_disk, require_verified, verify

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]},
]


def token_mean(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    losses = [
        F.cross_entropy(model(torch.tensor([row["input_ids"]])).logits[0, position - 1].float(), torch.tensor(label))
        for row in ROWS
        for position, label in enumerate(row["labels"])
        if label != -100
    ]
    return torch.stack(losses).mean().item()


def test_the_same_model_is_verified(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")  # of a launcher: the fresh process must not see them
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = token_mean(model_dir)
    result = verify(model_dir, ROWS, expected, ["bfloat16"], use_cpu=True)
    assert result.pop("loss_on_disk") == pytest.approx(expected, rel=1e-3)
    assert 0 <= result.pop("difference") < result["bound"] == pytest.approx(expected * 1e-2)
    assert result == {"verified": True, "loss_trained": expected, "bound": result["bound"], "rows": 2,
                      "supervised_tokens": 4}  # fmt: skip
    capsys.readouterr()
    require_verified(verify(model_dir, ROWS, expected, ["bfloat16"], use_cpu=True), model_dir)
    assert capsys.readouterr().out.startswith(f"Export verified: {model_dir}, loaded in a fresh process, has loss 6.0")


@pytest.mark.parametrize(
    ("trained", "dtypes"), [(1.02, ["bfloat16"]), (1.0002, ["float32"]), (float("nan"), ["float32"])]
)
def test_another_loss_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch, trained: float, dtypes: Any) -> None:
    found = loss_on_disk(str(model_dir), ROWS, use_cpu=True, trust_remote_code=False)
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps(found), stderr="")
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: answer)
    result = verify(model_dir, ROWS, found["loss"] * trained, dtypes, use_cpu=True)
    assert result["verified"] is False
    with pytest.raises(ExportError, match=r"Export NOT verified: .* Do not use these weights"):
        require_verified(result, model_dir)


def test_without_a_supervised_token_nothing_is_verified(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(model_dir, [{"input_ids": [5, 6], "labels": [-100, -100]}], 0.0, ["bfloat16"], use_cpu=True)
    assert result["verified"] is None
    require_verified(result, model_dir)
    assert capsys.readouterr().out == "Export not verified: none of the 1 rows asked has a supervised token.\n"


def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    result = verify(tmp_path, ROWS, 1.0, ["float32"], use_cpu=True)
    assert result["verified"] is False
    with pytest.raises(ExportError, match=f"Export NOT verified: {tmp_path} cannot be loaded in a fresh process: "):
        require_verified(result, tmp_path)


def test_a_signal_to_stop_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(number: int) -> dict[str, Any]:
        answer = subprocess.CompletedProcess([], -number, stdout="", stderr="")
        monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: answer)
        return verify(tmp_path, ROWS, 1.0, ["float32"], use_cpu=True)

    for number in (signal.SIGTERM, signal.SIGUSR1):
        require_verified(ended(number), tmp_path)
    assert capsys.readouterr().out.count("Export not verified: the fresh process was stopped by a signal.") == 2
    assert ended(signal.SIGKILL)["verified"] is False  # out of memory is nobody's wish
