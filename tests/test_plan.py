"""`ds-sft plan`: its arithmetic against figures worked out by hand, and its command."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from ds_sft.cli import main
from ds_sft.commands.flag_values import size
from ds_sft.commands.plan import parser
from ds_sft.commands.plan_tables import duration, in_seconds, recommendation
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.plan import layouts
from ds_sft.plan import recommend as advice
from ds_sft.plan.activations import CHUNK_BYTES, chunk_logits
from ds_sft.plan.cost import Hardware, model_flops_per_token, step_time, traffic
from ds_sft.plan.disk import checkpoint_bytes
from ds_sft.plan.gathered import gathered_at
from ds_sft.plan.gradients import Reduction, joined_parts, reductions
from ds_sft.plan.layouts import (
    LAYOUTS,
    NAMED,
    PYTHON,
    engine_of,
    name_of,
    shipped_engine,
)
from ds_sft.plan.memory import Memory, peak
from ds_sft.plan.recommend import micro_batches, recommend
from ds_sft.plan.run import Engine, Run
from ds_sft.plan.schedule import count_lines
from ds_sft.plan.shape import Shape
from ds_sft.plan.states import owned, states
from ds_sft.plan.sweep import node_counts
from ds_sft.ranks.launch import Launch
from ds_sft.training import expectation

TINY = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip
SEVENTY_BILLION = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672,
                   "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}  # fmt: skip
SHAPE = Shape(family="llama", hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocab=1000,
              tied=False)  # fmt: skip
TIED = replace(SHAPE, tied=True)
# A layer: q, o 64 x 64 each; k, v 64 x 32 each; gate, up, down 64 x 128 each; two norms of 64.
LAYER = 2 * 4096 + 2 * 2048 + 3 * 8192 + 128
PARAMETERS = 2 * LAYER + 2 * 64_000 + 64


def run(stage: int | None, ranks: int = 4, **keys: Any) -> Run:
    engine = keys.pop("engine", Engine(stage=stage))
    accumulation = keys.pop("accumulation", 1)
    return Run(shape=SHAPE, engine=engine, ranks=ranks, micro_batch=2, length=128, accumulation=accumulation,
               checkpointing=False, half=True, **keys)  # fmt: skip


def test_parameters_by_hand() -> None:
    assert SHAPE.parameters == PARAMETERS == 202_048
    assert SHAPE.multiplied == 2 * (LAYER - 128) + 64_000


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (None, (4 + 8) * PARAMETERS),  # float32 weights, two moments; DDP's buckets apart
        (1, 2 * PARAMETERS + (4 + 8) * PARAMETERS // 4),
        (2, 2 * PARAMETERS + (4 + 8) * PARAMETERS // 4),
    ],
)
def test_states_by_hand(stage: int | None, expected: int) -> None:
    found = states(run(stage))
    assert sum(size for part, size in found.items() if part != "buckets") == expected


def test_stage_3_divides_each_parameter_and_keeps_small_ones_whole() -> None:
    engine = Engine(stage=3, persistence_threshold=640)
    assert owned(run(3, 3)) == 2 * (2 * 1366 + 2 * 683 + 3 * 2731 + 2 * 22) + 2 * 21_334 + 22
    found = states(run(3, 4, engine=engine))
    assert found["parameters"] == 2 * (PARAMETERS // 4 + 5 * 64)  # a share, and five norms
    assert found["master weights"] + found["optimizer states"] == 12 * PARAMETERS // 4


def test_offloading_moves_states_to_the_host() -> None:
    memory = peak(run(3, engine=Engine(stage=3, offload_optimizer=True, offload_param=True)))
    assert "optimizer states" not in memory.device
    assert memory.host == {
        "parameters": 2 * PARAMETERS // 4,
        "master weights": 4 * PARAMETERS // 4,
        "optimizer states": 8 * PARAMETERS // 4,
        "gradients": 6 * PARAMETERS // 4,  # float32, and as they arrive
    }


def test_logits_are_those_of_a_chunk() -> None:
    """As the product leaves them, and on a CPU in float32 too."""
    assert chunk_logits(run(2), 256) == 256 * 1000 * 2
    assert chunk_logits(run(2, smoothed=True), 256) == 256 * 1000 * (4 + 2)  # no kernel smooths labels
    assert chunk_logits(run(2, lazy=True), 256) == 256 * 1000 * (4 + 2)
    assert chunk_logits(run(2, lazy=True), 10**6) == CHUNK_BYTES // 4000 * 1000 * (4 + 2)


def test_gradients_wait_in_buckets_and_are_reduced_when_one_is_full() -> None:
    """Projection, norm, layer 1 but its q; that q, of which two ranks have parts, and layer 0; the embedding."""
    first, second, q, embedding = 64_000 + 64 + LAYER - 4096, 4096 + LAYER, 4096, 64_000

    def points(stage: int, size: int = 100_000, *, lazy: bool = True) -> list[Reduction]:
        return reductions(run(stage, ranks=2, engine=Engine(stage=stage, reduce_bucket=size), lazy=lazy), rank=1)

    touched = points(2)
    assert touched[0] == Reduction(0, 2 * 64_000, 2 * 64_000)
    assert touched[10] == Reduction(0, 2 * (q + first), 2 * (first + q))  # copied to where they are kept
    assert touched[-2] == Reduction(2 * first, 2 * (embedding + second), 2 * (first + second))  # in one piece
    assert touched[-1] == Reduction(2 * (first + q), 0, 2 * (first + second))  # the embedding is rank 0's
    reserved = points(2, lazy=False)
    assert reserved[-2] == Reduction(2 * (first + q), 2 * (embedding + second), 2 * 2 * 100_000)
    assert [point.buckets for point in points(3)] == [2 * first] * 22
    assert points(3)[-2].passing == 2 * (embedding + 2 * second)  # and gloo copies what it scatters
    assert points(3, lazy=False)[-2].passing == 2 * (embedding + second)
    # Larger than a bucket: it stays where it was, until it has been copied to where it is kept.
    assert points(2, 50_000)[1] == Reduction(0, 2 * (64 + 2 * 64_000), 2 * 64)


def test_a_large_gradient_is_cloned_on_its_way_to_the_host() -> None:
    engine = Engine(stage=2, reduce_bucket=50_000, offload_optimizer=True)
    first = reductions(run(2, ranks=2, engine=engine, lazy=True), rank=1)[0]
    assert first == Reduction(0, 2 * 2 * 64_000, 2 * 64_000)  # and the buffer that the largest is sent from


@pytest.mark.parametrize("keys", [{"overlap": False}, {"accumulation": 2}])
def test_stage_1_keeps_all_gradients_until_backward_has_ended(keys: dict[str, Any]) -> None:
    """It reduces behind the last micro batch, beside backward only where communication overlaps."""
    engine = Engine(stage=1, reduce_bucket=100_000, overlap=keys.get("overlap", True))
    asked = run(1, ranks=2, engine=engine, lazy=True, accumulation=keys.get("accumulation", 1))
    points = reductions(asked, rank=1)
    assert points[-1].kept == 2 * PARAMETERS
    assert points[0].kept == (2 * PARAMETERS if asked.accumulation > 1 else 0)
    assert points[-2].kept + points[-2].passing >= 2 * PARAMETERS
    assert points[-2].buckets == 0  # made at the end


@pytest.mark.parametrize(
    ("start", "end", "room", "expected"),
    [
        (0, 100, 500, 0),  # of one rank
        (50, 150, 500, 100),  # of two
        (0, 300, 90, 0),  # each part is larger than a bucket, and goes alone
        (60, 300, 120, 140),  # 40 and 100, then 100 alone
    ],
)
def test_parts_of_several_ranks_are_joined_up_to_a_bucket(start: int, end: int, room: int, expected: int) -> None:
    assert joined_parts(start, end, share=100, room=room) == expected


def test_gathered_parameters_obey_the_reuse_distance() -> None:
    near = gathered_at(run(3, engine=Engine(stage=3, prefetch_bucket=0, persistence_threshold=64)))
    assert near[2] == 2 * (2 * (LAYER - 128) + 2 * 64_000)  # both layers' matrices, the embedding and the projection
    far = gathered_at(run(3, engine=Engine(stage=3, prefetch_bucket=0, persistence_threshold=64, max_reuse_distance=0)))
    assert far == [2 * 64_000, 2 * 8192, 2 * 64_000]
    tied = replace(run(3, engine=Engine(stage=3, prefetch_bucket=0, persistence_threshold=64)), shape=TIED)
    assert gathered_at(tied) == [2 * 64_000, *[2 * (2 * (LAYER - 128) + 64_000)] * 2]  # until the embedding's backward


def test_traffic_in_weights() -> None:
    """The ZeRO paper's section 7: 2 psi without and with stage 1 or 2 (here as DeepSpeed does it), 3 psi in stage 3."""
    psi = 2 * PARAMETERS * 3 / 4
    assert traffic(run(1, accumulation=3), 4).total == 3 * psi
    assert traffic(run(2, accumulation=3), 4).total == (2 * 3 + 1) * psi
    assert traffic(run(3, accumulation=3), 4).total == 3 * 3 * psi
    within = traffic(run(3, engine=Engine(stage=3, hierarchical=2)), 2)
    assert (within.inside, within.between) == (psi, 2 * psi)


def test_traffic_of_single_reduces() -> None:
    """Where buckets are not all-reduced each rank's part is reduced to it: psi a micro batch."""
    zero = {"stage": 2, "use_multi_rank_bucket_allreduce": False}
    psi = 2 * PARAMETERS * 3 / 4
    assert traffic(run(2, engine=engine_of(zero, SHAPE), accumulation=3), 4).total == (3 + 1) * psi
    whole = engine_of({**zero, "reduce_scatter": False}, SHAPE)
    assert traffic(run(2, engine=whole, accumulation=3), 4).total == (2 * 3 + 1) * psi


@pytest.mark.parametrize(
    ("inside", "seconds_by_hand"),
    [
        # 2 nodes of 8 GPUs: a rank sends 3 psi x 15 / 16, an eighth of it over its own card of 1e6 bytes a second.
        (1e12, 3 * 2 * PARAMETERS * 15 / 16 / 8 / 1e6),
        # Seven eighths stay inside, here the slower way.
        (1e6, 3 * 2 * PARAMETERS * 15 / 16 * 7 / 8 / 1e6),
    ],
)
def test_each_card_carries_its_part_of_a_ring(inside: float, seconds_by_hand: float) -> None:
    cluster = Hardware(nodes=2, gpus_per_node=8, flops=1e15, inside=inside, between=1e6)
    assert step_time(run(3, 16), cluster).communication == pytest.approx(seconds_by_hand)


def test_step_time_hides_what_fits_behind_computation() -> None:
    slow = Hardware(nodes=2, gpus_per_node=2, flops=1e12, inside=1e9, between=1e6)
    fast = Hardware(nodes=2, gpus_per_node=2, flops=1e6, inside=1e12, between=1e12)
    assert step_time(run(3), slow).total == pytest.approx(3 * 2 * PARAMETERS * 3 / 4 / 2e6)
    assert step_time(run(3), fast).efficiency == pytest.approx(1.0)
    sent, computed = step_time(run(3), slow), step_time(run(3), slow, overlap=0)
    assert computed.total == pytest.approx(sent.compute + sent.communication)
    assert model_flops_per_token(SHAPE, 128) == 6 * SHAPE.multiplied + 12 * 2 * 64 * 128


@pytest.mark.parametrize(
    ("stage", "weight_bytes", "expected"),
    [(None, 4, 12 * PARAMETERS), (2, 2, 16 * PARAMETERS), (3, 2, 14 * PARAMETERS), (3, 4, 16 * PARAMETERS)],
)
def test_checkpoint_bytes(stage: int | None, weight_bytes: int, expected: int) -> None:
    assert checkpoint_bytes(SHAPE, stage=stage, weight_bytes=weight_bytes) == expected


def test_published_figures() -> None:
    """Table 1 of the ZeRO paper within its rounding; where other sources count differently the reason is given."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    import plan_papers

    rows = plan_papers.rows()
    paper = [row for row in rows if row.source == "ZeRO, table 1"]
    assert len(paper) == 18
    for row in paper:
        assert row.ours == pytest.approx(row.published, rel=0.004, abs=0.005), row.what
    assert all(row.why for row in rows if abs(row.difference) > 0.025)
    throughputs = {(row.source, row.published): row.difference for row in rows if row.unit == "TFLOP/s"}
    assert len(throughputs) == 14
    assert all(abs(difference) < 0.16 for difference in throughputs.values()), throughputs
    assert abs(throughputs["Megatron-LM, table 2", 44]) < 0.01  # half the rows a GPU, as many bytes: half the rate


@pytest.mark.parametrize("name", NAMED)
def test_planned_engines_are_those_of_the_files(name: str) -> None:
    file = Path(__file__).resolve().parents[1] / "ds_configs" / f"{NAMED[name]}.json"
    assert shipped_engine(name, SHAPE) == engine_of(json.loads(file.read_text())["zero_optimization"], SHAPE)
    assert name_of(shipped_engine(name, SHAPE)) == name


def test_engine_options_are_those_transformers_fills_in() -> None:
    auto = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    engine = engine_of({"stage": 3, **dict.fromkeys(auto, "auto")}, SHAPE)
    assert (engine.reduce_bucket, engine.prefetch_bucket, engine.persistence_threshold) == (4096, 3686, 640)
    given = engine_of({"stage": 2, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "cpu"}}, SHAPE)
    assert (given.reduce_bucket, given.overlap, name_of(given)) == (500_000_000, False, "ZeRO-2 offload")
    with pytest.raises(UserError, match="stage: 0: cannot be planned"):
        engine_of({}, SHAPE)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stage": "auto"}, "zero_optimization.stage: 'auto': expected 1, 2 or 3"),
        ({"stage": 4}, "zero_optimization.stage: 4: expected 1, 2 or 3"),
        ({"reduce_bucket_size": None}, "zero_optimization.reduce_bucket_size: None: expected a number of elements"),
        ({"offload_optimizer": "cpu"}, "zero_optimization.offload_optimizer: 'cpu': expected an object, such as"),
    ],
)
def test_engine_options_that_cannot_be_read(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        engine_of({"stage": 2, **options}, SHAPE)


def test_no_hierarchy_is_one_rank() -> None:
    assert engine_of({"stage": 3, "zero_hpz_partition_size": 0}, SHAPE).hierarchical == 1


def test_micro_batches_keep_the_rows_of_a_step() -> None:
    assert micro_batches(12) == [12, 6, 4, 3, 2, 1]


def test_sizes() -> None:
    assert (size("80GB"), size("24GiB"), size("150T"), size("25GB/s")) == (80e9, 24 * 2**30, 150e12, 25e9)


def test_durations() -> None:
    said = [duration(seconds) for seconds in (0.0431, 0.9999, 40, 87, 119, 3600 * 5 + 420, 86400 * 2 + 3600 * 3)]
    assert said == ["43.1 ms", "1.00 s", "40 s", "1 min", "2 min", "5 h 07 min", "2 d 03 h"]


def test_durations_of_steps() -> None:
    said = [in_seconds(seconds) for seconds in (0.0431, 0.9999, 1.254, 119.99, 119.996, 4548.78)]
    assert said == ["43.1 ms", "1.00 s", "1.25 s", "119.99 s", "2 min", "1 h 16 min"]


def test_nodes_of_a_sweep() -> None:
    assert node_counts("nodes=1..128") == [1, 2, 4, 8, 16, 32, 64, 128]
    assert node_counts("nodes=3..10") == [3, 6, 10]
    with pytest.raises(UserError, match=r"--sweep gpus=1: expected nodes=FIRST\.\.LAST"):
        node_counts("gpus=1")


def test_rows_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    assert count_lines(str(file)) is None
    file.write_bytes(b"{}\n\n{}\n \r\n{}")
    assert count_lines(str(file)) == 3


def test_a_large_file_is_estimated_from_its_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ds_sft.plan.schedule.COUNTED", 30)
    (tmp_path / "rows.jsonl").write_bytes(b"{}\n" * 1000)
    assert count_lines(str(tmp_path / "rows.jsonl")) == 1000


@pytest.fixture
def config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY), encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text("{}\n" * 100, encoding="utf-8")
    keys = {"model_name_or_path": "model", "train_file": "rows.jsonl", "output_dir": "out", "max_length": 128}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    return tmp_path / "run.yaml"


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", "run.yaml", "--json", *words]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.usefixtures("config_file")
@pytest.mark.parametrize(
    ("words", "on_cpu", "said"),
    [
        (["--use_cpu", "yes"], True, "the plan is for this machine's CPU; --gpus-per-node 8 plans for GPUs.\n"),
        (["--use_cpu", "yes", "--gpus-per-node", "0"], True, None),
        (
            ["--use_cpu", "yes", "--nodes", "2"],
            False,
            "the run uses no GPU; this plan is for GPUs, as its flags say.\n",
        ),
        ([], False, None),
    ],
    ids=["cpu", "said", "gpus", "no word"],
)
def test_a_run_that_uses_no_gpu_is_planned_without(
    capsys: pytest.CaptureFixture[str], words: list[str], on_cpu: bool, said: str | None
) -> None:
    assert main(["plan", "run.yaml", "--json", *words]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["on_cpu"] is on_cpu
    assert shown.err == ("" if said is None else f"use_cpu: yes: {said}")


@pytest.mark.usefixtures("config_file")
def test_command_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--gpus-per-node", "4")
    assert found["model"] == {
        "parameters": PARAMETERS,
        "active": PARAMETERS,
        "experts": None,
        "trained": PARAMETERS,
        "tied": False,
        "family": "llama",
        "positions": None,
    }
    assert [o["name"] for o in found["options"]] == ["no DeepSpeed", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-2 offload",
                                                     "ZeRO-3 offload"]  # fmt: skip
    assert all(sum(o["gpu"].values()) == o["gpu_total"] for o in found["options"])
    assert all(o["activations"]["checkpointing"] < o["activations"]["without"] for o in found["options"])
    best = found["recommended"]
    assert best["micro_batch"] * best["accumulation"] == 4  # the rows of a step stay
    assert best["tokens_per_micro_batch"] == best["micro_batch"] * 128
    assert found["schedule"]["steps"] == 14  # 7 an epoch of 100 rows, 16 a step; two epochs
    assert found["schedule"]["tokens"] == 14 * 16 * 128
    assert found["disk"]["total"] == found["disk"]["checkpoint"] + found["disk"]["final_model"]


def test_rows_that_resizing_adds_are_planned(
    config_file: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,000 rows hold the 400 tokens; 399 do not, and become 448."""
    tokenizer.save_pretrained("model")
    assert plan(capsys, "--resize_embeddings", "yes")["model"]["parameters"] == PARAMETERS
    (config_file.parent / "model" / "config.json").write_text(json.dumps({**TINY, "vocab_size": 399}), encoding="utf-8")
    assert plan(capsys)["model"]["parameters"] == PARAMETERS - 2 * 64 * 601
    assert plan(capsys, "--resize_embeddings", "yes")["model"]["parameters"] == PARAMETERS - 2 * 64 * 552
    for file in Path("model").glob("tokenizer*"):
        file.unlink()
    assert main(["plan", "run.yaml", "--resize_embeddings", "yes"]) == 2
    assert "error: resize_embeddings: model: no tokenizer to count: " in capsys.readouterr().err


def test_a_length_beyond_the_positions_of_the_model_is_noted(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = config_file.parent / "model" / "config.json"
    file.write_text(json.dumps({**TINY, "max_position_embeddings": 128, "rope_theta": 1e4}), encoding="utf-8")
    main(["plan", "run.yaml"])
    assert "positions" not in capsys.readouterr().out
    main(["plan", "run.yaml", "--max_length", "129"])
    assert (
        "max_length: 129 is above the 128 positions that the model was made for (max_position_embeddings): a run "
        "warns if a row is; for such rows write rope_scaling: {rope_type: yarn, factor: 2.0, "
        "original_max_position_embeddings: 128} (--write does not: it changes the model).\n"
    ) in capsys.readouterr().out
    assert plan(capsys)["model"]["positions"] == 128
    longer = ("--max_length", "512", "--rope_scaling", "{rope_type: yarn, factor: 4}")
    assert plan(capsys, *longer)["model"]["positions"] == 512
    assert main(["plan", "run.yaml", *longer]) == 0
    assert "positions" not in capsys.readouterr().out


@pytest.mark.usefixtures("config_file")
def test_tables_have_one_unit_of_memory_and_no_time_of_zero(capsys: pytest.CaptureFixture[str]) -> None:
    """GB/s are of links, as they are sold; a step of this model lasts less than a millisecond."""
    said = []
    for words in ([], ["--sweep", "nodes=1..2"]):
        assert main(["plan", "run.yaml", *words]) == 0
        said.append(capsys.readouterr().out)
        assert "0.00 s" not in said[-1]
        assert re.search(r"0\.\d+ ms", said[-1])
    assert "8 GPUs of 74.5 GiB (--nodes, --gpus-per-node, --gpu-memory)." in said[0]
    assert re.findall(r"\S+ GB\b(?!/s)", said[0]) == []
    assert re.search(r"\nZeRO-2 +\d+\.\d [KM]iB ", said[0])  # what it sends
    assert "GPU, GiB" in said[1]


@pytest.mark.usefixtures("config_file")
def test_short_rows_send_and_update_as_much_as_long_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """The time of a run is that of its steps, whatever `max_length` would allow."""
    slow = ("--rows", "6400", "--nodes", "2", "--interconnect", "1MB", "--batching", "padding_free")
    long, short = (plan(capsys, *slow, "--mean-tokens", tokens)["schedule"] for tokens in ("128", "16"))
    same = plan(capsys, *slow, "--mean-tokens", "16", "--max_length", "16")["schedule"]
    assert short["tokens"] == long["tokens"] / 8
    assert short["seconds"] == pytest.approx(long["seconds"], rel=0.01)  # it sends all the time
    assert short["seconds"] == pytest.approx(same["seconds"])


@pytest.mark.usefixtures("config_file")
def test_offloading_is_for_what_nothing_else_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--interconnect", "1MB", "--nodes", "2", "--host-link", "1TB")
    assert "offload" not in plan(capsys, *words)["recommended"]["name"]
    shape = replace(SHAPE, layers=40, hidden=4096, intermediate=11008, heads=32, kv_heads=32, head_dim=128, vocab=32000)
    runs = {name: replace(run(None, ranks=8), shape=shape, engine=shipped_engine(name, shape)) for name in LAYOUTS}
    cluster = Hardware(nodes=1, gpus_per_node=8, flops=1e14, inside=2e11, between=2e10)
    for gib, wanted in ((80, False), (12, True)):
        best = recommend(runs, cluster, gib * 2**30, None)
        assert best is not None
        assert best.run.engine.offload_optimizer is wanted, best.name


def test_memory_of_the_host_that_nobody_checked_is_named() -> None:
    found = {"name": "ZeRO-3 offload", "micro_batch": 1, "accumulation": 1, "checkpointing": True, "gpu_total": 2**30,
             "activation_checkpointing": "yes", "sequence_parallel": 1, "groups": 8,
             "step_seconds": {"total": 2.0}, "tokens_per_micro_batch": 1, "node_total": 2**40,
             "host": {"parameters": 1}}  # fmt: skip
    planned = {"recommended": found, "ranks": 8, "filled": False}
    assert "Each node needs 1.0 TiB of memory, which is not checked" in recommendation(planned, host_checked=False)
    assert "Each node" not in recommendation(planned, host_checked=True)
    assert "Each node" not in recommendation({**planned, "recommended": {**found, "host": {}}}, host_checked=False)


@pytest.mark.usefixtures("config_file")
def test_rows_are_counted_as_launch_counts_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").write_text("{}\n\n" * 100, encoding="utf-8")

    def rows(*words: str) -> Any:
        return plan(capsys, *words)["schedule"]["rows"]

    assert rows() == 100
    assert rows("--val_size", "0.1") == 90
    assert rows("--train_file", "[{path: rows.jsonl, weight: 2, limit: 40}, rows.jsonl]") == 180
    assert rows("--train_file", "absent.jsonl") is None
    assert rows("--train_file", "absent.jsonl", "--rows", "7") == 7


@pytest.mark.usefixtures("config_file")
def test_nothing_fits_is_said_and_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml", "--gpu-memory", "1GB"]) == 1
    said = capsys.readouterr()
    assert "Nothing fits: even " in said.out
    assert said.err == "ds-sft plan: too little memory for this run\n"
    assert "Time (as configured, " in said.out
    assert main(["plan", "run.yaml", "--gpu-memory", "1GB", "--write", "planned.yaml"]) == 1
    assert "--write planned.yaml: nothing is written, as nothing fits" in capsys.readouterr().err
    assert not Path("planned.yaml").exists()


@pytest.mark.usefixtures("config_file")
def test_what_runs_under_autocast_takes_more(capsys: pytest.CaptureFixture[str]) -> None:
    line = "Without DeepSpeed fp16 and torch_compile run under autocast"
    for flags, said in (([], 0), (["--torch_compile", "yes"], 1), (["--bf16", "no", "--fp16", "yes"], 1)):
        assert main(["plan", "run.yaml", *flags]) == 0
        assert capsys.readouterr().out.count(line) == said


@pytest.mark.usefixtures("config_file")
def test_memory_decides_the_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    wide = plan(capsys, "--per_device_train_batch_size", "8", "--gpu-memory", "80GB")["recommended"]
    narrow = plan(capsys, "--per_device_train_batch_size", "8", "--gpu-memory", "1.7245GB")["recommended"]
    assert wide["micro_batch"] == 32
    assert 1 <= narrow["micro_batch"] < 32
    assert narrow["gpu_total"] <= 1.7245e9
    assert narrow["micro_batch"] * narrow["accumulation"] == 32


@pytest.mark.usefixtures("config_file")
def test_written_configuration_is_the_recommended_one(capsys: pytest.CaptureFixture[str]) -> None:
    best = plan(capsys, "--write", "planned.yaml")["recommended"]
    written = load_config(["--config", "planned.yaml"])
    assert written.training["per_device_train_batch_size"] == best["micro_batch"]
    assert written.training["gradient_accumulation_steps"] == best["accumulation"]
    assert written.training["activation_checkpointing"] is best["checkpointing"]
    assert "deepspeed: zero2\n" in Path("planned.yaml").read_text(encoding="utf-8")


@pytest.mark.usefixtures("config_file")
def test_packed_rows_are_fewer_sequences_without_a_mask(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--mean-tokens", "32", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1")
    apart, packed = plan(capsys, *words, "--batching", "padded"), plan(capsys, *words, "--packing", "concat")
    assert (apart["schedule"]["steps"], packed["schedule"]["steps"]) == (14, 4)  # 100 rows, 25 sequences; 16 a step
    ways = [
        next(o for o in found["options"] if o["name"] == "ZeRO-2")["gpu"]["activations"] for found in (apart, packed)
    ]
    # Of the padded rows' mask: a byte, and two a number in the layer that is computed again.
    assert ways[1] - ways[0] == -2 * 128 * 128 * (1 + 2)


@pytest.mark.usefixtures("config_file")
def test_a_number_of_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    """Of 4 x 512 tokens a step and GPU: as many at once as fit; 100 rows of 32 tokens fill two of them."""
    words = ("--max_tokens_per_batch", "512", "--gradient_accumulation_steps", "4", "--mean-tokens", "32")
    wide, narrow = plan(capsys, *words), plan(capsys, *words, "--gpu-memory", "1.7245GB")
    assert [option["tokens_per_micro_batch"] for option in wide["options"]] == [512] * 6
    assert (wide["recommended"]["tokens_per_micro_batch"], wide["recommended"]["accumulation"]) == (2048, 1)
    small = narrow["recommended"]
    assert 128 <= small["tokens_per_micro_batch"] < 2048
    assert small["gpu_total"] <= 1.7245e9
    assert small["tokens_per_micro_batch"] * small["accumulation"] <= 2048
    assert wide["schedule"]["rows"] == 2  # micro batches of 2,048
    assert main(["plan", "run.yaml", *words]) == 0
    assert "16,384 tokens a step (max_tokens_per_batch: 2048)" in capsys.readouterr().out.replace("\n", " ")
    plan(capsys, *words, "--write", "planned.yaml")
    written = load_config(["--config", "planned.yaml"])
    assert (written.max_tokens_per_batch, written.fills_batches) == (2048, True)
    assert written.training["gradient_accumulation_steps"] == 1


@pytest.mark.usefixtures("config_file")
def test_a_large_number_of_tokens_is_split_by_halves(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 million tokens as many at once as fit, found in few tries of the 78,125 splits of each layout."""
    tried = []
    judge = advice.option

    def counting(name: str, run: Run, *limits: Any) -> layouts.Option:
        tried.append(judge(name, run, *limits))
        return tried[-1]

    monkeypatch.setattr(advice, "option", counting)
    words = ("--max_tokens_per_batch", "10000000", "--gradient_accumulation_steps", "1", "--gpu-memory", "2GB")
    best = plan(capsys, *words)["recommended"]
    assert len(tried) < 5 * 2 * 20  # layouts, checkpointing or not, 2^17 > 78,125
    same = [o for o in tried if (o.name, o.run.checkpointing) == (best["name"], best["checkpointing"])]
    assert best["accumulation"] == min(o.run.accumulation for o in same if o.fits)
    assert best["accumulation"] - 1 == max(o.run.accumulation for o in same if not o.fits)


@pytest.mark.usefixtures("config_file")
@pytest.mark.parametrize(
    ("words", "tokens", "known"),
    [
        (("--max_tokens_per_batch", "512"), 512, True),
        (("--packing", "concat"), 128, True),
        ((), 128, False),  # every row taken to be max_length long
    ],
)
def test_steps_of_rows_that_cannot_be_counted(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], tokens: int, known: bool
) -> None:
    """Steps that were given have tokens whatever the rows; else one line says what is missing."""
    absent = ("--train_file", "absent.jsonl", "--gradient_accumulation_steps", "1", *words)
    times = plan(capsys, *absent, "--max_steps", "10")["schedule"]
    assert (times["rows"], times["steps"], times["tokens_known"]) == (None, 10, known)
    assert times["tokens"] == 10 * 8 * tokens
    assert times["flops"] == times["tokens"] * model_flops_per_token(SHAPE, 128)
    assert times["checkpoints"] == 1

    unknown = plan(capsys, *absent)
    assert [unknown["schedule"][key] for key in ("steps", "tokens", "seconds", "checkpoints")] == [None] * 4
    assert (unknown["disk"]["checkpoints_at_once"], unknown["disk"]["total"]) == (None, None)
    assert plan(capsys, *absent, "--save_total_limit", "2")["disk"]["checkpoints_at_once"] == 3
    by_epoch = plan(capsys, *absent, "--max_steps", "10", "--save_strategy", "epoch")["schedule"]
    assert (by_epoch["steps"], by_epoch["checkpoints"]) == (10, None)
    assert main(["plan", "run.yaml", *absent]) == 0
    said = capsys.readouterr().out
    assert "Time: the rows of train_file cannot be counted from here; give --rows." in said
    assert "How many checkpoints there will be depends on the rows of train_file" in said


def test_the_users_file_stays_but_for_what_is_recommended(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = (
        "# my run\nmodel_name_or_path: model\ntrain_file: rows.jsonl  # all of them\noutput_dir: out\nmax_length: 128\n"
        "save_steps: 4\nlearning_rate: 2e-5\nper_device_train_batch_size: 1  # fits?\ngradient_checkpointing: yes\n"
        "deepspeed:\n  zero_optimization: {stage: 1}\n\n# the end\n"
    )
    config_file.write_text(given, encoding="utf-8")
    best = plan(capsys, "--write", "planned.yaml", "--num_train_epochs", "3", "--learning_rate=1e-5")["recommended"]
    assert (best["name"], best["micro_batch"], best["accumulation"], best["checkpointing"]) == ("ZeRO-2", 4, 1, False)
    changed = given.replace("batch_size: 1 ", "batch_size: 4 ").replace("checkpointing: yes", "checkpointing: false")
    changed = changed.replace("learning_rate: 2e-5", "learning_rate: 1.0e-05")
    changed = changed.replace("\n  zero_optimization: {stage: 1}", " zero2")
    written = Path("planned.yaml").read_text(encoding="utf-8")
    assert written == f"{changed}gradient_accumulation_steps: 1\nnum_train_epochs: 3\n"
    assert load_config(["--config", "planned.yaml"]).training["save_steps"] == 4


@pytest.mark.usefixtures("config_file")
def test_keys_need_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--model_name_or_path", "model", "--train_file", "rows.jsonl", "--output_dir", "out", "--max_length", "128"]
    assert main(["plan", *keys, "--gpus-per-node", "4", "--json", "--write", "planned.yaml"]) == 0
    found = json.loads(capsys.readouterr().out)["options"]
    assert found == plan(capsys, "--gpus-per-node", "4")["options"]
    assert load_config(["planned.yaml"]).max_length == 128
    assert main(["plan", "--gpus-per-node", "4", "--json", "--config", "run.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["options"] == found
    assert main(["plan", "--gpus-per-node", "4", "--json", "run.yaml", "--seed", "3"]) == 0
    assert main(["plan", "--nodes", "2"]) == 2
    assert "missing: model_name_or_path" in capsys.readouterr().err


@pytest.mark.usefixtures("config_file")
def test_a_limit_of_tokens_holds_for_the_rows_it_was_given_for(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--max_tokens_per_batch", "150", "--per_device_train_batch_size", "2")
    found = plan(capsys, *words, "--write", "planned.yaml")
    assert [option["tokens_per_micro_batch"] for option in found["options"]] == [150] * 6
    best = found["recommended"]
    assert (best["micro_batch"], best["tokens_per_micro_batch"]) == (8, 8 * 128)
    assert load_config(["--config", "planned.yaml"]).max_tokens_per_batch is None


@pytest.mark.usefixtures("config_file")
def test_a_measured_run_gives_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out").mkdir()
    Path("out/run.json").write_text('{"tokens_per_second": 1000.0, "world_size": 8}', encoding="utf-8")
    times = plan(capsys)["schedule"]
    assert (times["rate"], times["rate_measured"]) == (1000.0, True)
    assert times["seconds"] == times["tokens"] / 1000
    assert plan(capsys, "--nodes", "2")["schedule"]["rate_measured"] is False  # another number of ranks


@pytest.mark.usefixtures("config_file")
def test_time_limit(capsys: pytest.CaptureFixture[str]) -> None:
    """One too short is said with the number of jobs; Slurm's 0 is no limit."""
    said = []
    for limit in ("1", "30-0", "0"):
        code = main(["plan", "run.yaml", "--tokens-per-second", "100", "--time-limit", limit])
        assert code == (limit == "1")
        said.append(capsys.readouterr().out)
    assert "Longer than the time limit of 1 min: " in said[0]
    assert "Within the time limit of 30 d 00 h." in said[1]
    assert "time limit" not in said[2]


@pytest.mark.usefixtures("config_file")
def test_one_process_on_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a run there says itself, and what Python takes beside it, in the memory that is here."""
    words = ["plan", "run.yaml", "--gpus-per-node", "0"]
    monkeypatch.setattr("ds_sft.commands.plan_answers.memory_here", lambda: 2 << 30)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (row,) = found["options"]
    assert (row["name"], row["fits"], found["host_memory"], found["ranks"]) == ("no DeepSpeed", True, 2 << 30, 1)
    assert row["gpu"].pop("Python and its libraries") == PYTHON
    assert (found["flops"], row["step_seconds"], found["schedule"]["seconds"]) == (None, None, None)
    config = load_config(["--config", "run.yaml"])
    said = expectation.expect_memory(config, None, longest=config.max_length, padded=False, ranks=1, on_gpu=False,
                                     largest=config.max_length * config.micro_batch,
                                     launch=Launch(launcher="python", rank=1))  # fmt: skip
    assert said is not None
    assert row["gpu"] == said.memory.device
    assert row["node_total"] == said.memory.device_bytes + PYTHON
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "; one process on a CPU with 2.0 GiB of memory.\n" in out
    assert "MiB. It fits.\n" in out
    assert " FLOP: how long that takes on this CPU, a first run says; --flops or --tokens-per-second.\n" in out
    assert main([*words, "--tokens-per-second", "100"]) == 0
    assert " at 100 tokens/s, measured.\n" in capsys.readouterr().out


@pytest.mark.usefixtures("config_file")
def test_a_cpu_without_room(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml", "--gpus-per-node", "0", "--host-memory", "600MB"]) == 1
    said = capsys.readouterr()
    assert "MiB. It does not fit.\nNothing fits: take a smaller max_length" in said.out
    assert said.err == "ds-sft plan: too little memory for this run\n"


@pytest.mark.usefixtures("config_file")
def test_a_disk_that_is_too_small(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The tables and what is below them are printed all the same."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert main(["plan", "run.yaml", "--tokens-per-second", "100", "--time-limit", "1"]) == 1
    said = capsys.readouterr()
    assert "The disk is too small: choose another output_dir.\n" in said.out  # one checkpoint cannot be fewer
    assert "Disk (recommended, ZeRO-2): " in said.out
    assert "Time (recommended, ZeRO-2): " in said.out
    assert said.err == "ds-sft plan: too little disk and time for this run\n"
    assert main(["plan", "run.yaml", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["short"] == ["disk"]
    assert main(["plan", "run.yaml", "--gpus-per-node", "4"]) == 0
    assert "This machine's disk is too small for it: see that the one of the GPUs is not.\n" in capsys.readouterr().out
    assert main(["plan", "run.yaml", "--gpus-per-node", "0", "--num_train_epochs", "99", "--save_steps", "4"]) == 1
    assert "The disk is too small: set save_total_limit, save less often, or" in capsys.readouterr().out


@pytest.mark.usefixtures("config_file")
def test_sweep_draws_a_png(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml", "--sweep", "nodes=1..4", "--plot", "sweep.png", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)
    assert [(p["layout"], p["nodes"]) for p in points] == [
        (layout, nodes) for layout in ("ZeRO-2", "ZeRO-3", "hierarchical") for nodes in (1, 2, 4)
    ]
    assert Path("sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["400T", "400TFLOP/s", "400 TFLOPS", "400tflops", "4e14", "0.4P", "400000000000000"])
def test_one_rate_of_a_gpu(text: str) -> None:
    assert parser().parse_args(["--flops", text]).flops == pytest.approx(4e14)


@pytest.mark.usefixtures("config_file")
def test_the_last_of_a_flag_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "run.yaml", "--json", "--nodes", "8", "--nodes=1", "--seed", "1", "--seed", "2"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["ranks"] == 8
    assert said.err == "--nodes is given 2 times: the last counts.\n--seed is given 2 times: the last counts.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu-memory", "80"], "'80': expected a number with its unit, such as 80GB"),
        (["--gpu-memory", "lots"], "'lots': expected a number above 0 such as 80GB"),
        (["--time-limit", "soon"], "'soon': expected a time such as 30 (minutes), 24:00:00"),
        (["--gpu_memory", "80GB"], "--gpu_memory: unknown key"),
        (["--flops", "312"], "'312': expected a number with its unit, such as 312T"),
        (["--interconnect", "25"], "'25': expected a number with its unit, such as 25GB"),
        (["--write", "absent/planned.yaml"], "--write: absent/planned.yaml: cannot be written: No such file"),
        (["--sweep", "nodes=1..2", "--plot", "absent/p.png"], "--plot: absent/p.png: cannot be written: No such file"),
        (
            ["--gpus-per-node", "0", "--nodes", "2"],
            "--gpus-per-node 0: a plan for a CPU is of one process: leave out --no",
        ),
        (["--gpus-per-node", "-1"], "--gpus-per-node: '-1': expected a whole number"),
        (["--gpus-per-node", "0", "--sweep", "nodes=1..2"], "of one process: leave out --sweep"),
        (["--plot", "p.png"], "--plot: draws a sweep: give --sweep"),
        (["--sweep", "nodes=1..2", "--write", "p.yaml"], "--write: a sweep recommends nothing: leave out --sweep or"),
    ],
)
@pytest.mark.usefixtures("config_file")
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    assert main(["plan", "run.yaml", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("measured", "freed", "said"),
    [
        (2.4, 0.0, None),
        (2.9, 0.7, None),  # freed blocks explain it: the summary says so
        (2.9, 0.3, "2.00 were planned: the plan of a longer or larger run would be as wrong; please report it with"),
        (1.1, 0.7, "took 1.10 GiB of a rank's memory, 2.00 were planned: the plan of a "),
    ],
)
def test_a_run_that_parts_from_its_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], measured: float, freed: float, said: str | None
) -> None:
    monkeypatch.setattr(expectation, "peak_memory", lambda: {"host_gib": measured + 0.5})
    monkeypatch.setattr(expectation, "freed_gib", lambda: freed)
    planned = expectation.Expectation("ZeRO-2", Memory("loss", {"activations": 2 << 30}), False, before_gib=0.5)
    found = expectation.compare_with_plan(planned, Launch(launcher="python"))
    out = capsys.readouterr().out
    assert out == "" if said is None else said in out
    assert found == {
        "layout": "ZeRO-2",
        "moment": "loss",
        "planned_gib": 2.0,
        "measured_gib": measured,
        "freed_gib": freed,
    }


def test_freed_blocks_that_the_c_library_keeps() -> None:
    """Once a block was freed glibc takes the next of its size from the heap, which a block at its end keeps."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):  # there a run says nothing of freed blocks
        assert expectation.freed_gib() == 0
        return
    script = """
import ctypes
from ds_sft.training.expectation import freed_gib
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
c.free(c.malloc(20 << 20))
blocks, last, before = [c.malloc(16 << 20) for _ in range(8)], c.malloc(1 << 20), freed_gib()
for block in blocks:
    c.free(block)
print(round(8 * (freed_gib() - before), 2))
"""
    tuned = ("GLIBC_TUNABLES", "MALLOC_", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=env)
    assert done.stdout == "1.0\n"


@pytest.mark.parametrize("size", [TINY, SEVENTY_BILLION], ids=["tiny", "70 B"])
def test_ways_to_fill_micro_batches_are_halved(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, size: dict[str, Any]
) -> None:
    """Tens of millions of them: a billion tokens a micro batch, rows of 128. Four layouts halve twice each."""
    (config_file.parent / "model" / "config.json").write_text(json.dumps(size), encoding="utf-8")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**15))
    planned: list[str] = []

    def count(name: str, *asked: Any) -> layouts.Option:
        planned.append(name)
        return layouts.option(name, *asked)

    monkeypatch.setattr(advice, "option", count)
    assert main(["plan", str(config_file), "--max_tokens_per_batch", "1000000000", "--gpu-memory", "10TB"]) == 0
    assert len(planned) < 300


def test_the_command_answers_without_the_libraries_of_training(config_file: Path) -> None:
    code = (
        "import sys; from ds_sft.cli import main; assert main(sys.argv[1:]) == 0; "
        "print([n for n in ('torch', 'transformers', 'datasets', 'deepspeed') if n in sys.modules])"
    )
    command = [sys.executable, "-c", code, "plan", str(config_file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=config_file.parent)
    assert done.stdout.splitlines()[-1] == "[]"
