"""What a user gets wrong, through the real entry: one line, said once, exit code 2, nothing left behind. And Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from ds_sft.ranks.stop import LAUNCHER_DIED
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, end_tree, entry, run, train, wait_until_gone

pytestmark = pytest.mark.distributed

GOOD = {"model_name_or_path": "MODEL", "train_file": "train.jsonl", "output_dir": "out", "num_predictions": 0}


def settings(model_dir: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    write_rows(folder / "train.jsonl", questions_and_answers(8))
    keys = {
        **GOOD,
        "model_name_or_path": str(model_dir),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        **changes,
    }
    return {name: value for name, value in keys.items() if value is not None}


MISTAKES = {
    "unknown key": ({"learning_rat": 1}, "run.yaml:2: unknown key 'learning_rat': did you mean learning_rate?"),
    "wrong type": ({"max_length": "long"}, "max_length: expected a whole number such as 2048, found 'long'"),
    "missing key": ({"train_file": None}, "missing: train_file"),
    "no such rows": ({"train_file": "none.jsonl"}, "none.jsonl: no such file (the current directory is "),
    "a folder without data": ({"train_file": str(ROOT / ".ci")}, ".ci: no data in it; expected .jsonl"),
    "a device": ({"train_file": "/dev/null"}, "/dev/null: is not a regular file"),
    "no such model": ({"model_name_or_path": "./none"}, "model_name_or_path: ./none: no such folder"),
    "no such engine": (
        {"deepspeed": "zero9.json"},
        "deepspeed: zero9.json: no such file; did you mean zero2?",
    ),
    "unwritable output": ({"output_dir": "/proc/none"}, "output_dir: /proc/none: cannot be written: "),
    "transformers' own": ({"optim": "adamw_nothing"}, "optim"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_code_2(model_dir: Path, tmp_path: Path, name: str) -> None:
    changes, said = MISTAKES[name]
    done = train("forked", None, settings(model_dir, tmp_path, **changes), cwd=tmp_path)
    assert done.code == 2
    (line,) = re.findall(r"ds_sft: error: .*", done.output)
    assert said in line
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_not_utf8(model_dir: Path, tmp_path: Path) -> None:
    config = settings(model_dir, tmp_path)
    (tmp_path / "train.jsonl").write_bytes('{"question": "é", "answer": "a"}\n'.encode("latin-1"))
    done = train("forked", None, config, cwd=tmp_path)
    assert done.code == 2
    assert "ds_sft: error: train.jsonl:1: not UTF-8: byte 0xe9 at column 15; save the file as UTF-8" in done.output


def test_skipped_rows_are_counted_and_the_run_goes_on(model_dir: Path, tmp_path: Path) -> None:
    config = settings(model_dir, tmp_path, on_bad_row="skip", max_steps=1, save_strategy="no", bf16=False)
    write_rows(tmp_path / "train.jsonl", [*questions_and_answers(4), "not json", {"question": 1, "answer": "a"}])
    done = train("forked", None, config, cwd=tmp_path)
    assert done.code == 0, done.output[-4000:]
    assert "skipped train.jsonl:5: not JSON" in done.output
    assert '"rows_dropped": {' in (tmp_path / "out" / "data_report.json").read_text()
    assert "rows dropped: not JSON" in done.output


@pytest.mark.parametrize(("launcher", "code"), [("torchrun", 1), ("deepspeed", 2)])
def test_launched_it_is_said_once(model_dir: Path, tmp_path: Path, launcher: str, code: int) -> None:
    """torchrun ends with 1 whatever its workers return."""
    done = train(launcher, 2, settings(model_dir, tmp_path, max_lenght=7), cwd=tmp_path)
    assert done.code == code
    assert done.output.count("ds_sft: error: ") == 1
    assert "unknown key 'max_lenght': did you mean max_length?" in done.output


def test_launcher_variables_that_are_half_there(model_dir: Path, tmp_path: Path) -> None:
    done = run([*entry("python"), "--config", "run.yaml"], cwd=tmp_path, env={"RANK": "0"})
    assert done.code == 2
    assert "ds_sft: error: environment: LOCAL_RANK is not set" in done.output


@pytest.mark.parametrize("launcher", ["python", "torchrun", "deepspeed"])
def test_ctrl_c_leaves_nothing_running_and_nothing_broken(model_dir: Path, tmp_path: Path, launcher: str) -> None:
    """A terminal sends SIGINT to every process in the foreground, once: the run saves and stops.

    torchrun passes it on, as its ranks have a session of their own. DeepSpeed's launcher answers it with SIGTERM to its
    ranks, and its runner dies of it: which of the three a busy rank sees first is up to the kernel.
    """
    ranks = 1 if launcher == "python" else 2
    write_rows(tmp_path / "train.jsonl", questions_and_answers(64))
    keys = settings(
        model_dir, tmp_path, bf16=False, num_train_epochs=1000, logging_steps=1, save_steps=5, save_total_limit=1
    )
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SWANLAB_MODE": "disabled"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*entry(launcher, ranks), *flags],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 400
            while not list(tmp_path.glob("out/checkpoint-*/manifest.json")):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
                assert process.poll() is None, (tmp_path / "log").read_text()[-4000:]
                time.sleep(0.2)
            family = [process, *psutil.Process(process.pid).children(recursive=True)]
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(200)
            wait_until_gone(family[1:], 200)
        finally:
            if process.poll() is None:
                end_tree(process.pid)
    output = (tmp_path / "log").read_text()
    assert (code == 0) == (launcher == "python")  # launchers return 1 when they were asked to stop
    if launcher == "python":
        assert "Traceback" not in output
    (reason,) = re.findall(r"Stopped \((.+)\) after step ", output)
    assert reason in (("SIGINT", "SIGTERM", LAUNCHER_DIED) if launcher == "deepspeed" else ("SIGINT",))
    assert "ending at once" not in output
    stopped = json.loads((tmp_path / "out" / "PREEMPTED.json").read_text())
    assert stopped["checkpoint"] == f"checkpoint-{stopped['step']}"
    assert (tmp_path / "out" / stopped["checkpoint"] / "manifest.json").exists()
    assert not list(tmp_path.rglob("*.tmp"))
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) >= 5
