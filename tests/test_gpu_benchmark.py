"""What `benchmarks/gpu.py` does besides starting programs: what it asks for, what it reads, its table."""

from __future__ import annotations

import json
import random
import re
import statistics
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import gpu
from peers.commands import command_for, environment

from ds_sft.config.read import load_config

CARD = gpu.Card("NVIDIA H200", peak=1000e12, product=800e12)
GIVEN = Namespace(shape="0.6b", steps=30, train_file=None, trl=None, timeout=100, budget=None, json=None)


def named(name: str) -> gpu.Run:
    return next(run for run in gpu.RUNS if run.name == name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    config = gpu.SHAPES["tiny"] | {"model_type": "qwen3"}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "lengths.json").write_text("[[10, 4], [30, 16]]")
    return tmp_path


def flags(name: str, folder: Path, given: Namespace = GIVEN) -> dict[str, str]:
    command, _ = command_for(
        named(name).candidate, gpu.job_of(named(name), given, folder, "cuda"), folder / "out", None
    )
    start = next(i for i, word in enumerate(command) if word.endswith("train.py")) + 1
    return dict(zip(command[start::2], command[start + 1 :: 2], strict=True))


@pytest.mark.parametrize("run", [run for run in gpu.RUNS if run.program == "ours"], ids=lambda run: run.name)
def test_ours_are_asked_for_with_keys_that_exist(run: gpu.Run, folder: Path) -> None:
    given = flags(run.name, folder)
    config = load_config([word for pair in given.items() for word in pair])
    assert (config.training["max_steps"], config.training["logging_steps"]) == (30 // run.less, 10 // run.less)
    assert bool(config.training.get("activation_checkpointing", False)) is run.recompute
    assert config.offloads is ("offload" in run.name)
    assert config.training.get("use_cpu", False) is False
    assert config.batching == "padding_free"


def test_what_fills_a_micro_batch(folder: Path) -> None:
    filled, rows, long = (flags(name, folder) for name in ("16k", "16-rows", "8k-rows"))
    assert filled["--max_tokens_per_batch"] == "16384"
    assert "--per_device_train_batch_size" not in filled
    assert (rows["--per_device_train_batch_size"], rows["--num_predictions"]) == ("16", "3")
    assert (long["--per_device_train_batch_size"], long["--max_length"]) == ("2", "8192")
    assert long["--train_file"] == str(folder / "rows-8192.jsonl")
    small = Namespace(**vars(GIVEN) | {"shape": "tiny"})
    assert flags("64k-row", folder, small)["--max_length"] == "2048"


def test_peers_get_their_own_keys(folder: Path) -> None:
    for name, expected in (("trl", None), ("trl-liger", True)):
        job = gpu.job_of(named(name), GIVEN, folder, "cuda")
        command, _ = command_for(named(name).candidate, job, folder / "out", None)
        assert command[0] == sys.executable
        keys = json.loads((folder / "out.yaml").read_text())
        assert keys.get("use_liger_kernel") is expected
        assert (keys["per_device_train_batch_size"], keys["logging_steps"], keys["padding_free"]) == (16, 10, False)
        assert "use_cpu" not in keys


def test_our_python_keeps_its_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine without network packages may be there alone; another Python's are not ours."""
    monkeypatch.setenv("PYTHONPATH", "/a:/b")
    job = gpu.job_of(named("trl"), GIVEN, folder, "cuda")
    paths = [environment(named("trl").candidate, job, folder, home)["PYTHONPATH"] for home in (None, folder)]
    assert paths[0] == f"{paths[1]}:/a:/b"
    monkeypatch.delenv("PYTHONPATH")
    assert environment(named("trl").candidate, job, folder, None)["PYTHONPATH"] == paths[1]


def test_the_last_interval_is_read(folder: Path) -> None:
    ours, peer = named("16-rows"), named("trl")
    out = folder / "out"
    out.mkdir()
    lines = [{"loss": loss, "tokens_per_second": 100.0 * loss, "data_wait_share": 0.01} for loss in (3, 2)]
    lines[-1]["optimizer_share"] = 0.03
    (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [{"x": 1}, *lines]))
    record = {"peak_memory": [{"host_gib": 4.0, "gpu_gib": 2.5}], "plan": {"planned_gib": 2.4}}
    (out / "run.json").write_text(json.dumps(record))
    said = [(2.0, "Qwen3ForCausalLM:"), (2.0, "  Attention      varlen_attn (all rows in one kernel a layer)"),
            (5.0, "Step 20 of 30: loss"), (7.0, "Step 30 of 30: loss 2.0"), (19.5, "")]  # fmt: skip
    found = gpu.read_ours(ours, gpu.job_of(ours, GIVEN, folder, "cuda"), out, said)
    assert (found.tokens_per_second, found.peak_gib, found.planned_gib) == (200.0, 2.5, 2.4)
    assert (found.data_wait, found.after_seconds, found.losses) == (0.01, 12.5, [3, 2])
    assert list(gpu.in_words(found)) == [
        "16-rows: 200 tokens/s (0 s)",
        "  data_wait 1.0%, optimizer 3.0%",
        "  Attention      varlen_attn (all rows in one kernel a layer)",
    ]
    job = gpu.job_of(peer, GIVEN, folder, "cuda")
    assert found.flops == 200 * gpu.flop_of_a_token(job, None)
    probed = {"logged": [[1, 10.0], [2, 12.0], [4, 16.0]], "tokens": [7, 9, 20, 30], "memory": 9.8, "losses": [3, 2, 1]}
    (folder / "rank-0.json").write_text(json.dumps(probed))
    assert gpu.read_peer(peer, job, folder).tokens_per_second == 50 / 4


def test_table() -> None:
    results = [
        gpu.Found("16k", tokens_per_second=120_000, flops=400e12, peak_gib=23.5, planned_gib=24.04, data_wait=0.004,
                  losses=[11.24, 10.5]),
        gpu.Found("16k-recomputed", tokens_per_second=90_000, flops=300e12),
        gpu.Found("trl", tokens_per_second=8_000, flops=30e12, peak_gib=9.8),
        gpu.Found("trl-liger", error="not installed: liger_kernel"),
    ]  # fmt: skip
    lines = gpu.table(results, CARD, "0.6b").splitlines()
    assert lines[0] == "NVIDIA H200; 1,000.0 TFLOP/s at most, 800.0 in a bfloat16 product. Shape 0.6b."
    assert {line.count("|") for line in lines[2:]} == {12}
    assert lines[4] == (
        "| ours, 16,384 tokens | 120,000 | 15.00 | 40.0% | 50% | 23.5 | 24.0 | 0.4% | - | 11.2400, 10.5000 | "
        ">= 110,000, 15 x TRL, <= 24 GiB, waiting for data < 1 % |"
    )
    assert lines[5].startswith("| ours, 16,384 tokens, checkpointing | 90,000 | 11.25 | 30.0% | 50% | - |")
    assert lines[7].startswith("| TRL with Liger, 16 rows | not installed: liger_kernel |  |")


def test_a_used_up_budget_starts_no_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def run_one(run: gpu.Run, given: Any, folder: Path, device: str, timeout: float) -> gpu.Found:
        limits.append(timeout)
        clock[0] += 70
        return gpu.Found(run.name)

    clock = [0.0]
    monkeypatch.setattr(gpu, "run_one", run_one)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    given = Namespace(**vars(GIVEN) | {"budget": 120, "json": folder / "kept.json"})
    found = list(gpu.measure(gpu.RUNS[:3], given, folder, CARD, started=0.0))
    assert limits == [100, 50]
    assert [result.error for result in found] == ["", "", "not started: the budget is used up"]
    assert len(json.loads((folder / "kept.json").read_text())["results"]) == 3


def test_a_run_without_an_end_is_ended(folder: Path) -> None:
    code, said = gpu.follow(
        [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"], {}, folder, 5
    )
    assert (code, said[0][1], gpu.why(code, said, 5)) == (None, "here", "no end after 5 s")


def test_the_log_of_a_run_that_fails_is_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = "print('why'); raise SystemExit('CUDA error: no')"
    monkeypatch.setattr(gpu, "command_for", lambda *_: ([sys.executable, "-c", program], {}))
    found = gpu.run_one(named("16k"), GIVEN, folder, "cuda", timeout=60)
    assert found.error
    assert capsys.readouterr().out.splitlines() == ["  | why", "  | CUDA error: no"]


def test_runs_come_in_the_order_they_are_asked_for() -> None:
    """What comes last is left out where time is short."""
    asked = Namespace(only=["trl", "16k", "16-rows", "16k"])
    assert [run.name for run in gpu.wanted_of(asked)] == ["trl", "16k", "16-rows"]
    assert gpu.wanted_of(Namespace(only=None)) == gpu.RUNS


def test_synthetic_dialogues_are_as_long_as_real_ones() -> None:
    """Each of their words is a token."""
    tokenizer, rows = gpu.make_tokenizer(), gpu.dialogues(random.Random(0))
    lengths = [len(tokenizer(f" {row['question']} {row['answer']}")["input_ids"]) for row in rows]
    counted = [len(f"{row['question']} {row['answer']}".split()) for row in rows]
    assert len(rows) == 1000
    assert statistics.mean(lengths) == pytest.approx(statistics.mean(counted), rel=0.02)
    assert statistics.mean(lengths) == pytest.approx(gpu.MEAN_TOKENS - gpu.TEMPLATE, rel=0.1)


def test_the_prepared_script_measures_all_that_has_a_target() -> None:
    script = (Path(gpu.__file__).parent / "gpu_table.sh").read_text(encoding="utf-8")
    named = {name for names in re.findall("--only ([^$]+)", script) for name in names.split(' "')[0].split()}
    assert named <= {run.name for run in gpu.RUNS}
    assert named >= {run.name for run in gpu.RUNS if run.target}
