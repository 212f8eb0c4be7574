"""What a plan and a run's figures know of a mixture of experts: all of it is kept and sent, a part is computed with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.cli import main
from ds_sft.config.keys import Config
from ds_sft.model.adapters import choose_weights
from ds_sft.model.experts import BLOCK
from ds_sft.plan.cost import model_flops_per_token, step_flops, traffic
from ds_sft.plan.experts import EXPERT_BLOCK, compiled_products
from ds_sft.plan.gathered import gathered_at
from ds_sft.plan.memory import peak
from ds_sft.plan.run import Engine, Run, planned_weights
from ds_sft.plan.shape import MIXTURES, shape_of
from ds_sft.plan.size import ModelSize, model_size, parameters_in_words
from ds_sft.plan.states import states
from ds_sft.plan.weights import Choice, choice_of
from ds_sft.ranks.launch import Launch
from ds_sft.training.flops import count_flops
from ds_sft.training.resumable import ResumableTrainer
from tests.test_plan_activations import MIXTURES as OWN
from tests.test_plan_shape import QWEN3_30B_A3B

SIZES = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
KEYS = {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
SHAPE = shape_of({"model_type": "qwen3_moe", **KEYS})
# A layer: q, o 64 x 64; k, v 64 x 32, their norms 16 each; a router 8 x 64; 8 experts of 3 x 64 x 40; two norms.
ATTENTION, ROUTER, EXPERTS = 2 * 4096 + 2 * 2048, 512, 8 * 7680
LAYER = ATTENTION + ROUTER + EXPERTS + 2 * 16 + 2 * 64
ACTIVE = ATTENTION + ROUTER + EXPERTS // 4


def keys_of(family: str) -> dict[str, Any]:
    keys = {**SIZES, **OWN[family]}
    if family == "deepseek_v3":
        del keys["head_dim"]
    return keys


def config(**keys: Any) -> Config:
    return Config(model_name_or_path="m", train_file="t", training={"learning_rate": 1e-3}, **keys)


def make(family: str, **keys: Any) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys_of(family)))
    args: Any = SimpleNamespace(seed=1, deepspeed=None, bf16=True, fp16=False, activation_checkpointing_kwargs=None)
    choose_weights(model, config(**keys), args, Launch(launcher="python"))
    return model


def run(stage: int | None, ranks: int = 4, **keys: Any) -> Run:
    engine = keys.pop("engine", Engine(stage=stage))
    return Run(shape=SHAPE, engine=engine, ranks=ranks, micro_batch=2, length=128, accumulation=1,
               checkpointing=keys.pop("checkpointing", False), half=True, **keys)  # fmt: skip


CHOICES: list[dict[str, Any]] = [
    {"adapter": "none"},
    {"adapter": "lora"},
    {"adapter": "lora", "lora_targets": ["all-linear", "experts"]},
    {"adapter": "lora", "lora_targets": ["o_proj", "experts.down_proj"]},
    {"train_only": ["layers.2."]},
    {"train_only": ["experts"]},
]


@pytest.mark.parametrize("keys", CHOICES, ids=str)
@pytest.mark.parametrize("family", MIXTURES)
def test_a_plan_and_a_run_agree(family: str, keys: dict[str, Any]) -> None:
    """On names, shapes, what is trained, its order, and FLOP."""
    model, shape = make(family, **keys), shape_of({"model_type": family, **keys_of(family)})
    choice = choice_of(config(**keys))
    planned = [(w.name, w.shape) for w in planned_weights(shape, choice).every if w.trained]
    assert planned == [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    flops = count_flops(model)
    assert flops is not None
    whole = flops.of(tokens=1, pairs=20, head_tokens=1)
    assert whole == pytest.approx(model_flops_per_token(shape, 20, choice), rel=1e-12)


def test_flop_are_those_of_the_chosen_experts() -> None:
    assert SHAPE.parameters == 3 * LAYER + 64 + 2 * 6400
    assert SHAPE.active == SHAPE.parameters - 3 * EXPERTS * 3 // 4
    pairs = 3 * 64 * 128
    assert model_flops_per_token(SHAPE, 128) == 6 * (3 * ACTIVE + 6400) + 12 * pairs
    assert step_flops(run(None, checkpointing=True)) - step_flops(run(None)) == 256 * (2 * 3 * ACTIVE + 4 * pairs)


def test_trainers_estimate_counts_active_parameters() -> None:
    """Of all parameters but embeddings, norms included."""
    asked: Any = SimpleNamespace(model=make("qwen3_moe"), flops_per_token=0.0)
    shape = shape_of({"model_type": "qwen3_moe", **keys_of("qwen3_moe")})
    inputs = {"input_ids": torch.zeros(2, 5)}
    assert ResumableTrainer.floating_point_ops(asked, inputs) == 10 * 6 * (shape.active - shape.embedding)


def test_states_and_traffic_are_those_of_all_experts() -> None:
    whole = SHAPE.parameters
    assert states(run(None))["parameters"] == 4 * whole
    assert states(run(2, ranks=1))["optimizer states"] == 8 * whole
    assert traffic(run(3), 4).inside == 3 * 2 * whole * 3 / 4


def test_stage_3_gathers_all_experts_of_a_layer_at_once() -> None:
    engine = Engine(stage=3, prefetch_bucket=0, persistence_threshold=64, max_reuse_distance=0)
    assert gathered_at(run(3, engine=engine)) == [2 * 6400, 2 * EXPERTS, 2 * EXPERTS, 2 * 6400]


def test_layers_without_experts_are_gathered_as_they_are() -> None:
    shape = shape_of({"model_type": "qwen3_moe", **KEYS, "mlp_only_layers": [1]})
    engine = Engine(stage=3, prefetch_bucket=0, persistence_threshold=64, max_reuse_distance=0)
    assert gathered_at(replace(run(3, engine=engine), shape=shape)) == [2 * 6400, 2 * 10240, 2 * EXPERTS, 2 * 6400]


def test_a_cpu_keeps_what_it_compiled_for_each_number_of_blocks() -> None:
    """256 tokens are up to 16 blocks, of which 12 are met; two matrices, each forward and for two gradients."""
    assert compiled_products(run(None, lazy=True)) == 12 * 6 * 576 * 1024
    assert peak(run(None, lazy=True)).device["compiled products"] == 12 * 6 * 576 * 1024
    assert compiled_products(run(None, lazy=True, choice=Choice(adapter="lora"))) == 12 * 4 * 576 * 1024
    assert compiled_products(replace(run(None, lazy=True), length=10**6)) == 1024 * 576 * 1024
    assert EXPERT_BLOCK == BLOCK
    assert compiled_products(run(None)) == compiled_products(replace(run(None, lazy=True), half=False)) == 0


# ---- Commands


@pytest.mark.parametrize("family", MIXTURES)
def test_a_published_folder_is_counted_as_in_memory(tmp_path: Path, family: str) -> None:
    """There each expert is apart: what names the joined ones finds them, and layers that no run loads do not count."""
    model = make(family)
    model.save_pretrained(tmp_path)
    shape = shape_of({"model_type": family, **keys_of(family)})
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    found = model_size(tmp_path, Choice(only=("mlp.experts.gate_up_proj", "mlp.experts.down_proj")))
    assert found == ModelSize(model.num_parameters(), embedding=6400, tied=False, trained=experts,
                              frozen=model.num_parameters() - experts, active=shape.active)  # fmt: skip
    assert parameters_in_words(found) == f"{shape.parameters:,} parameters, {shape.active:,} of them active"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(QWEN3_30B_A3B), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(
        "model_name_or_path: ./model\ntrain_file: rows.jsonl\noutput_dir: out\nmax_length: 4096\n"
        "per_device_train_batch_size: 1\nsave_strategy: 'no'\nexport_dtype: auto\n", encoding="utf-8"
    )  # fmt: skip
    words = ["plan", "run.yaml", "--rows", "1000", "--gpus-per-node", "8", "--gpu-memory", "80GB"]
    main(words)
    said = capsys.readouterr().out
    assert "qwen3_moe, 30,532,122,624 parameters, 3,353,032,704 of them active; 1 x 8 GPUs of 74.5 GiB" in said
    assert ("Experts: a token meets 8 of 128 in each of 48 layers. Memory and traffic are those of all, FLOP of the "
            "active ones; activations are the same wherever tokens go.") in said  # fmt: skip
    assert "Recommended: ZeRO-3" in said
    main([*words, "--json"])
    assert json.loads(capsys.readouterr().out)["model"]["experts"] == {"number": 128, "chosen": 8, "layers": 48}
