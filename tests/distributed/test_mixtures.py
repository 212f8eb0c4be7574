"""Mixtures of experts leave the files that they were published in, whoever writes them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from ds_sft.commands.export import main as export
from tests.distributed.harness import run_forked, script, step_losses, write_yaml
from tests.distributed.test_trajectory import Reference, bare_pytorch, check, check_bf16, engine, settings
from tests.mixtures import FAMILIES, make_mixture

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

ENGINES = ["none", "zero2", "zero3"]
SAVED = {"save_strategy": "steps", "export_dtype": "bfloat16"}
NOTHING = {**SAVED, "learning_rate": 0, "max_steps": 1, "save_steps": 1, "eval_strategy": "no"}
# Adapters on experts. In bfloat16 layers are computed again in backward.
WITH_ADAPTERS = [*(("qwen3_moe", name) for name in ENGINES), ("gpt_oss", "zero3")]
LORA = {"adapter": "lora", "lora_rank": 4, "lora_alpha": 16, "lora_targets": ["q_proj", "experts"]}
# How far bfloat16 may be off, as in test_trajectory.py: twice what peft has in bare PyTorch under autocast, 0.041 and
# 0.177. A rounding before a router chooses another expert, and gpt-oss's biases make these differ more.
BF16_UPDATE = {"qwen3_moe": 0.082, "gpt_oss": 0.354}
WHOLE = {**SAVED, **LORA, "save_steps": 2, "merge": "no"}
ADAPTED = {"float32": WHOLE, "resumed": WHOLE, "bf16": {**LORA, "bf16": True, "gradient_checkpointing": True}}


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, one after the other: of each family one that learns nothing, and some with adapters on experts."""
    folder = tmp_path_factory.mktemp("mixtures")
    files = []
    models = {family: make_mixture(folder / family, family, tokenizer_dir) for family in FAMILIES}
    for name in ENGINES:  # without DeepSpeed first: what it leaves in a process makes later runs its own
        deepspeed = {"deepspeed": engine_of(folder, name)} if name != "none" else {}
        for family, model in models.items():
            every = {"nothing": NOTHING, **(ADAPTED if (family, name) in WITH_ADAPTERS else {})}
            for kind, changes in every.items():
                from_two = {"resume": f"{family}-{name}-float32/checkpoint-2"} if kind == "resumed" else {}
                out = f"{family}-{name}-{kind}"
                keys = settings(model, folder, "none", 2, 2, output_dir=out, **changes, **deepspeed, **from_two)
                files.append(str(write_yaml(folder / f"{out}.yaml", keys)))
    done = run_forked([script("splits"), *files], 2, cwd=folder, timeout=1200)
    assert done.code == 0, done.output[-6000:]
    return folder


def engine_of(folder: Path, name: str) -> str:
    """In a file of its own: `engine` writes every one into the same."""
    engine(name, folder)
    return (folder / "engine.json").rename(folder / f"{name}.json").name


def assert_as_published(out: Path, published: Path) -> None:
    found, wanted = (load_file(path / "model.safetensors") for path in (out, published))
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in wanted.items()}
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_learns_nothing_is_as_published(folder: Path, tmp_path: Path, family: str, name: str) -> None:
    """The model at the end of a run, and what `ds-sft export` makes of its checkpoint."""
    run = folder / f"{family}-{name}-nothing"
    assert_as_published(run, folder / family)
    assert export([str(run / "checkpoint-1"), str(tmp_path / "out")]) == 0
    assert_as_published(tmp_path / "out", folder / family)


@cache
def reference(model: Path, dtype: torch.dtype) -> Reference:
    return bare_pytorch(model, choose=adapt, dtype=dtype)


def adapt(model: Any) -> Any:
    """By peft itself, as its documentation has it."""
    torch.manual_seed(42)  # the run's `seed`
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    asked = LoraConfig(r=4, lora_alpha=16, task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=experts)
    return get_peft_model(model, asked)


@pytest.mark.parametrize(("family", "name"), WITH_ADAPTERS)
def test_adapters_on_experts_have_the_trajectory_of_peft(folder: Path, family: str, name: str) -> None:
    check(folder / f"{family}-{name}-float32", reference(folder / family, torch.float32))
    bf16 = folder / f"{family}-{name}-bf16"
    check_bf16(bf16, reference(folder / family, torch.bfloat16), bound=BF16_UPDATE[family])


@pytest.mark.parametrize(("family", "name"), WITH_ADAPTERS)
def test_adapters_on_experts_go_on_bit_equal(folder: Path, tmp_path: Path, family: str, name: str) -> None:
    """From the second step; and the last checkpoint exports to the adapter that the run left, and merges into it."""
    whole, resumed = (folder / f"{family}-{name}-{kind}" for kind in ("float32", "resumed"))
    assert step_losses(resumed) == step_losses(whole)
    file = Path("adapter") / "adapter_model.safetensors"
    left = (whole / file).read_bytes()
    assert (resumed / file).read_bytes() == left
    assert export([str(whole / "checkpoint-4"), str(tmp_path / "out"), "--merge"]) == 0
    assert (tmp_path / "out" / file).read_bytes() == left
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / family))
    assert {n: v.shape for n, v in merged.items()} == {n: v.shape for n, v in base.items()}
    learned = ("q_proj.weight", *(end for part in ("gate", "up", "gate_up", "down") for end in expert_ends(part)))
    changed = {name for name, value in base.items() if not torch.equal(merged[name], value)}
    assert changed == {name for name in base if name.endswith(learned)}


def expert_ends(part: str) -> tuple[str, str]:
    """A matrix of one expert, a tensor of all."""
    return f"{part}_proj.weight", f"{part}_proj"
