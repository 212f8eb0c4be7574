"""What was asked for on a resume holds from the first step after it; the training is the one that bare PyTorch does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_sft.checkpoints.manifest import newest_complete
from tests.crash_campaign import metrics
from tests.distributed.harness import read_lines
from tests.distributed.test_resume import NUM_ROWS, job, run_jobs
from tests.distributed.test_resume import settings as plain_settings
from tests.distributed.test_trajectory import ROWS, loss_and_count, settings

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs each


@dataclass(frozen=True)
class Step:
    """One step of the reference: its rows, and with what it learns from them."""

    rows: range
    rate: float
    decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 0.5


# A finished linear run of two steps; two more with everything changed; and from the fourth on half the rows a step.
FIRST = {"max_steps": 2, "learning_rate": 1e-3}
SECOND = {"max_steps": 4, "learning_rate": 4e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99,
          "adam_epsilon": 1e-6, "max_grad_norm": 0.05, "warmup_steps": 3}  # fmt: skip
THIRD = {**SECOND, "max_steps": 6, "warmup_steps": 0, "lr_scheduler_type": "cosine", "gradient_accumulation_steps": 2}
CHANGED: dict[str, Any] = {"decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "clip": 0.05}
STEPS = [
    Step(range(0, 8), 1e-3),
    Step(range(8, 16), 0.5e-3),
    Step(range(16, 24), 4e-3 * 2 / 3, **CHANGED),  # warming up: the rate of step 2 of 3
    Step(range(24, 28), 4e-3 / 2, **CHANGED),  # step 3 of 6 of a cosine
    Step(range(28, 32), 4e-3 / 4, **CHANGED),
    Step(range(0, 4), 4e-3 * (1 + torch.cos(torch.tensor(5 / 6 * torch.pi)).item()) / 2, **CHANGED),
]


def bare_pytorch(model_dir: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights after them."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    others = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    optimizer = torch.optim.AdamW([{"params": others}, {"params": norms}])
    losses = []
    for step in STEPS:
        total, count = loss_and_count(model, tokenizer, [ROWS[i] for i in step.rows])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), step.clip)
        for group, decay in zip(optimizer.param_groups, (step.decay, 0.0), strict=True):
            group |= {"lr": step.rate, "weight_decay": decay, "betas": step.betas, "eps": step.eps}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    return losses, model.state_dict()


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
def test_everything_changed_holds_from_the_next_step_on(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Under ZeRO-3 the second start is one of another number of ranks, too."""
    ranks = None if name == "none" else 2
    keys = settings(model_dir, tmp_path, name, 1, 4 if ranks else 8, eval_strategy="no", save_strategy="steps",
                    save_steps=1)  # fmt: skip
    keys.pop("eval_file")
    third = {**THIRD, "gradient_accumulation_steps": 2 if ranks else 4}
    second = job(keys, 1 if name == "zero3" else ranks, "step 3 SIGTERM 0", resume_anyway=True, **SECOND)
    run_jobs(tmp_path, [job(keys, ranks, **FIRST), second, job(keys, ranks, resume_anyway=True, **third)])
    losses, weights = bare_pytorch(model_dir)
    logged = [row for row in metrics(tmp_path / "out") if "loss" in row]
    assert [row["learning_rate"] for row in logged] == pytest.approx([step.rate for step in STEPS])
    assert [row["loss"] for row in logged] == pytest.approx(losses, rel=2e-5)
    for key, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, weights[key], rtol=1e-4, atol=2e-5, msg=key)
    first, second = [row for row in read_lines(tmp_path / "out" / "metrics.jsonl") if "changed" in row]
    assert (first["step"], second["step"]) == (2, 3)
    assert {"learning_rate": [1e-3, 4e-3], "weight_decay": [0.0, 0.1]}.items() <= first["changed"].items()
    assert {"lr_scheduler_type": ["linear", "cosine"], "rows_a_step": [8, 4]}.items() <= second["changed"].items()
    log = (tmp_path / "log").read_text(encoding="utf-8")
    assert log.count("Going on with what has changed: learning_rate: 0.001 -> 0.004; ") == 1
    assert (
        log.count("Rows are dealt anew from step 4 on: the 24 that this epoch has learned do not come again in it.")
        == 1
    )


def test_each_row_once_an_epoch(model_dir: Path, tmp_path: Path) -> None:
    """Counted by their tokens: 13 rows in an order drawn by lot, two epochs, four rows a step until they are others."""
    keys = plain_settings(model_dir, tmp_path, "plain", eval_strategy="no", logging_steps=1, save_steps=1,
                          save_total_limit=20, num_predictions=0)  # fmt: skip
    keys.pop("eval_file")
    filled = {key: value for key, value in keys.items() if key != "per_device_train_batch_size"}

    def start(out: str, stop: int | None = None, given: dict[str, Any] = keys, **changes: Any) -> dict[str, Any]:
        changes |= {"output_dir": out, "log": f"log-{out}"}
        return job(given, None, f"step {stop} SIGTERM 0" if stop else "", **changes)

    anyway: dict[str, Any] = {"resume_anyway": True}
    packed: dict[str, Any] = {"packing": "concat", "max_length": 160}
    other_order = {"train_sampling_strategy": "group_by_length", "seed": 7, "bf16": True, **anyway}
    run_jobs(tmp_path, [
        start("reference"),
        start("sizes", 1),
        start("sizes", 2, per_device_train_batch_size=6, gradient_accumulation_steps=1, **anyway),
        start("sizes", per_device_train_batch_size=2, gradient_accumulation_steps=1, **anyway),
        start("layout", 1),  # as many rows in a step need no --resume_anyway, nor does another cadence
        start("layout", per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=2, save_steps=3),
        start("packed", 1, **packed),
        start("packed", gradient_accumulation_steps=3, **packed, **anyway),
        start("end", 4),  # where an epoch ends everything may change
        start("end", 6, gradient_accumulation_steps=3, **other_order),
        start("end", gradient_accumulation_steps=3, **other_order),
        start("filled", 4),
        start("filled", given=filled, max_tokens_per_batch=100, **anyway),
    ])  # fmt: skip

    def known(out: str) -> dict[str, Any]:
        newest = newest_complete(tmp_path / out)
        assert newest is not None
        return dict(newest.manifest)

    def logged(out: str) -> list[dict[str, Any]]:
        return [row for row in metrics(tmp_path / out) if "loss" in row]

    tokens = known("reference")["tokens"]
    outs = ("reference", "sizes", "layout", "packed", "end", "filled")
    assert {out: known(out)["tokens"] for out in outs} == dict.fromkeys(outs, tokens)
    assert {out: known(out)["step"] for out in outs if out not in ("packed", "filled")} == {
        "reference": 8, "sizes": 1 + 1 + 2 + 7, "layout": 8, "end": 4 + 5,
    }  # fmt: skip
    assert {known(out)["samples"] for out in outs if out != "packed"} == {2 * NUM_ROWS}
    assert [row["epoch"] for row in logged("sizes")][:5] == pytest.approx([4 / 13, 10 / 13, 12 / 13, 1, 1 + 1 / 7])
    assert [row["step"] for row in logged("layout")] == [1, 2, 4, 6, 8]
    assert sorted(path.name for path in (tmp_path / "layout").glob("checkpoint-*")) == [
        f"checkpoint-{step}" for step in (1, 3, 6, 8)
    ]
    weights, wanted = (load_file(tmp_path / out / "model.safetensors") for out in ("layout", "reference"))
    for key, value in wanted.items():
        torch.testing.assert_close(weights[key], value, rtol=1e-4, atol=2e-5, msg=key)
