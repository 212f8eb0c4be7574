"""What is planned where weights are frozen: which are trained, states, traffic, arithmetic, disks; against peft's own
models and figures worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.checkpoints.space import export_size, predict_size
from ds_sft.checkpoints.storage import Site
from ds_sft.checkpoints.trained import trained_parts
from ds_sft.cli import main
from ds_sft.commands.preview import say_trained
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.adapter_files import WEIGHTS, save_adapter
from ds_sft.model.adapters import choose_weights
from ds_sft.plan.cost import Hardware, collectives, model_flops_per_token, step_flops, traffic
from ds_sft.plan.disk import trained_checkpoint_bytes
from ds_sft.plan.gradients import gradients_before, reductions
from ds_sft.plan.layouts import CUDA_CONTEXT, loading_bytes, option
from ds_sft.plan.memory import model_states
from ds_sft.plan.run import Engine, Run, planned_weights
from ds_sft.plan.shape import FAMILIES, shape_of
from ds_sft.plan.size import model_size, written_bytes
from ds_sft.plan.states import states
from ds_sft.plan.weights import ALL, Choice, Weight, choice_of
from ds_sft.ranks.launch import Launch
from ds_sft.training.expectation import expect_memory
from ds_sft.training.flops import count_flops
from ds_sft.training.resumable import ResumableTrainer

ALONE = Launch(launcher="python")
KEYS = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 3, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
SHAPE = shape_of({"model_type": "llama", **KEYS})
# A layer: q, o 64 x 64; k, v 64 x 32; gate, up, down 64 x 160; two norms. Rank 16 beside each matrix.
MATRICES = 2 * 4096 + 2 * 2048 + 3 * 10240
BASE = 3 * (MATRICES + 128) + 64 + 2 * 6400
LORA = 3 * 16 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160))


def config(**keys: Any) -> Config:
    training = {"learning_rate": 1e-3, "bf16": True, "output_dir": "out", "gradient_accumulation_steps": 1,
                "activation_checkpointing": False}  # fmt: skip
    return Config(model_name_or_path="m", train_file="t", training=training, **keys)


def trained_model(family: str = "llama", *, tied: bool = False, engine: Any = None, **keys: Any) -> Any:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **KEYS, tie_word_embeddings=tied))
    args: Any = SimpleNamespace(seed=1, deepspeed=engine, bf16=True, fp16=False, activation_checkpointing_kwargs=None)
    choose_weights(model, config(**keys), args, ALONE)
    return model


def run(stage: int | None, ranks: int = 4, **keys: Any) -> Run:
    choice, engine = keys.pop("choice", Choice(adapter="lora")), keys.pop("engine", Engine(stage=stage))
    return Run(shape=SHAPE, engine=engine, ranks=ranks, micro_batch=2, length=128,
               accumulation=keys.pop("accumulation", 1), checkpointing=keys.pop("checkpointing", False), half=True,
               choice=choice, **keys)  # fmt: skip


# ---- Which weights


def same(name: str) -> str:
    return name.replace(".base_layer", "").replace(".original_module", "")


@pytest.mark.parametrize(
    ("family", "tied", "keys"),
    [
        *((family, False, {"adapter": "lora"}) for family in ("llama", "mistral", "qwen2", "qwen3", "smollm3")),
        ("llama", True, {"adapter": "dora", "lora_targets": ["q_proj", r".*layers\.[12]\..*down_proj"]}),
        ("qwen3", False, {"adapter": "lora", "lora_rank": 4, "lora_modules_to_save": ["lm_head", "q_norm"]}),
        ("qwen3", True, {"adapter": "lora", "lora_modules_to_save": ["lm_head"]}),
        ("llama", True, {"adapter": "lora", "lora_modules_to_save": ["embed_tokens"]}),
        ("llama", True, {"train_only": ["layers.2.", "norm"]}),
        ("qwen2", False, {"train_only": ["layers.*.mlp", "lm_head"]}),
    ],
)
def test_the_weights_are_those_of_the_model(family: str, tied: bool, keys: dict[str, Any]) -> None:
    """Names, shapes, what is trained, and its order: that of gradients and buckets."""
    shape = shape_of({"model_type": family, **KEYS, "tie_word_embeddings": tied})
    ours = [(w.name, w.shape, w.trained) for w in planned_weights(shape, choice_of(config(**keys))).every]
    model = trained_model(family, tied=tied, **keys)
    real = [(same(name), tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()]
    assert sorted(ours) == sorted(real)
    assert [one for one in ours if one[2]] == [one for one in real if one[2]]


TARGETS = ["q_proj", "self_attn.o_proj", "1.mlp.up_proj", "layers.0", "mlp", "proj", "PROJ", "lm_head", "norm", "[", "",
           "q_pro.", ".*", r".*\.[12]\..*_proj", ".*q_proj|.*v_proj", "q_proj.weight", "all-linear"]  # fmt: skip
WHOLE = ["lm_head", "embed_tokens", "model.embed_tokens", "norm", "q_norm", "1.input_layernorm", "layernorm", "q_proj",
         "layers.1.mlp.up_proj", "mlp"]  # fmt: skip
ONLY = ["layers.2.", "norm", "lm_head", "embed", "layers.*.mlp", "*", "bias", "LAYERS", "[", "layers.[01]."]


def some(names: list[str]) -> st.SearchStrategy[list[str]]:
    return st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True)


@given(
    family=st.sampled_from(FAMILIES),
    tied=st.booleans(),
    keys=st.fixed_dictionaries({"train_only": some(ONLY)})
    | st.fixed_dictionaries(
        {"adapter": st.sampled_from(["lora", "dora"])},
        optional={"lora_targets": some(TARGETS), "lora_modules_to_save": some(WHOLE)},
    ),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_what_a_run_accepts_is_planned_alike(family: str, tied: bool, keys: dict[str, Any]) -> None:
    """The plan has names and shapes alone, the run asks the model: they must not part, whatever is named."""
    try:
        model = trained_model(family, tied=tied, **keys)
    except UserError:
        return
    shape = shape_of({"model_type": family, **KEYS, "tie_word_embeddings": tied})
    planned = {w.name: w.shape for w in planned_weights(shape, choice_of(config(**keys))).every if w.trained}
    assert planned == {name: tuple(p.shape) for name, p in trained_parts(model).items()}


def test_parameters_by_hand() -> None:
    found = planned_weights(SHAPE, Choice(adapter="lora"))
    assert (found.number_frozen, found.number_trained, found.first) == (BASE, LORA, 0)
    assert planned_weights(SHAPE, Choice(only=("layers.2.",))).first == 2
    assert planned_weights(SHAPE, Choice(only=("lm_head",))).first == 3
    assert planned_weights(SHAPE, Choice(only=("embed", "layers.2."))).first == 0


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (Choice(adapter="lora", targets=("x_proj",)), "lora_targets: 'x_proj' matches no linear layer of this model"),
        (Choice(adapter="lora", targets=("lm_head",)), "lora_targets: 'lm_head' matches no linear layer"),
        (Choice(adapter="lora", targets=("*_proj",)), r"lora_targets: '\*_proj' is neither a name nor a regular"),
        (Choice(only=("layers.9.",)), "train_only: 'layers.9.' is in no weight's name"),
    ],
)
def test_what_names_nothing(choice: Choice, said: str) -> None:
    with pytest.raises(UserError, match=said):
        planned_weights(SHAPE, choice)


def test_4_bits_as_bitsandbytes_packs_them() -> None:
    """Two to a byte, and a float32 for 64 of them; embeddings, norms and the output projection stay as they are."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(160, 64), blocksize=64, quant_type="nf4")
    taken = packed.nbytes + state.absmax.nbytes + state.code.nbytes
    assert Weight("down_proj.weight", (160, 64), trained=False, four_bits=True).bytes(2) == taken
    found = planned_weights(SHAPE, Choice(adapter="lora", four_bits=True))
    packed_bytes = 3 * (MATRICES // 2 + MATRICES // 16 + 7 * 64)
    assert found.frozen_bytes(2) == packed_bytes + 2 * (BASE - 3 * MATRICES)


# ---- States, gradients, traffic


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (None, {"parameters": 4 * LORA, "frozen weights": 2 * BASE, "optimizer states": 8 * LORA}),
        (2, {"parameters": 2 * LORA, "frozen weights": 2 * BASE, "master weights": LORA, "optimizer states": 2 * LORA}),
        (3, {"parameters": 2 * LORA // 4, "frozen weights": 2 * BASE // 4, "master weights": LORA,
             "optimizer states": 2 * LORA}),
    ],
)  # fmt: skip
def test_states_by_hand(stage: int | None, expected: dict[str, int]) -> None:
    """Frozen weights have neither masters nor moments; stage 3 divides them, too."""
    assert states(run(stage, engine=Engine(stage=stage, persistence_threshold=0))) == expected


def test_gradients_are_of_trained_weights_alone() -> None:
    points = reductions(run(None, ranks=1), rank=0)
    assert len(points) == 2 * 7 * 3 + 1
    assert points[-1].kept == 4 * LORA
    assert gradients_before(run(None, accumulation=2), rank=0) == 4 * LORA
    assert model_states(run(None, ranks=1, lazy=True)) == 2 * BASE + (4 + 8 + 4) * LORA


def test_traffic_by_hand() -> None:
    """Gradients of what is trained; stage 3 gathers all weights twice, ZeRO++ once between nodes."""
    psi, still = 2 * LORA * 3 / 4, 2 * BASE * 3 / 4
    assert traffic(run(2, accumulation=3), 4).total == (2 * 3 + 1) * psi
    assert traffic(run(3, accumulation=3), 4).total == 3 * (3 * psi + 2 * still)
    within = traffic(run(3, engine=Engine(stage=3, hierarchical=2)), 2)
    assert (within.inside, within.between) == (psi + still, 2 * psi + still)
    assert collectives(Engine(stage=None), 100.0, 2, 1, frozen=1000.0) == (100.0, 0.0)


# ---- Arithmetic


CHOICES: list[dict[str, Any]] = [
    {"adapter": "lora"},
    {"adapter": "dora", "lora_targets": ["q_proj"]},
    {"adapter": "lora", "lora_modules_to_save": ["lm_head"]},
    {"train_only": ["layers.2."]},
    {"train_only": ["model.norm"]},
    {"train_only": ["embed_tokens"]},
]


def test_arithmetic_by_hand() -> None:
    """6 an adapter's parameter, 4 a frozen one, 2 below the first layer that is trained: forward alone."""
    pairs = 12 * 64 * 20
    head = 4 * 6400
    lora, upper = Choice(adapter="lora"), Choice(only=("layers.2.",))
    assert model_flops_per_token(SHAPE, 20, lora) == 4 * 3 * MATRICES + 6 * LORA + head + 3 * pairs
    assert model_flops_per_token(SHAPE, 20, upper) == (6 + 2 * 2) * MATRICES + head + pairs + 2 * pairs / 3
    assert model_flops_per_token(SHAPE, 20, ALL) == 6 * (3 * MATRICES + 6400) + 3 * pairs
    tokens, again = 2 * 128, 12 * 64 * 128 / 3
    whole, recomputed = (step_flops(run(None, checkpointing=way)) for way in (False, True))
    assert recomputed - whole == tokens * (2 * (3 * MATRICES + LORA) + 3 * again)
    whole, recomputed = (step_flops(run(None, checkpointing=way, choice=upper)) for way in (False, True))
    assert recomputed - whole == tokens * (2 * MATRICES + again)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", CHOICES, ids=str)
def test_a_run_counts_what_is_planned(keys: dict[str, Any], tied: bool) -> None:
    flops = count_flops(trained_model(tied=tied, **keys))
    assert flops is not None
    planned = model_flops_per_token(replace(SHAPE, tied=tied), 20, choice_of(config(**keys)))
    assert flops.of(tokens=1, pairs=20, head_tokens=1) == planned


def test_trainers_estimate_knows_what_is_frozen() -> None:
    """Of all parameters but embeddings, norms included."""
    asked: Any = SimpleNamespace(model=trained_model(adapter="lora"), flops_per_token=0)
    inputs = {"input_ids": torch.zeros(2, 5)}
    assert ResumableTrainer.floating_point_ops(asked, inputs) == 10 * (4 * (BASE - 6400) + 6 * LORA)


# ---- Disks


@pytest.mark.parametrize(("stage", "expected"), [(None, 12 * 100), (2, (4 + 12 + 2) * 100), (3, (4 + 12) * 100)])
def test_checkpoints_have_what_is_trained(stage: int | None, expected: int) -> None:
    weight_bytes = 4 if stage is None else 2
    assert trained_checkpoint_bytes(100, 0, stage=stage, weight_bytes=weight_bytes) == expected
    assert trained_checkpoint_bytes(100, 30, stage=stage, weight_bytes=weight_bytes) == expected + 4 * 30


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("keys", [{}, {"lora_modules_to_save": ["lm_head"]}], ids=["adapters", "head"])
def test_a_model_in_memory_and_one_on_the_disk_are_counted_alike(
    tmp_path: Path, keys: dict[str, Any], tied: bool
) -> None:
    """And as large as peft's file is, in which a tied head that is trained is twice."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **KEYS, tie_word_embeddings=tied)).save_pretrained(
        tmp_path / "base"
    )
    given = config(adapter="lora", merge="yes", **{name: list(value) for name, value in keys.items()})
    model = trained_model(tied=tied, adapter="lora", **{name: list(value) for name, value in keys.items()})
    site, size = Site(ALONE, shared=True), model_size(tmp_path / "base", choice_of(given))
    assert size is not None
    assert written_bytes(size, None, given) == (predict_size(model, None, site), export_size(model, given, site))
    save_adapter(model, trained_parts(model), tmp_path)
    adapter = (tmp_path / WEIGHTS).stat().st_size
    base = 2 * (BASE - 6400 * tied)
    assert export_size(model, given, site) - base == pytest.approx(adapter, rel=0.03)  # without names and shapes
    assert export_size(model, replace(given, merge="auto"), site) == export_size(model, given, site) - base


# ---- Commands


@pytest.fixture
def run_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **KEYS}), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n' * 100, encoding="utf-8")
    keys = {"model_name_or_path": "model", "train_file": "rows.jsonl", "output_dir": "out", "max_length": 128,
            "adapter": "lora"}  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return tmp_path / "run.yaml"


@pytest.mark.usefixtures("run_file")
def test_plan_says_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml"]) == 0
    said = capsys.readouterr().out
    assert f"Trained (lora): {LORA:,} of {LORA + BASE:,} parameters ({LORA / (LORA + BASE):.2%}); the others" in said
    assert "frozen weights" in said
    assert main(["plan", "run.yaml", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"]["trained"] == LORA
    disk = found["disk"]
    assert disk["checkpoint"] == (4 + 12 + 2) * LORA  # ZeRO-2 is recommended
    assert disk["final_model"] == 4 * LORA + 2 * BASE
    assert found["schedule"]["flops"] == found["schedule"]["tokens"] * model_flops_per_token(
        SHAPE, 128, Choice(adapter="lora")
    )
    assert main(["plan", "run.yaml", "--json", "--merge", "no"]) == 0
    assert json.loads(capsys.readouterr().out)["disk"]["final_model"] == 4 * LORA
    assert main(["plan", "run.yaml", "--lora_targets", "x_proj"]) == 2
    assert "lora_targets: 'x_proj' matches no linear layer of this model" in capsys.readouterr().err
    assert main(["plan", "run.yaml", "--adapter", "none", "--train_only", "layers.2."]) == 0
    assert "Trained (train_only): 43" in capsys.readouterr().out


@pytest.mark.usefixtures("run_file")
def test_4_bits_are_not_planned_under_stage_3(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml", "--quantization", "nf4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["options"]] == ["no DeepSpeed", "ZeRO-1", "ZeRO-2", "ZeRO-2 offload"]
    assert main(["plan", "run.yaml", "--quantization", "nf4", "--sweep", "nodes=1..2", "--json"]) == 0
    assert {point["layout"] for point in json.loads(capsys.readouterr().out)} == {"ZeRO-2"}


def test_a_run_whose_keys_the_plan_cannot_follow_goes_on(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = replace(config(adapter="lora", lora_targets=["x_proj"]), model_name_or_path=str(run_file.parent / "model"))
    ways: dict[str, Any] = {"longest": 8, "largest": 8, "padded": False, "ranks": 1, "on_gpu": False, "launch": ALONE}
    assert expect_memory(asked, None, **ways) is None
    assert capsys.readouterr().out == "No memory plan: it cannot follow lora_targets.\n"
    expected = expect_memory(replace(asked, lora_targets=None), None, **ways)
    assert expected is not None
    assert expected.memory.device["frozen weights"] == 2 * BASE


@pytest.mark.parametrize(
    ("stage", "choice", "trained", "frozen"),
    [(2, ALL, 2 * BASE, 0), (1, Choice(only=("layers",)), 2 * (BASE - 64 - 12800), 2 * (64 + 12800)),
     (2, Choice(adapter="lora"), 2 * LORA, 2 * BASE)],
)  # fmt: skip
def test_the_host_has_a_tensor_at_a_time_or_the_flat_weights_and_their_parts(
    stage: int, choice: Choice, trained: int, frozen: int
) -> None:
    """Weights go to the GPU as they are read; DeepSpeed flattens on the host what has no room there twice."""
    room = CUDA_CONTEXT + frozen + 2 * trained
    asked = run(stage, choice=choice)
    assert loading_bytes(asked, room) == 2 * 10240
    assert loading_bytes(asked, room - 1) == 2 * trained
    assert loading_bytes(run(None, choice=choice), room - 1) == 4 * 10240  # float32, and never flat
    cluster = Hardware(nodes=1, gpus_per_node=4, flops=1e12, inside=1e9, between=1e9)
    for gpu_memory, needed in ((80e9, 2 * 10240), (room - 1, 2 * trained)):
        found = option("ZeRO", asked, cluster, gpu_memory, host_memory=4 * needed)
        assert (found.node_bytes, found.fits_host) == (4 * needed, True)
        assert not option("ZeRO", asked, cluster, gpu_memory, host_memory=4 * needed - 1).fits_host


def test_stage_3_loads_its_share_of_what_is_frozen() -> None:
    assert loading_bytes(run(3), 80e9) == (2 * BASE + 2 * LORA) // 4 + 2 * 10240


def test_names_that_only_the_model_in_memory_has_are_not_refused(tmp_path: Path) -> None:
    """GPT-2 is published without the first part of its names; Qwen2's shared experts have a gate that can be named."""
    values = {"h.0.mlp.c_fc.weight": torch.zeros(2, 2), "layers.0.mlp.shared_expert_gate.weight": torch.zeros(1, 2)}
    save_file(values, tmp_path / "model.safetensors")
    named = Choice(only=("transformer.h",)), Choice(adapter="lora", targets=("shared_expert_gate",))
    for choice, said in zip(named, ("train_only", "lora_targets"), strict=True):
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
        assert model_size(tmp_path, choice) is None
        (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
        with pytest.raises(UserError, match=said):
            model_size(tmp_path, choice)


def test_launch_foretells_small_checkpoints(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **KEYS)).save_pretrained("model")
    words = ["launch", "--dry-run", str(run_file)]
    assert main([*words, "--json"]) == 0
    said = capsys.readouterr().out
    found = json.loads(said[said.index("{") :])  # DeepSpeed's first import says which accelerator it took
    assert (found["trained_parameters"], found["parameters"]) == (LORA, BASE)
    assert (found["checkpoint_bytes"], found["final_model_bytes"]) == (12 * LORA, 4 * LORA + 2 * BASE)
    assert main(words) == 0
    assert f"each ({LORA:,} trained, of a model of {BASE:,} parameters), " in capsys.readouterr().out


def test_preview_says_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the run will, in any model that transformers has; and how large a checkpoint will be."""
    AutoConfig.for_model("gpt_neox", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                         vocab_size=50).save_pretrained(tmp_path)  # fmt: skip
    asked = replace(config(adapter="lora", lora_rank=2), model_name_or_path=str(tmp_path))
    say_trained(asked, None, ALONE)
    said = capsys.readouterr().out
    adapters = 2 * ((32 + 96) + (32 + 32) + (32 + 64) + (64 + 32))
    assert f"Trained  {adapters:,} of " in said
    assert f"A checkpoint takes about {12 * adapters / 1024:.1f} KiB without DeepSpeed, the final weights " in said
    engine = {"zero_optimization": {"stage": 2}}
    say_trained(replace(asked, training={**asked.training, "bf16": True, "deepspeed": engine}), None, ALONE)
    assert f"about {18 * adapters / 1024:.1f} KiB under ZeRO-2, " in capsys.readouterr().out  # as `plan` says
    say_trained(replace(asked, quantization="nf4"), None, ALONE)  # whose weights are not there
    assert f"A checkpoint takes about {12 * adapters / 1024:.1f} KiB without" in capsys.readouterr().out
    with pytest.raises(UserError, match="lora_targets: 'q_proj'"):
        say_trained(replace(asked, lora_targets=["q_proj"]), None, ALONE)
