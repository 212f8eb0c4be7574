"""The loss of a model on disk, from a process that knows only the folder."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from ds_sft.cli import main
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.export.placement import is_out_of_memory
from ds_sft.export.verify import (
    ExportError,
    Question,
    answer,
    loss_on_disk,
    require_verified,
    verify,
    verify_or_keep,
)
from ds_sft.train import let_it_answer, score_its_answers

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]},
    {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]},
]


def question(trained_loss: float, dtypes: list[str], rows: Any = ROWS) -> Question:
    return Question(rows=rows, trained_loss=trained_loss, dtypes=dtypes, use_cpu=True)


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
    result = verify(model_dir, question(expected, ["bfloat16"]))
    assert result.pop("loss_on_disk") == pytest.approx(expected, rel=1e-3)
    assert 0 <= result.pop("difference") < result["bound"] == pytest.approx(expected * 1e-2)
    assert result == {"verified": True, "loss_trained": expected, "bound": result["bound"], "rows": 2,
                      "supervised_tokens": 4}  # fmt: skip
    capsys.readouterr()
    require_verified(verify(model_dir, question(expected, ["bfloat16"])), model_dir)
    assert capsys.readouterr().out.startswith(f"Export verified: {model_dir}, loaded in a fresh process, has loss 6.0")


@pytest.mark.parametrize(
    ("trained", "dtypes"), [(1.02, ["bfloat16"]), (1.0002, ["float32"]), (float("nan"), ["float32"])]
)
def test_another_loss_is_refused(model_dir: Path, monkeypatch: pytest.MonkeyPatch, trained: float, dtypes: Any) -> None:
    found = loss_on_disk(str(model_dir), ROWS, use_cpu=True, trust_remote_code=False)
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(found), stderr="")
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: done)
    result = verify(model_dir, question(found["loss"] * trained, dtypes))
    assert result["verified"] is False
    with pytest.raises(ExportError, match=r"Export NOT verified: .* Do not use these weights"):
        require_verified(result, model_dir)


def test_without_a_supervised_token_nothing_is_verified(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = verify(model_dir, question(0.0, ["bfloat16"], [{"input_ids": [5, 6], "labels": [-100, -100]}]))
    assert result["verified"] is None
    require_verified(result, model_dir)
    assert capsys.readouterr().out == "Export not verified: none of the 1 rows asked has a supervised token.\n"


def test_a_folder_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    result = verify(tmp_path, question(1.0, ["float32"]))
    assert result["verified"] is False
    with pytest.raises(ExportError, match=f"Export NOT verified: {tmp_path} cannot be loaded in a fresh process: "):
        require_verified(result, tmp_path)


def test_a_signal_to_stop_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(number: int) -> dict[str, Any]:
        done = subprocess.CompletedProcess([], -number, stdout="", stderr="")
        monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: done)
        return verify(tmp_path, question(1.0, ["float32"]))

    for number in (signal.SIGTERM, signal.SIGUSR1):
        require_verified(ended(number), tmp_path)
    assert capsys.readouterr().out.count("Export not verified: the fresh process was stopped by a signal.") == 2
    assert ended(signal.SIGSEGV)["verified"] is False  # a crash is no wish of anybody's


# ---- No memory for it: a run with good weights does not fail


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ..."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["Python", "CUDA", "torch", "the system"],
)
def test_what_is_a_want_of_memory(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(**asked: Any) -> None:
        try:
            raise error
        except Exception as cause:
            raise RuntimeError("could not load shard 3") from cause

    monkeypatch.setattr("ds_sft.export.verify.loss_on_disk", fail)
    assert answer({}) == {"out_of_memory": "could not load shard 3"}
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("size mismatch for lm_head.weight"))


def test_killed_by_the_kernel_then_verified_later(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run says the command; it needs nothing but the folder, and the question goes when it was answered."""
    out = Path(shutil.copytree(model_dir, tmp_path / "out"))
    (out / "run.json").write_text(json.dumps({"steps": 4, "export": None}), encoding="utf-8")
    asked = question(token_mean(out), ["bfloat16"])
    with monkeypatch.context() as patched:
        killed = subprocess.CompletedProcess([], -signal.SIGKILL, stdout="", stderr="")
        patched.setattr("subprocess.run", lambda *args, **kwargs: killed)
        result = verify_or_keep(out, asked)
        require_verified(result, out)  # no error
        assert main(["verify", str(out)]) == 1  # still none
    said = capsys.readouterr().out.splitlines()
    line = "Export not verified: no memory for it in a fresh process (killed by SIGKILL). Verify it later: "
    assert said == [line + f"ds-sft verify {out}"] * 2
    assert main(["verify", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"Export verified: {out}, loaded in a fresh process, has loss ")
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert (record["steps"], record["export"]["verified"], record["export"]["rows"]) == (4, True, 2)
    assert main(["verify", str(out)]) == 2
    assert f"{out}: no verify.json in it; it is there where a run ended with " in capsys.readouterr().err


def test_wrong_weights_are_found_later_too(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(model_dir, tmp_path / "out"))
    (out / "verify.json").write_text(json.dumps(asdict(question(1.0, ["float32"]))), encoding="utf-8")
    assert main(["verify", str(out)]) == 1
    assert capsys.readouterr().out.startswith(f"Export NOT verified: {out}, loaded in a fresh process, has loss 6.")
    assert not (out / "run.json").exists()


def test_predictions_that_find_no_memory_do_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(export: dict[str, Any], error: Exception) -> str:
        def fail(*given: Any) -> None:
            raise error

        monkeypatch.setattr("ds_sft.export.predict.predict", fail)
        config = Config(model_name_or_path="m", train_file="t", training={"output_dir": str(tmp_path)})
        data, tracker = (cast("Any", SimpleNamespace(samples=[])) for _ in range(2))
        let_it_answer(config, data, None, tracker, {"export": export})  # type: ignore[arg-type]
        return capsys.readouterr().out

    (tmp_path / "predictions.jsonl").write_text("{}", encoding="utf-8")
    lack = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    said = answers({"verified": True}, lack)
    assert said == "No predictions: no memory for them (CUDA out of memory. Tried to allocate 2 GiB).\n"
    said = answers({"verified": None, "out_of_memory": True}, AssertionError("asked"))
    assert said == "No predictions: they would need the same memory.\n"
    with pytest.raises(ValueError, match="another"):
        answers({"verified": True}, ValueError("another"))
    assert list(tmp_path.iterdir()) == []  # not an earlier run's answers either


def test_scores_without_their_rows_or_memory_do_not_fail_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are written, and `ds-sft evaluate` can be called later."""
    results: dict[str, Any] = {"export": {"verified": True}}

    def scores(error: Exception) -> str:
        def fail(*given: Any) -> None:
            raise error

        monkeypatch.setattr("ds_sft.evaluation.session.evaluate_run", fail)
        config = Config(model_name_or_path="m", train_file="t", evaluate_rows=3, training={"output_dir": str(tmp_path)})
        score_its_answers(config, *[cast("Any", None)] * 3, results)
        return capsys.readouterr().out

    (tmp_path / "evaluation.jsonl").write_text("{}", encoding="utf-8")
    assert scores(UserError("eval.jsonl: no such file")) == "No scores: eval.jsonl: no such file\n"
    assert scores(MemoryError("out of memory")) == "No scores: no memory for them (out of memory).\n"
    with pytest.raises(ValueError, match="another"):
        scores(ValueError("another"))
    assert "evaluation" not in results
    assert list(tmp_path.iterdir()) == []
