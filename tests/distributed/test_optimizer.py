"""Optimizers of fewer bytes a parameter under the engines: they learn what float32 does, and go on bit-equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ds_sft.checkpoints.universal import load_data_only
from ds_sft.commands.export import main as export
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.test_adapters import LAYERS, LORA, MARK, MARKED, RANKS, keys_of
from tests.distributed.test_resume import NUM_ROWS, dropout_dir, job, metrics, run_job, run_jobs

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs
__all__ = ["dropout_dir"]  # a fixture

STEPS, MIDDLE = 6, 3
ENGINES = ["plain", "ddp", "zero2", "zero3"]
VARIANTS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "bfloat16": ([*ENGINES, "zero1"], {"optimizer_dtype": "bfloat16"}),
    "8bit": (ENGINES, {"optim": "adamw_8bit"}),
    "adafactor": (["plain", "ddp"], {"optim": "adafactor"}),
    "muon": ([*ENGINES, "zero1"], {"optim": "muon", "max_grad_norm": 0}),
}
# Beside frozen weights: bfloat16 where a copy of it would be made, and 8 bits in DeepSpeed's flat parts.
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "layers": ("plain", "trained.safetensors", {**LAYERS, **VARIANTS["bfloat16"][1]}),
    "lora": ("zero2", "adapter_model.safetensors", {**LORA, **VARIANTS["8bit"][1]}),
}
SPOILT = ["ddp", "zero2", "zero3"]  # by a loss that is no number, under Muon
CASES = [(kind, name) for kind, (names, _) in VARIANTS.items() for name in names]


@pytest.fixture(scope="module")
def folder(dropout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, one after the other: whole, and again from the checkpoint in the middle; dropout in attention."""
    folder = tmp_path_factory.mktemp("optimizers")
    common = {"save_steps": MIDDLE, "max_steps": STEPS, "eval_strategy": "no", "weight_decay": 0.1}
    jobs = [job(keys_of(dropout_dir, folder, "plain", common), None, output_dir="float32")]
    for kind, name in CASES:
        keys = keys_of(dropout_dir, folder, name, {**common, **VARIANTS[kind][1]})
        run = f"{name}-{kind}"
        jobs.append(job(keys, RANKS[name], output_dir=run))
        jobs.append(job(keys, RANKS[name], output_dir=f"{run}-again", resume=f"{run}/checkpoint-{MIDDLE}"))
    for kind, (name, _, changes) in PARTS.items():
        keys = keys_of(dropout_dir, folder, name, {**common, **changes})
        jobs.append(job(keys, RANKS[name], output_dir=kind))
        jobs.append(job(keys, RANKS[name], output_dir=f"{kind}-again", resume=f"{kind}/checkpoint-{MIDDLE}"))
    for name in ("zero2", "zero3"):
        keys = keys_of(dropout_dir, folder, name, {**common, **VARIANTS["bfloat16"][1]})
        jobs.append(job(keys, 1, output_dir=f"{name}-one", resume=f"{name}-bfloat16/checkpoint-{MIDDLE}"))
    (token,) = AutoTokenizer.from_pretrained(dropout_dir).encode(MARK, add_special_tokens=False)
    for name in SPOILT:
        keys = keys_of(dropout_dir, folder, name, {**common, **VARIANTS["muon"][1], "on_nonfinite": "skip"})
        jobs.append(job(keys, RANKS[name], output_dir=f"{name}-spoilt") | {"poison": {token: "nan"}})
    mark_a_row(folder)
    run_jobs(folder, jobs)
    return folder


def mark_a_row(folder: Path) -> None:
    rows = questions_and_answers(NUM_ROWS)
    rows[MARKED]["answer"] += MARK
    write_rows(folder / "train.jsonl", rows)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_it_goes_on_bit_equal(folder: Path, kind: str, name: str) -> None:
    found, wanted = folder / f"{name}-{kind}-again", folder / f"{name}-{kind}"
    assert metrics(found) == metrics(wanted)
    before, weights, whole = (load_file(run / "model.safetensors") for run in
                              (wanted / f"checkpoint-{MIDDLE}", found, wanted))  # fmt: skip
    assert [key for key in whole if not torch.equal(weights[key], whole[key])] == []
    matrices = [key for key, value in whole.items() if value.dim() > 1]
    assert [key for key in matrices if torch.equal(before[key].to(whole[key].dtype), whole[key])] == []  # all learn
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", PARTS)
def test_part_of_the_weights_goes_on_bit_equal(folder: Path, kind: str) -> None:
    _, file, _ = PARTS[kind]
    assert metrics(folder / f"{kind}-again") == metrics(folder / kind)
    before, found, wanted = (load_file(folder / run / f"checkpoint-{step}" / file) for run, step in
                             ((kind, MIDDLE), (f"{kind}-again", STEPS), (kind, STEPS)))  # fmt: skip
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    matrices = [key for key, value in wanted.items() if value.dim() > 1]
    assert [key for key in matrices if torch.equal(before[key], wanted[key])] == []  # all learn
    assert {value.dtype for value in wanted.values()} == {torch.bfloat16 if kind == "layers" else torch.float32}


@pytest.mark.parametrize("kind", ["bfloat16", "8bit"])
@pytest.mark.parametrize("name", ENGINES)
def test_it_learns_what_float32_does(folder: Path, kind: str, name: str) -> None:
    """The same rows with other draws of dropout on two ranks."""
    wanted = losses(folder / "float32")
    assert losses(folder / f"{name}-{kind}") == pytest.approx(wanted, rel=2e-2)
    assert wanted[-1] < 0.95 * wanted[0]


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_muon_learns_the_same_under_zero(folder: Path, name: str) -> None:
    """As two ranks without DeepSpeed, whose dropout is the same; gradients are rounded to bfloat16."""
    assert losses(folder / f"{name}-muon") == pytest.approx(losses(folder / "ddp-muon"), rel=2e-4)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_step_that_is_left_out_leaves_no_trace_in_muons_momentum(folder: Path, name: str) -> None:
    found, wanted = losses(folder / f"{name}-spoilt"), losses(folder / "ddp-spoilt")
    assert [step for step, loss in enumerate(wanted, 1) if loss is None] == [3, 6]
    assert [loss or 0 for loss in found] == pytest.approx([loss or 0 for loss in wanted], rel=2e-4)


def test_muon_goes_on_with_as_many_ranks_alone(folder: Path, dropout_dir: Path) -> None:
    keys = keys_of(dropout_dir, folder, "zero2", {"max_steps": STEPS, "eval_strategy": "no", **VARIANTS["muon"][1]})
    mark_a_row(folder)
    done = run_job(folder, job(keys, 1, output_dir="one", resume=f"zero2-muon/checkpoint-{MIDDLE}"))
    assert done.codes == (2,)
    error = f"zero2-muon/checkpoint-{MIDDLE}: 2 ranks saved it, and DeepSpeed converts no states of optim: muon to 1; "
    assert f"{error}start 2 ranks, or --resume never\n" in done.output


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_another_number_of_ranks_goes_on(folder: Path, name: str) -> None:
    assert losses(folder / f"{name}-one") == pytest.approx(losses(folder / f"{name}-bfloat16"), rel=2e-2)


def dtypes(kept: dict[Any, Any]) -> set[torch.dtype]:
    """Of tensors in mappings; bitsandbytes puts its own one deeper."""
    inside = [dtypes(value) for value in kept.values() if isinstance(value, dict)]
    return {value.dtype for value in kept.values() if torch.is_tensor(value) and value.dim()}.union(*inside)


def states(folder: Path, name: str, kind: str) -> set[torch.dtype]:
    """The dtypes of what a checkpoint has of an optimizer's states, and of masters, where they are in it."""
    load_data_only()
    checkpoint = folder / f"{name}-{kind}" / f"checkpoint-{STEPS}"
    if not name.startswith("zero"):
        return dtypes(torch.load(checkpoint / "optimizer.pt")["state"])
    file = next(checkpoint.glob("global_step*/*zero_pp_rank_0_mp_rank_00_optim_states.pt"))
    content = torch.load(file)["optimizer_state_dict"]
    base = content["base_optimizer_state"] if name == "zero2" else content["optimizer_state_dict"]
    masters = content["single_partition_of_fp32_groups" if name == "zero2" else "fp32_flat_groups"]
    return dtypes(base["state"]) | dtypes(dict(enumerate(masters)))


@pytest.mark.parametrize("name", ENGINES)
def test_what_stays_is_narrow(folder: Path, name: str) -> None:
    assert states(folder, name, "bfloat16") == {torch.bfloat16}
    assert torch.uint8 in states(folder, name, "8bit")


@pytest.mark.parametrize("name", ENGINES)
def test_a_checkpoint_has_the_weights_of_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = folder / f"{name}-bfloat16"
    assert export([str(run / f"checkpoint-{STEPS}"), "exported"]) == 0
    found, wanted = load_file(Path("exported") / "model.safetensors"), load_file(run / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
