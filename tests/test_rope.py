"""`rope_scaling`: what it makes of a configuration is what transformers computes with, wherever the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.errors import UserError
from ds_sft.export.card import Facts, model_card
from ds_sft.model.rotary import knows_scaling, read_config, scaled_options
from ds_sft.plan.rope import scaled
from ds_sft.plan.shape import positions_of

QWEN3 = {"model_type": "qwen3", "max_position_embeddings": 40960, "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("found", "scaling", "rope", "written", "reached"),
    [
        (QWEN3, {**YARN, ORIGINAL: 32768}, {"rope_theta": 1e6, **YARN, ORIGINAL: 32768}, 131072, 131072),
        (QWEN3, YARN, {"rope_theta": 1e6, **YARN, ORIGINAL: 40960}, 163840, 163840),
        (QWEN3, {**YARN, "rope_theta": 5e6}, {"rope_theta": 5e6, **YARN, ORIGINAL: 40960}, 163840, 163840),
        # vLLM multiplies what it finds beside a linear factor.
        (QWEN3, {"rope_type": "linear", "factor": 2}, {"rope_theta": 1e6, "rope_type": "linear", "factor": 2},
         40960, 81920),
        (QWEN3, LLAMA3, {"rope_theta": 1e6, **LLAMA3, ORIGINAL: 40960}, 327680, 327680),
        # Its author's own numbers stay where the type does; of another type they mean nothing.
        ({**QWEN3, "max_position_embeddings": 65536,
          "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 16, ORIGINAL: 32768}}, YARN,
         {"rope_theta": 1e6, "beta_fast": 16, **YARN, ORIGINAL: 32768}, 131072, 131072),
        ({**QWEN3, "max_position_embeddings": 131072, "rope_scaling": {**LLAMA3, "factor": 4.0, ORIGINAL: 32768}},
         YARN, {"rope_theta": 1e6, **YARN, ORIGINAL: 32768}, 131072, 131072),
        ({"model_type": "glm4", "max_position_embeddings": 1024,
          "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, YARN,
         {"rope_theta": 1e4, "partial_rotary_factor": 0.5, **YARN, ORIGINAL: 1024}, 4096, 4096),
    ],
)  # fmt: skip
def test_what_is_written(
    found: dict[str, Any], scaling: dict[str, Any], rope: dict[str, Any], written: int, reached: int
) -> None:
    changed = scaled(found, scaling)
    assert changed == {"rope_parameters": rope, "max_position_embeddings": written}
    assert positions_of({**changed, "model_type": "qwen3"}) == reached
    if "beta_fast" not in rope:  # a second time, as of a model that was exported, it changes nothing
        assert scaled({**changed, "model_type": "qwen3"}, scaling) == changed


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ({"model_type": "gpt2", "n_positions": 1024}, "gpt2 has no rotary positions: leave it out"),
        ({"model_type": "gemma3_text", "max_position_embeddings": 32768,
          "rope_parameters": {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}},
         "gemma3_text has rotary positions of several kinds (sliding_attention, full_attention), each with numbers of "
         "its own: leave it out, and scale them in config.json of a copy of the model"),
        ({"model_type": "phi3", "max_position_embeddings": 131072, "rope_scaling": {"type": "longrope"}},
         "the rotary positions of phi3 are longrope already, which nothing replaces: leave it out"),
        ({"model_type": "qwen3", "max_position_embeddings": 40960, "rope_theta": 1e6,
          "rope_parameters": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768}},
         "factor 2 of 32,768 positions reaches 65,536 tokens, and the model was made for 131,072: write a factor of 4 "
         "or more, or leave rope_scaling out"),
    ],
)  # fmt: skip
def test_models_that_cannot_be_scaled_so(found: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        scaled(found, {"rope_type": "yarn", "factor": 2.0})
    assert str(caught.value) == f"rope_scaling: {said}"


def frequencies(config: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_config(config)
    found: torch.Tensor = next(module.inv_freq for module in model.modules() if hasattr(module, "inv_freq"))
    assert found.dtype == torch.float32
    return found


SMALL = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "glm4"])
@pytest.mark.parametrize(
    "scaling", [YARN, LLAMA3, {"rope_type": "linear", "factor": 3.0}], ids=lambda s: s["rope_type"]
)
def test_frequencies_are_those_of_a_config_json_with_it(family: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """As a model card tells to write it by hand; and so they are where the run's export is read again."""
    AutoConfig.for_model(family, **SMALL).save_pretrained(tmp_path)
    ours = read_config(str(tmp_path), trust_remote_code=False, scaling=scaling)
    written = json.loads((tmp_path / "config.json").read_text())
    linear = scaling["rope_type"] == "linear"
    by_hand = {
        "rope_scaling": written.pop("rope_parameters") | scaling | ({} if linear else {ORIGINAL: 256}),
        "max_position_embeddings": 256 if linear else int(scaling["factor"] * 256),
    }
    (tmp_path / "config.json").write_text(json.dumps(written | by_hand))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert torch.equal(frequencies(ours), frequencies(theirs))
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    ours.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert (again.rope_parameters, again.max_position_embeddings) == (
        ours.rope_parameters,
        ours.max_position_embeddings,
    )
    assert torch.equal(frequencies(again), frequencies(ours))
    assert not torch.equal(frequencies(ours), frequencies(AutoConfig.for_model(family, **SMALL)))


def test_a_family_that_takes_no_other_type_refuses_it(tmp_path: Path) -> None:
    AutoConfig.for_model("phi3", **SMALL).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"^rope_scaling: phi3: .*must be one of \['longrope'\], got yarn: leave it out$"
    ):
        read_config(str(tmp_path), trust_remote_code=False, scaling=YARN)


def test_code_that_reads_no_scaling_is_told_from_code_that_does(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", **SMALL).save_pretrained(tmp_path)
    options = scaled_options(str(tmp_path), YARN, trust_remote_code=False)
    assert knows_scaling(AutoModelForCausalLM.from_config(options["config"]), YARN)
    assert not knows_scaling(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)), YARN)
    assert scaled_options(str(tmp_path), None, trust_remote_code=False) == {}


def test_the_card_of_an_adapter_says_how_its_base_is_loaded() -> None:
    card = model_card(
        Facts("me/a", run={}, keys={"adapter": "lora", "rope_scaling": YARN}, data={}, base="org/b", datasets=[],
              adapter=True, loading="", base_changes={"max_position_embeddings": 1024}, license=None)
    )  # fmt: skip
    assert 'from_pretrained("org/b", dtype="auto", max_position_embeddings=1024)' in card
    assert "--lora-modules a=a \\\n    --hf-overrides '{\"max_position_embeddings\": 1024}'\n" in card
    assert "| `rope_scaling` | `{'rope_type': 'yarn', 'factor': 4.0}` |" in card


def test_a_million_positions_are_turned_in_float32() -> None:
    """Also under autocast, of a model in bfloat16: bfloat16 knows no odd number above 256."""
    config = AutoConfig.for_model("qwen3", **SMALL)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).model
    places = torch.tensor([[0, 1, 65_537, 262_145, 999_999]])
    with torch.autocast("cpu", torch.bfloat16):
        cos, sin = model.rotary_emb(torch.zeros(1, 5, 64, dtype=torch.bfloat16), places)
    angles = places[0, :, None] * model.rotary_emb.inv_freq  # float32
    angles = torch.cat([angles, angles], dim=-1)
    assert torch.equal(cos[0], angles.cos().bfloat16())
    assert torch.equal(sin[0], angles.sin().bfloat16())
