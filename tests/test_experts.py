"""Experts by grouped products: what transformers' own loop over them computes, a product for each that has tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.model.experts import BLOCK, NAME, experts_of, group_experts
from ds_sft.model.working_copy import WorkingCopy

EXPERTS, HIDDEN = 8, 32
SMALL = {"vocab_size": 64, "hidden_size": HIDDEN, "intermediate_size": 24, "moe_intermediate_size": 24,
         "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
         "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS},
    "mixtral": {"num_local_experts": EXPERTS},
    "glm4_moe": {"n_routed_experts": EXPERTS, "first_k_dense_replace": 0},
    "deepseek_v3": {"n_routed_experts": EXPERTS, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0},
    "gpt_oss": {"num_local_experts": EXPERTS},  # transposed, interleaved, with biases
    "nemotron_h": {"n_routed_experts": EXPERTS, "layers_block_type": ["moe"], "moe_latent_size": None},  # without gate
}


def make_experts(family: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]}))
    (experts,) = experts_of(model)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def learn(experts: Any, implementation: str, chosen: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input, weights of the choice, and parameters."""
    torch.manual_seed(1)
    dtype = experts.down_proj.dtype
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    states = torch.randn(len(chosen), HIDDEN).to(dtype).requires_grad_()
    weights = torch.rand(chosen.shape).to(dtype).requires_grad_()
    output = experts(states, chosen, weights)
    (output * torch.linspace(-1, 1, HIDDEN, dtype=dtype)).sum().backward()
    found = [output, states.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())]
    return [torch.zeros(()) if tensor is None else tensor.detach().float() for tensor in found]


def choices(tokens: int, among: int = EXPERTS) -> torch.Tensor:
    """[tokens, 2], two different experts of the first `among`."""
    torch.manual_seed(2)
    return torch.rand(tokens, among).topk(2, -1).indices


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_loop_of_the_model(family: str, dtype: torch.dtype) -> None:
    """Outputs and all gradients; one token, many, and experts that nobody chose."""
    experts = make_experts(family, dtype)
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    for chosen in (choices(1), choices(57), choices(57, among=3)):
        wanted = learn(experts, "eager", chosen)
        for found, known in zip(learn(experts, NAME, chosen), wanted, strict=True):
            assert (found - known).norm() <= bound * known.norm()


class Products(TorchDispatchMode):
    """The shapes of the left factors of the matrix products computed in it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket is torch.ops.aten.mm:
            self.rows.append(tuple(args[0].shape))
        return function(*args, **kwargs or {})


def products(experts: Any, chosen: torch.Tensor) -> list[tuple[int, ...]]:
    with Products() as counted:
        learn(experts, NAME, chosen)
    return counted.rows


def test_an_expert_without_tokens_costs_no_product() -> None:
    """Two matrices, each once in forward and twice in backward."""
    experts = make_experts("qwen3_moe", torch.float32)
    assert len(products(experts, choices(57, among=3))) == 3 * 2 * 3
    assert len(products(experts, choices(57))) == EXPERTS * 2 * 3


def test_of_16_bits_products_have_few_shapes() -> None:
    """So that oneDNN compiles few of them; in float32 nothing is compiled, and nothing filled up."""
    chosen = choices(57)
    rows = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
    assert {shape[0] for shape in products(make_experts("qwen3_moe", torch.float32), chosen)} >= set(rows)
    first = [shape[0] for shape in products(make_experts("qwen3_moe", torch.bfloat16), chosen)][:EXPERTS]
    assert first == [-(-count // BLOCK) * BLOCK for count in rows]


def test_a_working_copy_has_gradients_of_every_expert() -> None:
    """In 16 bits by copies of the float32 weights, which get the gradients."""
    experts = make_experts("gpt_oss", torch.float32)
    experts.config._experts_implementation = NAME
    states, chosen = torch.randn(57, HIDDEN), choices(57)
    with WorkingCopy(experts).lent():
        experts(states.bfloat16(), chosen, torch.rand(57, 2).bfloat16()).float().sum().backward()
    assert [(name, p.grad.dtype) for name, p in experts.named_parameters()] == [
        (name, torch.float32) for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    ]
    assert all(parameter.grad.flatten(1).norm(dim=1).gt(0).all() for parameter in experts.parameters())


def test_what_is_said_and_saved(tmp_path: Path) -> None:
    """A saved configuration names no function that another program would not have."""
    families = {name: FAMILIES.get(name, {}) for name in ("qwen3_moe", "qwen3", "deepseek_v3")}
    made = [AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SMALL, **own}))
            for family, own in families.items()]  # fmt: skip
    how = "8 a layer, in 1 of them, by one product an expert (ds_sft's)"
    assert [str(group_experts(model, on_gpu=False)) for model in made] == [
        how, "None", f"{how}; e_score_correction_bias, which balances them, stays as it is"
    ]  # fmt: skip
    made[0].save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert not [key for key in json.loads((tmp_path / "config.json").read_text(encoding="utf-8")) if "implem" in key]


def test_on_a_gpu_transformers_kernel() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **{**SMALL, **FAMILIES["mixtral"]}))
    assert str(group_experts(model, on_gpu=True)) == "8 a layer, in 1 of them, by grouped_mm (transformers')"
