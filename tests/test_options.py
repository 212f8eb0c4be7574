"""Every field of `TrainingArguments` is one that a test holds, or refused, or another name: none that nobody tried."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from accelerate.utils import DynamoBackend
from transformers.training_args import trainer_log_levels

from ds_sft.config.read import load_config
from ds_sft.config.refused import UNSAFE, UNUSED
from ds_sft.config.upstream_keys import ALIASES, LISTED, training_keys
from ds_sft.errors import UserError
from tests.distributed.test_options import LEARNED, SEEN_IN_NO_LOSS

TESTS = Path(__file__).resolve().parent
NEEDED = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]
REFUSED = {**UNSAFE, **UNUSED}
# Keys -> the file of a test that fails if a run does not obey them.
HELD = {
    **dict.fromkeys(SEEN_IN_NO_LOSS, "distributed/test_options.py"),
    **dict.fromkeys(LEARNED, "distributed/test_options.py"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs", "max_steps", "bf16",
         "per_device_eval_batch_size", "eval_strategy", "report_to"), "distributed/test_trajectory.py"),
    **dict.fromkeys(
        ("learning_rate", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
         "seed", "optim"), "distributed/test_resume_changes.py"),
    **dict.fromkeys(
        ("output_dir", "deepspeed", "save_strategy", "save_steps", "eval_steps", "eval_on_start", "save_total_limit",
         "logging_steps", "logging_strategy", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
        "distributed/test_resume.py"),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_revision"),
        "test_push.py"),
    "activation_checkpointing": "distributed/test_adapters.py",
    "optim_args": "test_extend.py",
    **dict.fromkeys(("torch_compile", "torch_compile_backend"), "distributed/test_options.py"),
    "fp16": "test_load.py",
    "save_only_model": "test_resumable.py",
    "save_on_each_node": "distributed/test_nodes.py",
    "dataloader_drop_last": "test_arguments.py",
    "local_rank": "test_config.py",  # it is DeepSpeed's launcher's
}  # fmt: skip
# What no test can show on a CPU without minutes of compilation, and goes to the libraries as it is.
PASSED_ON = ("tf32", "torch_compile_mode")


def test_every_field_is_decided_on() -> None:
    """A new version of transformers may bring one: try it, then write it into one of these and into docs/trainer.md."""
    names = [*HELD, *REFUSED, *PASSED_ON, *ALIASES]
    assert sorted(names) == sorted(training_keys())


@pytest.mark.parametrize("name", HELD)
def test_the_test_that_holds_it_has_it(name: str) -> None:
    assert re.search(rf"\b{name}\b", (TESTS / HELD[name]).read_text(encoding="utf-8"))


def said_of(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config([*NEEDED, *flags])
    return str(caught.value)


def other(name: str, so: Any) -> str:
    """A value that a run would not obey."""
    return str(not so).lower() if isinstance(so, bool) else "{a: 1}" if "dict" in training_keys()[name].type else "x"


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_run_obeys_is_refused(name: str) -> None:
    """In one line that says why and what it may be; that is taken."""
    so, why = REFUSED[name]
    found = other(name, so)
    expected = "nothing" if so is None else str(so).lower()
    assert said_of(f"--{name}={found}") == (
        f"--{name}: {found}: {why}: leave it out"
        if name in UNUSED
        else f"--{name}: expected {expected} ({why}), found '{found}'"
    )
    written = "none" if so is None else str(so).lower()
    assert load_config([*NEEDED, f"--{name}={written}"]).training[name] == so


@pytest.mark.parametrize(("name", "text"), [("fsdp", "no"), ("fsdp", ""), ("include_for_metrics", "[]"), ("debug", "")])
def test_nothing_may_be_said_in_other_words(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "run.yaml").write_text(f"{name}: {text}\n", encoding="utf-8")
    assert load_config(["--config", str(tmp_path / "run.yaml"), *NEEDED]).training[name] is None


def test_a_structure_of_yaml_is_refused_as_well(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("seed: 1\nparallelism_config: {tp_size: 2}\n", encoding="utf-8")
    assert said_of("--config", str(tmp_path / "run.yaml")) == (
        f"{tmp_path}/run.yaml:2: parallelism_config: expected nothing (deepspeed: zero3 divides weights, and "
        "sequence_parallel rows; write these), found '{\"tp_size\": 2}'"
    )


NOT_OBEYED_ALONE = [
    (["--train_sampling_strategy", "grouped"], "--train_sampling_strategy: expected one of random, sequential, "
     "group_by_length, batch_rebalance, found 'grouped'"),
    (["--log_level", "loud"], "--log_level: expected one of detail, debug, info, warning, error, critical, passive, "
     "found 'loud'"),
    (["--max_steps", "0"], "--max_steps: expected 1 or more; -1: as num_train_epochs says, found '0'"),
    (["--save_total_limit", "-1"], "--save_total_limit: expected 1 or more, found '-1'"),
    (["--warmup_steps", "1.5"], "--warmup_steps: expected a whole number of steps, or a share below 1, found '1.5'"),
    (["--adam_beta1", "1"], "--adam_beta1: expected a share below 1, found '1'"),
    (["--include_num_input_tokens_seen", "some"],
     "--include_num_input_tokens_seen: expected yes, no, all or non_padding, found 'some'"),
    (["--activation_checkpointing_kwargs", "{use_reentrent: false}"], "--activation_checkpointing_kwargs: expected "
     "use_reentrant in place of use_reentrent, found '{use_reentrent: false}'"),
    (["--activation_checkpointing_kwargs", "reentrant"], "--activation_checkpointing_kwargs: expected a mapping such "
     "as {use_reentrant: false}, found 'reentrant'"),
    (["--optim", "lomo"], "--optim: expected one of adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit, "
     "lion_32bit, adafactor, muon, or my.module:thing, found 'lomo'"),
    (["--optim", "lion_32bit", "--adam_epsilon", "1e-6"],
     "--adam_epsilon: optim: lion_32bit has none: leave it out"),
    (["--neftune_noise_alpha", "5", "--torch_compile", "yes"], "--neftune_noise_alpha: no test trains with it beside "
     "torch_compile: leave out one of the two"),
    (["--metric_for_best_model", "accuracy"],
     "--metric_for_best_model: expected eval_loss, which is all that validation measures, found 'accuracy'"),
    (["--label_smoothing_factor", "1"], "--label_smoothing_factor: expected a share below 1, found '1'"),
    (["--neftune_noise_alpha", "-5"], "--neftune_noise_alpha: expected 0 or more, found '-5'"),
    (["--dataloader_persistent_workers", "yes"], "--dataloader_persistent_workers: it does nothing alone: write "
     "dataloader_num_workers: 2 too, or leave it out"),
    (["--dataloader_prefetch_factor", "2"], "--dataloader_prefetch_factor: it does nothing alone: write "
     "dataloader_num_workers: 2 too, or leave it out"),
    (["--torch_compile_mode", "reduce-overhead"], "--torch_compile_mode: it does nothing alone: write torch_compile: "
     "yes too, or leave it out"),
    (["--lr_scheduler_type", "constant", "--warmup_steps", "9"], "--warmup_steps: lr_scheduler_type: constant has no "
     "warm-up: write constant_with_warmup"),
    (["--lr_scheduler_type", "greedy", "--warmup_steps", "9"], "--warmup_steps: lr_scheduler_type: greedy has no "
     "warm-up: leave it out"),
    (["--lr_scheduler_type", "constant_with_warmup", "--lr_scheduler_kwargs", "{min_lr: 1e-6}"],
     "--lr_scheduler_kwargs: lr_scheduler_type: constant_with_warmup has no options: leave it out"),
    (["--load_best_model_at_end", "yes"], "--load_best_model_at_end: yes: it needs an eval_file (or val_size), and an "
     "eval_strategy"),
    (["--save_strategy", "best"], "--save_strategy: best: it needs an eval_file (or val_size), and an eval_strategy"),
    (["--early_stopping_patience", "3", "--eval_file", "e"], "--early_stopping_patience: the run would end with a "
     "model that is not the best: write load_best_model_at_end: yes too"),
    (["--sequence_parallel", "2", "--neftune_noise_alpha", "5"], "--sequence_parallel: 2: neftune_noise_alpha: 5: its "
     "noise depends on the tokens that a rank has: leave out one of the two"),
    (["--optim_args", "momentum=0.9"], "--optim_args: they are of an optimizer of your own (optim: my.module:Thing): "
     "leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"), NOT_OBEYED_ALONE, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_what_trainer_would_leave_out_without_a_word(flags: list[str], said: str) -> None:
    assert said_of(*flags) == said


def test_values_of_other_libraries_are_theirs() -> None:
    assert set(LISTED["torch_compile_backend"]) <= {backend.value.lower() for backend in DynamoBackend}
    assert set(LISTED["torch_compile_mode"]) <= set(torch._inductor.list_mode_options())
    assert LISTED["log_level"] == LISTED["log_level_replica"] == tuple(trainer_log_levels)
    assert said_of("--torch_compile", "yes", "--torch_compile_mode", "fastest") == (
        "--torch_compile_mode: expected one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs, "
        "found 'fastest'"
    )


# ---- docs/trainer.md

PAGE = (TESTS.parent / "docs" / "trainer.md").read_text(encoding="utf-8")


def rows_of(header: str) -> list[list[str]]:
    """The cells of a table whose header begins so."""
    lines = PAGE[PAGE.index(f"| {header}") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.split(" | ")] for line in (line.strip("| ") for line in lines)]


def test_the_page_says_what_the_rules_say() -> None:
    rows = {name.strip("`"): cells for name, *cells in rows_of("key")}
    assert list(rows) == list(training_keys())
    assert [name for name, cells in rows.items() if cells[0] == cells[1] == "refused"] == [
        name for name in training_keys() if name in REFUSED
    ]
    assert [name for name in REFUSED if rows[name][2] != REFUSED[name][1]] == []
    others = {cell for name, cells in rows.items() if name not in REFUSED for cell in cells[:2]}
    assert others == {"works", "nothing"}
