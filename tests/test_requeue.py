"""Whether a job starts again: from what the run left, and only if it comes further."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.checkpoints.manifest import FACTS, FORMAT
from ds_sft.checkpoints.requeue import DONE, NO_PROGRESS, main, stalls


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DS_SFT_MAX_STALLS", raising=False)
    (tmp_path / "out").mkdir()
    return tmp_path


def ask(folder: Path, question: str, *words: str) -> int:
    keys = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", str(folder / "out")]
    return main([question, "--starts", str(folder / "starts.jsonl"), *keys, *words])


def stopped_at(folder: Path, step: int) -> None:
    """What a run leaves that was stopped, with its checkpoint."""
    stopped = {"step": step, "checkpoint": f"checkpoint-{step}", "reason": "SIGTERM", "time": "now"}
    (folder / "out" / "PREEMPTED.json").write_text(json.dumps(stopped), encoding="utf-8")
    if step:
        checkpoint = folder / "out" / f"checkpoint-{step}"
        checkpoint.mkdir(exist_ok=True)
        manifest = {**dict.fromkeys(FACTS, 0), "format": FORMAT, "step": step, "files": {}}
        (checkpoint / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_a_run_that_was_stopped_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (10, 20, 30):
        assert ask(folder, "begin") == 0
        assert not (folder / "out" / "PREEMPTED.json").exists()  # that of an earlier start says nothing of this one
        stopped_at(folder, step)
        assert ask(folder, "end") == 0
    assert capsys.readouterr().out.endswith("The run was stopped at step 30 (SIGTERM).\n")


def test_a_run_that_was_not_stopped_does_not(folder: Path) -> None:
    assert ask(folder, "begin") == 0
    assert ask(folder, "end") == DONE


def test_another_job_in_the_folder_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stopped_at(folder, 10)  # a file that the run's own job is about to read
    with FolderLock(folder / "out") as lock:
        lock.take()
        assert ask(folder, "begin") == 2
    assert "another run has it: process " in capsys.readouterr().err
    assert ask(folder, "end") == 0


def test_no_progress(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two starts from step 10 that end there: the second is not requeued."""
    assert ask(folder, "begin") == 0
    stopped_at(folder, 10)
    assert ask(folder, "end") == 0
    assert ask(folder, "begin") == 0
    stopped_at(folder, 10)
    assert ask(folder, "end") == 0
    assert ask(folder, "begin") == 0
    stopped_at(folder, 10)
    capsys.readouterr()
    assert ask(folder, "end") == NO_PROGRESS
    assert "No progress: the last 2 starts of this job came no further than step 10;" in capsys.readouterr().err


def test_weights_that_were_exported_are_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped behind its export, and has no checkpoint, goes on from there; not for ever."""
    monkeypatch.setenv("DS_SFT_MAX_STALLS", "1")
    assert ask(folder, "begin") == 0
    (folder / "out" / "exported.json").write_text(json.dumps({"results": {"steps": 8}}), encoding="utf-8")
    stopped = json.dumps({"step": 8, "checkpoint": None, "reason": "SIGTERM"})
    for answer in (0, NO_PROGRESS):
        (folder / "out" / "PREEMPTED.json").write_text(stopped, encoding="utf-8")
        assert ask(folder, "end") == answer
        assert ask(folder, "begin") == answer
    assert [json.loads(line)["step"] for line in (folder / "starts.jsonl").read_text().splitlines()] == [0, 8, 8]


def test_no_progress_where_slurm_requeues(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nodes that die leave no PREEMPTED.json; the third start from one step is refused."""
    assert [ask(folder, "begin") for _ in range(3)] == [0, 0, NO_PROGRESS]
    assert "the last 2 starts of this job came no further than step 0;" in capsys.readouterr().err


def test_the_limit(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("DS_SFT_MAX_STALLS", "1")
    assert ask(folder, "begin") == 0
    stopped_at(folder, 0)
    assert ask(folder, "end") == NO_PROGRESS
    for wrong in ("0", "many"):
        monkeypatch.setenv("DS_SFT_MAX_STALLS", wrong)
        assert ask(folder, "begin") == 2
        assert f"DS_SFT_MAX_STALLS={wrong!r}: expected a whole number, 1 or more" in capsys.readouterr().err


def test_a_mistake_in_the_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(folder, "begin", "--max_lenght", "7") == 2
    assert capsys.readouterr().err == "ds_sft: error: --max_lenght: unknown key: did you mean --max_length?\n"
    assert not (folder / "starts.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"reason": "x"}', b'{"step": null}', b"\xff"])
def test_malformed_preempted(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    """That it is there says that the run was stopped; the newest checkpoint says where. One line, no traceback."""
    assert ask(folder, "begin") == 0
    stopped_at(folder, 10)
    (folder / "out" / "PREEMPTED.json").write_bytes(content)
    assert ask(folder, "end") == 0
    said = capsys.readouterr()
    assert said.out == "The run was stopped at step 10 (no reason given).\n"
    assert said.err.endswith("PREEMPTED.json: malformed; the newest complete checkpoint stands for its step\n")
    assert said.err.count("\n") == 1


def test_a_start_that_was_cut_off_while_it_was_noted(folder: Path) -> None:
    (folder / "starts.jsonl").write_text('{"step": 0}\n{"st\n', encoding="utf-8")
    assert ask(folder, "begin") == 0
    assert ask(folder, "begin") == NO_PROGRESS


@pytest.mark.parametrize(
    ("steps", "expected"), [([0], 0), ([0, 0], 1), ([0, 5], 0), ([5, 5, 5], 2), ([5, 5, 3], 0), ([0, 5, 5], 1)]
)
def test_stalls(steps: list[int], expected: int) -> None:
    assert stalls(steps) == expected
