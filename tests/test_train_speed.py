"""What `benchmarks/train_speed.py` and `memory.py` do besides starting programs: rows, records, ratios, tables."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import train_speed  # noqa: E402
from peers import commands, environment, results  # noqa: E402

from ds_sft.plan.shape import shape_of  # noqa: E402
from tests.distributed.harness import wait_until_gone  # noqa: E402

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 2,
    "vocab_size": 10,
    "tie_word_embeddings": True,
}
OURS, PADDED = "ours flat, not recomputed", "trl padded"


def load(name: str, file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job(folder: Path, **changed: Any) -> commands.Job:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
    keys: dict[str, Any] = {"folder": folder, "model": folder / "model", "system": "Be.", "batch": 8, "steps": 2,
                            "longest": 30, "tokens": 200}  # fmt: skip
    return commands.Job(**{**keys, **changed})


def test_rows_are_rendered_as_the_reference_template_does(tokenizer_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    row = {"question": "What is the capital of France?", "answer": "Paris."}
    rendered = train_speed.render(row, tokenizer.pad_token)
    assert rendered == {
        "prompt": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "What is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        "completion": "Paris.<|endoftext|>",
    }
    assert train_speed.messages(rendered) == {
        "messages": [{"role": "user", "content": rendered["prompt"]}, {"role": "assistant", "content": "Paris."}]
    }


def test_all_are_asked_for_the_same_rows_a_step(tmp_path: Path) -> None:
    for ranks, stage in train_speed.RUNS.values():
        asked = job(tmp_path, ranks=ranks, stage=stage)
        for candidate in commands.CANDIDATES:
            keys = asked.keys(candidate, tmp_path / "out")
            micro, accumulation = keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]
            assert micro * accumulation * ranks == 8, candidate
            assert (micro == 1) == (candidate.layout == "single")
            assert keys.get("deepspeed") == (str(ROOT / f"ds_configs/zero{stage}.json") if stage else None)


def test_each_program_gets_its_own_command(tmp_path: Path) -> None:
    asked, home = job(tmp_path, ranks=2, stage=2), tmp_path / "home"
    found = {c.name: commands.command_for(c, asked, tmp_path / "out", home) for c in commands.CANDIDATES}
    torchrun, ranks, port, script = found[OURS][0][:4]
    assert (torchrun, ranks, script) == (
        str(home / "bin/torchrun"), "--nproc_per_node=2", str(ROOT / "ds_sft/train.py"))  # fmt: skip
    assert 0 < int(port.removeprefix("--master_port=")) < 65536
    assert found["llamafactory single"][0] == [str(home / "bin/llamafactory-cli"), "train", str(tmp_path / "out.yaml")]
    assert found["llamafactory single"][1]["NPROC_PER_NODE"] == "2"
    swift = found["ms-swift flat"][0]
    assert swift[:2] == [str(home / "bin/swift"), "sft"]
    assert swift[swift.index("--padding_free") + 1] == "True"
    assert swift[swift.index("--model_type") + 1] == "llama"


def test_neat_packing_has_as_many_tokens_a_step_in_multiples_of_eight(tmp_path: Path) -> None:
    flat = next(c for c in commands.CANDIDATES if c.name == "llamafactory flat")
    commands.command_for(flat, job(tmp_path), tmp_path / "out", tmp_path)
    keys = json.loads((tmp_path / "out.yaml").read_text())
    assert keys["cutoff_len"] == 104  # 200 tokens in 2 steps, rounded up
    assert (keys["per_device_train_batch_size"], keys["gradient_accumulation_steps"]) == (1, 1)


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("a\n[rank1]: ValueError: no such thing\nlater.Error: b\n", "ValueError: no such thing"),
        ("Traceback\nmy.module.SomeError: why\n", "my.module.SomeError: why"),
        ("usage\nds_sft: error: --x: unknown\n\n", "exit code 3: ds_sft: error: --x: unknown"),
        ("", "exit code 3: "),
    ],
)
def test_first_error_of_a_log(log: str, error: str) -> None:
    assert train_speed.first_error(log, 3) == error


def test_ranks_are_put_together(tmp_path: Path) -> None:
    (tmp_path / "lengths.json").write_text("[[5, 2], [5, 2], [6, 3], [4, 1]]")
    rank = {"marks": [[0, 0], [1, 2], [3, 5]], "optimizer": [9, 0.5], "tokens": [5, 6], "supervised": [2, 3],
            "computed": [8, 8], "losses": [2.0, 1.0], "memory": 1.5, "weights": "float32"}  # fmt: skip
    (tmp_path / "rank-0.json").write_text(json.dumps(rank))
    asked = job(tmp_path, batch=2, ranks=2)
    assert results.read_result(tmp_path, asked).error == "1 of 2 ranks finished their training"
    other = rank | {"marks": [[0, 0], [1, 2], [5, 3]], "tokens": [5, 4], "supervised": [2, 1], "memory": 2.0}
    (tmp_path / "rank-1.json").write_text(json.dumps(other))
    found = results.read_result(tmp_path, asked)
    assert (found.error, found.tokens, found.supervised, found.memory) == ("", [10, 10], [4, 4], 2.0)
    assert found.cpu == 1000 * (3 + 1) / 10  # both ranks' CPU
    assert found.wall == 1000 * 4 / 10  # the slower rank's clock
    assert found.padding == 1 - 20 / 32
    assert found.rate_without_optimizer == pytest.approx(found.rate * 4 / 3)


def test_useful_flop_counts_the_head_at_supervised_tokens_only() -> None:
    shape = shape_of(CONFIG)
    layer = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8  # q and o, k and v, MLP
    assert results.useful_flop(shape, [3, 5], 8, 2) == 6 * 2 * layer * 8 + 6 * 40 * 2 + 6 * 2 * 4 * (9 + 25)


def run(candidate: str, number: int, cpu: float, **changed: Any) -> dict[str, Any]:
    good = results.Result(cpu=cpu, wall=2 * cpu, memory=2.0, rate=50.0, rate_without_optimizer=60.0, weights="float32",
                          tokens=[10, 10], supervised=[4, 4], losses=[2.0, 1.0])  # fmt: skip
    return {"run": "plain", "round": number, "candidate": candidate, **vars(good), **changed}


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    found = results.by_candidate([run(OURS, 0, 1.0), run(PADDED, 0, 3.0), run(OURS, 1, 10.0), run(PADDED, 1, 20.0)])
    assert results.ratio(found[PADDED], found[OURS], "cpu") == 2.5
    found[OURS][1]["error"] = "no"
    assert results.ratio(found[PADDED], found[OURS], "cpu") == 3.0
    assert results.ratio(found[PADDED], {}, "cpu") is None


def test_table_limit_and_targets(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        {"run": "plain", "round": 0, "bare": 100.0},
        run(OURS, 0, 1.0),
        run(PADDED, 0, 2.5, memory=5.0, padding=0.5),
        run("trl flat", 0, 0.0, error="ValueError: a | b"),
        run("ms-swift single", 0, 1.5, tokens=[12, 10], losses=[2.0, 1.5]),
    ]
    results.print_table(runs)
    results.print_limit(runs)
    results.print_targets(runs)
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[2] == "| ours flat, not recomputed * | 1.00 | 1.00 | 2.00 | 1.00 | 2.00 | 1.00 | 0% | float32 | 1.0000 |"
    )
    assert lines[3] == "| trl padded * | 2.50 | 2.50 | 5.00 | 2.50 | 5.00 | 2.50 | 50% | float32 | 1.0000 |"
    assert lines[4] == "| trl flat | does not run: ValueError: a \\| b | | | | | | | | |"
    assert (
        "- ms-swift single: other rows or tokens in a step: 22 tokens in 2 steps (ours 20 in 2); 8 supervised"
        in lines[7]
    )
    assert lines[8] == "- ms-swift single: LOSS DIFFERS: mean loss 1.7500, ours 1.5000, bound 2%"
    assert lines[10].startswith("Bare bfloat16 product: 100 GFLOP a CPU second.")
    assert "50% of it over whole steps, 60% without" in lines[10]
    assert lines[11] == f"CPU time, fastest peer as recommended: `ms-swift single` 1.50 x `{OURS}`"


def test_loss_that_is_no_number_is_flagged() -> None:
    ours = {0: run(OURS, 0, 1.0)}
    flagged = results.differences(run(PADDED, 0, 1.0, losses=[2.0, float("nan")]), ours)
    assert flagged == ["LOSS DIFFERS: last loss nan, ours 1.0000, bound 2%"]
    assert results.differences(run(PADDED, 0, 1.0, losses=[2.0, 1.019]), ours) == []


def test_scaling_is_against_twice_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    """Of its own engine, and of one without DeepSpeed; a failed one is named with what depends on it."""
    runs = [
        run(OURS, 0, 4.0, run="plain x1"),
        run(OURS, 0, 5.0, run="ZeRO-2 x1", wall=10.0),
        run(OURS, 0, 0.0, run="ZeRO-3 x1", error="no room"),
        run(OURS, 0, 6.0, run="ZeRO-2 x2", wall=5.0),
        run(OURS, 0, 4.0, run="ZeRO-3 x2", wall=5.0),
    ]
    results.print_scaling(runs)
    assert capsys.readouterr().out.splitlines()[3:] == [
        "| plain x1 | 125 | 100% | 100% | 1.00 |",
        "| ZeRO-2 x1 | 100 | 100% | 80% | 1.00 |",
        "| ZeRO-3 x1 | does not run: no room | | | |",
        "| ZeRO-2 x2 | 200 | 100% | 80% | 1.20 |",
        "| ZeRO-3 x2 | does not run: one rank does not run | | | |",
    ]


def test_scaling_keeps_micro_batches_and_steps() -> None:
    """One rank accumulates what two compute at once."""
    job = train_speed.with_ranks(
        commands.Job(Path(), Path(), "", batch=8, steps=2, longest=1, tokens=1, most=4), 1, 2, 1
    )
    micro = [
        (k["per_device_train_batch_size"], k["gradient_accumulation_steps"])
        for k in (
            job.keys(train_speed.CANDIDATES[0], Path("out")),
            train_speed.with_ranks(job, 2, 2, 1).keys(train_speed.CANDIDATES[0], Path("out")),
        )
    ]
    assert micro == [(4, 2), (4, 1)]


def test_plot_names_what_does_not_run(tmp_path: Path) -> None:
    results.plot([run(OURS, 0, 1.0), run(PADDED, 0, 0.0, error="no")], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("flag", ["--batch=3", "--steps=1"])
def test_what_cannot_be_measured_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_speed.py", flag])
    with pytest.raises(SystemExit, match="2"):
        train_speed.arguments()


def test_a_failed_installation_is_its_error_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = "print('WARNING: x'); print('ERROR: no such version'); exit(1)"
    with pytest.raises(RuntimeError, match=r"ERROR: no such version$"):
        environment.call(sys.executable, "-c", script)
    (tmp_path / "trl").mkdir()
    (tmp_path / "trl" / ".installed").write_text("\n".join([environment.TORCH, *environment.PEERS["trl"]]))
    monkeypatch.setattr(environment, "call", None)  # nothing is installed twice
    assert environment.make_environment("trl", tmp_path) == tmp_path / "trl"


def test_the_probe_counts_tokens_of_every_layout() -> None:
    probe = load("probe", "peers/probe/sitecustomize.py")
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, -100]])
    padded = {"input_ids": torch.zeros(2, 4), "labels": labels, "attention_mask": torch.tensor([[1] * 4, [1, 1, 0, 0]])}
    assert (probe.positions(padded), probe.real(padded), probe.learned(padded)) == (8, 6, 3)
    flat = {"input_ids": torch.zeros(1, 6), "labels": labels.view(1, -1)[:, :6]}
    assert (probe.positions(flat), probe.real(flat), probe.learned(flat)) == (6, 6, 3)
    packed = flat | {"attention_mask": torch.tensor([[1, 1, 2, 2, 2, 0]])}
    assert probe.real(packed) == 5
    blocks = torch.full((1, 1, 6, 6), -1e9)
    blocks[..., range(5), range(5)] = 0
    assert probe.real(flat | {"attention_mask": blocks}) == 5


def test_the_probe_measures_any_trainer(tmp_path: Path) -> None:
    """A stand-in for transformers, whose Trainer a program subclasses and knows by its signature."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("")
    (tmp_path / "transformers" / "trainer.py").write_text(
        "class TrainerCallback: pass\n"
        "class Trainer:\n"
        "    def __init__(self, model, processing_class=None): self.model, self.callbacks = model, []\n"
        "    def add_callback(self, callback): self.callbacks.append(callback)\n"
        "    def get_batch_samples(self, iterator, number): return [next(iterator) for _ in range(number)], None\n"
    )
    script = (
        "import inspect, torch, types\nfrom transformers.trainer import Trainer\n"
        "class Mine(Trainer): pass\n"
        "assert 'processing_class' in inspect.signature(Trainer.__init__).parameters\n"
        "t = Mine(torch.nn.Linear(1, 1))\n(c,) = t.callbacks\n"
        "batches = iter([{'input_ids': torch.zeros(1, n), 'labels': torch.ones(1, n)} for n in (3, 4, 5, 6)])\n"
        "c.on_train_begin(0, 0, 0, model=t.model)\nstate = types.SimpleNamespace(global_step=7)\n"
        "for _ in range(2):\n"
        "    t.get_batch_samples(batches, 2); c.on_pre_optimizer_step(); c.on_optimizer_step(); c.on_step_end()\n"
        "    c.on_log(0, state, 0, logs={'loss': 2}); c.on_log(0, state, 0, logs={'eval_loss': 3})\n"
        "c.on_train_end()\n"
    )
    env = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'benchmarks/peers/probe'}:{tmp_path}",
        "DS_SFT_PROBE": str(tmp_path),
        "RANK": "1",
    }
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "rank-1.json").read_text())
    assert (found["tokens"], found["supervised"], found["losses"]) == ([7, 11], [5, 9], [2.0, 2.0])
    assert (len(found["marks"]), len(found["optimizer"]), found["weights"]) == (3, 2, "float32")
    assert found["marks"][0][0] < found["marks"][1][0] < found["marks"][2][0]
    assert found["memory"] > 0
    assert [step for step, _ in found["logged"]] == [7, 7]
    assert found["marks"][0][0] < found["logged"][0][1] < found["logged"][1][1]


def test_a_run_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE, start_new_session=True)\n"
        "print(child.pid, flush=True)\nchild.wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    train_speed.end(process)
    wait_until_gone([child], 120)
    assert process.returncode == -9
    train_speed.end(process)  # has ended: nothing to do


def test_memory_table_and_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = load("memory_benchmark", "memory.py")
    ours, own = (memory.make_batch(kind, 20, 50, 10) for kind in ("ours", "own"))
    assert ours["input_ids"].tolist() == [own["input_ids"].flatten().tolist()]
    assert own["input_ids"].shape == (2, 10)
    assert ours["position_ids"].tolist() == [[*range(10), *range(10)]]
    assert (ours["labels"] != -100).sum() == (own["labels"] != -100).sum() == 16
    assert (memory.cell(1234.5), memory.times(300.0, 100.0), memory.times("about 9 GiB", 100.0)) == (
        "1,234",
        "3.0",
        "-",
    )
    monkeypatch.setattr(memory, "available_gib", lambda: 8.0)
    assert memory.in_fresh_process("own", 8192, 151_936, 512) == "about 19 GiB"


def test_peers_under_an_engine_are_given_the_process_group_that_cpus_need(tmp_path: Path) -> None:
    engine, plain = job(tmp_path, stage=3, ranks=2, threads=3), job(tmp_path, threads=3)
    ours, peer = commands.CANDIDATES[0], next(c for c in commands.CANDIDATES if c.program == "ms-swift")
    given = commands.environment(peer, engine, tmp_path / "probe", tmp_path / "home")
    assert given["DS_SFT_PROBE_GLOO"] == "yes"
    assert (given["OMP_NUM_THREADS"], given["DS_SFT_PROBE"]) == ("3", str(tmp_path / "probe"))
    assert given["PATH"].startswith(f"{tmp_path / 'home/bin'}:")
    assert "DS_SFT_PROBE_GLOO" not in commands.environment(ours, engine, tmp_path / "probe", None)
    assert "DS_SFT_PROBE_GLOO" not in commands.environment(peer, plain, tmp_path / "probe", None)
