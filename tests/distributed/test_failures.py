"""When a rank breaks, the whole run ends, soon, with its error as the last word and with nothing left running."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, Done, entry, run, run_forked, script
from tests.distributed.test_trajectory import engine

pytestmark = pytest.mark.distributed


def fail(model_dir: Path, folder: Path, launcher: str, name: str, fault: str, **changes: Any) -> Done:
    """Run until the fault; how it ended. `run` waits for all pipes: nothing is left running.

    Its time limit is far below `ddp_timeout`: whoever waits for a rank that is gone is found by it.
    """
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
    argv, env = [script("faulty"), *flags], {"FAULT": fault, "PYTHONPATH": str(ROOT)}
    if launcher == "forked":
        done = run_forked(argv, 2, cwd=folder, env=env)
    else:
        done = run([*entry(launcher, 2)[:-1], *argv], cwd=folder, env=env)
    assert fault.split()[1] == "slow" or "here is the fault" in done.output, done.output[-4000:]
    return done


@pytest.mark.parametrize("name", ["none", "zero2"])
def test_a_slow_rank_shows_as_waiting(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Each of the last two steps takes rank 1 three seconds, in which rank 0 waits: half of them on average.

    On a clock that stands still beside that, as other work would hold a rank up, too.
    """
    done = fail(model_dir, tmp_path, "forked", name, "train slow 1", num_predictions=0, save_strategy="no",
                per_device_train_batch_size=1)  # fmt: skip
    assert done.code == 0, done.output[-4000:]
    speed = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["speed"]
    parts = {name: speed[f"{name}_share"] for name in ("waiting", "communication", "other", "forward_backward")}
    assert parts == {"waiting": 0.5, "communication": 0.5, "other": 0.5, "forward_backward": 0.0}
    assert speed["seconds"] == 6.0


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
    done = fail(model_dir, tmp_path, launcher, name, f"{place} raise {rank}")
    assert done.code != 0
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
    done = fail(model_dir, tmp_path, launcher, name, f"{place} kill {rank}")
    assert done.code != 0
    assert re.search(r"Signal 9|SIGKILL|return code = -9|code: -9", done.output)


def test_out_of_memory_names_the_remedies(model_dir: Path, tmp_path: Path) -> None:
    done = fail(model_dir, tmp_path, "forked", "zero2", "train oom 1")
    assert done.code != 0
    assert "Out of memory: try a smaller per_device_train_batch_size" in done.output


def test_a_rank_that_hangs_ends_the_run_after_ddp_timeout(model_dir: Path, tmp_path: Path) -> None:
    done = fail(model_dir, tmp_path, "torchrun", "zero3", "train hang 1", ddp_timeout=40)
    assert done.code != 0
    assert "2 ranks; one that does not answer ends the run after 40 s (ddp_timeout)." in done.output
    assert "ds_sft: [rank 0 on " in done.output
    assert re.search(r"lost the other ranks \(.*(Timed out|timeout)", done.output), done.output[-3000:]
