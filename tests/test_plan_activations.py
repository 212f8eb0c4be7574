"""What autograd keeps of a layer, counted in transformers' own models, against the planner's formula."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from weakref import WeakSet

import pytest

from ds_sft.config import Config
from ds_sft.plan.memory import Engine, Run, layer_activations
from ds_sft.plan.shape import shape_of
from ds_sft.plan.weights import ALL, Choice, choice_of
from ds_sft.runtime.distributed import Launch
from ds_sft.training.adapters import choose_weights
from ds_sft.training.working_copy import WorkingCopy

ROWS, LENGTH = 2, 48
KEYS = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip


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
    config = AutoConfig.for_model(family, **KEYS, num_hidden_layers=layers)
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


def planned(family: str, *, kind: str, padded: bool, attention: str, fused: bool = False, choice: Choice = ALL) -> Run:
    return Run(
        shape=shape_of({"model_type": family, **KEYS, "num_hidden_layers": 3}),
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
        lazy=True,
    )
