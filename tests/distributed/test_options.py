"""Options of Trainer under the engines: those that change nothing of what is learned, and those that do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.crash_campaign import metrics
from tests.distributed.harness import run_forked, script
from tests.distributed.test_adapters import RANKS, keys_of
from tests.distributed.test_resume import dropout_dir, job, run_jobs

pytestmark = pytest.mark.distributed
__all__ = ["dropout_dir"]  # a fixture

ENGINES = ["plain", "ddp", "zero2", "zero3"]
STEPS, MIDDLE = 6, 3
# All at once, and not one of them shows in a loss, nor in a resumed one.
SEEN_IN_NO_LOSS = {
    "dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 3,
    "dataloader_pin_memory": False, "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 1,
    "ddp_broadcast_buffers": True, "ddp_backend": "gloo", "ddp_timeout": 600, "use_cpu": True,
    "torch_empty_cache_steps": 2, "full_determinism": True, "disable_tqdm": True, "logging_first_step": True,
    "log_level": "error", "log_level_replica": "critical", "log_on_each_node": False, "skip_memory_metrics": False,
    "include_num_input_tokens_seen": "all", "eval_delay": 3,
    "run_name": "options", "project": "options", "trackio_space_id": "me/space", "trackio_bucket_id": "me/bucket",
    "trackio_static_space_id": "me/page", "activation_checkpointing_kwargs": "{every_n_layers: 2}",
}  # fmt: skip
# With these what is learned is another, by noise and a rate that depends on validations; the same under all engines.
LEARNED = {
    "neftune_noise_alpha": 5, "label_smoothing_factor": 0.1, "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": "{patience: 0, factor: 0.5, threshold: 1.0}", "train_sampling_strategy": "batch_rebalance",
    "data_seed": 7, "optim": "lion_32bit",
}  # fmt: skip
# The rate that it ends at is a part of the first one, which DeepSpeed's optimizer does not tell by itself.
POLYNOMIAL = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": "{lr_end: 4e-4}"}
KINDS: dict[str, dict[str, Any]] = {"bare": POLYNOMIAL, "seen": SEEN_IN_NO_LOSS | POLYNOMIAL, "learned": LEARNED}
# Without the C++ compiler, which would take minutes.
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
RATES = [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4]  # no validation is better by the threshold than the one before


@pytest.fixture(scope="module")
def folder(dropout_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, one after the other: whole, and again from the checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("options")
    common = {"save_steps": MIDDLE, "max_steps": STEPS, "eval_steps": 2, "bf16": False, "verify_export": False}
    jobs = []
    for name in ENGINES:
        for kind, changes in KINDS.items():
            keys, run = keys_of(dropout_dir, folder, name, {**common, **changes}), f"{name}-{kind}"
            jobs.append(job(keys, RANKS[name], output_dir=run))
            if kind != "bare":
                jobs.append(job(keys, RANKS[name], output_dir=f"{run}-again", resume=f"{run}/checkpoint-{MIDDLE}"))
        compiled = keys_of(dropout_dir, folder, name, {**common, **POLYNOMIAL, **COMPILED})
        jobs.append(job(compiled, RANKS[name], output_dir=f"{name}-compiled", log=f"{name}-compiled.log"))
    run_jobs(folder, jobs)
    return folder


def logged(run: Path, name: str) -> list[float]:
    return [row[name] for row in metrics(run) if name in row]


@pytest.mark.parametrize("name", ENGINES)
def test_nothing_of_them_shows_in_a_loss(folder: Path, name: str) -> None:
    wanted = logged(folder / f"{name}-bare", "loss")
    rates = logged(folder / f"{name}-bare", "learning_rate")
    assert rates == pytest.approx([1e-3, 9e-4, 8e-4, 7e-4, 6e-4, 5e-4])
    assert logged(folder / f"{name}-seen", "loss") == wanted
    assert logged(folder / f"{name}-seen-again", "loss") == wanted
    assert len(logged(folder / f"{name}-bare", "eval_loss")) == len(logged(folder / f"{name}-seen", "eval_loss")) + 1


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_learned_otherwise_goes_on_bit_equal(folder: Path, name: str) -> None:
    found = folder / f"{name}-learned"
    assert metrics(folder / f"{name}-learned-again") == metrics(found)
    assert logged(found, "learning_rate") == RATES
    bare = logged(folder / f"{name}-bare", "loss")
    assert all(loss > 1.001 * wanted for loss, wanted in zip(logged(found, "loss")[1:], bare[1:], strict=True))


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_engines_learn_the_same(folder: Path, name: str) -> None:
    for what in ("loss", "eval_loss"):
        assert logged(folder / f"{name}-learned", what) == pytest.approx(logged(folder / "ddp-learned", what), rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_a_compiled_model_learns_the_same(folder: Path, name: str) -> None:
    wanted = logged(folder / f"{name}-bare", "loss")
    assert logged(folder / f"{name}-compiled", "loss") == pytest.approx(wanted, rel=1e-5)
    assert "torch_compile compiles the whole model" in (folder / f"{name}-compiled.log").read_text(encoding="utf-8")


def test_ranks_that_share_rows_smooth_the_same_labels(model_dir: Path, folder: Path) -> None:
    smoothed = {"label_smoothing_factor": 0.1, "max_steps": 3, "save_strategy": "no", "eval_strategy": "no"}
    keys = keys_of(model_dir, folder, "plain", {**smoothed, "bf16": False})
    shared = {**keys, "sequence_parallel": 2, "gradient_accumulation_steps": 4}
    run_jobs(folder, [job(keys, None, output_dir="alone"), job(shared, 2, output_dir="shared")])
    assert logged(folder / "shared", "loss") == pytest.approx(logged(folder / "alone", "loss"), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr_scheduler_kwargs": "{power: 2}"}, "lr_scheduler_kwargs: {'power': 2}: lr_scheduler_type: linear: "
         "get_linear_schedule_with_warmup() got an unexpected keyword argument 'power'"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs: None: lr_scheduler_type: "
         "warmup_stable_decay: get_wsd_schedule() missing 1 required positional argument: 'num_decay_steps'"),
    ],
)  # fmt: skip
def test_a_schedule_is_tried_before_the_model_is_loaded(
    model_dir: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    made = job(keys_of(model_dir, tmp_path, "plain", changes), None)
    done = run_forked([script("disturbed"), *made["argv"]], None, cwd=tmp_path)
    assert done.code == 2
    assert f"ds_sft: error: {said}\n" in done.output
    assert "Traceback" not in done.output
