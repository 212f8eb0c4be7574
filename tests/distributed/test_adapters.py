"""Runs with frozen weights under every engine: their checkpoints have what is trained alone, and go on bit-equal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ds_sft.commands.export import main as export
from tests.conftest import questions_and_answers, write_rows
from tests.crash_campaign import metrics
from tests.distributed.harness import listing
from tests.distributed.test_nonfinite import engine_file
from tests.distributed.test_resume import NUM_ROWS, STEPS, dropout_dir, job, run_job, settings

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs
__all__ = ["dropout_dir"]  # a fixture

RANKS = {"plain": None, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "zero2_offload": 2, "zero3_offload": 2}
LORA = {"adapter": "lora", "lora_rank": 4, "lora_dropout": 0.1, "merge": "no"}
LAYERS = {"train_only": "[layers.1.mlp, model.norm]"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
WITH_LAYERS = ["plain", "zero2", "zero3"]
OTHER_RANKS = ["ddp", "zero2", "zero3"]
SPOILT = ["ddp", "zero1"]  # by a loss that is no number
RECOMPUTED = {  # what the other runs do is recomputing without reentrance
    "whole": (["plain", "zero3"], {"activation_checkpointing": False}),
    "reentrant": (["plain", "ddp", "zero2", "zero3"], {"activation_checkpointing_kwargs": '{"use_reentrant": true}'}),
}
LATER = "zero2"  # merged by a start after the last step
MARK, MARKED = "~", 3  # in a row of the third step


@pytest.fixture(scope="module")
def folder(model_dir: Path, dropout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, one after the other."""
    folder = tmp_path_factory.mktemp("adapters")
    jobs = [made for name in RANKS for made in stopped_and_resumed(dropout_dir, folder, name, "lora", LORA)]
    for name in WITH_LAYERS:
        jobs += stopped_and_resumed(dropout_dir, folder, name, "layers", {**LAYERS, **BEST, "save_steps": 2})
    for name in OTHER_RANKS:
        keys = keys_of(model_dir, folder, name, {**LORA, "lora_dropout": 0, "bf16": False, "save_steps": 5})
        jobs += [job(keys, 2, log=f"{name}-two.log", output_dir=f"{name}-two"),
                 job(keys, 1, log=f"{name}-one.log", output_dir=f"{name}-one",
                     resume=f"{name}-two/checkpoint-5")]  # fmt: skip
    for kind, (names, changes) in RECOMPUTED.items():
        for name in names:
            keys = keys_of(dropout_dir, folder, name, {**LORA, **changes, "max_steps": 2, "save_strategy": "no"})
            jobs.append(job(keys, RANKS[name], log=f"{name}-{kind}.log", output_dir=f"{name}-{kind}"))
    keys = keys_of(dropout_dir, folder, LATER, {**LORA, "merge": "yes"})
    jobs.append(job(keys, RANKS[LATER], log="later.log", output_dir=f"{LATER}-lora"))
    (token,) = AutoTokenizer.from_pretrained(model_dir).encode(MARK, add_special_tokens=False)
    for name in SPOILT:
        keys = keys_of(dropout_dir, folder, name, {**LORA, "save_steps": 1})
        spoilt = job(keys, RANKS[name], log=f"{name}-spoilt.log", output_dir=f"{name}-spoilt")
        jobs += [spoilt | {"poison": {token: "nan"}},
                 job(keys, RANKS[name], log=f"{name}-again.log", output_dir=f"{name}-spoilt")]  # fmt: skip
    rows = questions_and_answers(NUM_ROWS)
    rows[MARKED]["answer"] += MARK
    write_rows(folder / "train.jsonl", rows)
    run_all(folder, jobs)
    return folder


def stopped_and_resumed(
    model: Path, folder: Path, name: str, kind: str, changes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A run that nobody stops, and one that is stopped in the middle of an epoch."""
    keys, ranks, label = keys_of(model, folder, name, changes), RANKS[name], f"{name}-{kind}"
    merged = {"merge": "yes"} if "adapter" in keys else {}
    return [
        job({**keys, **merged}, ranks, log=f"{label}-reference.log", output_dir=f"{label}-reference"),
        job(keys, ranks, "step 1 SIGTERM 0", log=f"{label}-stop.log", output_dir=label),
        job(keys, ranks, log=f"{label}-resumed.log", output_dir=label),
    ]


def keys_of(model: Path, folder: Path, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    common = {"bf16": True, "logging_steps": 1, "num_predictions": 0, "save_steps": STEPS}
    keys = settings(model, folder, "plain" if RANKS[name] is None else "ddp", **{**common, **changes})
    return keys | ({"deepspeed": engine_file(name, folder)} if name.startswith("zero") else {})


def run_all(folder: Path, jobs: list[dict[str, Any]]) -> None:
    for made in jobs:
        done = run_job(folder, made)
        expected = 1 if made.get("poison") else 0
        assert set(done.codes) == {expected}, f"{done.codes} from {made}\n{done.output[-2500:]}"


def tensors(folder: Path, label: str, step: int) -> dict[str, torch.Tensor]:
    file = "trained.safetensors" if "layers" in label else "adapter_model.safetensors"
    return load_file(folder / label / f"checkpoint-{step}" / file)


def losses(folder: Path, label: str) -> list[float]:
    return [row["loss"] for row in metrics(folder / label) if "loss" in row]


def assert_equal_runs(folder: Path, label: str, reference: str) -> None:
    found, wanted = (tensors(folder, run, STEPS) for run in (label, reference))
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert metrics(folder / label) == metrics(folder / reference)


def assert_went_on_as_if_never_stopped(folder: Path, label: str) -> None:
    assert_equal_runs(folder, label, f"{label}-reference")
    log = (folder / f"{label}-resumed.log").read_text(encoding="utf-8")
    assert f"Resuming from {label}/checkpoint-1, step 1, the newest usable checkpoint." in log
    assert "missing" not in log.lower()


@pytest.mark.parametrize("name", RANKS)
def test_an_adapter_goes_on_bit_equal(folder: Path, name: str) -> None:
    """Stopped in the middle of an epoch, with dropout in attention and before the adapters."""
    assert_went_on_as_if_never_stopped(folder, f"{name}-lora")
    before, after = (tensors(folder, f"{name}-lora", step) for step in (1, STEPS))
    assert [name for name, value in after.items() if torch.equal(before[name], value)] == []  # all of it learns


OF_ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "generation_config.json",
              "tokenizer.json", "tokenizer_config.json", "trained_on.json"]  # fmt: skip
OF_MODEL = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
            "tokenizer_config.json"]  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_a_run_and_its_checkpoint_end_in_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Adapter, merged model and what is beside them, whatever engine was in the process that merged before."""
    monkeypatch.chdir(folder)
    run, out = folder / f"{name}-lora-reference", tmp_path / "out"
    assert export([str(run / f"checkpoint-{STEPS}"), str(out)]) == 0
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert [file for file in files if (out / file).read_bytes() != (run / file).read_bytes()] == []
    assert files == [f"adapter/{file}" for file in OF_ADAPTER] + OF_MODEL


def test_a_finished_run_is_merged_when_it_is_asked_for(folder: Path) -> None:
    log = (folder / "later.log").read_text(encoding="utf-8")
    assert f"This run is finished: {LATER}-lora holds its adapter. (--resume never trains it anew.)\n" in log
    assert f"Merged model is in {LATER}-lora (bfloat16).\n" in log
    merged, wanted = (folder / f"{LATER}-lora{run}" / "model.safetensors" for run in ("", "-reference"))
    assert merged.read_bytes() == wanted.read_bytes()
    results = json.loads((folder / f"{LATER}-lora" / "run.json").read_text(encoding="utf-8"))
    assert results["adapter"]["not_merged"] is None


OF_A_RANK = ["rng_state_0.pth", "rng_state_1.pth"]
BESIDE = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manifest.json", "scheduler.pt",
          "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin"]  # fmt: skip
OF_DEEPSPEED = ["latest", "global_step1"]


@pytest.mark.parametrize("name", RANKS)
def test_a_checkpoint_has_what_is_trained_alone(folder: Path, name: str) -> None:
    """The base has 74,000 weights in 16 bits; its adapter of rank 4 has 8,192 of 32 bits, and two states of each."""
    checkpoint = folder / f"{name}-lora" / "checkpoint-1"
    own = ["rng_state.pth", "optimizer.pt"] if name == "plain" else [*OF_A_RANK, "optimizer.pt"]
    others = own if RANKS[name] is None or name == "ddp" else [*OF_A_RANK, *OF_DEEPSPEED]
    assert listing(checkpoint) == sorted([*BESIDE, *others])
    saved = tensors(folder, f"{name}-lora", 1)
    assert sum(value.numel() for value in saved.values()) == 8192
    assert {value.dtype for value in saved.values()} == {torch.float32}


@pytest.mark.parametrize("name", WITH_LAYERS)
def test_some_layers_go_on_bit_equal_and_the_best_of_them_is_exported(folder: Path, name: str) -> None:
    """What the measure prefers is the first checkpoint that was measured, not the last."""
    label = f"{name}-layers"
    assert_went_on_as_if_never_stopped(folder, label)
    checkpoint, exported = tensors(folder, label, 2), load_file(folder / label / "model.safetensors")
    assert listing(folder / label / "checkpoint-2").count("trained.safetensors") == 1
    assert not list((folder / label / "checkpoint-2").glob("model*.safetensors"))
    assert sorted(checkpoint) == [f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")] + [
        "model.norm.weight"
    ]
    assert all(torch.equal(exported[name], value.bfloat16()) for name, value in checkpoint.items())
    assert not torch.equal(checkpoint["model.norm.weight"], tensors(folder, label, STEPS)["model.norm.weight"])
    assert json.loads((folder / label / "run.json").read_text("utf-8"))["best_checkpoint"] == "checkpoint-2"


@pytest.mark.parametrize("name", OTHER_RANKS)
def test_another_number_of_ranks_goes_on(folder: Path, name: str) -> None:
    """Two ranks saved it, one goes on: the same rows, losses and adapter."""
    two, one = (losses(folder, f"{name}-{n}")[-3:] for n in ("two", "one"))
    assert one == pytest.approx(two, rel=1e-5)
    wanted = tensors(folder, f"{name}-two", STEPS)
    for part, value in tensors(folder, f"{name}-one", STEPS).items():
        torch.testing.assert_close(value, wanted[part], rtol=1e-4, atol=2e-5, msg=part)
    log = (folder / f"{name}-one.log").read_text(encoding="utf-8")
    assert log.count("gradient_accumulation_steps is set to 4, so that a step keeps its 4 rows.") == 1
    assert log.count("(once; DeepSpeed's universal checkpoint).") == (name != "ddp")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (names, _) in RECOMPUTED.items() for name in names])
def test_gradients_reach_adapters_however_layers_are_recomputed(folder: Path, kind: str, name: str) -> None:
    """No input of the first layer has a gradient by itself. A second step's loss shows what the first has changed."""
    assert losses(folder, f"{name}-{kind}") == pytest.approx(losses(folder, f"{name}-lora-reference")[:2], rel=1e-6)


@pytest.mark.parametrize("name", SPOILT)
def test_a_loss_that_is_no_number_loses_nothing(folder: Path, name: str) -> None:
    log, again = ((folder / f"{name}-{n}.log").read_text(encoding="utf-8") for n in ("spoilt", "again"))
    assert re.search(rf"error: step 3: the loss is nan on rank [01] \(train.jsonl:{MARKED + 1}\)\. Nothing of", log)
    assert f"; {name}-spoilt/checkpoint-2 is complete." in log
    assert f"Resuming from {name}-spoilt/checkpoint-2, step 2, the newest usable checkpoint." in again
    assert_equal_runs(folder, f"{name}-spoilt", f"{name}-lora-reference")
