"""When a rank breaks, the whole run ends, soon, with its error as the last word and with nothing left running."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, Done, entry, run
from tests.distributed.test_trajectory import engine

pytestmark = pytest.mark.distributed

LIMIT = 200.0  # seconds from the fault to the launcher's end on a busy machine; DeepSpeed's gives the others 30


def fail(model_dir: Path, folder: Path, launcher: str, name: str, fault: str, **changes: Any) -> tuple[Done, float]:
    """Run until the fault; how it ended, and the seconds since. `run` waits for all pipes: nothing is left running."""
    write_rows(folder / "train.jsonl", questions_and_answers(8))
    write_rows(folder / "eval.jsonl", questions_and_answers(3))
    keys: dict[str, Any] = {
        "model_name_or_path": model_dir,
        "train_file": "train.jsonl",
        "eval_file": "eval.jsonl",
        "output_dir": "out",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_train_epochs": 1,
        "bf16": False,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "logging_steps": 1,
        "verify_export": False,
        "num_predictions": 1,
        "predict_max_new_tokens": 4,
        **({"deepspeed": engine(name, folder)} if name != "none" else {}),
        **changes,
    }
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    command = [*entry(launcher, 2)[:-1], str(Path(__file__).with_name("faulty.py")), *flags]
    done = run(command, cwd=folder, timeout=500, env={"FAULT": fault, "PYTHONPATH": str(ROOT)})
    faults = re.findall(r"the fault at ([\d.]+) s", done.output)
    assert faults, done.output[-4000:]
    return done, time.time() - float(faults[0])


@pytest.mark.parametrize("name", ["none", "zero2"])
def test_a_slow_rank_shows_as_waiting(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Each of two steps takes rank 1 three seconds longer; rank 0 waits that long, half of it on average.

    What else holds a rank up, on a busy machine, counts as well: a second here or there is no fault.
    """
    done, _ = fail(model_dir, tmp_path, "torchrun", name, "train slow 1", num_predictions=0, save_strategy="no")
    assert done.code == 0, done.output[-4000:]
    speed = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["speed"]
    assert speed["waiting_share"] * speed["seconds"] == pytest.approx(3, abs=1)
    assert speed["communication_share"] >= speed["waiting_share"]


@pytest.mark.parametrize(
    ("launcher", "name", "place", "rank"),
    [
        ("torchrun", "zero3", "load", 1),
        ("torchrun", "zero3", "train", 1),
        ("deepspeed", "zero3", "eval", 1),
        ("torchrun", "zero2", "save", 0),
        ("deepspeed", "zero2", "train", 0),
        ("torchrun", "zero3", "export", 1),
        ("deepspeed", "zero3", "predict", 0),
        ("torchrun", "none", "train", 1),
    ],
)
def test_a_rank_that_raises(model_dir: Path, tmp_path: Path, launcher: str, name: str, place: str, rank: int) -> None:
    done, seconds = fail(model_dir, tmp_path, launcher, name, f"{place} raise {rank}")
    assert done.code != 0
    assert seconds < LIMIT
    assert f"ds_sft: [rank {rank} on " in done.output
    last = done.output.rindex(f"ValueError: a fault in {place}")
    assert not re.search(r"Connection closed|lost the other ranks|Timed out", done.output[last:])
    if launcher == "torchrun":  # the summary it ends with has the error, too
        assert last > done.output.index("Root Cause")


@pytest.mark.parametrize(
    ("launcher", "name", "place", "rank"),
    [
        ("deepspeed", "zero2", "load", 1),
        ("deepspeed", "zero3", "train", 1),
        ("torchrun", "zero3", "eval", 0),
        ("torchrun", "zero2", "save", 1),
        ("torchrun", "zero2", "predict", 0),
        ("deepspeed", "none", "train", 0),
    ],
)
def test_a_rank_that_is_killed(
    model_dir: Path, tmp_path: Path, launcher: str, name: str, place: str, rank: int
) -> None:
    done, seconds = fail(model_dir, tmp_path, launcher, name, f"{place} kill {rank}")
    assert done.code != 0
    assert seconds < LIMIT
    assert re.search(r"Signal 9|SIGKILL|return code = -9|code: -9", done.output)


def test_out_of_memory_names_the_remedies(model_dir: Path, tmp_path: Path) -> None:
    done, seconds = fail(model_dir, tmp_path, "torchrun", "zero2", "train oom 1")
    assert done.code != 0
    assert seconds < LIMIT
    assert "Out of memory: try a smaller per_device_train_batch_size" in done.output


def test_a_rank_that_hangs_ends_the_run_after_ddp_timeout(model_dir: Path, tmp_path: Path) -> None:
    done, seconds = fail(model_dir, tmp_path, "torchrun", "zero3", "train hang 1", ddp_timeout=40)
    assert done.code != 0
    assert 20 < seconds < 40 + 20 + LIMIT  # the time limit, the silence for a rank that may speak, the launcher
    assert "2 ranks; one that does not answer ends the run after 40 s (ddp_timeout)." in done.output
    assert "ds_sft: [rank 0 on " in done.output
    assert "lost the other ranks (" in done.output
