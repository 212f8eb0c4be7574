"""What a run with an adapter leaves: peft's files, the merged model, what both are served with, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_sft.runtime.adapter import ADAPTER, load_on_disk, save_adapter
from ds_sft.runtime.export import finish_adapter
from ds_sft.runtime.merge import merge
from tests.conftest import make_model

IDS = torch.arange(5, 25)[None]
TARGETS = ["q_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """An adapter to be made: on which base, with what."""

    base: str
    options: dict[str, Any]


CASES = {
    "lora": Case("tied", {}),
    "rslora": Case("untied", {"use_rslora": True}),
    "dora": Case("tied", {"use_dora": True}),
    "head trained whole": Case("untied", {"modules_to_save": ["lm_head"]}),
    "tied ends trained whole": Case("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
}


@pytest.fixture(scope="module")
def bases(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    untied = make_model(root / "untied", tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype="auto")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 50)
    model.save_pretrained(untied)
    return {"tied": make_model(root / "tied", tokenizer_dir), "untied": untied}


def make_adapter(base: Path, output_dir: Path, **options: Any) -> Path:
    """The folder `adapter` of a run whose training gave an adapter these values."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    asked = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=4, lora_alpha=8,
                       **{"target_modules": TARGETS} | options)  # fmt: skip
    inject_adapter_in_model(asked, model, adapter_name=ADAPTER)
    model.adapter_config = asked
    torch.manual_seed(2)
    weights = {n: p.detach() + torch.randn_like(p) / 20 for n, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, weights, output_dir / ".export")
    tokenizer = AutoTokenizer.from_pretrained(base)
    finish_adapter(output_dir, output_dir / ".export", tokenizer, end_ids=[0], chat_template="{{ messages }}")
    return output_dir / "adapter"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path) -> tuple[str, Path, Path]:
    """Its name, its base, its adapter."""
    base = bases[CASES[request.param].base]
    return request.param, base, make_adapter(base, tmp_path / "out", **CASES[request.param].options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def test_peft_and_transformers_read_the_same_adapter(case: tuple[str, Path, Path]) -> None:
    """transformers would leave DoRA's magnitudes at their beginning under the names that peft gives them."""
    _, base, adapter = case
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    before = logits(model)
    by_peft = logits(PeftModel.from_pretrained(model, str(adapter)))
    assert (by_peft - before).abs().max() > 0.01
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter, dtype="float32")), by_peft)
    assert torch.equal(logits(load_on_disk(adapter, dtype="float32")), by_peft)
    assert AutoTokenizer.from_pretrained(adapter).chat_template == "{{ messages }}"


def oracle(base: Path, adapter: Path, name: str) -> torch.Tensor:
    """A merged weight from LoRA's and DoRA's definitions, in float32."""
    weight, options = load_file(base / "model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())
    values = {
        n.removeprefix("base_model.model."): v for n, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    layer = name.removesuffix(".weight")
    if name in values:  # trained whole
        return values[name]
    if f"{layer}.lora_A.weight" not in values:
        return weight[name].float()
    scale = 8 / 4 if not options["use_rslora"] else 8 / 4**0.5
    merged = weight[name].float() + values[f"{layer}.lora_B.weight"] @ values[f"{layer}.lora_A.weight"] * scale
    if not options["use_dora"]:
        return merged
    return merged / merged.norm(dim=1, keepdim=True) * values[f"{layer}.lora_magnitude_vector.weight"][:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merged_in_float32_and_rounded_once(case: tuple[str, Path, Path], dtype: torch.dtype) -> None:
    name, base, adapter = case
    out = adapter.parent
    merge(adapter, out, dtype, max_shard_size="5GB", trust_remote_code=False)
    found = load_file(out / "model.safetensors")
    assert found.keys() == load_file(base / "model.safetensors").keys()
    for weight, value in found.items():
        expected, published = oracle(base, adapter, weight), load_file(base / "model.safetensors")[weight].float()
        if name == "dora":  # the norm may be summed in another order
            assert value.dtype == dtype
            torch.testing.assert_close(value.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(value, expected.to(dtype)), weight
        trained = any(target in weight for target in TARGETS) or weight in WHOLE.get(name, ())
        assert trained != torch.equal(expected, published)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.config.tie_word_embeddings is (CASES[name].base == "tied")
    if dtype == torch.float32:
        assert (logits(model) - logits(load_on_disk(adapter, dtype=dtype))).abs().max() < 1e-5


WHOLE = {"head trained whole": ["lm_head.weight"], "tied ends trained whole": ["model.embed_tokens.weight"]}
