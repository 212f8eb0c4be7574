"""What a run is: the keys and the data that decide its result, how another run differs from it, and which of these
differences a checkpoint can go on with. docs/resume.md has the table of it.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ds_sft.checkpoints.content import content
from ds_sft.config.extension import learned_with, source_hash
from ds_sft.config.keys import TRAINING_DEFAULTS, Config
from ds_sft.config.upstream_keys import training_keys
from ds_sft.engine.zero import stage

# Keys that say where, how often and how fast, but not what is learned; every other key counts.
INDIFFERENT = {
    # what this start does, and where
    "output_dir", "resume", "resume_anyway", "on_save_error", "on_nonfinite", "cache_dir", "preprocessing_num_workers",
    "train_file", "eval_file",  # their rows count, not their names
    "num_predictions", "predict_max_new_tokens", "predict_before", "generation",
    "evaluate_rows",
    "verify_export", "export_max_shard_size",
    "run_name", "report_to", "swanlab_project", "swanlab_mode", "project", "trackio_space_id",
    "trackio_bucket_id", "trackio_static_space_id",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision",
    # when it measures, logs and saves
    "logging_strategy", "logging_first_step", "logging_steps", "logging_nan_inf_filter",
    "log_level", "log_level_replica", "log_on_each_node",
    "disable_tqdm", "profile_steps", "skip_memory_metrics", "include_num_input_tokens_seen",
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "save_only_model",
    "restore_callback_states_from_checkpoint", "enable_jit_checkpoint",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "per_device_eval_batch_size",
    # how the machine is used; the size of a step is compared on its own, with the number of ranks
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "ddp_timeout", "local_rank", "use_cpu", "per_device_train_batch_size", "gradient_accumulation_steps",
    "sequence_parallel", "fused_kernels", "tiled_mlp", "merge",
    "deepspeed",  # its content counts, not its name
}  # fmt: skip
# What a checkpoint's own states would hide, and is set anew after they were loaded: see training/hyperparameters.py.
APPLIED = {
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "deepspeed.gradient_clipping", "deepspeed.scheduler.params.*",
    *(f"deepspeed.optimizer.params.{name}" for name in ("lr", "betas", "eps", "weight_decay")),
}  # fmt: skip
# What decides which rows make which step, beside the size of a step and the rows themselves.
DEALING = {
    "seed", "data_seed", "train_sampling_strategy", "dataloader_drop_last", "packing",
    "max_length",  # of packed rows; of others it shows in the data
    "max_tokens_per_batch", "batching",  # where tokens fill the micro batches
}  # fmt: skip
# What the states in a checkpoint are made for -> those states.
REFUSED = {
    "optim": "the optimizer's states are of the old one",
    **dict.fromkeys(
        (
            "adapter",
            "lora_rank",
            "lora_alpha",
            "lora_targets",
            "lora_modules_to_save",
            "use_rslora",
            "train_only",
        ),
        "the weights that were trained are others",
    ),
    "lora_init": "the adapter that was trained began otherwise",
    "quantization": "what was trained was trained beside other frozen weights",
    "resize_embeddings": "weights and states have the old number of rows",
    "optimizer_dtype": "weights and states are of the old precision",
    "bf16": "DeepSpeed's states are of the old precision",
    "fp16": "the states and the loss scale are of the old precision",
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), "the best checkpoint was chosen by the old one"),
    "deepspeed.*": "DeepSpeed's states are of the old one",
}
# Options of DeepSpeed that change how it works and not what it keeps.
ENGINE_TUNING = {
    f"deepspeed.{name}" for name in (
        "steps_per_print", "wall_clock_breakdown", "memory_breakdown",
        *(f"zero_optimization.{name}" for name in (
            "overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size", "allgather_bucket_size",
            "allgather_partitions", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold",
            "stage3_max_live_parameters", "stage3_max_reuse_distance",
        )),
    )
}  # fmt: skip
CLASSES: dict[str, set[str]] = {
    "free": INDIFFERENT, "applied": APPLIED, "dealing": DEALING, "refused": set(REFUSED), "tuning": ENGINE_TUNING,
}  # fmt: skip
OWN_RATES = ("reduce_lr_on_plateau", "greedy")  # schedules whose rate is what the run came to, not a formula
DATA, EVAL_DATA = "data", "eval_data"  # differences that are not of a key: the names of the manifest
CODE = "code of "  # before a user's function or class: the hash of its file
BASE = "base"  # the same: a hash of the files of frozen weights
PLACES = "places"  # of the manifest: where the files lie that these keys name, for another folder names them otherwise
CONTENTS = "contents"  # of the manifest: what is in them, for a project that was moved has them in another place
NAMING = ("model_name_or_path", "template")
IN_WORDS = {
    DATA: "the rows of train_file, or how they are encoded",
    EVAL_DATA: "the validation rows, or how they are encoded",
}
# Engine options that follow from other keys, or say where files go.
INDIFFERENT_ENGINE = ("checkpoint", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def identity(
    config: Config, engine: dict[str, Any] | None, data: str, eval_data: str = "", base: str = "", *, reads: bool = True
) -> dict[str, Any]:
    """The keys that decide the result, the content of the DeepSpeed configuration, the hashes of the data and, where
    weights are frozen, of the base; of the files that keys name where this rank `reads` them."""
    # A number of rows a step is the same rows however they are laid out; filled micro batches are others.
    batching = () if config.fills_batches else ("batching", "max_tokens_per_batch")
    given = {
        name: value for name, value in config.to_dict().items() if name not in INDIFFERENT and name not in batching
    }
    if config.offloads:
        given["activation_checkpointing"] = True  # wherever it is kept, the result is the same
    keys = {name: value for name, value in given.items() if name in TRAINING_DEFAULTS or not _is_default(name, value)}
    keys |= {CODE + name: source_hash(name, key) for name, key in learned_with(config).items()}
    kept = {name: value for name, value in (engine or {}).items() if name not in INDIFFERENT_ENGINE}
    flat = {f"deepspeed.{name}": value for name, value in _flat(kept).items()}
    batch = {"per_device_train_batch_size": config.micro_batch,
             "gradient_accumulation_steps": config.training.get("gradient_accumulation_steps", 1)}  # fmt: skip
    places = _places(given)
    read = places if reads else {}
    contents = {name: found for name, place in read.items() if (found := content(Path(place))) is not None}
    known = {"config": keys | flat, PLACES: places, CONTENTS: contents, DATA: data, EVAL_DATA: eval_data,
             "zero_stage": stage(engine), "batch": batch}  # fmt: skip
    return known | ({BASE: base} if base else {})


def _places(given: Mapping[str, Any]) -> dict[str, str]:
    named = {name: Path(given[name]).expanduser() for name in NAMING}
    return {name: str(path.resolve()) for name, path in named.items() if path.exists()}


def _is_default(name: str, value: Any) -> bool:
    """Whether leaving the key of transformers out would have meant the same."""
    return name in training_keys() and bool(value == _default(name))


def _default(name: str) -> Any:
    """What a key means where it is left out, as by a checkpoint that is older than the key; None for other names."""
    ours = {f.name: f.default for f in fields(Config) if f.default is not MISSING}
    if name in ours:
        return ours[name]
    try:
        return ast.literal_eval(training_keys()[name].default)
    except (KeyError, ValueError, SyntaxError):
        return None


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{above}{name}.") if isinstance(item, Mapping) else {f"{above}{name}": item}
    return flat


Changes = dict[str, tuple[Any, Any]]  # a key, or `DATA`, `EVAL_DATA` -> what it was, what it is


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
    """What differs between two identities."""
    before, after = then.get("config", {}), now["config"]
    pairs = {name: (_value(before, name), _value(after, name)) for name in {**before, **after}}
    found = {name: pair for name, pair in pairs.items() if _plain(pair[0]) != _plain(pair[1])}
    for kind in (PLACES, CONTENTS):
        for name, same in now.get(kind, {}).items():
            if then.get(kind, {}).get(name) == same:
                found.pop(name, None)  # the same, named otherwise
    if then.get(DATA) != now[DATA]:
        found[DATA] = (then.get(DATA), now[DATA])
    if then.get(EVAL_DATA, now.get(EVAL_DATA)) != now.get(EVAL_DATA):
        found[EVAL_DATA] = (then[EVAL_DATA], now.get(EVAL_DATA))
    if then.get(BASE) and now.get(BASE):
        found.pop("model_name_or_path", None)  # wherever it lies now
        names = before["model_name_or_path"], after["model_name_or_path"]
        found |= {BASE: names} if base_differs(then[BASE], now[BASE]) else {}
    return found


def base_differs(then: str, now: str) -> str | None:
    """What of a base has changed between two hashes of it, "weights" or "config.json"; older hashes are of weights."""
    parts = zip(("weights", "config.json"), then.split("-"), now.split("-"), strict=False)
    return next((part for part, before, after in parts if before != after), None)


def _value(keys: Mapping[str, Any], name: str) -> Any:
    return keys[name] if name in keys else _default(name)


def changes_in_words(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Each as "key: then -> now"."""
    return "; ".join(IN_WORDS.get(name) or _in_words(name, *pair) for name, pair in changed.items())


def _in_words(name: str, then: Any, now: Any) -> str:
    if name.startswith(CODE) and then and now:
        return f"{name}, which has changed"
    if name == BASE:
        return f"the weights or the config.json in {now}" + (
            ", which have changed" if then == now else f" (it began with {then})"
        )
    return f"{name}: {then!r} -> {now!r}"


def unchangeable(changed: Changes, now: Mapping[str, Any]) -> dict[str, str]:
    """The changes that no checkpoint of that run can go on with -> why."""
    reasons = {name: reason for name in changed if (reason := _refusal(name, now)) is not None}
    rates = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs")
    schedules = (_value(now["config"], "lr_scheduler_type"), *changed.get("lr_scheduler_type", ()))
    if any(schedule in OWN_RATES for schedule in schedules):
        reasons |= dict.fromkeys((name for name in rates if name in changed),
                                 f"the rate of {' and '.join(OWN_RATES)} is what the run came to")  # fmt: skip
    return reasons


def _refusal(name: str, now: Mapping[str, Any]) -> str | None:
    if name == BASE:
        return "a checkpoint has no frozen weights, and what this one has was trained beside others"
    if name == "bf16" and now["zero_stage"] is None:
        return None  # weights and states are float32 either way
    parts = name.split(".")
    wider = {".".join(parts[:n]) + ".*" for n in range(1, len(parts))}
    if name in APPLIED | ENGINE_TUNING or wider & APPLIED:
        return None
    return REFUSED.get(name) or next((REFUSED[other] for other in wider if other in REFUSED), None)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
