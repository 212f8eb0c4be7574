"""What autograd keeps of a layer, counted in transformers' own models, against the planner's formula."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest

from ds_sft.plan.memory import Engine, Run, layer_activations
from ds_sft.plan.shape import shape_of
from ds_sft.training.working_copy import WorkingCopy

ROWS, LENGTH = 2, 48
KEYS = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}  # fmt: skip


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
    kept: dict[int, Any] = {}  # holds the storages, lest an address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(1, 128, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, LENGTH // 2 :] = 0
    with copy.lent() if kind == "copy" else nullcontext():
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        weights = [*model.parameters(), *copy.copies.values()]
        owned = {weight.untyped_storage().data_ptr() for weight in weights}
    assert output.logits.requires_grad
    return sum(storage.nbytes() for address, storage in kept.items() if address not in owned)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["bf16", "copy", "float32"])
@pytest.mark.parametrize(("padded", "attention"), [(False, "sdpa"), (True, "sdpa"), (False, "eager")])
def test_a_layer(family: str, kind: str, padded: bool, attention: str) -> None:
    measured = [kept_by_autograd(family, n, kind=kind, padded=padded, attention=attention) for n in (2, 3)]
    run = planned(family, kind=kind, padded=padded, attention=attention)
    assert layer_activations(run) == pytest.approx(measured[1] - measured[0], rel=0.002)


def planned(family: str, *, kind: str, padded: bool, attention: str, fused: bool = False) -> Run:
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
    )
