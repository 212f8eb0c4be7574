"""What holds of the steps of a run on a GPU: nothing waits in between, a resumed run is the same, the plan is true."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import write_rows
from tests.distributed.harness import step_losses
from tests.distributed.test_trajectory import BF16_LOSS, ROWS
from tests.gpu.lane import DEVICE, GPU, ON_GPU, Ran, make, run_all, settings
from tests.gpu.test_losses import make_mixture, runs

pytestmark = GPU


@pytest.fixture(scope="module")
def model(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), tokenizer_dir)


@pytest.mark.skipif(not ON_GPU, reason="a CPU does not wait for itself")
def test_pytorch_raises_where_the_host_waits() -> None:
    """What the next test relies on."""
    number = torch.ones((), device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            number.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_between_two_logging_steps_nothing_waits_for_the_device(
    model: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4 and 8 are logged: in 5 to 7 no batch, forward, backward, clipping, optimizer or schedule waits."""
    monkeypatch.setenv("STRICT_STEPS", "4 7")
    rows = write_rows(tmp_path / "rows.jsonl", ROWS * 2)
    mixture = make_mixture(tmp_path / "mixture-model", tokenizer_dir)
    changes = {"end_to_end": {}, "recomputed": {"gradient_checkpointing": True}, "liger": {"fused_kernels": "liger"},
               "filled": {"max_tokens_per_batch": 600}, "padded": {"batching": "padded"},
               "mixture": {"model_name_or_path": str(mixture)}}  # fmt: skip
    asked = {
        name: settings(model, rows, max_steps=8, logging_steps=4, **change)
        for name, change in changes.items()
        if runs(name)
    }
    for keys in asked.values():
        if "max_tokens_per_batch" in keys:
            del keys["per_device_train_batch_size"]
    ran = run_all(tmp_path, asked)
    for name in asked:
        assert len(step_losses(ran.out(name))) == 2
        assert [line for line in ran.said[name].splitlines() if line.startswith("waiting for the device")] == [
            "waiting for the device: error",
            "waiting for the device: default",
        ]


def test_a_resumed_run_is_the_same(model: Path, tmp_path: Path) -> None:
    """After step 3 of 6. Bit for bit with deterministic algorithms; else kernels add gradients in whatever order they
    come (attention's backward), and losses are the same within one rounding of bfloat16."""
    rows = write_rows(tmp_path / "rows.jsonl", ROWS * 2)
    keys = settings(model, rows, max_steps=6, save_strategy="steps", save_steps=3)
    asked = {"usual": keys, "deterministic": keys | {"full_determinism": True}}
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    whole = run_all(first, asked)
    for name in asked:  # as a run leaves it that was ended between step 3 and 6
        shutil.copytree(whole.out(name) / "checkpoint-3", second / name / "checkpoint-3")
        shutil.copy(whole.out(name) / "metrics.jsonl", second / name)
    resumed = run_all(second, asked)
    losses = {name: [step_losses(ran.out(name)) for ran in (whole, resumed)] for name in asked}
    assert all("checkpoint-3" in resumed.said[name] for name in asked)
    assert losses["usual"][1] == pytest.approx(losses["usual"][0], rel=BF16_LOSS)
    assert losses["deterministic"][1] == losses["deterministic"][0]
    assert len(losses["deterministic"][1]) == 6
    weights = [load_file(ran.out("deterministic") / "model.safetensors") for ran in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[1][key], value) for key, value in weights[0].items())


PLANNED: dict[str, dict[str, Any]] = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "liger": {"fused_kernels": "liger"},
    "liger_recomputed": {"fused_kernels": "liger", "gradient_checkpointing": True},
}
# Of 1 GiB and more, so that what a library takes for itself (a workspace of cuBLAS: 32 MiB) is no tenth.
SHAPE = {"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
         "num_attention_heads": 8, "num_key_value_heads": 4} if ON_GPU else {}  # fmt: skip
TOKENS = 16_384 if ON_GPU else 2048


@pytest.fixture(scope="module")
def measured(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """On a CPU sizes are those of a try: resident memory says nothing of the second run in a process."""
    folder = tmp_path_factory.mktemp("planned")
    model = make(folder / "model", tokenizer_dir, **SHAPE)
    rows = write_rows(folder / "rows.jsonl", [{"question": f"{i}?", "answer": f"{i} " * 120} for i in range(200)])
    keys = settings(model, rows, max_steps=3, gradient_accumulation_steps=1, max_tokens_per_batch=TOKENS)
    del keys["per_device_train_batch_size"]
    wanted = {name: keys | changes for name, changes in PLANNED.items() if runs(name.partition("_")[0])}
    return run_all(folder, wanted)


@pytest.mark.parametrize("name", PLANNED)
def test_the_plan_is_what_pytorch_allocates(name: str, measured: Ran) -> None:
    if not runs(name.partition("_")[0]):
        pytest.skip("Liger is not installed")
    plan = json.loads((measured.out(name) / "run.json").read_text(encoding="utf-8"))["plan"]
    assert plan["planned_gib"] > 0
    assert plan["measured_gib"] == pytest.approx(plan["planned_gib"], rel=0.1) or not ON_GPU
