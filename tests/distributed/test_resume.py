"""A run that was stopped and resumed ends bit-equal to one that was not, wherever it was stopped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.conftest import questions_and_answers, write_rows
from tests.crash_campaign import metrics
from tests.distributed.harness import Done, run_forked, script
from tests.distributed.test_trajectory import engine

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs each

NUM_ROWS = 13  # 4 rows a step: four steps an epoch, the last of which has a single row
STEPS = 8


@pytest.fixture(scope="module")
def dropout_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual model with dropout: the state of the random numbers matters."""
    folder = tmp_path_factory.mktemp("dropout")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.config.attention_dropout = 0.1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def settings(model: Path, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Nothing of the schedule falls together: log every 3 steps, evaluate every 2, save every 5."""
    write_rows(folder / "train.jsonl", questions_and_answers(NUM_ROWS))
    write_rows(folder / "eval.jsonl", questions_and_answers(3))
    return {
        "model_name_or_path": model,
        "train_file": "train.jsonl",
        "eval_file": "eval.jsonl",
        "output_dir": "out",
        "system_prompt": "Answer.",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 if name == "plain" else 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "bf16": False,
        "logging_steps": 3,
        "eval_steps": 2,
        "save_steps": 5,
        "save_total_limit": 2,
        "num_predictions": 1,
        "predict_max_new_tokens": 4,
        "verify_export": False,
        **({"deepspeed": engine(name, folder)} if name.startswith("zero") else {}),
        **changes,
    }


def flags(keys: dict[str, Any], **changes: Any) -> list[str]:
    return [str(word) for key, value in {**keys, **changes}.items() for word in (f"--{key}", value)]


def job(
    keys: dict[str, Any], ranks: int | None, at: str = "", log: str = "log", file_limit: int = 0, **changes: Any
) -> dict[str, Any]:
    return {"argv": flags(keys, **changes), "ranks": ranks, "at": at, "log": log, "file_limit": file_limit}


def run_job(folder: Path, job: dict[str, Any]) -> Done:
    """One of them, from new ranks; what it says is added to its log."""
    env = {"AT": job["at"], "FILE_LIMIT": str(job["file_limit"]), "POISON": json.dumps(job.get("poison", {}))}
    done = run_forked([script("disturbed"), *job["argv"]], job["ranks"], cwd=folder, env=env)
    with (folder / job["log"]).open("a", encoding="utf-8") as log:
        log.write(done.output)
    return done


def run_jobs(folder: Path, jobs: list[dict[str, Any]], expected: int = 0) -> None:
    """Run them in `folder`, one after the other; every rank must end with the expected code."""
    for job in jobs:
        done = run_job(folder, job)
        assert set(done.codes) == {expected}, f"{done.codes} from {job}\n{done.output[-6000:]}"


def assert_bit_equal(out: Path, reference: Path) -> None:
    assert metrics(out) == metrics(reference)
    weights, wanted = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert weights.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []


def test_any_step_of_a_plain_run(dropout_dir: Path, tmp_path: Path) -> None:
    keys = settings(dropout_dir, tmp_path, "plain")
    jobs = [job(keys, None, output_dir="reference")]
    for step in range(1, STEPS + 1):
        jobs += [job(keys, None, f"step {step} SIGTERM 0", output_dir=f"out{step}", log=f"log{step}"),
                 job(keys, None, output_dir=f"out{step}", log=f"log{step}")]  # fmt: skip
    run_jobs(tmp_path, jobs)
    assert len(metrics(tmp_path / "reference")) == 2 + 4 + 1  # losses, validation losses, the summary
    for step in range(1, STEPS + 1):
        log = (tmp_path / f"log{step}").read_text(encoding="utf-8")
        assert f"Stopped (SIGTERM) after step {step}; out{step}/checkpoint-{step} is complete." in log
        assert f"Resuming from out{step}/checkpoint-{step}, step {step}, the newest usable checkpoint." in log
        assert_bit_equal(tmp_path / f"out{step}", tmp_path / "reference")
        assert not (tmp_path / f"out{step}" / "PREEMPTED.json").exists()


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_several_stops_of_two_ranks(dropout_dir: Path, tmp_path: Path, name: str) -> None:
    """In the middle of an epoch, during an evaluation, at the end of an epoch; one rank is told, both stop."""
    keys = settings(dropout_dir, tmp_path, name)
    jobs = [job(keys, 2, output_dir="reference"), job(keys, 2, "step 1 SIGUSR1 1"), job(keys, 2, "eval 2 SIGTERM 0"),
            job(keys, 2, "step 4 SIGINT 1"), job(keys, 2, "save 5 SIGTERM 1"), job(keys, 2)]  # fmt: skip
    run_jobs(tmp_path, jobs)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    stops = re.findall(r"Stopped \([^;]*", log)
    assert stops == ["Stopped (SIGUSR1) after step 1", "Stopped (SIGTERM) after step 2",
                     "Stopped (SIGINT) after step 4", "Stopped (SIGTERM) after step 6"]  # fmt: skip
    assert_bit_equal(tmp_path / "out", tmp_path / "reference")
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    before = json.loads((tmp_path / "out" / "checkpoint-6" / "manifest.json").read_text(encoding="utf-8"))["tokens"]
    now = record["speed"]["tokens"]
    assert record["tokens"] == before + now
    assert 0 < now < record["tokens"] / 2
    speed = record["speed"]
    assert speed["seconds"] == pytest.approx(now / record["tokens_per_second"], abs=0.01, rel=1e-3)  # rounded
    assert speed["seconds"] < record["train_seconds"]  # which has the evaluations, too
    assert f"tokens; {now:,} of them in this start in " in log


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_epochs_and_the_best_model(dropout_dir: Path, tmp_path: Path, strategy: str) -> None:
    """What belongs to the end of an epoch happens once: its log entry, its evaluation, its checkpoint."""
    how = "epoch" if strategy == "epoch" else "steps"
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    keys = settings(dropout_dir, tmp_path, "plain", eval_strategy=how, logging_strategy=how, save_strategy=strategy,
                    save_total_limit=1, learning_rate=1e-2, **best)  # fmt: skip
    jobs = [job(keys, None, output_dir="reference"), job(keys, None, "step 4 SIGTERM 0"),
            job(keys, None, "eval 4 SIGTERM 0"), job(keys, None, "eval 8 SIGTERM 0"), job(keys, None)]  # fmt: skip
    run_jobs(tmp_path, jobs)
    assert_bit_equal(tmp_path / "out", tmp_path / "reference")
    results = [json.loads((tmp_path / out / "run.json").read_text()) for out in ("out", "reference")]
    assert results[0]["best_checkpoint"] == results[1]["best_checkpoint"] is not None
    assert results[0]["tokens"] == results[1]["tokens"]


def test_stops_outside_of_steps(model_dir: Path, tmp_path: Path) -> None:
    """While rows are encoded, before the first step, while answers are generated: at once, and nothing is lost."""
    keys = settings(model_dir, tmp_path, "ddp", cache_dir="cache")
    places = [
        "encode 0 SIGTERM 0",
        "encode 0 SIGTERM 1",
        "start 0 SIGUSR1 1",
        "eval 0 SIGTERM 0",
        "predict 0 SIGTERM 0",
    ]
    jobs = [job(keys, 2, at, log=f"log{n}", eval_on_start=True) for n, at in enumerate(places)]
    run_jobs(tmp_path, [*jobs, job(keys, 2, log="log5"), job(keys, 2, log="log6")])
    logs = [(tmp_path / f"log{n}").read_text(encoding="utf-8") for n in range(7)]
    for log in logs[:4]:
        assert log.count(") before the first save. The same command goes on from there.") == 1
    assert logs[4].count(f"Stopped (SIGTERM) after step {STEPS}; out/checkpoint-{STEPS} is complete.") == 1
    assert f"Resuming from out/checkpoint-{STEPS}, step {STEPS}" in logs[5]
    assert logs[5].count("Answered 1 of 1") == 1
    assert json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))["tokens_per_second"] is None
    assert "tokens; 0 of them in this start.\n" in logs[5]
    assert logs[6].count("This run is finished: out holds its model.") == 1
    assert "Answered" not in logs[6]


@pytest.mark.parametrize(("name", "ranks", "late"), [("plain", None, "export"), ("zero3", 2, "predict")])
def test_a_stop_after_the_last_step_of_a_run_that_saves_nothing(
    dropout_dir: Path, tmp_path: Path, name: str, ranks: int | None, late: str
) -> None:
    """Before the export it saves; from there on the weights stay, and the same command puts them to use."""
    keys = settings(dropout_dir, tmp_path, name, save_strategy="no")
    run_jobs(tmp_path, [job(keys, ranks, output_dir="reference"),
                        job(keys, ranks, f"end {STEPS} SIGINT {(ranks or 1) - 1}", log="log0"),
                        job(keys, ranks, f"{late} 0 SIGTERM 0", output_dir="late", log="log1")])  # fmt: skip
    assert [path.name for path in tmp_path.glob("*/checkpoint-*")] == [f"checkpoint-{STEPS}"]
    left = [json.loads((tmp_path / out / "PREEMPTED.json").read_text("utf-8")) for out in ("out", "late")]
    assert [(one["step"], one["checkpoint"]) for one in left] == [(STEPS, f"checkpoint-{STEPS}"), (STEPS, None)]
    exported = (tmp_path / "late" / "model.safetensors").stat().st_mtime_ns
    run_jobs(tmp_path, [job(keys, ranks, log="log2"), job(keys, ranks, output_dir="late", log="log3")])
    logs = [(tmp_path / f"log{n}").read_text(encoding="utf-8") for n in range(4)]
    assert logs[0].count(f"Stopped (SIGINT) after step {STEPS}; out/checkpoint-{STEPS} is complete. The same ") == 1
    assert logs[1].count(
        f"Stopped (SIGTERM) after step {STEPS}, the last; late has the weights, verification or answers are left. "
        "The same command goes on from there."
    ) == 1  # fmt: skip
    assert f"Resuming from out/checkpoint-{STEPS}, step {STEPS}" in logs[2]
    assert logs[3].count("This run is trained, late has its weights: going on with verification and answers.") == 1
    assert (tmp_path / "late" / "model.safetensors").stat().st_mtime_ns == exported  # nothing is trained again
    for out, log in (("out", logs[2]), ("late", logs[3])):
        assert log.count("Answered 1 of 1") == 1
        assert_bit_equal(tmp_path / out, tmp_path / "reference")
        assert json.loads((tmp_path / out / "run.json").read_text(encoding="utf-8"))["steps"] == STEPS
        assert not [name for name in ("PREEMPTED.json", "exported.json") if (tmp_path / out / name).exists()]


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3"])
def test_another_number_of_ranks(model_dir: Path, tmp_path: Path, name: str) -> None:
    """1, 2 and 4 ranks after 2, from the middle of an epoch whose last step they cannot share out evenly."""
    keys = settings(model_dir, tmp_path, name, logging_steps=1, eval_strategy="no", max_grad_norm=0.5)
    run_jobs(tmp_path, [job(keys, 2, output_dir="reference"), job(keys, 2, "step 2 SIGTERM 0")])
    jobs = []
    for ranks in (1, 4):
        shutil.copytree(tmp_path / "out", tmp_path / f"out{ranks}")
        jobs.append(job(keys, ranks, output_dir=f"out{ranks}", log=f"log{ranks}"))
    if name == "zero3":  # and back again; the converted copy is found
        shutil.copytree(tmp_path / "out", tmp_path / "again")
        jobs += [job(keys, 1, "step 5 SIGTERM 0", output_dir="again", log="log-a"),
                 job(keys, 2, output_dir="again", log="log-a")]  # fmt: skip
    run_jobs(tmp_path, jobs)
    losses = [row["loss"] for row in metrics(tmp_path / "reference") if "loss" in row]
    assert len(losses) == STEPS
    for out in ["out1", "out4"] + (["again"] if name == "zero3" else []):
        assert [row["loss"] for row in metrics(tmp_path / out) if "loss" in row] == pytest.approx(losses, rel=1e-5)
        wanted = load_file(tmp_path / "reference" / "model.safetensors")
        for key, value in load_file(tmp_path / out / "model.safetensors").items():
            torch.testing.assert_close(value, wanted[key], rtol=1e-4, atol=2e-5, msg=key)
    log = (tmp_path / "log4").read_text(encoding="utf-8")
    assert log.count("gradient_accumulation_steps is set to 1, so that a step keeps its 4 rows.") == 1


def test_a_number_of_ranks_that_cannot_keep_the_batch(model_dir: Path, tmp_path: Path) -> None:
    """Of two numbers: of ranks, and of rows in a micro batch."""
    keys = settings(model_dir, tmp_path, "ddp")
    run_jobs(tmp_path, [job(keys, 2, "step 1 SIGTERM 0")])
    run_jobs(tmp_path, [job(keys, None, per_device_train_batch_size=3)], expected=2)
    log = (tmp_path / "log").read_text(encoding="utf-8")
    said = "learned from 4 rows a step, which 1 ranks x 3 rows (per_device_train_batch_size) cannot make up."
    assert f"{said} What can: 1 ranks with per_device_train_batch_size 3" not in log
    assert f"{said} What can: no number of ranks with per_device_train_batch_size 3; 1 ranks with " in log
    assert "1 ranks with per_device_train_batch_size 1, 2, 4" in log


def test_packed_rows_in_the_order_of_their_lengths(dropout_dir: Path, tmp_path: Path) -> None:
    keys = settings(dropout_dir, tmp_path, "plain", packing="concat", max_length=160, gradient_accumulation_steps=2,
                    train_sampling_strategy="group_by_length")  # fmt: skip
    run_jobs(tmp_path, [job(keys, None, output_dir="reference"), job(keys, None, "step 2 SIGTERM 0"),
                        job(keys, None, "step 3 SIGTERM 0"), job(keys, None)])  # fmt: skip
    assert "Stopped (SIGTERM) after step 3" in (tmp_path / "log").read_text(encoding="utf-8")
    assert_bit_equal(tmp_path / "out", tmp_path / "reference")


def filled(model: Path, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Seven micro batches an epoch, four in a step: in the last of an epoch a rank has none."""
    keys = settings(model, folder, name, max_tokens_per_batch=100, logging_steps=1, **changes)
    del keys["per_device_train_batch_size"]
    return keys


def test_micro_batches_that_tokens_fill(dropout_dir: Path, tmp_path: Path) -> None:
    keys = filled(dropout_dir, tmp_path, "zero2")
    run_jobs(tmp_path, [job(keys, 2, output_dir="reference"), job(keys, 2, "step 1 SIGTERM 0"),
                        job(keys, 2, "step 3 SIGTERM 1"), job(keys, 2)])  # fmt: skip
    assert "Stopped (SIGTERM) after step 3" in (tmp_path / "log").read_text(encoding="utf-8")
    assert_bit_equal(tmp_path / "out", tmp_path / "reference")
    manifest = json.loads((tmp_path / "reference" / "checkpoint-4" / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["samples"], manifest["rows_a_step"], manifest["micro_batches_a_step"]) == (2 * NUM_ROWS, None, 4)


def test_another_number_of_ranks_shares_the_micro_batches(model_dir: Path, tmp_path: Path) -> None:
    keys = filled(model_dir, tmp_path, "ddp", eval_strategy="no")
    run_jobs(tmp_path, [job(keys, 2, output_dir="reference"), job(keys, 2, "step 1 SIGTERM 0")])
    run_jobs(tmp_path, [job(keys, None, log="log0", max_tokens_per_batch=200)], expected=2)
    run_jobs(tmp_path, [job(keys, 1, log="log1")])
    losses = [[row["loss"] for row in metrics(tmp_path / out) if "loss" in row] for out in ("out", "reference")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 4
    logs = [(tmp_path / f"log{n}").read_text(encoding="utf-8") for n in (0, 1)]
    assert "out/checkpoint-1 is of another run, which differs in: max_tokens_per_batch: 100 -> 200" in logs[0]
    assert "gradient_accumulation_steps is set to 4, so that a step keeps its 4 micro batches." in logs[1]


def test_a_save_that_fails(model_dir: Path, tmp_path: Path) -> None:
    """Files may have 600 kB: the weights fit, the optimizer's state does not."""
    keys = settings(model_dir, tmp_path, "plain")
    run_jobs(tmp_path, [job(keys, None, output_dir="reference"), job(keys, None, "step 2 SIGTERM 0")])
    run_jobs(tmp_path, [job(keys, None, log="failed", file_limit=600_000)], expected=2)
    (error,) = [line for line in (tmp_path / "failed").read_text("utf-8").splitlines() if "ds_sft: error: " in line]
    assert "ds_sft: error: out/checkpoint-5 could not be saved: " in error
    assert "; the newest complete one is out/checkpoint-2 (on_save_error: continue would train on)" in error
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    run_jobs(tmp_path, [job(keys, None, log="failed", file_limit=600_000, on_save_error="continue")])
    log = (tmp_path / "failed").read_text(encoding="utf-8")
    assert log.count("Warning: out/checkpoint-5 could not be saved: ") == 1
    assert "missing keys" not in log  # the tied head, which is in no file
    assert log.count("Training on (on_save_error: continue).") == 2
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert_bit_equal(tmp_path / "out", tmp_path / "reference")


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_save_that_fails_on_every_rank(model_dir: Path, tmp_path: Path, name: str) -> None:
    """DeepSpeed's barriers between the files are met in spite of it: nothing hangs, and the run goes on."""
    keys = settings(model_dir, tmp_path, name, eval_strategy="no")
    run_jobs(tmp_path, [job(keys, 2, file_limit=550_000, on_save_error="continue")])
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert log.count("Warning: out/checkpoint-5 could not be saved: ") == 1
    assert log.count("there is no older one. Training on (on_save_error: continue).") == 2
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert (tmp_path / "out" / "run.json").exists()
