"""A step that is no number, under every engine: named, not kept, and resumed or trained past as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_sft.training.nonfinite import MAX_IN_A_ROW
from tests.conftest import write_rows
from tests.crash_campaign import metrics
from tests.distributed.test_resume import assert_bit_equal, job, run_job
from tests.distributed.test_trajectory import LEARNING_RATE, ROWS, Reference, bare_pytorch, engine, settings

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs

MARK, BAD_ROW, BAD_STEP = "~", 20, 3  # eight rows a step, in the order of the file
RANKS = {"plain": None, "ddp": 2, "zero0": 2, "zero1": 2, "zero2": 2, "zero3": 2, "zero2_offload": 2,
         "zero3_offload": 2}  # fmt: skip
STOPPED, SKIPPED = ["plain", "ddp", "zero2", "zero3"], [name for name in RANKS if name != "zero0"]
INFINITE, RESUMED = ["ddp", "zero3"], ["plain", "zero2"]


@pytest.fixture(scope="module")
def folder(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, one after the other; each has a log and an exit code of its ranks."""
    folder = tmp_path_factory.mktemp("nonfinite")
    (token,) = AutoTokenizer.from_pretrained(model_dir).encode(MARK, add_special_tokens=False)
    found = {}
    for made in plan(model_dir, folder):
        done = run_job(folder, made | {"poison": {token: made["poison"]} if made["poison"] else {}})
        found[made["log"]] = sorted(set(done.codes))
    (folder / "codes.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def plan(model_dir: Path, folder: Path) -> list[dict[str, Any]]:
    jobs = []
    for name in STOPPED:
        keys = keys_of(model_dir, folder, name, bf16=True, save_strategy="steps", save_steps=2, logging_steps=4)
        jobs += [start(keys, name, f"{name}-reference"), start(keys, name, f"{name}-stop", "nan"),
                 start(keys, name, f"{name}-resumed", output_dir=f"{name}-stop")]  # fmt: skip
    for name in SKIPPED:
        keys = keys_of(model_dir, folder, name, on_nonfinite="skip", logging_steps=1)
        jobs.append(start(keys, name, f"{name}-skip", "inf" if name in INFINITE else "nan"))
    for name in ("ddp", "zero0"):
        jobs.append(start(keys_of(model_dir, folder, name, save_strategy="steps", save_steps=1), name,
                          f"{name}-gradient", "gradient"))  # fmt: skip
    for name in RESUMED:
        keys = keys_of(model_dir, folder, name, on_nonfinite="skip", logging_steps=4)
        jobs += [start(keys, name, f"{name}-whole", "nan"),
                 start(keys, name, f"{name}-first", "nan", at="step 3 SIGTERM 0", output_dir=f"{name}-again"),
                 start(keys, name, f"{name}-second", "nan", output_dir=f"{name}-again")]  # fmt: skip
    every = keys_of(model_dir, folder, "plain", on_nonfinite="skip", train_file="marked.jsonl", max_steps=7,
                    eval_strategy="no", eval_file="null", gradient_accumulation_steps=2)  # fmt: skip
    return [*jobs, start(every, "plain", "every", "nan")]


def keys_of(model_dir: Path, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    accumulation = 4 if RANKS[name] is None else 2
    keys = settings(model_dir, folder, "none", 2, accumulation, **changes)
    if name.startswith("zero"):
        keys["deepspeed"] = engine_file(name, folder)
    marked = [{**row, "answer": row["answer"] + MARK} for row in ROWS]
    write_rows(folder / "marked.jsonl", marked)
    write_rows(folder / "train.jsonl", [marked[i] if i == BAD_ROW else row for i, row in enumerate(ROWS)])
    return keys


def engine_file(name: str, folder: Path) -> str:
    """A file of its own for each; with PyTorch's Adam where DeepSpeed would compile one."""
    content = json.loads((folder / str(engine(name, folder))).read_text(encoding="utf-8"))
    if "offload" in name:
        content["zero_force_ds_cpu_optimizer"] = False
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return f"{name}.json"


def start(
    keys: dict[str, Any], name: str, log: str, poison: str = "", at: str = "", output_dir: str = ""
) -> dict[str, Any]:
    return job(keys, RANKS[name], at, log=f"{log}.log", output_dir=output_dir or log) | {"poison": poison}


def said(folder: Path, log: str) -> str:
    return (folder / f"{log}.log").read_text(encoding="utf-8")


def codes(folder: Path, log: str) -> list[int]:
    known: dict[str, list[int]] = json.loads((folder / "codes.json").read_text(encoding="utf-8"))
    return known[f"{log}.log"]


ROWS_OF_IT = "train.jsonl:17, train.jsonl:21, train.jsonl:23, train.jsonl:24"  # the micro batch of BAD_ROW


@pytest.mark.parametrize("name", STOPPED)
def test_the_run_ends_and_goes_on_from_the_checkpoint_before(folder: Path, name: str) -> None:
    """Nothing is logged before the last step, so without DeepSpeed the norm of step 3 is read in step 4."""
    out, log = folder / f"{name}-stop", said(folder, f"{name}-stop")
    assert codes(folder, f"{name}-stop") == [1]
    (error,) = [line for line in log.splitlines() if line.startswith("ds_sft: ")]
    assert error == (
        f"ds_sft: error: step 3: the loss is nan on rank 0 ({ROWS_OF_IT}). Nothing of this step is kept; "
        f"{out.name}/checkpoint-2 is complete. Look at its rows, and at learning_rate; on_nonfinite: skip would "
        "leave the step out"
    )
    assert "Traceback" not in log
    resumed = said(folder, f"{name}-resumed")
    assert codes(folder, f"{name}-resumed") == [0]
    assert f"Resuming from {out.name}/checkpoint-2, step 2, the newest usable checkpoint." in resumed
    assert_bit_equal(out, folder / f"{name}-reference")


@pytest.mark.parametrize("name", ["ddp", "zero0"])
def test_gradients_that_are_no_numbers(folder: Path, name: str) -> None:
    """Of finite losses; the checkpoint of each good step stays, and what is in it is finite."""
    assert codes(folder, f"{name}-gradient") == [1]
    wanted = f"step 3: all losses are finite, the norm of the gradients is nan. Nothing of this step is kept; {name}-"
    assert said(folder, f"{name}-gradient").count(f"ds_sft: error: {wanted}gradient/checkpoint-2 is complete. ") == 1
    out = folder / f"{name}-gradient"
    assert sorted(path.parent.name for path in out.glob("*/manifest.json")) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert all(value.isfinite().all() for value in load_file(out / "checkpoint-2" / "model.safetensors").values())
    assert [row["step"] for row in metrics(out)] == [1, 2]
    assert not (out / "run.json").exists()


@pytest.fixture(scope="module")
def left_out(model_dir: Path) -> Reference:
    return bare_pytorch(model_dir, left_out=BAD_STEP - 1)


@pytest.mark.parametrize("name", SKIPPED)
def test_a_step_that_is_left_out(folder: Path, left_out: Reference, name: str) -> None:
    """The weights are those of bare PyTorch that never took the step; losses and counts say so."""
    kind = "inf" if name in INFINITE else "nan"
    assert codes(folder, f"{name}-skip") == [0]
    said_once = f"Warning: step 3: the loss is {kind} on rank 0 ({ROWS_OF_IT}). Its update is left out; 1 so far."
    assert said(folder, f"{name}-skip").count(said_once) == 1
    out = folder / f"{name}-skip"
    rows = [row for row in metrics(out) if "loss" in row]
    assert [row["loss"] for row in rows if row["step"] != BAD_STEP] == pytest.approx(left_out.losses, rel=1e-5)
    assert (rows[2]["loss"], rows[2]["grad_norm"]) == (None, None)
    assert [row.get("skipped_steps") for row in rows] == [None, None, 1, 1]
    assert metrics(out)[-1]["train_loss"] == pytest.approx(sum(left_out.losses) / 3, rel=1e-5)
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["skipped_steps"] == 1
    weights = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    for key, value in left_out.weights.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=LEARNING_RATE * 2e-2, msg=key)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_stopped_behind_a_step_left_out(folder: Path, left_out: Reference, name: str) -> None:
    """Bit-equal, and the one log entry is the mean of the steps that were applied."""
    assert [codes(folder, f"{name}-{part}") for part in ("whole", "first", "second")] == [[0]] * 3
    assert "Resuming from " in said(folder, f"{name}-second")
    assert_bit_equal(folder / f"{name}-again", folder / f"{name}-whole")
    (row,) = [row for row in metrics(folder / f"{name}-again") if "loss" in row]
    assert (row["loss"], row["skipped_steps"]) == (pytest.approx(sum(left_out.losses) / 3, rel=1e-5), 1)


def test_too_many_in_a_row(folder: Path) -> None:
    log = said(folder, "every")
    assert codes(folder, "every") == [1]
    assert log.count("Its update is left out; ") == MAX_IN_A_ROW - 1 == 4
    (error,) = [line for line in log.splitlines() if line.startswith("ds_sft: ")]
    assert error == (
        "ds_sft: error: step 5: the loss is nan on rank 0 (marked.jsonl:18); nan on rank 0 (marked.jsonl:17, "
        "marked.jsonl:19, marked.jsonl:20). Nothing of this step is kept; no checkpoint was saved before it. All "
        "losses of the step are none: the weights were no numbers before it, as a rule. Look at learning_rate; it "
        "is step 5 of this kind in a row, where on_nonfinite: skip ends, too"
    )
    assert [(row["step"], row["loss"]) for row in metrics(folder / "every")] == [(n, None) for n in (1, 2, 3, 4)]
