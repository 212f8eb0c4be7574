"""What autograd keeps of a layer, counted in transformers' own models, against the planner's formula."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest

from ds_sft.config.keys import Config
from ds_sft.model.adapters import choose_weights
from ds_sft.model.experts import NAME
from ds_sft.model.working_copy import WorkingCopy
from ds_sft.plan.activations import layer_activations
from ds_sft.plan.run import Engine, Run
from ds_sft.plan.shape import shape_of
from ds_sft.plan.weights import ALL, Choice, choice_of
from ds_sft.ranks.launch import Launch

ROWS, LENGTH = 2, 48
KEYS = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip
MIXED = {"num_experts_per_tok": 3, "moe_intermediate_size": 40}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**MIXED, "num_experts": 8},
    "qwen2_moe": {**MIXED, "num_experts": 8, "norm_topk_prob": True, "shared_expert_intermediate_size": 56},
    "mixtral": {"num_experts_per_tok": 3, "num_local_experts": 8},
    "glm4_moe": {**MIXED, "n_routed_experts": 8, "use_qk_norm": True, "first_k_dense_replace": 0},
    "gpt_oss": {"num_experts_per_tok": 3, "num_local_experts": 8},
    "deepseek_v3": {**MIXED, "n_routed_experts": 8, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1,
                    "q_lora_rank": 28, "kv_lora_rank": 20, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24,
                    "v_head_dim": 16, "num_key_value_heads": 4},
}  # fmt: skip


def keys_of(family: str) -> dict[str, Any]:
    keys = {**KEYS, **MIXTURES.get(family, {})}
    if family == "deepseek_v3":
        del keys["head_dim"]  # its own name for the rotated part of a head
    return keys


class Kept:
    """A tensor for as long as the graph needs it."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor


def kept_by_autograd(
    family: str,
    layers: int,
    *,
    kind: str,
    padded: bool,
    attention: str,
    prepare: Callable[[Any], Any] = lambda model: None,
) -> int:
    """Bytes of the storages that backward needs, each once, without those of parameters."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **keys_of(family), num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model = (model.bfloat16() if kind == "bf16" else model.float()).train()
    prepare(model)
    copy = WorkingCopy(model)
    kept: WeakSet[Kept] = WeakSet()  # what a graph keeps that is gone when forward has ended is forgotten

    def pack(tensor: torch.Tensor) -> Kept:
        packed = Kept(tensor)
        kept.add(packed)
        return packed

    ids = torch.randint(1, 128, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, LENGTH // 2 :] = 0
    with copy.lent() if kind == "copy" else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        weights = [*model.parameters(), *copy.copies.values()]
        owned = {weight.untyped_storage().data_ptr() for weight in weights}
    assert output.logits.requires_grad
    storages = {packed.tensor.untyped_storage().data_ptr(): packed.tensor.untyped_storage() for packed in kept}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in owned)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["bf16", "copy", "float32"])
@pytest.mark.parametrize(("padded", "attention"), [(False, "sdpa"), (True, "sdpa"), (False, "eager")])
def test_a_layer(family: str, kind: str, padded: bool, attention: str) -> None:
    measured = [kept_by_autograd(family, n, kind=kind, padded=padded, attention=attention) for n in (2, 3)]
    run = planned(family, kind=kind, padded=padded, attention=attention)
    assert layer_activations(run) == pytest.approx(measured[1] - measured[0], rel=0.002)


FROZEN: list[dict[str, Any]] = [
    {"adapter": "lora"},
    {"adapter": "lora", "lora_dropout": 0.1},
    {"adapter": "lora", "lora_targets": ["q_proj", "v_proj"]},
    {"adapter": "lora", "lora_targets": [r".*\.mlp\.down_proj"], "lora_modules_to_save": ["input_layernorm"]},
    {"adapter": "dora"},
    {"adapter": "dora", "lora_dropout": 0.1},
    {"train_only": ["self_attn"]},
    {"train_only": ["mlp"]},
]


@pytest.mark.parametrize("keys", FROZEN, ids=lambda keys: "-".join(str(value) for value in keys.values()))
@pytest.mark.parametrize(
    ("family", "kind", "attention"),
    [("llama", "bf16", "sdpa"), ("qwen3", "copy", "sdpa"), ("llama", "copy", "eager"), ("qwen3", "float32", "sdpa")],
)
def test_a_layer_with_something_frozen(keys: dict[str, Any], family: str, kind: str, attention: str) -> None:
    """Of what is frozen no input is kept, dropout has copies of its own, DoRA keeps what it scales."""
    config = Config(model_name_or_path="m", train_file="t", training={"learning_rate": 1e-3}, **keys)
    args = SimpleNamespace(seed=1, deepspeed={} if kind == "bf16" else None, bf16=kind != "float32", fp16=False,
                           activation_checkpointing_kwargs=None)  # fmt: skip

    def prepare(model: Any) -> None:
        if config.adapter != "none" and kind != "float32":
            model.bfloat16()  # as `load_model` loads what is frozen
        choose_weights(model, config, args, Launch(launcher="python"))  # type: ignore[arg-type]

    measure = partial(kept_by_autograd, family, kind=kind, padded=False, attention=attention, prepare=prepare)
    run = planned(family, kind=kind, padded=False, attention=attention, choice=choice_of(config))
    assert layer_activations(run) == pytest.approx(measure(3) - measure(2), rel=0.01)


# ---- Experts


def routed(model: Any, experts: str, *, to_few: bool = False) -> None:
    """Let a mixture compute its experts so; its routers choose at random, or the same three for all tokens."""
    import torch

    torch.manual_seed(2)
    model.set_experts_implementation(experts)
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
            torch.nn.init.normal_(parameter, std=0 if to_few else 1)


def attention_of(family: str) -> str:
    """One that CPUs and GPUs compute alike: of DeepSeek's larger keys `sdpa` keeps the scores on a CPU."""
    return "eager" if family in ("gpt_oss", "deepseek_v3") else "sdpa"


# On a CPU the output of `sdpa` lies as its queries do, GLM's in another order than its projection wants: a copy.
EXACT = {"glm4_moe": 0.05}


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("kind", ["bf16", "copy", "float32"])
def test_a_layer_of_experts_on_a_gpu(family: str, kind: str) -> None:
    """By transformers' `grouped_mm`: the same wherever tokens go."""
    for to_few in (False, True):
        prepare = partial(routed, experts="grouped_mm", to_few=to_few)
        measure = partial(
            kept_by_autograd, family, kind=kind, padded=False, attention=attention_of(family), prepare=prepare
        )
        run = planned(family, kind=kind, padded=False, attention=attention_of(family), lazy=False)
        assert layer_activations(run) == pytest.approx(measure(3) - measure(2), rel=EXACT.get(family, 0.001))


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("kind", ["copy", "float32"])
def test_a_layer_of_experts_on_a_cpu(family: str, kind: str) -> None:
    """By ours, which in 16 bits fills the tokens of an expert up to whole blocks, here 36 to 48 on average."""
    prepare = partial(routed, experts=NAME)
    attention = "eager" if family == "gpt_oss" else "sdpa"
    measure = partial(kept_by_autograd, family, kind=kind, padded=False, attention=attention, prepare=prepare)
    run = planned(family, kind=kind, padded=False, attention=attention)
    near = EXACT.get(family, 0.001) if kind == "float32" else 0.1
    assert layer_activations(run) == pytest.approx(measure(3) - measure(2), rel=near)


FROZEN_EXPERTS: list[dict[str, Any]] = [
    {"adapter": "lora"},
    {"adapter": "lora", "lora_targets": ["all-linear", "experts"]},
    {"train_only": ["self_attn"]},
    {"train_only": ["experts"]},
    {"train_only": ["experts.down_proj"]},
    {"train_only": ["gate.weight", "norm"]},
]


@pytest.mark.parametrize("keys", FROZEN_EXPERTS, ids=lambda keys: "-".join(str(value) for value in keys.values()))
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "mixtral", "deepseek_v3"])
def test_a_layer_of_experts_with_something_frozen(keys: dict[str, Any], family: str) -> None:
    config = Config(model_name_or_path="m", train_file="t", training={"learning_rate": 1e-3}, **keys)
    args = SimpleNamespace(seed=1, deepspeed={}, bf16=True, fp16=False, activation_checkpointing_kwargs=None)

    def prepare(model: Any) -> None:
        routed(model, "grouped_mm")
        choose_weights(model, config, args, Launch(launcher="python"))  # type: ignore[arg-type]

    attention = attention_of(family)
    measure = partial(kept_by_autograd, family, kind="bf16", padded=False, attention=attention, prepare=prepare)
    run = planned(family, kind="bf16", padded=False, attention=attention, choice=choice_of(config), lazy=False)
    assert layer_activations(run, 2) == pytest.approx(measure(3) - measure(2), rel=0.003)


def planned(
    family: str,
    *,
    kind: str,
    padded: bool,
    attention: str,
    fused: bool = False,
    choice: Choice = ALL,
    lazy: bool = True,
) -> Run:
    return Run(
        shape=shape_of({"model_type": family, **keys_of(family), "num_hidden_layers": 3}),
        engine=Engine(stage=2 if kind == "bf16" else None),
        ranks=1,
        micro_batch=ROWS,
        length=LENGTH,
        accumulation=1,
        checkpointing=False,
        half=kind != "float32",
        padded=padded,
        attention=attention,
        fused=fused,
        choice=choice,
        lazy=lazy,
    )
