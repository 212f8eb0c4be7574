"""Runs with frozen weights under every engine: their checkpoints have what is trained alone, and go on bit-equal."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.crash_campaign import metrics
from tests.distributed.harness import ROOT, listing, run
from tests.distributed.test_nonfinite import engine_file
from tests.distributed.test_resume import STEPS, dropout_dir, job, settings

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs
__all__ = ["dropout_dir"]  # a fixture

RANKS = {"plain": None, "ddp": 2, "zero1": 2, "zero2": 2, "zero3": 2, "zero2_offload": 2, "zero3_offload": 2}
LORA = {"adapter": "lora", "lora_rank": 4, "lora_dropout": 0.1, "merge": "no"}
LAYERS = {"train_only": "[layers.1.mlp, model.norm]"}
BEST = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
WITH_LAYERS = ["plain", "zero2", "zero3"]
OTHER_RANKS = ["ddp", "zero2", "zero3"]


@pytest.fixture(scope="module")
def folder(dropout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, one after the other in one process."""
    folder = tmp_path_factory.mktemp("adapters")
    jobs = [made for name in RANKS for made in stopped_and_resumed(dropout_dir, folder, name, "lora", LORA)]
    for name in WITH_LAYERS:
        jobs += stopped_and_resumed(dropout_dir, folder, name, "layers", {**LAYERS, **BEST, "save_steps": 2})
    run_all(folder, jobs)
    jobs = []
    for name in OTHER_RANKS:  # from where two ranks stopped
        source = folder / f"{name}-lora" / "checkpoint-1"
        keys = keys_of(dropout_dir, folder, name, {**LORA, "lora_dropout": 0})
        jobs.append(job(keys, 1, log=f"{name}-alone.log", output_dir=f"{name}-alone", resume=source, resume_anyway=True))
    run_all(folder, jobs)
    return folder


def stopped_and_resumed(
    model: Path, folder: Path, name: str, kind: str, changes: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A run that nobody stops, and one that is stopped in the middle of an epoch."""
    keys, ranks, label = keys_of(model, folder, name, changes), RANKS[name], f"{name}-{kind}"
    return [
        job(keys, ranks, log=f"{label}-reference.log", output_dir=f"{label}-reference"),
        job(keys, ranks, "step 1 SIGTERM 0", log=f"{label}-stop.log", output_dir=label),
        job(keys, ranks, log=f"{label}-resumed.log", output_dir=label),
    ]


def keys_of(model: Path, folder: Path, name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    keys = settings(model, folder, "plain" if RANKS[name] is None else "ddp", bf16=True, logging_steps=1,
                    num_predictions=0, save_steps=8, **changes)  # fmt: skip
    return keys | ({"deepspeed": engine_file(name, folder)} if name.startswith("zero") else {})


def run_all(folder: Path, jobs: list[dict[str, Any]]) -> None:
    (folder / "jobs.json").write_text(json.dumps(jobs, default=str), encoding="utf-8")
    script = str(Path(__file__).with_name("forked.py"))
    env = {"PYTHONPATH": str(ROOT), "SWANLAB_MODE": "disabled", "DS_SFT_CACHE": str(folder / "cache")}
    done = run([sys.executable, script, "jobs.json"], cwd=folder, timeout=2400, env=env)
    assert done.code == 0, done.output
    codes = json.loads((folder / "jobs.json.done").read_text(encoding="utf-8"))
    failed = [made["log"] for made, ranks in zip(jobs, codes, strict=True) if set(ranks) != {0}]
    assert failed == [], "\n".join((folder / log).read_text(encoding="utf-8")[-2500:] for log in failed)


def tensors(folder: Path, label: str, step: int) -> dict[str, torch.Tensor]:
    file = "trained.safetensors" if "layers" in label else "adapter_model.safetensors"
    return load_file(folder / label / f"checkpoint-{step}" / file)


def assert_went_on_as_if_never_stopped(folder: Path, label: str) -> None:
    resumed, wanted = (tensors(folder, run, STEPS) for run in (label, f"{label}-reference"))
    assert resumed.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(resumed[name], wanted[name])] == []
    assert metrics(folder / label) == metrics(folder / f"{label}-reference")
    log = (folder / f"{label}-resumed.log").read_text(encoding="utf-8")
    assert f"Resuming from {label}/checkpoint-1, step 1, the newest usable checkpoint." in log
    assert "missing" not in log.lower()


@pytest.mark.parametrize("name", RANKS)
def test_an_adapter_goes_on_bit_equal(folder: Path, name: str) -> None:
    """Stopped in the middle of an epoch, with dropout in attention and before the adapters."""
    assert_went_on_as_if_never_stopped(folder, f"{name}-lora")
    before, after = (tensors(folder, f"{name}-lora", step) for step in (1, STEPS))
    assert [name for name, value in after.items() if torch.equal(before[name], value)] == []  # all of it learns


OF_A_RANK = ["rng_state_0.pth", "rng_state_1.pth"]
BESIDE = ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "manifest.json", "scheduler.pt",
          "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.bin"]  # fmt: skip
OF_DEEPSPEED = ["latest", "zero_to_fp32.py", "zero_to_torch.py", "global_step1"]


@pytest.mark.parametrize("name", RANKS)
def test_a_checkpoint_has_what_is_trained_alone(folder: Path, name: str) -> None:
    """The base has 74,000 weights in 16 bits; an adapter of rank 4 has 8,448 of 32 bits, and two states of each."""
    checkpoint = folder / f"{name}-lora" / "checkpoint-1"
    own = ["rng_state.pth", "optimizer.pt"] if name == "plain" else [*OF_A_RANK, "optimizer.pt"]
    others = own if RANKS[name] is None or name == "ddp" else [*OF_A_RANK, *OF_DEEPSPEED]
    assert listing(checkpoint) == sorted([*BESIDE, *others])
    saved = tensors(folder, f"{name}-lora", 1)
    assert sum(value.numel() for value in saved.values()) == TRAINED
    assert {value.dtype for value in saved.values()} == {torch.float32}
