"""Rows that ranks share: the losses, gradients and weights of one rank, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from tests.conftest import write_rows
from tests.distributed.harness import read_lines, run_forked, script, step_losses, write_yaml
from tests.distributed.test_trajectory import (
    BF16_LOSS,
    LORA,
    MIXTURE,
    ROWS,
    Reference,
    bare_pytorch,
    check,
    engine,
    reference,
    reference_of,
    settings,
    trained_weights,
    update_error,
)

pytestmark = pytest.mark.distributed
__all__ = ["reference"]  # a fixture


def test_attention_over_ranks_is_that_of_one(tmp_path: Path) -> None:
    """Two ranks and four, several families: with windows, with fewer key heads than ranks, recomputed in backward.

    Two layers exchange twice in forward and twice in backward each, and twice more where they are computed again.
    """
    done = run_forked([script("shared_rows")], 4, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    cases = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    assert len(cases) == 22
    for case in cases:
        near = 1e-6 if case["dtype"] == "float32" else 1e-2
        assert max(case["loss"], case["gradient"]) < near, case
        assert case["exchanges"] == (12 if case["again"] else 8), case


def shared(model_dir: Path, folder: Path, name: str, group: int, micro: int, **changes: Any) -> dict[str, Any]:
    """A run of eight rows a step on four ranks, `group` of which share each row."""
    (folder / name).mkdir(exist_ok=True)
    keys = settings(model_dir, folder, "none", micro, 8 * group // (4 * micro), sequence_parallel=group, **changes)
    engine(name, folder / name)
    return keys if name == "none" else {**keys, "deepspeed": f"{name}/engine.json"}


@pytest.mark.timeout(900)
def test_one_trajectory(model_dir: Path, tmp_path: Path, reference: Reference) -> None:
    """Four ranks in groups of two and four, under every engine: bare PyTorch's losses, weights and validation loss.

    Two key heads serve four ranks; parts begin in the middle of rows; a sum of lengths rarely divides by the ranks.
    "few" has one row for two groups, in training and validation. MLPs are tiled, where they are, by 50 tokens.
    """
    window = small_model("mistral", model_dir, tmp_path / "windowed", sliding_window=16)  # several in a part of a row
    experts = small_model("qwen3_moe", model_dir, tmp_path / "experts", **{**MIXTURE, "num_attention_heads": 4})
    talks = [{"messages": [turn for row in ROWS[i : i + 4] for turn in turns(row)]} for i in range(24)]
    packed = {"packing": "concat", "max_length": 700, "train_file": "talks.jsonl", "gradient_accumulation_steps": 1}
    few = {"train_file": "few.jsonl", "eval_file": "few.jsonl", "gradient_accumulation_steps": 2, "max_steps": 3}
    runs = {
        "none-2": shared(model_dir, tmp_path, "none", 2, 1),
        "none-4": shared(model_dir, tmp_path, "none", 4, 2, gradient_checkpointing=True),
        "zero1-2": shared(model_dir, tmp_path, "zero1", 2, 2),
        "zero2-4": shared(model_dir, tmp_path, "zero2", 4, 8),
        "zero3-2": shared(model_dir, tmp_path, "zero3", 2, 4, gradient_checkpointing="offload", tiled_mlp="yes"),
        "zero3-4": shared(model_dir, tmp_path, "zero3", 4, 1, max_tokens_per_batch=600),
        "bf16-1": shared(model_dir, tmp_path, "none", 1, 2, bf16=True),
        "bf16-2": shared(model_dir, tmp_path, "zero3", 2, 2, bf16=True),
        "bf16-4": shared(model_dir, tmp_path, "none", 4, 2, bf16=True),
        "lora": shared(model_dir, tmp_path, "zero3", 4, 2, **LORA),
        "window-1": shared(window, tmp_path, "none", 1, 1),
        "window-4": shared(window, tmp_path, "none", 4, 2),
        "few-1": shared(model_dir, tmp_path, "none", 1, 1, **few),
        "few-2": shared(model_dir, tmp_path, "none", 2, 1, **few),
        "few-2-zero3": shared(model_dir, tmp_path, "zero3", 2, 1, **few),
        "packed-1": shared(model_dir, tmp_path, "none", 1, 1, **packed),
        "packed-2": shared(model_dir, tmp_path, "zero2", 2, 2, **packed),
        "packed-4": shared(model_dir, tmp_path, "none", 4, 4, **packed),
        "experts-1": shared(experts, tmp_path, "none", 1, 2),
        "experts-2": shared(experts, tmp_path, "zero2", 2, 4),
        "experts-4": shared(experts, tmp_path, "zero3", 4, 8),
    }
    write_rows(tmp_path / "talks.jsonl", talks)
    write_rows(tmp_path / "few.jsonl", ROWS[1:2])
    files = [str(write_yaml(tmp_path / f"{key}.yaml", {**keys, "output_dir": key})) for key, keys in runs.items()]
    done = run_forked([script("tiled"), *files], 4, cwd=tmp_path, timeout=800)
    assert done.code == 0, done.output[-6000:]
    said = re.findall("Batch: .*", done.output)
    assert said[:2] == [
        "Batch: 1 rows x 4 accumulated x 2 groups of 2 ranks = 8 rows a step; 32 rows => 4 steps an epoch, 4 steps in "
        "all.",
        "Batch: 2 rows x 4 accumulated x 1 group of 4 ranks = 8 rows a step; 32 rows => 4 steps an epoch, 4 steps in "
        "all.",
    ]
    for key in runs:
        if key.startswith(("none", "zero")):
            check(tmp_path / key, reference)
        if key.startswith("bf16"):
            assert step_losses(tmp_path / key) == pytest.approx(reference.losses, rel=BF16_LOSS)
            off = update_error(tmp_path / key, reference) / update_error(tmp_path / "bf16-1", reference)
            assert off < 1.1, key  # rounding is what it is without sharing
    check(tmp_path / "lora", reference_of(model_dir, "lora", torch.float32))
    check(tmp_path / "window-1", bare_pytorch(window))
    for kind in ("window", "few", "packed", "experts"):
        for other in sorted(key for key in runs if key.startswith(kind)):
            check(tmp_path / other, as_reference(tmp_path / f"{kind}-1", reference))
    balance = [[row["aux_loss"] for row in read_lines(tmp_path / f"experts-{n}" / "metrics.jsonl") if "aux_loss" in row]
               for n in (1, 2, 4)]  # fmt: skip
    assert balance[0] == pytest.approx(balance[1], rel=1e-5)
    assert balance[0] == pytest.approx(balance[2], rel=1e-5)
    told = {key: json.loads((tmp_path / key / "run.json").read_text()) for key in runs}
    learned = {key: (run["tokens"], run["speed"]["supervised_tokens"]) for key, run in told.items()}
    whole = {learned[key] for key in runs if not key.startswith(("few", "packed"))}
    assert whole == {learned["none-2"]}  # whatever fills up the parts
    assert {learned[key][1] for key in runs if key.startswith("few")} == {learned["few-1"][1]}
    assert len({learned[f"packed-{n}"][1] for n in (1, 2, 4)}) == 1
    assert [told[key]["sequence_parallel"] for key in ("none-2", "none-4", "window-1")] == [2, 4, 1]


def turns(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"] or "-"}]


def as_reference(out: Path, started: Reference) -> Reference:
    evaluated = [row["eval_loss"] for row in read_lines(out / "metrics.jsonl") if "eval_loss" in row]
    return Reference(step_losses(out), evaluated[-1], trained_weights(out), started.start)


def small_model(family: str, model_dir: Path, folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    keys = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 2,
            "bos_token_id": None}  # fmt: skip
    config = AutoConfig.for_model(family, **{**keys, **changes})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


@pytest.mark.timeout(900)
def test_a_checkpoint_goes_on_with_other_groups(model_dir: Path, tmp_path: Path) -> None:
    """With as many ranks and groups bit for bit; with others as many rows a step, and the same losses and weights.

    But for DistributedDataParallel's on more than two ranks, shared rows or not: in its first step after any start it
    sums gradients in another order than in later ones.
    """
    saving = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    groups = {"again": 2, "four": 4, "one": 1}
    resumed = {"plain": ["again", "four", "one"], "zero2": ["four"], "zero3": ["again", "four"]}
    pair = shared(model_dir, tmp_path, "none", 2, 2, **{**saving, "gradient_accumulation_steps": 4})
    runs, later = {}, {"pair": pair, "pair-again": {**pair, "resume": "pair/checkpoint-2"}}  # plain ones come first
    for name, others in resumed.items():
        runs[name] = shared(model_dir, tmp_path, "none" if name == "plain" else name, 2, 2, **saving)
        later[f"{name}-fewer"] = {**runs[name], "resume": f"{name}/checkpoint-2"}
        for other in others:
            keys = {**later[f"{name}-fewer"], "sequence_parallel": groups[other]}
            runs[f"{name}-{other}"] = {**keys, "per_device_train_batch_size": 1 if other == "one" else 2}
    said = ""
    for ranks, these in ((4, runs), (2, later)):
        files = [str(write_yaml(tmp_path / f"{key}.yaml", {**keys, "output_dir": key})) for key, keys in these.items()]
        done = run_forked([script("splits"), *files], ranks, cwd=tmp_path, timeout=800)
        assert done.code == 0, done.output[-6000:]
        said += done.output
    before = "The checkpoint is of 4 ranks with sequence_parallel: 2, this run has"
    kept = "gradient_accumulation_steps is set to {}, so that a step keeps its 8 rows."
    four, fewer = (f"{before} {n} with sequence_parallel: {n}: {kept.format(4)}" for n in (4, 2))
    assert re.findall("The checkpoint is .*", said) == [
        four, f"{before} 4: {kept.format(2)}", four, four, fewer, fewer, fewer
    ]  # fmt: skip
    for key in [*runs, *later]:
        name, _, how = key.partition("-")
        losses, weights = step_losses(tmp_path / name), trained_weights(tmp_path / name)
        assert step_losses(tmp_path / key) == pytest.approx(losses, rel=1e-5), key
        for weight, value in trained_weights(tmp_path / key).items():
            same = how in ("", "again") and name != "plain"
            exact = {"rtol": 0, "atol": 0} if same else {"rtol": 1e-5, "atol": 2e-5}
            torch.testing.assert_close(value, weights[weight], msg=f"{key}: {weight}", **exact)
