"""A base in 4 bits: it computes what its rounded weights do, an adapter beside it learns that, and nothing saves it."""

from __future__ import annotations

import json
import logging
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel
from transformers.trainer_utils import validate_quantization_for_training

from ds_sft.checkpoints.trained import trained_parts
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.engine.zero import engine_config
from ds_sft.errors import UserError
from ds_sft.export.weights import say_how_its_base_is_loaded
from ds_sft.model import quantized
from ds_sft.model.adapter_files import load_on_disk, save_adapter
from ds_sft.model.adapters import choose_weights, count_parameters
from ds_sft.model.load import load_model
from ds_sft.model.quantized import (
    as_trained,
    elements,
    nf4_config,
    quantised_layers,
    quantization_of,
    round_base,
    settle,
    skeleton,
)
from ds_sft.model.tokenizer import load_tokenizer
from ds_sft.ranks.launch import Launch
from ds_sft.training.flops import count_flops
from tests.conftest import make_model

ALONE = Launch(launcher="python")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}
IDS = torch.arange(3, 131)[None] * 3 % 400
OF_A_LAYER = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj",
              "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]  # fmt: skip


def make(name: Path, **keys: Any) -> Config:
    training = {"output_dir": "o", "learning_rate": 1e-3}
    keys = {"adapter": "lora", "quantization": "nf4", **keys}
    return Config(model_name_or_path=str(name), train_file="t", training=training, **keys)


def arguments(precision: str = "bf16") -> Any:
    flags = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    return SimpleNamespace(
        **flags, deepspeed=None, device=torch.device("cpu"), seed=7, activation_checkpointing_kwargs=None
    )


def in_4_bits(name: Path, precision: str = "bf16", **keys: Any) -> Any:
    return load_model(make(name, **keys), arguments(precision)).train()


def rounded(name: Path, precision: str = "bf16", whole: Any = ()) -> Any:
    """The same model of ordinary weights, those of its 4 bits."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[precision]).train()
    round_base(model, DTYPES[precision], whole)
    return model


def with_adapter(model: Any, folder: Path, precision: str, **keys: Any) -> Any:
    """One whose product is not 0, so that what lies below gets a gradient."""
    wanted = "nf4" if getattr(model, "is_loaded_in_4bit", False) else "none"
    choose_weights(model, make(folder, quantization=wanted, **keys), arguments(precision), ALONE)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def learn(model: Any, precision: str, steps: int = 3) -> list[float]:
    """Losses of steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        with torch.autocast("cpu", DTYPES[precision], enabled=precision != "float32"):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def of_inputs(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of what goes into the first layer."""
    inputs = model.get_input_embeddings()(IDS).detach().requires_grad_(True)
    result = model(inputs_embeds=inputs, labels=IDS)
    (gradient,) = torch.autograd.grad(result.loss, inputs)
    return result.logits, gradient


def write(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def edit(file: Path, **changes: Any) -> None:
    write(file, json.loads(file.read_text(encoding="utf-8")) | changes)


# ---- What it computes


@pytest.mark.parametrize("precision", DTYPES)
def test_it_computes_what_its_rounded_weights_do(model_dir: Path, precision: str) -> None:
    """Bit for bit, forward and backward: who has these weights has what was trained against."""
    (logits, gradient), (wanted, wanted_gradient) = map(
        of_inputs, (in_4_bits(model_dir, precision), rounded(model_dir, precision))
    )
    assert logits.dtype == DTYPES[precision]
    assert torch.equal(logits, wanted)
    assert torch.equal(gradient, wanted_gradient)
    assert gradient.abs().max() > 0
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=DTYPES[precision])
    assert not torch.equal(of_inputs(plain)[0], logits)


def test_an_evaluation_changes_nothing(model_dir: Path) -> None:
    """On a CPU with bfloat16 products bitsandbytes repacks weights at the first evaluation, for a kernel that rounds
    otherwise and has no backward: gradients were wrong from then on, without a word."""
    model = in_4_bits(model_dir)
    wanted, wanted_gradient = of_inputs(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, wanted)
        model.generate(IDS[:, :4], max_new_tokens=4)
    logits, gradient = of_inputs(model.train())
    assert torch.equal(logits, wanted)
    assert torch.equal(gradient, wanted_gradient)
    packing = [module.support_avx512bf16_for_cpu for module in model.modules() if hasattr(module, "quant_state")]
    assert packing == [False] * 14


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_an_adapter_learns_what_it_would_beside_the_rounded_weights(
    model_dir: Path, adapter: str, precision: str
) -> None:
    models = (
        with_adapter(make_base(model_dir, precision), model_dir, precision, adapter=adapter)
        for make_base in (in_4_bits, rounded)
    )
    losses, wanted = (learn(model, precision) for model in models)
    assert losses == pytest.approx(wanted, rel=1e-6 if precision == "float32" else 1e-3)
    assert losses[-1] < losses[0] - 0.1


def test_recomputed_layers_learn_the_same(model_dir: Path) -> None:
    def losses(*, recomputed: bool) -> list[float]:
        model = with_adapter(in_4_bits(model_dir), model_dir, "bf16")
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        return learn(model, "bf16")

    assert losses(recomputed=True) == losses(recomputed=False)


def test_4_bits_are_the_same_wherever_they_are_made() -> None:
    """With other threads, and of a file in float32. Magnitudes that were rounded again, too, would depend on threads:
    the mean that is taken off them is summed in another order."""
    weight = torch.randn(4096, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found += [as_trained(weight, torch.bfloat16), as_trained(weight.float(), torch.bfloat16)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], again) for again in found[1:])
    assert len(found[0][0, :64].unique()) <= 16
    assert (found[0] - weight).float().square().mean() < 0.01  # of a normal distribution of variance 1


def test_a_model_is_quantised_from_the_dtype_of_forward_and_backward(model_dir: Path, tmp_path: Path) -> None:
    """A base in float32 becomes the bits that merging it makes."""
    torch.manual_seed(3)
    folder = make_model(tmp_path / "model", model_dir)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for parameter in whole.parameters():
        nn.init.normal_(parameter, std=0.05)
    whole.save_pretrained(folder)
    wanted = as_trained(whole.model.layers[1].mlp.up_proj.weight.data, torch.bfloat16)
    model = in_4_bits(folder)
    layer = model.model.layers[1].mlp.up_proj
    assert torch.equal(layer(torch.eye(64, dtype=torch.bfloat16)[None])[0].T, wanted)


# ---- What is in 4 bits


@pytest.mark.parametrize("tied", [True, False])
def test_linear_layers_are_in_4_bits_and_nothing_else(tokenizer_dir: Path, tmp_path: Path, tied: bool) -> None:
    folder = make_model(tmp_path, tokenizer_dir)
    if not tied:
        edit(folder / "config.json", tie_word_embeddings=False)
    wanted = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in OF_A_LAYER]
    assert sorted(quantised_layers(skeleton(str(folder), trust_remote_code=False))) == wanted
    model = in_4_bits(folder)
    assert sorted(n.removesuffix(".weight") for n, p in model.named_parameters() if p.dtype == torch.uint8) == wanted
    assert {p.dtype for p in model.parameters()} == {torch.uint8, torch.bfloat16}
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_is_trained_whole_stays_whole(model_dir: Path) -> None:
    keys = {"lora_modules_to_save": ["up_proj"]}
    model = in_4_bits(model_dir, **keys)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    model = with_adapter(model, model_dir, "bf16", **keys)
    assert learn(model, "bf16") == pytest.approx(
        learn(with_adapter(rounded(model_dir, "bf16", ["up_proj"]), model_dir, "bf16", **keys), "bf16"), rel=1e-3
    )


def test_it_is_counted_as_what_it_stands_for(model_dir: Path) -> None:
    """In parameters and in arithmetic: two weights to a byte are two."""
    small = with_adapter(in_4_bits(model_dir), model_dir, "bf16")
    plain = with_adapter(rounded(model_dir), model_dir, "bf16")
    assert count_parameters(small) == count_parameters(plain) == (32768, 132480)
    assert count_flops(small) == count_flops(plain)
    assert elements(small.model.layers[0].mlp.up_proj.base_layer.weight) == 64 * 128


def test_what_it_takes_is_said(model_dir: Path) -> None:
    assert str(quantization_of(in_4_bits(model_dir))) == (
        f"nf4 (bitsandbytes {version('bitsandbytes')}): 73,728 of 99,712 parameters in 4.5 bits; 0.1 MiB instead of 0.2"
    )
    assert quantization_of(rounded(model_dir)) is None


# ---- What is saved


def test_no_state_has_the_base(model_dir: Path) -> None:
    """Nor the magnitudes beside it, which are no parameters: leaving out frozen ones would not leave them out."""
    model = with_adapter(in_4_bits(model_dir), model_dir, "bf16", lora_targets=["up_proj"])
    assert [name for name in model.state_dict() if "layers.0" in name] == [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.k_norm.weight",
        "model.layers.0.mlp.up_proj.lora_A.default.weight",
        "model.layers.0.mlp.up_proj.lora_B.default.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ]


def test_merged_into_the_rounded_weights_it_has_the_trained_loss(model_dir: Path) -> None:
    model = with_adapter(in_4_bits(model_dir, "float32"), model_dir, "float32")
    losses = learn(model, "float32", steps=5)
    merged = rounded(model_dir, "float32")
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]:
        merged.get_submodule(name).weight.data += layer.get_delta_weight("default").detach()
    with torch.no_grad():
        trained, found = (m.eval()(input_ids=IDS, labels=IDS).loss.item() for m in (model, merged))
    assert found == pytest.approx(trained, rel=1e-6)
    assert trained < losses[0] - 0.1


def test_how_the_base_under_an_adapter_is_loaded_is_said(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a line that whoever has transformers and peft alone can use."""
    model = with_adapter(in_4_bits(model_dir), model_dir, "bf16")
    save_adapter(model, trained_parts(model), tmp_path)
    capsys.readouterr()
    say_how_its_base_is_loaded(tmp_path)  # not known to be in 4 bits
    write(tmp_path / "trained_on.json", {"quantization": "nf4", "computed_in": "bfloat16"})
    say_how_its_base_is_loaded(tmp_path)
    (said,) = capsys.readouterr().out.splitlines()
    start, end = said.index("AutoModel"), said.index(". A merged")
    base = eval(
        said[start:end], {"AutoModelForCausalLM": AutoModelForCausalLM, "BitsAndBytesConfig": BitsAndBytesConfig}
    )
    wanted, found = (dict(m.named_parameters()) for m in (in_4_bits(model_dir), base))
    packed = {name: value for name, value in found.items() if value.dtype == torch.uint8}
    assert packed.keys() == {f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in OF_A_LAYER}
    assert [name for name, value in packed.items() if not torch.equal(value, wanted[name])] == []
    PeftModel.from_pretrained(base, tmp_path)  # changes the base itself
    in_16_bits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    with torch.no_grad():
        loaded, trained, other = (
            m.eval()(input_ids=IDS).logits for m in (base, load_on_disk(tmp_path, trust_remote_code=False), in_16_bits)
        )
    assert 4 * (loaded - trained).abs().max() < (other - trained).abs().max()


# ---- What is refused


def test_trainer_takes_it_with_an_adapter_only(model_dir: Path) -> None:
    model = in_4_bits(model_dir)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(model)
    validate_quantization_for_training(with_adapter(model, model_dir, "bf16"))


def refused(call: Any, *args: Any) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    return str(error.value)


def test_a_package_that_is_missing(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)  # type: ignore[attr-defined]
    assert refused(load_tokenizer, make(model_dir), ALONE) == (
        "quantization: nf4: bitsandbytes is not installed: pip install bitsandbytes"
    )
    with_optim = Config(model_name_or_path=str(model_dir), train_file="t", training={"optim": "lion_32bit"})
    assert refused(load_tokenizer, with_optim, ALONE) == (
        "optim: lion_32bit: bitsandbytes is not installed: pip install bitsandbytes"
    )
    load_tokenizer(make(model_dir, quantization="none"), ALONE)


@pytest.mark.parametrize(("wanted", "method"), [("nf4", "gptq"), ("nf4", "bitsandbytes"), ("none", "bitsandbytes")])
def test_a_model_that_is_quantised_already(copy: Path, wanted: str, method: str) -> None:
    edit(copy / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    assert refused(load_tokenizer, make(copy, quantization=wanted), ALONE) == (
        f"model_name_or_path: {copy}: its weights are quantised already ({method}); give the model they were made of, "
        "and for 4 bits quantization: nf4 beside adapter: lora"
    )


def test_a_model_that_stays_quantised_when_it_is_loaded(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some kinds become ordinary weights while they are loaded, and are trained as such; others do not."""
    loaded = SimpleNamespace(is_quantized=True, generation_config=None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **options: loaded)
    assert refused(load_model, make(model_dir, quantization="none"), arguments()) == (
        f"model_name_or_path: {model_dir}: its weights are quantised, and cannot be trained here; give the model they "
        "were made of"
    )


def test_a_model_without_layers_for_it(model_dir: Path, tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=400, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path)
    assert refused(load_model, make(tmp_path), arguments()) == (
        "quantization: nf4: GPT2LMHeadModel has its matrices transposed (Conv1D); leave quantization out"
    )
    whole = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert refused(nf4_config, skeleton(str(model_dir), trust_remote_code=False), torch.bfloat16, whole) == (
        "quantization: nf4: Qwen3ForCausalLM has no linear layer beside what is trained; leave it out"
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_3_cannot_partition_it(stage: int, tmp_path: Path) -> None:
    engine = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }  # fmt: skip
    config = load_config(["--model_name_or_path=m", "--train_file=t", "--output_dir=o", "--adapter=lora",
                          "--quantization=nf4", f"--deepspeed={write(tmp_path / 'zero.json', engine)}"])  # fmt: skip
    launch = Launch(launcher="torchrun", world_size=2, local_world_size=2)
    if stage < 3:
        assert engine_config(config, launch) is not None
        return
    assert refused(engine_config, config, launch) == (
        f"{tmp_path / 'zero.json'}: zero_optimization.stage: 3: it cannot partition the 4-bit weights of quantization: "
        "nf4; write 2, or leave quantization out"
    )
    assert engine_config(config, ALONE) is None  # DeepSpeed is not used


def test_only_what_bitsandbytes_misses_for_answers_is_not_said(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s. Please make sure", "No module")
    logger.warning("something else: %s", "is wrong")
    assert caplog.messages == ["something else: is wrong"]


def test_the_base_in_16_bits_is_not_kept_in_memory(copy: Path) -> None:
    """What stays in 16 bits lies in the mapped file at first, and would keep all of it."""
    model = in_4_bits(copy)
    assert str(copy / "model.safetensors") not in Path("/proc/self/maps").read_text(encoding="utf-8")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_settling_leaves_other_layers_alone(model_dir: Path) -> None:
    plain = rounded(model_dir)
    settle(plain)
    assert len([name for name in plain.state_dict() if "layers.0.mlp" in name]) == 3
