"""What is trained: adapters on exactly the layers that were named, modules beside them, or parts of a model alone."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.checkpoints.trained import trained_parts
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.data.batch import collate_flat
from ds_sft.errors import UserError
from ds_sft.model import loss as chunked
from ds_sft.model.adapter_files import adapter_of
from ds_sft.model.adapters import choose_weights, count_parameters, lora_config
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.load import load_model
from ds_sft.model.loss import SupervisedLoss, supervise
from ds_sft.model.targets import expert_tensors, linear_layers, targets, whole_modules
from ds_sft.model.working_copy import LentCopy, WorkingCopy
from ds_sft.ranks.launch import Launch
from tests.mixtures import FAMILIES as MIXTURES
from tests.test_attention import make_rows
from tests.test_loss import SMALL, apart, make_batch

ALONE = Launch(launcher="python")
SEED = 7
MIXTURE = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**MIXTURE, "mlp_only_layers": [0]},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
}


def make(family: str = "qwen3", **changes: Any) -> Any:
    torch.manual_seed(0)
    keys = {**SMALL, **OWN.get(family, {}), **changes}
    config = AutoConfig.for_model(family, **keys, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config).train()


def mixture(family: str) -> Any:
    return make(family, **MIXTURES[family])


def keys(**given: Any) -> Config:
    flags = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o", **given}
    return load_config([word for name, value in flags.items() for word in (f"--{name}", as_flag(value))])


def as_flag(value: Any) -> str:
    return f"[{', '.join(map(repr, value))}]".replace("\\\\", "\\") if isinstance(value, list) else str(value)


def arguments(**changes: Any) -> Any:
    checkpointing = {"use_reentrant": False}
    return SimpleNamespace(
        **{"bf16": False, "fp16": False, "deepspeed": None, "seed": SEED}
        | {"activation_checkpointing_kwargs": checkpointing}
        | changes
    )


def choose(model: Any, *, bf16: bool = False, **given: Any) -> Any:
    choose_weights(model, keys(**given), arguments(bf16=bf16), ALONE)
    return model


def adapted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if hasattr(module, "lora_A")]


# ---- Which layers


DENSE = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
TARGETS: list[tuple[str, list[str] | None, list[str]]] = [
    ("qwen3", None, DENSE),
    ("qwen3", ["all-linear"], DENSE),
    ("qwen3", ["q_proj", "self_attn.v_proj"], ["q_proj", "v_proj"]),
    ("qwen3", [r".*\.(q|k)_proj", "up_proj"], ["k_proj", "q_proj", "up_proj"]),
    ("qwen3", [".*"], DENSE),  # not the output projection
    (
        "qwen3",
        [r"model\.layers\.1\.mlp\..*"],
        [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")],
    ),
    ("phi3", None, ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]),
    ("gpt_neox", None, ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]),
    ("qwen2_moe", None, DENSE),  # the shared expert's, without its gate
    ("qwen2_moe", ["shared_expert_gate"], ["shared_expert_gate"]),  # asked for by name
    ("qwen3_moe", None, ATTENTION),  # peft takes the dense layer's up_proj for the experts of the other
    ("jetmoe", None, ["kv_proj"]),  # without routers
    ("falcon_h1", None, [*DENSE[:2], "in_proj", *DENSE[2:]]),  # without out_proj, whose weight a kernel reads
]


@pytest.mark.parametrize(("family", "asked", "named"), TARGETS)
def test_targets(family: str, asked: list[str] | None, named: list[str]) -> None:
    """peft finds the layers that were chosen by the names it is given, and no other."""
    model = make(family)
    layers = linear_layers(model)
    assert targets(model, asked) == named
    choose(model, adapter="lora", **({"lora_targets": asked} if asked else {}))
    assert adapted(model) == [name for name in layers if name in named or name.rpartition(".")[2] in named]
    assert adapter_of(model).target_modules == sorted(named)
    assert not adapter_of(model).target_parameters


def test_a_vision_tower_gets_no_adapters() -> None:
    """No text reaches it; the names of its layers are those of the language model's."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "gemma3", text_config=SMALL, vision_config={**tower, "image_size": 28, "patch_size": 14}
    )
    model = AutoModelForCausalLM.from_config(config)
    assert "model.vision_tower.encoder.layers.0.self_attn.q_proj" in dict(model.named_modules())
    choose(model, adapter="lora")
    assert len(adapted(model)) == 14
    assert all(name.startswith("model.language_model.layers.") for name in adapted(model))


MATRICES = ["down_proj", "gate_up_proj", *ATTENTION]  # of a mixture
WRONG_TARGETS = [
    ("qwen3", "q_prj", "'q_prj' matches no layer of this model; near it: q_proj, v_proj, o_proj"),
    ("qwen3", "xyz", "'xyz' matches no layer of this model; near it: " + ", ".join(DENSE)),
    ("qwen3", "[all-linear, lm_head]", "all-linear is said alone, or with experts"),
    ("qwen3", "[all-linear, experts]", "experts: Qwen3ForCausalLM has no tensors of experts: leave it out"),
    (
        "qwen3",
        "(q",
        "'(q' is neither a name nor a regular expression: missing ), unterminated subpattern at position 0",
    ),
    ("qwen3", "mlp", "'mlp' is no linear layer (Qwen3MLP): adapters can be on " + ", ".join(DENSE)),
    (
        "qwen3",
        "[q_proj, lm_head]",
        "lm_head: an adapter merged into an embedding or an output projection, which may be one tensor, would change "
        "both: write lora_modules_to_save: [lm_head], which trains it whole",
    ),
    (
        "gpt2",
        "c_attn",
        "'c_attn': GPT2LMHeadModel has no linear layer beside its output projection that can have an adapter (its "
        "matrices are of Conv1D): write adapter: none, perhaps with train_only",
    ),
    (
        "gpt2",
        "all-linear",
        "all-linear: GPT2LMHeadModel has no linear layer beside its output projection that can have an adapter (its "
        "matrices are of Conv1D): write adapter: none, perhaps with train_only",
    ),
    (
        "qwen3_moe",
        "gate_proj.weight",
        "'gate_proj.weight' is a tensor (model.layers.0.mlp.gate_proj.weight), no linear layer: adapters can be on "
        + ", ".join(MATRICES),
    ),
    ("qwen3_moe", "[k_proj, xyz]", "'xyz' matches no layer of this model; near it: " + ", ".join(MATRICES)),
    ("mixtral", "w1", "'w1' matches no layer of this model; near it: " + ", ".join(MATRICES)),
    (
        "qwen3_moe",
        "up_proj",
        "up_proj of Qwen3MoeForCausalLM cannot have adapters: peft takes this name for the model's fused "
        "experts: write experts for these",
    ),
]


@pytest.mark.parametrize(("family", "asked", "message"), WRONG_TARGETS, ids=lambda value: str(value)[:20])
def test_wrong_targets(family: str, asked: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        choose(make(family), adapter="lora", lora_targets=asked)
    assert str(error.value) == f"lora_targets: {message}"


WRONG_MODULES = [
    ("lm_hed", "'lm_hed' is no module of this model; near it: lm_head"),
    (
        "mlp",
        "'mlp' is a group of modules: name those of it that are to be trained whole: gate_proj, up_proj, down_proj, "
        "act_fn",
    ),
    ("act_fn", "'act_fn' has no weights (SiLUActivation)"),
    (".*norm", "'.*norm' is no module of this model; near it: norm, q_norm, k_norm"),
]


@pytest.mark.parametrize(("asked", "message"), WRONG_MODULES)
def test_wrong_modules_to_save(asked: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        choose(make(), adapter="lora", lora_modules_to_save=asked)
    assert str(error.value) == f"lora_modules_to_save: {message}"


def test_a_module_is_trained_whole_or_has_an_adapter() -> None:
    assert targets(make(), None, apart_from=["q_proj"]) == [name for name in DENSE if name != "q_proj"]
    message = "lora_targets: q_proj is in lora_modules_to_save, too: leave it out of one of them"
    with pytest.raises(UserError, match=message):
        targets(make(), ["q_proj", "v_proj"], apart_from=["q_proj"])


def test_modules_to_save_are_those_named() -> None:
    """`norm` is the last one: peft alone would train every module whose name ends so."""
    assert whole_modules(make(), ["norm"]) == ["model.norm"]
    assert whole_modules(make(), ["q_norm", "lm_head"]) == ["q_norm", "lm_head"]
    found = trained_parts(choose(make(), adapter="lora", lora_targets="q_proj", lora_modules_to_save="norm"))
    assert [name for name in found if "lora_" not in name] == ["model.norm.modules_to_save.default.weight"]


WRONG_VALUES = [
    ({"lora_targets": "[]"}, "--lora_targets: expected a name or more, such as [a, b]; or leave it out, found '[]'"),
    ({"lora_modules_to_save": "[lm_head, '']"}, "--lora_modules_to_save: expected a name or more"),
    ({"lora_init": "orthogonal", "lora_rank": 5}, "--lora_rank: 5: lora_init: orthogonal wants an even rank"),
    ({"lora_rank": 0}, "--lora_rank: expected 1 or more, found '0'"),
    ({"lora_alpha": 0}, "--lora_alpha: expected a number above 0, found '0'"),
    ({"lora_dropout": 1}, "--lora_dropout: expected a share below 1, found '1'"),
    ({"lora_init": "pissa"}, "--lora_init: expected one of default, gaussian, orthogonal, found 'pissa'"),
    ({"adapter": "dora", "fused_kernels": "compile"}, "--fused_kernels: compile: Dynamo breaks layers with"),
    ({"adapter": "dora", "torch_compile": "yes"}, "--torch_compile: yes: Dynamo breaks layers with peft's DoRA"),
    ({"train_only": "norm"}, "--train_only: an adapter freezes all weights of the model"),
    ({"adapter": "none", "use_rslora": "yes"}, "--use_rslora: it is of adapters: write adapter: lora too, or leave it"),
    ({"adapter": "none", "train_only": "[]"}, "--train_only: expected a name or more"),
    ({"adapter": "qlora"}, "--adapter: expected one of none, lora, dora, found 'qlora'"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_VALUES, ids=lambda value: str(value)[:30])
def test_wrong_values(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        keys(**{"adapter": "lora", **given})
    assert str(error.value).startswith(message)


def test_peft_leaves_a_runs_keys_as_they_are() -> None:
    """It changes the list of modules that it is given: here the output projection is the embedding."""
    config = keys(adapter="lora", lora_targets="[v_proj, q_proj]", lora_modules_to_save="[norm, lm_head]")
    model = make(tie_word_embeddings=True)
    choose_weights(model, config, arguments(), ALONE)
    assert config.lora_targets == ["v_proj", "q_proj"]
    assert config.lora_modules_to_save == ["norm", "lm_head"]
    assert adapter_of(model).modules_to_save == ["model.embed_tokens", "model.norm"]


# ---- What is said, and in which dtype


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rate": "5e-4"}, True),
        ({"learning_rate": "1e-3", "train_only": "[norm]"}, True),
        ({"learning_rate": "4e-4"}, False),
        ({"learning_rate": "1e-3", "optim": "adafactor"}, False),
        ({"learning_rate": "1e-3", "adapter": "lora"}, False),
    ],
)
def test_a_rate_of_adapters_without_one(capsys: pytest.CaptureFixture[str], given: dict[str, str], said: bool) -> None:
    choose_weights(make(), keys(**given), arguments(), ALONE)
    line = (
        f"learning_rate {float(given['learning_rate']):g} is high where the model's own weights are trained, and usual "
        "for adapters: 0.0001 is the default. Small models bear it; or was adapter: lora meant?"
    )
    assert (line in capsys.readouterr().out.splitlines()) == said


def said(model: Any, **given: Any) -> list[str]:
    parts = choose_weights(model, keys(**given), arguments(), ALONE)
    return [str(part) for part in parts if part is not None]


def test_what_is_trained_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"lora_targets": "[q_proj, v_proj]", "lora_modules_to_save": "lm_head", "use_rslora": "yes"}
    assert said(make(tie_word_embeddings=True), adapter="lora", **given) == [
        "lora, rank 16, its product times 8, on q_proj x 2, v_proj x 2; trained whole: model.embed_tokens, lm_head",
        "8,704 of 29,376 parameters (29.63%); the others are frozen",
    ]
    assert capsys.readouterr().out == (
        "learning_rate 0.0001 is the default of full fine-tuning: adapters learn as much at about 10 times that "
        "(0.001).\n"
    )
    assert said(make("qwen3_moe"), adapter="dora", lora_rank=4, lora_alpha=4, learning_rate="1e-3") == [
        "dora, rank 4, its product times 1, on k_proj x 2, o_proj x 2, q_proj x 2, v_proj x 2; none on the experts "
        "(down_proj, gate_up_proj), which lora_targets can name: experts",
        "1,984 of 29,440 parameters (6.74%); the others are frozen",
    ]
    assert said(make("qwen3_moe"), adapter="lora", lora_targets="[q_proj, gate_up_proj]", learning_rate="1e-3") == [
        "lora, rank 16, its product times 2, on q_proj x 2, every expert of gate_up_proj x 1; none on the experts "
        "(down_proj), which lora_targets can name: experts",
        "6,144 of 33,600 parameters (18.29%); the others are frozen",
    ]
    assert said(make(tie_word_embeddings=True), train_only="[layers.1.mlp, lm_head]") == [
        "9,728 of 20,672 parameters (47.06%): layers.1.mlp (3 weights), lm_head (lm_head.weight), the embedding being "
        "the output projection, too; the others are frozen"
    ]
    assert said(make(tie_word_embeddings=True)) == ["all 20,672 parameters"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "given", [{"adapter": "lora", "lora_modules_to_save": "[lm_head, norm]"}, {"train_only": "norm"}]
)
@pytest.mark.parametrize("engine", [None, {}])
def test_frozen_weights_have_the_dtype_of_forward_and_trained_ones_that_of_masters(
    given: dict[str, str], engine: Any
) -> None:
    """Under DeepSpeed all have its 16 bits: the masters are its own."""
    model = make()
    choose_weights(model, keys(**given), arguments(bf16=True, deepspeed=engine), ALONE)
    trained = set(trained_parts(model).values())
    assert {p.dtype for p in trained} == {torch.float32 if engine is None else torch.bfloat16}
    assert {p.dtype for p in set(model.parameters()) - trained} == {torch.bfloat16}


def test_every_rank_begins_with_the_same_adapters() -> None:
    """Whatever was drawn before; and what is drawn later does not depend on them."""
    states, after = [], []
    for drawn in (0, 5):
        model = make()
        torch.rand(drawn)
        with torch.random.fork_rng(devices=[]):
            following = torch.rand(1)
        choose(model, adapter="lora")
        states.append(trained_parts(model))
        after.append(torch.equal(torch.rand(1), following))
    assert after == [True, True]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("start", ["default", "gaussian", "orthogonal"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_adapters_begin_as_the_base_model(adapter: str, start: str) -> None:
    model, batch = make(), make_batch()
    expected = model(**batch).logits
    found = choose(model, adapter=adapter, lora_init=start)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# ---- What train_only names


WRONG_PATTERNS = [
    ("layer.1", "train_only: 'layer.1' is in no weight's name; near it: layers, input_layernorm"),
    ("*", "train_only: *: these name all weights of the model: leave it out"),
    (
        "[layers, embed_tokens, lm_head, norm]",
        "train_only: layers, embed_tokens, lm_head, norm: these name all weights of the model: leave it out",
    ),
]


@pytest.mark.parametrize(("patterns", "message"), WRONG_PATTERNS)
def test_wrong_patterns(patterns: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        choose(make(), train_only=patterns)
    assert str(error.value) == message


def test_new_rows_of_a_frozen_embedding_would_never_be_learned() -> None:
    message = "resize_embeddings: new rows of a frozen embedding would never be learned: name it in train_only"
    with pytest.raises(UserError, match=message):
        choose(make(), train_only="layers", resize_embeddings="yes")
    choose(make(tie_word_embeddings=True), train_only="lm_head", resize_embeddings="yes")


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_nothing_is_computed_below_the_first_trained_layer(reentrant: bool | None) -> None:
    """Neither a gradient nor, where layers are recomputed, the layer again; reentrant checkpointing cannot help it."""
    model = make(num_hidden_layers=4)
    choose_weights(
        model,
        keys(train_only="[layers.2.mlp.down_proj, layers.3.]"),
        arguments(activation_checkpointing_kwargs={"use_reentrant": bool(reentrant)}),
        ALONE,
    )
    supervise(model)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
    computed: list[int] = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *given, number=number: computed.append(number))
    loss = model(**make_batch(), use_cache=False).loss
    del computed[:]
    loss.backward()
    assert computed == {None: [], False: [3, 2], True: [3, 2, 1, 0]}[reentrant]
    assert all(p.grad is not None for p in trained_parts(model).values())
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


# ---- Experts


FIRST, SECOND = "experts.gate_up_proj", "experts.down_proj"
EXPERTS: list[tuple[str, list[str], list[str], list[str]]] = [  # asked -> target_modules, target_parameters
    ("qwen3_moe", ["experts"], [], [SECOND, FIRST]),
    ("qwen3_moe", ["all-linear", "experts"], ATTENTION, [SECOND, FIRST]),
    ("qwen3_moe", ["q_proj", "gate_up_proj"], ["q_proj"], [FIRST]),
    ("qwen3_moe", [r".*\.(v_proj|experts\..*)"], ["v_proj"], [SECOND, FIRST]),
    ("gpt_oss", ["experts"], [], [SECOND, FIRST]),
    ("gpt_oss", [r"model\.layers\.1\..*down_proj"], [], ["model.layers.1.mlp.experts.down_proj"]),
    ("deepseek_v3", ["experts.down_proj"], [], [SECOND]),
    ("deepseek_v3", ["o_proj", "experts"], ["o_proj"], [SECOND, FIRST]),
]


@pytest.mark.parametrize(("family", "asked", "modules", "tensors"), EXPERTS)
def test_experts_are_named_as_peft_takes_them(
    family: str, asked: list[str], modules: list[str], tensors: list[str]
) -> None:
    """Every expert that is named has A and B of its own; nothing else has."""
    model = mixture(family)
    layers, experts = linear_layers(model), expert_tensors(model)
    choose(model, adapter="lora", lora_targets=asked)
    assert (adapter_of(model).target_modules, adapter_of(model).target_parameters) == (modules, tensors or None)
    wrappers = {name: module for name, module in model.named_modules() if hasattr(module, "parameter_name")}
    found = [f"{name.replace('.base_layer', '')}.{module.parameter_name}" for name, module in wrappers.items()]
    assert sorted(found) == sorted(name for name in experts if name.endswith(tuple(tensors)))
    others = [name for name in adapted(model) if name not in wrappers]
    assert others == [name for name in layers if name.rpartition(".")[2] in modules]
    for module in wrappers.values():
        shape = getattr(module.get_base_layer(), module.parameter_name).shape
        adapters = [getattr(module, part)["default"].weight.numel() for part in ("lora_A", "lora_B")]
        assert sum(adapters) == 16 * shape[0] * (shape[1] + shape[2])


AGAINST_EXPERTS = [
    ({"adapter": "dora"}, "peft has no DoRA for tensors of experts: write adapter: lora"),
    ({"lora_dropout": 0.1}, "peft has no dropout for adapters on tensors of experts: write lora_dropout: 0"),
    ({"lora_init": "orthogonal"},
     "peft cannot begin adapters on tensors of experts orthogonal: write lora_init: gaussian, or leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "why"), AGAINST_EXPERTS, ids=["dora", "dropout", "orthogonal"])
def test_what_peft_cannot_do_on_experts(given: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError) as error:
        choose(make("qwen3_moe"), **{"adapter": "lora", **given}, lora_targets="[q_proj, experts]")
    assert str(error.value) == f"lora_targets: experts.down_proj: {why}"


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("start", ["default", "gaussian"])
def test_experts_learn_as_with_peft(family: str, start: str) -> None:
    """Loss and gradients, from the same values."""
    known, model = mixture(family), mixture(family)
    targets = {"target_modules": ["o_proj"], "target_parameters": [FIRST, SECOND]}
    asked = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets,
                       init_lora_weights={"default": True}.get(start, start))  # type: ignore[arg-type]  # fmt: skip
    torch.manual_seed(SEED)
    known = get_peft_model(known, asked)
    choose(model, adapter="lora", lora_rank=4, lora_alpha=8, lora_targets=["o_proj", "experts"], lora_init=start)
    keep_rows_apart(model)
    supervise(model)
    mine, theirs = (
        {n.removeprefix("base_model.model."): p for n, p in trained_parts(m).items()} for m in (model, known)
    )
    assert mine.keys() == theirs.keys()
    with torch.no_grad():
        for name, value in mine.items():
            assert torch.equal(value, theirs[name]), name
            value += 0.05 * torch.randn_like(value)
            theirs[name].copy_(value)
    batch = make_batch()
    loss = model(**batch, use_cache=False).loss
    expected = known(**batch, use_cache=False).loss
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    for name, value in mine.items():
        assert apart(value.grad, theirs[name].grad) < 1e-5, name


@pytest.mark.parametrize("kind", [WorkingCopy, LentCopy])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_copies_of_adapters_on_experts(kind: Any, reentrant: bool | None) -> None:
    """As for other adapters, though nothing calls the layers that A and B are in."""
    made = [choose(mixture("qwen3_moe"), adapter="lora", bf16=True, lora_targets="experts") for _ in range(2)]
    model, half = made
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    for one in made:
        supervise(one)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            type(model).enable_input_require_grads(model)
    half(**make_batch(), use_cache=False).loss.backward()
    with kind(model).lent():
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**make_batch(), use_cache=False).loss
        loss.backward()
    found = trained_parts(model)
    assert len(found) == 4
    for name, parameter in trained_parts(half).items():
        assert found[name].grad.dtype == torch.float32
        assert torch.equal(found[name].grad, parameter.grad.float()), name


# ---- The model half


def reference(tied: bool, adapter: str, whole: list[str]) -> Any:
    """peft as its documentation has it, around a model of transformers."""
    model = make(tie_word_embeddings=tied)
    torch.manual_seed(SEED)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        use_dora=adapter == "dora",
        modules_to_save=list(whole) or None,
        ensure_weight_tying=tied and bool(whole),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


WHOLE: list[list[str]] = [[], ["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]]


@pytest.mark.parametrize("whole", WHOLE, ids="+".join)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_loss_and_gradients_are_those_of_peft(
    adapter: str, tied: bool, whole: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours in chunks, of rows laid end to end; and no gradient of a frozen projection is formed."""
    known = reference(tied, adapter, whole)
    given = {"lora_modules_to_save": whole} if whole else {}
    model = choose(make(tie_word_embeddings=tied), adapter=adapter, lora_rank=4, lora_alpha=8, **given)
    keep_rows_apart(model)
    supervise(model)
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * SMALL["vocab_size"] * 11)
    formed: list[list[bool]] = []
    learn = chunked._learn_chunk
    monkeypatch.setattr(
        chunked, "_learn_chunk", lambda *args: formed.append([g is not None for g in args[-1]]) or learn(*args)
    )
    with torch.no_grad():  # else the product is nothing, and A has no gradient
        for mine, theirs in zip(trained_parts(model).values(), trained_parts(known).values(), strict=True):
            assert torch.equal(mine, theirs)
            mine += 0.05 * torch.randn_like(mine)
            theirs.copy_(mine)
    rows = make_rows()
    count = sum(label != -100 for row in rows for label in row["labels"][1:])
    model(**collate_flat(rows), num_items_in_batch=count, use_cache=False).loss.backward()
    for row in (row for row in rows if len(row["labels"]) > 1):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        known(input_ids=ids, labels=labels, num_items_in_batch=count, use_cache=False).loss.backward()
    theirs = {name.removeprefix("base_model.model."): p.grad for name, p in trained_parts(known).items()}
    mine = {name: p.grad for name, p in trained_parts(model).items()}
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert apart(gradient, theirs[name]) < 1e-5, name
    of_head = "lm_head" in whole or (tied and bool(whole))
    assert len(formed) > 3
    assert formed == [[True, of_head, False]] * len(formed)


def test_only_a_projection_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then hidden states want no gradient, and none is formed."""
    model = choose(make(tie_word_embeddings=False), train_only="lm_head")
    supervise(model)
    formed: list[list[bool]] = []
    learn = chunked._learn_chunk
    monkeypatch.setattr(
        chunked, "_learn_chunk", lambda *args: formed.append([g is not None for g in args[-1]]) or learn(*args)
    )
    model(**make_batch(), use_cache=False).loss.backward()
    assert formed == [[False, True, False]]
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", [WorkingCopy, LentCopy])
@pytest.mark.parametrize("whole", WHOLE[:2] + WHOLE[3:], ids="+".join)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_copies_of_what_is_trained(
    kind: Any, whole: list[str], tied: bool, reentrant: bool | None, adapter: str
) -> None:
    """A model in bfloat16, bit for bit, its gradients summed in float32; frozen weights have no copy."""
    given = {"lora_modules_to_save": whole} if whole else {}
    model = choose(make(tie_word_embeddings=tied), adapter=adapter, bf16=True, **given)
    supervise(model)
    half = choose(make(tie_word_embeddings=tied), adapter=adapter, bf16=True, **given)
    for parameter in half.parameters():  # not buffers, which from_pretrained leaves in float32
        parameter.data = parameter.data.bfloat16()
    supervise(half)
    if reentrant is not None:
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            type(model).enable_input_require_grads(model)
    lender = kind(model)
    expected: dict[str, torch.Tensor] = {}
    for number in range(2):
        half.zero_grad()
        half(**make_batch(), use_cache=False).loss.backward()
        for name, parameter in trained_parts(half).items():
            expected[name] = expected.get(name, torch.zeros(())) + parameter.grad.float()
        with lender.lent(keep=number == 0):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**make_batch(), use_cache=False).loss
            loss.backward()
            copied = set(lender.copies if kind is WorkingCopy else lender.values)
    assert copied == set(trained_parts(model).values())
    for name, parameter in trained_parts(model).items():
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, expected[name]), name


def test_activations_stay_in_16_bits() -> None:
    """peft casts what comes in to the dtype of A, which is its master's until A is called."""
    model = choose(make(), adapter="lora", bf16=True)
    seen: set[torch.dtype] = set()
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    lender = LentCopy(model)
    with lender.lent(), torch.autocast("cpu", torch.bfloat16):
        model(**make_batch(), use_cache=False)
    assert seen == {torch.bfloat16}


def test_dropout_is_drawn_again_alike() -> None:
    """Where layers are recomputed, what an adapter left out of its inputs is left out again."""
    found = []
    for recomputed in (False, True):
        model = choose(make(), adapter="lora", lora_dropout=0.3)
        with torch.no_grad():
            for parameter in trained_parts(model).values():
                parameter += 0.1
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(**make_batch(), use_cache=False).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in trained_parts(model).values()]))
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
def test_rows_end_to_end_or_padded(implementation: str | None) -> None:
    """With adapters as without: the attention of a run makes no difference."""
    model = choose(make(), adapter="dora", lora_modules_to_save="lm_head")
    supervised = supervise(model)
    rows = make_rows()
    batch = collate_flat(rows)
    if implementation is None:
        keep_rows_apart(model)
    else:
        model.set_attn_implementation(implementation)
        del batch["metadata"]
    model(**batch, use_cache=False)
    assert isinstance(supervised, SupervisedLoss)
    assert supervised.total is not None
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True)
    labels = nn.utils.rnn.pad_sequence([torch.tensor(row["labels"]) for row in rows], True, -100)
    total = supervised.total.item()
    padded = choose(make(), adapter="dora", lora_modules_to_save="lm_head")
    other = supervise(padded)
    padded(input_ids=ids, labels=labels, attention_mask=(ids != 0).long(), use_cache=False)
    assert other.total.item() == pytest.approx(total, rel=1e-5)  # type: ignore[union-attr]


# ---- Numbers


def test_numbers_of_parameters() -> None:
    """The trained copy of a module counts beside the frozen one."""
    model = make(tie_word_embeddings=False)
    size = sum(p.numel() for p in model.parameters())
    config = keys(adapter="lora", lora_targets="q_proj", lora_rank=2, lora_modules_to_save="lm_head")
    assert lora_config(copy.deepcopy(model), config).r == 2
    choose(model, adapter="lora", lora_targets="q_proj", lora_rank=2, lora_modules_to_save="lm_head")
    head = SMALL["vocab_size"] * SMALL["hidden_size"]
    trained = 2 * 2 * (SMALL["hidden_size"] + 32) + head
    assert count_parameters(model) == (trained, size + trained)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("published", [torch.float32, torch.bfloat16])
def test_a_module_trained_whole_begins_as_it_was_published(published: torch.dtype, tied: bool, tmp_path: Path) -> None:
    """Not rounded to the dtype of forward and backward, which frozen weights are."""
    base = make(tie_word_embeddings=tied).to(published)
    base.save_pretrained(tmp_path)
    config = keys(model_name_or_path=tmp_path, adapter="lora", lora_modules_to_save="lm_head")
    args = arguments(bf16=True, device=torch.device("cpu"))
    model = load_model(config, args)
    choose_weights(model, config, args, ALONE)
    trained = trained_parts(model)
    (head,) = (value for name, value in trained.items() if ".modules_to_save." in name)
    assert torch.equal(head, base.lm_head.weight.float())
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
