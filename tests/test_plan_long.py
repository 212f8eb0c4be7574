"""The plan of long rows and small states: bytes by hand, what can only grow, and what is recommended."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_sft.cli import main
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.model import offload, tiling
from ds_sft.plan.activations import layer_activations, layer_backward, outside_layers
from ds_sft.plan.attention import attention_backward
from ds_sft.plan.cost import exchanged, step_flops, traffic
from ds_sft.plan.disk import checkpoint_bytes
from ds_sft.plan.fits import QWEN3, last_with_room, qwen3
from ds_sft.plan.gathered import gathered_at
from ds_sft.plan.gradients import Reduction, reductions, standing_buckets, step_gradients
from ds_sft.plan.layouts import LAYOUTS, run_of, shipped_engine
from ds_sft.plan.memory import model_states, peak, step
from ds_sft.plan.optimizer import StateBytes, planned_optimizer
from ds_sft.plan.recommend import Way, ways
from ds_sft.plan.run import TILE, TILED_FROM, Engine, Run
from ds_sft.plan.shape import Shape
from ds_sft.plan.states import MUON_KEPT, PINNED, host, moments, muon_gathered, muon_step, states
from ds_sft.plan.weights import Choice

SHAPE = Shape(family="llama", hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=1000,
              tied=False)  # fmt: skip
# A layer: q, o 64 x 64 each; k, v 64 x 32 each; gate, up, down 64 x 128 each; two norms of 64.
MATRICES = 2 * 4096 + 2 * 2048 + 3 * 8192
PARAMETERS = 2 * (MATRICES + 128) + 2 * 64_000 + 64
WIDE = replace(SHAPE, intermediate=256)  # 7 x 256 >= 16 x 64


def run(stage: int | None, ranks: int = 4, **keys: Any) -> Run:
    made = Run(shape=SHAPE, engine=Engine(stage=stage), ranks=ranks, micro_batch=1, length=128, accumulation=1,
               checkpointing=True, half=True, flat=True)  # fmt: skip
    return replace(made, **keys)


# ---- States


@pytest.mark.parametrize(
    ("stage", "ranks", "kept"),
    [
        (None, 1, {"parameters": 2 * PARAMETERS, "optimizer states": 4 * PARAMETERS}),
        (2, 4, {"parameters": 2 * PARAMETERS, "master weights": PARAMETERS // 2, "optimizer states": PARAMETERS}),
    ],
)
def test_states_in_bfloat16(stage: int | None, ranks: int, kept: dict[str, int]) -> None:
    found = states(run(stage, ranks, narrow=True))
    assert {part: size for part, size in found.items() if size} == kept


def test_bytes_a_parameter() -> None:
    """Weights, gradients and states when the optimizer steps: 8 alone or over ranks, where a share is a fraction."""
    assert model_states(run(None, 1, narrow=True)) == 8 * PARAMETERS
    assert model_states(run(None, 2, narrow=True)) == 8 * PARAMETERS
    assert reductions(run(None, 2, narrow=True), 0)[-1] == Reduction(0, 0, 2 * PARAMETERS)  # gradients are in buckets
    assert model_states(run(None, 1, narrow=False, lazy=True)) == 16 * PARAMETERS
    assert (
        model_states(run(3, 1, narrow=True, engine=Engine(stage=3, reduce_bucket=0, persistence_threshold=0)))
        == (2 + 2 + 2 + 4) * PARAMETERS
    )


def test_states_of_8_bits_have_a_scale_for_each_block() -> None:
    """Norms are too small for it, and Trainer keeps an embedding's states in float32; a flat part has neither."""
    alone = run(None, 1, optimizer="adamw_8bit")
    small = 5 * 64 + 64_000 + 4 * 2048  # norms, the embedding, and keys and values
    assert moments(alone) == 8 * small + 2 * (PARAMETERS - small) + 8 * (PARAMETERS - small) // 256
    share = PARAMETERS // 4
    assert moments(run(2, 4, optimizer="adamw_8bit")) == 2 * share + 8 * -(-share // 256)


def test_8_bits_are_unpacked_for_a_step_on_a_cpu() -> None:
    """Two moments, the gradient, a root and its quotient: 20 bytes an element of what is updated at once."""
    on_cpu = run(2, 4, optimizer="adamw_8bit", lazy=True)
    assert step(on_cpu, 0)["step buffers"] == (4 + 20) * PARAMETERS // 4
    assert step(replace(on_cpu, lazy=False), 0)["step buffers"] == 8 * PARAMETERS // 4  # squares in float64
    assert step(run(None, 1, optimizer="adamw_8bit", lazy=True), 0)["step buffers"] == 20 * 64_000


def test_gradients_of_bfloat16_states_are_never_cast() -> None:
    """DeepSpeed's flat ones are the optimizer's; of float32 states they are there in 16 bits and in 32 for a moment."""
    flat = replace(SHAPE, vocab=8)  # else the square of the embedding's gradient in float64 takes more
    chunk = 36 * 2**10
    number = run(2, shape=flat).weights.number_trained
    with pytest.MonkeyPatch.context() as inside:
        inside.setattr("ds_sft.plan.memory.CHUNK_ON_GPU", 2**10)
        assert step(run(2, 1, shape=flat, narrow=True), 0)["step buffers"] == 2 * number + chunk
    assert step(run(2, 1, shape=flat), 0)["step buffers"] == (2 + 4) * number


@pytest.mark.parametrize(
    ("optim", "left"),
    [
        ("adamw_torch_fused", list(LAYOUTS)),
        ("lion_32bit", [name for name in LAYOUTS if not name.endswith("offload")]),
        ("my_module:Optimizer", [name for name in LAYOUTS if not name.endswith("offload")]),
        ("adafactor", ["no DeepSpeed"]),
    ],
)
def test_an_optimizer_has_no_layout_that_a_run_with_it_refuses(optim: str, left: list[str]) -> None:
    named = planned_optimizer(Config(model_name_or_path="m", train_file="t", training={"optim": optim}))
    assert [name for name in LAYOUTS
            if not run(None, optimizer=named, engine=shipped_engine(name, SHAPE)).refused] == left  # fmt: skip


def test_muon_has_one_state_of_a_matrix() -> None:
    alone = run(None, 1, optimizer="muon")
    assert moments(alone) == 4 * 2 * MATRICES + 8 * (PARAMETERS - 2 * MATRICES)
    others = PARAMETERS - 2 * MATRICES
    assert moments(run(2, optimizer="muon")) == 2 * 2 * 2 * MATRICES // 4 + 8 * others // 4  # the step's beside it
    assert moments(run(3, optimizer="muon")) == 2 * 2 * MATRICES // 4 + 8 * others // 4
    assert moments(run(3, optimizer="muon", half=False)) == 4 * 2 * MATRICES // 4 + 8 * others // 4
    refused = {name: run(None, optimizer="muon", engine=shipped_engine(name, SHAPE)).refused for name in LAYOUTS}
    assert refused == {name: name.endswith("offload") for name in LAYOUTS}
    assert run(2, optimizer="muon", clipped=True).refused
    assert not run(None, 1, optimizer="muon", clipped=True).refused
    assert not alone.refused


def test_an_optimizer_without_a_kernel_of_its_own_has_roots() -> None:
    """On a GPU of all second moments at once; on a CPU the head's with its quotient, and that of the norm before it."""
    none, zero = (partial(run, stage, fused_steps=False) for stage in (None, 2))
    share = PARAMETERS // 4

    def more(asked: Run) -> int:
        return step(asked, 0)["step buffers"] - step(replace(asked, fused_steps=True), 0)["step buffers"]

    assert more(none()) == 4 * PARAMETERS
    assert more(none(lazy=True)) == 4 * (2 * 64_000 + 64)
    assert step(zero(), 0)["step buffers"] == 4 * share + 4 * share  # gradients in float32, and roots
    assert step(zero(lazy=True), 0)["step buffers"] == 4 * share + 2 * 4 * share


def test_deepspeeds_muon_has_more_than_momentum() -> None:
    """Stages 1 and 2: what it made of gradients, beside the buffer of all of them. Stage 3: gathered matrices, which it
    keeps, and while it updates them their gradients, their momentum and a rank's part of that."""
    hidden, keys = 2 * MATRICES, {"optimizer": "muon", "lazy": True}
    assert step_gradients(run(2, **keys), 0) - step_gradients(run(2, lazy=True), 0) == hidden // 4 * 2
    assert standing_buckets(run(3, **keys)) - standing_buckets(run(3, lazy=True)) == hidden * 2 + hidden // 4 * 2
    assert muon_step(run(3, **keys)) == 2 * hidden * 2 + hidden // 4 * 2
    large = run(3, shape=replace(SHAPE, hidden=2048, intermediate=65_536, layers=4), **keys)
    assert muon_gathered(large) == MUON_KEPT  # of 3.2 GB of matrices
    assert muon_step(run(3, 1, **keys)) == muon_gathered(run(3, 1, **keys)) == 0  # nobody to gather from
    norms = run(3, choice=Choice(only=("norm",)), **keys)
    assert (muon_step(norms), muon_gathered(norms)) == (0, 0)  # no matrix


def test_checkpoints_have_the_states_that_there_are() -> None:
    narrow = StateBytes(2, 4)
    assert checkpoint_bytes(SHAPE, stage=None, weight_bytes=2, kept=narrow) == 6 * PARAMETERS
    assert checkpoint_bytes(SHAPE, stage=2, weight_bytes=2, kept=narrow) == 10 * PARAMETERS
    assert checkpoint_bytes(SHAPE, stage=3, weight_bytes=2, kept=narrow) == 8 * PARAMETERS


# ---- Activations


def test_ranks_that_share_a_row_have_a_part_of_its_tokens() -> None:
    """130 tokens over 4 ranks are 33 each; key heads are there four times instead of two; o_proj has an input of its
    own."""
    shared = run(2, length=130, sequence=4)
    assert (shared.tokens, shared.groups) == (33, 1)
    assert outside_layers(shared) == 33 * (3 * 8 + 2 * 16 * 2)  # three numbers, sines and cosines
    alone = layer_activations(run(2, length=33))
    assert layer_activations(shared) - alone == 33 * 2 * 2 * (4 - 2) * 16


def test_gradients_of_attention() -> None:
    """Of queries, keys, values and output; those who share a row have the first three twice."""
    assert attention_backward(run(2, lazy=True)) == 128 * (64 + 64 + 2 * 32) * 2
    assert attention_backward(run(2, sequence=2, lazy=True)) == 64 * (64 + 2 * (64 + 2 * 32)) * 2


def test_the_kernel_of_a_gpu_has_gradients_of_its_own() -> None:
    """Of queries in float32, heads of 16 filled up to 32, a block of 128 more a row; of keys and values for each of 4
    query heads."""
    on_a_cpu = attention_backward(run(2, lazy=True))
    assert attention_backward(run(2)) - on_a_cpu == (128 + 128) * 4 * (32 + 1) * 4 + 2 * 128 * 64 * 2
    assert attention_backward(run(2, half=False)) == attention_backward(run(2, half=False, lazy=True))


def test_the_fullest_moment_of_a_layers_backward() -> None:
    """In the MLP, in the norm before it, or in attention; beside it the residual's gradient and the layer's input."""
    norm, beside = 128 * (64 * (4 + 2 + 2) + 4), 2 * 128 * 64 * 2

    def found(intermediate: int, heads: int = 4) -> tuple[int, int]:
        asked = run(2, shape=replace(SHAPE, intermediate=intermediate, heads=heads), lazy=True)
        return layer_activations(asked), layer_backward(asked, 0) - beside

    kept, most = found(1024)
    assert most == kept + 128 * 2 * 1024 * 2  # both factors' gradients, while the product's takes the product's place
    kept, most = found(8)
    assert most == kept - 128 * 4 * 8 * 2 - norm + 128 * 6 * 64 * 4
    kept, most = found(8, heads=64)
    assert most == kept - 128 * 4 * 8 * 2 - norm + 128 * (2 * 1024 + 2 * 32) * 2


def test_inputs_of_layers_wait_on_the_host() -> None:
    """The last layer's stays; one that is next to go backward is on its way; buffers are powers of two."""
    shape, keys = replace(SHAPE, layers=9), {"length": 1000, "shape": replace(SHAPE, layers=9)}
    there, here = run(2, inputs_on_host=True, **keys), run(2, **keys)
    assert host(there) == {"layer inputs": 8 * 131_072}  # 1,000 x 64 x 2 = 128,000
    assert host(here) == {}
    assert model_states(there) == model_states(here)
    first = {moment: peak(asked).device["activations"] for moment, asked in (("there", there), ("here", here))}
    assert first["here"] - first["there"] == 7 * 128_000  # of eight layers below, at the last one's backward
    long = run(2, inputs_on_host=True, length=300_000, shape=shape)
    assert host(long)["layer inputs"] == 8 * 2 * PINNED  # 38.4 MB


def test_a_tile_of_the_mlp_is_there_at_a_time() -> None:
    """32,768 tokens in 8 tiles: intermediates of one, gradients of three matrices in float32, output and gradient."""
    keys: dict[str, Any] = {"shape": replace(SHAPE, intermediate=2048), "length": 32_768}
    tiled, whole = run(2, **keys), run(2, tiling="no", **keys)
    assert (tiled.tile, whole.tile) == (4096, None)
    assert layer_activations(whole) - layer_activations(tiled) == 32_768 * 4 * 2048 * 2
    beside = 2 * 32_768 * 64 * 2
    made = 4096 * 6 * 2048 * 2 + 3 * 64 * 2048 * (4 + 2) + 32_768 * 64 * 2
    assert layer_backward(tiled, 0) == layer_activations(tiled) + beside + made
    asked = replace(tiled, checkpointing=False)
    assert asked.tile is None  # auto leaves a product more out
    assert step_flops(replace(asked, tiling="yes")) - step_flops(replace(whole, checkpointing=False)) == (
        32_768 * 6 * 2 * 64 * 2048
    )
    assert step_flops(tiled) == step_flops(whole)


def test_where_mlps_are_computed_in_tiles() -> None:
    """The rule of `model/tiling.py`: by the tokens of a rank, and where the MLP is most of its layer."""
    assert (tiling.TILE, tiling.MANY, offload.BUFFER) == (TILE, TILED_FROM, PINNED)

    def tile(shape: Shape = WIDE, **keys: Any) -> int | None:
        return run(2, shape=shape, **keys).tile

    assert [tile(length=length) for length in (16_383, 16_384, 16_385)] == [None, 4096, 3277]
    assert tile(length=16_384, sequence=2) is None
    assert tile(SHAPE, length=16_384) is None
    assert [tile(SHAPE, length=length, tiling="yes") for length in (4096, 4098)] == [None, 2049]


def test_stage_3_gathers_an_mlp_in_tiles_at_once() -> None:
    engine = Engine(stage=3, prefetch_bucket=0, persistence_threshold=64, max_reuse_distance=0)
    keys: dict[str, Any] = {"shape": WIDE, "length": 16_384, "engine": engine}
    assert gathered_at(run(3, **keys))[1] == 2 * 3 * 64 * 256
    assert gathered_at(run(3, tiling="no", **keys))[1] == 2 * 64 * 256


# ---- Traffic


def test_what_ranks_that_share_a_row_send() -> None:
    """Queries, keys, values there and the output back, forward, backward and in the recomputation; 3 of 4 to others."""
    token = 64 + 2 * 4 * 16 + 64  # four key heads instead of two
    sent = 3 * 2 * 32 * token * 2 * 3 / 4
    assert exchanged(SHAPE, 128, 4, 2, again=True) == sent
    assert exchanged(SHAPE, 128, 4, 2, again=False) == sent * 2 / 3
    shared = run(2, sequence=4, accumulation=3)
    assert traffic(shared, 4).heads_inside == 3 * sent
    assert traffic(shared, 4).heads_between == 0
    apart = traffic(shared, 2)  # one of three others is in the node
    assert (apart.heads_inside, apart.heads_between) == (pytest.approx(sent), pytest.approx(2 * sent))


def test_inputs_of_layers_are_copied_there_and_back() -> None:
    assert traffic(run(2, inputs_on_host=True, accumulation=3), 4).host == 3 * 2 * 128 * 64 * 2


# ---- What can only grow


LAYOUT, WAY = st.sampled_from([*LAYOUTS]), st.sampled_from([Way(False), Way(True), Way(True, True)])


@settings(max_examples=60, deadline=None)
@given(LAYOUT, WAY, st.booleans(), st.integers(1, 200_000), st.integers(1, 50_000))
def test_a_longer_row_never_needs_less(name: str, way: Way, narrow: bool, length: int, more: int) -> None:
    def needs(tokens: int) -> int:
        engine = shipped_engine(name, WIDE)
        return peak(
            way.of(run(None, shape=WIDE, engine=engine, length=tokens, tiling="no", narrow=narrow))
        ).device_bytes

    assert needs(length) <= needs(length + more)


@settings(max_examples=60, deadline=None)
@given(LAYOUT, WAY, st.integers(1, 200_000), st.sampled_from([1, 2, 4, 8]))
def test_more_ranks_that_share_a_row_never_fit_less(name: str, way: Way, length: int, group: int) -> None:
    """Nor does a way that costs more."""
    asked = run(None, 16, shape=replace(WIDE, heads=16, kv_heads=16), engine=shipped_engine(name, WIDE), length=length,
                tiling="no", accumulation=2)  # fmt: skip

    def needs(way: Way) -> int:
        return peak(way.of(asked)).device_bytes

    assert needs(replace(way, sequence=2 * group)) <= needs(replace(way, sequence=group))
    order = [way for equals in ways([group]) for way in equals]
    assert [needs(way) for way in order] == sorted((needs(way) for way in order), reverse=True)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 6000), st.floats(0.5, 2))
def test_the_last_number_with_room(last: int, fits: int, bend: float) -> None:
    asked: list[int] = []

    def room(number: int) -> float:
        asked.append(number)
        return float(fits) ** bend - float(number) ** bend

    assert last_with_room(room, 1, last) == min(fits, last)
    assert len(asked) == len(set(asked)) <= 2 + 3 * 13


# ---- The command


def plan_file(folder: Path, shape: Shape, **keys: Any) -> Path:
    (folder / "model").mkdir(exist_ok=True)
    config = {"model_type": shape.family, "vocab_size": shape.vocab, "hidden_size": shape.hidden,
              "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
              "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim,
              "tie_word_embeddings": shape.tied}  # fmt: skip
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "rows.jsonl").write_text("{}\n" * 100, encoding="utf-8")
    found = {"model_name_or_path": "model", "train_file": "rows.jsonl", "output_dir": "out", "save_strategy": "no",
             "per_device_train_batch_size": 1, **keys}  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(found), encoding="utf-8")
    return folder / "run.yaml"


Planned = Callable[..., dict[str, Any]]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Planned:
    """The plan of a shape as JSON; its exit code is that of `short`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**15}))
    monkeypatch.setattr("ds_sft.plan.layouts.has_liger", lambda: False)

    def ask(shape: Shape, *words: str, **keys: Any) -> dict[str, Any]:
        plan_file(tmp_path, shape, **keys)
        code = main(["plan", "run.yaml", "--json", *words])
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert code == bool(found["short"])
        return found

    return ask


@pytest.mark.parametrize(
    ("model", "length", "words", "expected"),
    [
        ("0.6B", 8192, ("--gpus-per-node", "1", "--gpu-memory", "24GB"), ("no DeepSpeed", 4, 1, "yes", 1)),
        ("8B", 32_768, ("--gpus-per-node", "8", "--gpu-memory", "80GB"), ("ZeRO-2", 2, 2, "yes", 1)),
        ("4B", 262_144, ("--gpus-per-node", "1", "--gpu-memory", "141GB"), ("no DeepSpeed", 1, 4, "offload", 1)),
        ("8B", 393_216, ("--gpus-per-node", "8", "--gpu-memory", "80GB"), ("ZeRO-3", 1, 8, "offload", 2)),
    ],
)
def test_recommended(
    planned: Planned, model: str, length: int, words: tuple[str, ...], expected: tuple[Any, ...]
) -> None:
    """Layout, micro batch, accumulation, activation_checkpointing, sequence_parallel; 4 rows a step and rank."""
    best = planned(qwen3(model), *words, max_length=length)["recommended"]
    keys = ("name", "micro_batch", "accumulation", "activation_checkpointing", "sequence_parallel")
    assert tuple(best[key] for key in keys) == expected
    assert best["micro_batch"] * best["accumulation"] * best["groups"] == 4 * int(words[1])


def test_every_layout_in_every_way_has_a_longest_row_and_a_largest_model(planned: Planned) -> None:
    found = planned(qwen3("8B"), "--gpus-per-node", "2", max_length=32_768)["reaches"]
    assert len(found) == (6 + 4) * 6  # no optimizer on the host in bfloat16; three ways, alone and two by two
    by = {(f["name"], f["optimizer_dtype"], f["activation_checkpointing"], f["sequence_parallel"]): f for f in found}
    rows = [
        by["ZeRO-3", "bfloat16", word, group]["longest_row"] for group in (1, 2) for word in ("no", "yes", "offload")
    ]
    assert all(row % 1024 == 0 for row in rows)
    assert rows[:3] == sorted(rows[:3])
    assert [row >= 1.8 * alone for row, alone in zip(rows[3:], rows[:3], strict=True)] == [True] * 3
    assert by["ZeRO-3", "float32", "yes", 1]["largest_model"] == "4B"
    assert by["ZeRO-3", "bfloat16", "yes", 1]["largest_model"] == "8B"


@pytest.mark.parametrize(
    ("keys", "ways"),
    [
        ({"batching": "padded"}, 3),
        ({"attn_implementation": "sdpa"}, 3),
        ({"fp16": True, "bf16": False}, 3),
        ({"adapter": "lora", "lora_dropout": 0.1}, 3),
        ({"adapter": "lora"}, 6),
    ],
)
def test_rows_are_shared_where_a_run_may_share_them(planned: Planned, keys: dict[str, Any], ways: int) -> None:
    found = planned(SHAPE, "--gpus-per-node", "2", max_length=128, **keys)["reaches"]
    assert len({(f["activation_checkpointing"], f["sequence_parallel"]) for f in found}) == ways


@pytest.mark.parametrize(
    ("ranks", "said"),
    [("3", "2: does not divide 3 ranks: write 1"), ("2", "8: does not divide 2 ranks: write 1 or 2"),
     ("8", "3: does not divide 8 ranks: write 1, 2 or 4"), ("12", "5: does not divide 12 ranks: write 1, 2 or 4")],
)  # fmt: skip
def test_groups_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    plan_file(tmp_path, SHAPE, max_length=128, sequence_parallel=int(said[0]))
    assert main(["plan", "run.yaml", "--gpus-per-node", ranks]) == 2
    assert f"sequence_parallel: {said}" in capsys.readouterr().err


def test_heads_that_cannot_be_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(["--config", str(plan_file(tmp_path, SHAPE, max_length=128, sequence_parallel=8))])
    with pytest.raises(UserError, match="sequence_parallel: 8: does not divide 4 attention heads: write 1, 2 or 4"):
        run_of(config, SHAPE, Engine(stage=2), 8)


def test_what_would_fit_is_said(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 B parameters on one GPU: states in bfloat16, or a second node."""
    words = ("--gpus-per-node", "1", "--gpu-memory", "48GB")
    found = planned(qwen3("4B"), *words, "--host-memory", "32GB", max_length=8192)
    assert found["short"] == ["memory"]
    assert [remedy["write"] for remedy in found["remedies"]] == [
        ["optimizer_dtype: bfloat16", "activation_checkpointing: yes"],
        ["--nodes 2", "deepspeed: zero3, activation_checkpointing: yes"],
        ["adapter: lora", "activation_checkpointing: yes"],
    ]
    assert main(["plan", "run.yaml", *words, "--host-memory", "32GB"]) == 1
    said = capsys.readouterr().out
    assert (
        "of a node. This would: optimizer_dtype: bfloat16 with activation_checkpointing: yes; or --nodes 2 with" in said
    )


def test_an_adapter_may_fit_where_no_length_does(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus-per-node", "1", "--gpu-memory", "48GB", "--host-memory", "64GB")
    for keys in ({}, {"train_only": ["*"]}):
        found = planned(qwen3("32B"), *words, max_length=2048, **keys)
        assert max(reach["longest_row"] for reach in found["reaches"]) == 0
        last = found["remedies"][-1]["write"]
        assert (last == ["adapter: lora, quantization: nf4", "activation_checkpointing: yes"]) == (not keys)


def test_what_is_default_is_not_spelled_out(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--gpus-per-node", "1", "--gpu-memory", "80GB", "--host-memory", "512GB")
    planned(qwen3("8B"), *words, max_length=1_048_576)
    capsys.readouterr()
    assert main(["plan", "run.yaml", *words]) == 1
    assert " with ZeRO-3 offload, activation_checkpointing: offload" in (said := capsys.readouterr().out)
    assert "sequence_parallel: 1" not in said
    assert "float32" not in said


@pytest.mark.parametrize(
    ("model", "keys", "offered"),
    [
        ("14B", {"optimizer_dtype": "bfloat16"}, ["no DeepSpeed", "ZeRO-1", "ZeRO-2", "ZeRO-3"]),
        ("8B", {"optim": "adamw_8bit"}, ["no DeepSpeed", "ZeRO-1", "ZeRO-2", "ZeRO-3"]),
        ("8B", {"optim": "muon", "deepspeed": "zero3"}, ["no DeepSpeed", "ZeRO-3"]),
    ],
)
def test_no_layout_is_advised_that_a_run_refuses(
    planned: Planned, model: str, keys: dict[str, Any], offered: list[str]
) -> None:
    """DeepSpeed's CPU Adam, which would have had room, has float32 states alone; Muon has no part of a matrix."""
    found = planned(qwen3(model), "--gpus-per-node", "1", "--gpu-memory", "80GB", max_length=2048, **keys)
    assert [option["name"] for option in found["options"]] == offered
    assert found["recommended"] is None
    assert [remedy["name"] for remedy in found["remedies"] if "offload" in remedy["name"]] == []
    refused = [reach for reach in found["reaches"] if "muon" in keys.values() and reach["name"] == "ZeRO-3"]
    assert {(reach["longest_row"], reach["largest_model"]) for reach in refused} <= {(0, None)}
    if "muon" in keys.values():
        assert (len(refused), found["remedies"]) == (3, [])


def test_the_largest_model_has_heads_for_every_rank_of_a_group(planned: Planned) -> None:
    """14B has 40 heads, which 16 ranks cannot share."""
    words = ("--gpus-per-node", "16", "--gpu-memory", "64GB")
    found = planned(qwen3("8B"), *words, max_length=8192)["reaches"]
    way = ("ZeRO-2", "float32", "offload")
    by = {f["sequence_parallel"]: f["largest_model"] for f in found
          if (f["name"], f["optimizer_dtype"], f["activation_checkpointing"]) == way}  # fmt: skip
    assert by == {1: "14B", 2: "14B", 4: "14B", 8: "14B", 16: "8B"}


def test_six_layouts_have_room_in_80_signs(
    planned: Planned, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No word is cut: a terminal's width, where the output is one."""
    planned(qwen3("8B"), max_length=2048)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["plan", "run.yaml", "--gpus-per-node", "8", "--gpu-memory", "80GB"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said
    (row,) = [line for line in said.splitlines() if line.startswith("ZeRO-3 offload") and line.count("k ") > 3]
    assert len(row) <= 80


def test_the_recommended_keys_are_written(planned: Planned) -> None:
    words = ("--gpus-per-node", "2", "--gpu-memory", "80GB", "--write", "planned.yaml")
    best = planned(qwen3("4B"), *words, max_length=393_216)["recommended"]
    assert (best["activation_checkpointing"], best["sequence_parallel"]) == ("offload", 2)
    written = load_config(["--config", "planned.yaml"])
    assert (written.offloads, written.sequence_parallel) == (True, 2)
    text = Path("planned.yaml").read_text(encoding="utf-8")
    assert "activation_checkpointing: offload\n" in text
    assert "sequence_parallel: 2\n" in text


def test_rows_of_a_step_are_those_of_groups(planned: Planned) -> None:
    """8 ranks in groups of 4: 2 groups of one row, 4 accumulated; 100 rows are 13 steps an epoch, two of them."""
    found = planned(SHAPE, max_length=128, sequence_parallel=4)
    assert [option["sequence_parallel"] for option in found["options"]] == [4] * 6
    assert found["options"][0]["tokens_per_micro_batch"] == 128
    assert (found["schedule"]["steps"], found["schedule"]["tokens"]) == (26, 26 * 8 * 128)


@pytest.mark.usefixtures("planned")
def test_the_table_has_the_keys_to_write(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    planned(qwen3("8B"), max_length=32_768)
    assert main(["plan", "run.yaml", "--gpus-per-node", "4", "--gpu-memory", "80GB"]) == 0
    said = capsys.readouterr().out
    assert "The longest row that fits, k of 1,024 tokens; the largest Qwen3 at 32,768" in said
    columns = said.split("The longest row")[1].splitlines()[1]
    assert " ".join(columns.split()) == "no yes offload offload x 2 offload x 4"
    assert "Columns: activation_checkpointing; x N: sequence_parallel: N. bfloat16: optimizer_dtype." in said
    assert "The host's memory is not checked: --host-memory." in said
    main(["plan", "run.yaml", "--host-memory", "1TB"])
    assert "is not checked" not in capsys.readouterr().out


def test_an_optimizer_that_is_not_known_is_named(planned: Planned, capsys: pytest.CaptureFixture[str]) -> None:
    for optim, said in (("adafactor", True), ("adamw_8bit", False)):
        planned(SHAPE, max_length=128, optim=optim)
        main(["plan", "run.yaml"])
        line = f"optim: {optim}: planned as AdamW, with two float32 states of each parameter."
        assert (line in capsys.readouterr().out) is said


def test_shapes_are_those_that_were_published() -> None:
    """Of https://huggingface.co/Qwen, in billions."""
    sizes = {name: round(qwen3(name).parameters / 1e9, 2) for name in QWEN3}
    assert sizes == {"0.6B": 0.6, "1.7B": 1.72, "4B": 4.02, "8B": 8.19, "14B": 14.77, "32B": 32.76}
