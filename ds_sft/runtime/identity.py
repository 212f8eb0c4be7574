"""What a run is: the keys and the data that decide its result, and how another run differs from it."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from ds_sft.config import TRAINING_DEFAULTS, Config, training_keys
from ds_sft.runtime.zero import stage

# Keys that say where, how often and how fast, but not what is learned; every other key counts.
INDIFFERENT = {
    # what this start does, and where
    "output_dir", "resume", "resume_anyway", "on_save_error", "on_nonfinite", "cache_dir", "preprocessing_num_workers",
    "train_file", "eval_file",  # their rows count, not their names
    "num_predictions", "predict_max_new_tokens", "predict_before", "generation",
    "verify_export", "export_max_shard_size",
    "run_name", "report_to", "swanlab_project", "swanlab_mode", "project", "trackio_space_id",
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
    "deepspeed",  # its content counts, not its name
}  # fmt: skip
# Engine options that follow from other keys, or say where files go.
INDIFFERENT_ENGINE = ("checkpoint", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def identity(config: Config, engine: dict[str, Any] | None, data: str, eval_data: str = "") -> dict[str, Any]:
    """The keys that decide the result, the content of the DeepSpeed configuration, and the hashes of the data."""
    # A number of rows a step is the same rows however they are laid out; filled micro batches are others.
    layout = () if config.fills_batches else ("batching", "max_tokens_per_batch")
    given = {name: value for name, value in config.to_dict().items() if name not in INDIFFERENT and name not in layout}
    keys = {name: value for name, value in given.items() if not _is_trainers_default(name, value)}
    kept = {name: value for name, value in (engine or {}).items() if name not in INDIFFERENT_ENGINE}
    flat = {f"deepspeed.{name}": value for name, value in _flat(kept).items()}
    return {"config": keys | flat, "data": data, "eval_data": eval_data, "zero_stage": stage(engine)}


def _is_trainers_default(name: str, value: Any) -> bool:
    """Whether leaving the key out would have meant the same."""
    known = training_keys().get(name)
    if known is None or name in TRAINING_DEFAULTS:
        return False
    try:
        return bool(ast.literal_eval(known.default) == value)
    except (ValueError, SyntaxError):  # made by a function
        return False


def _flat(value: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{above}{name}.") if isinstance(item, Mapping) else {f"{above}{name}": item}
    return flat


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, a line of "key: then -> now" each."""
    before, after = then.get("config", {}), now["config"]
    names = [name for name in {**before, **after} if _plain(before.get(name)) != _plain(after.get(name))]
    lines = [f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in names]
    if then.get("data") != now["data"]:
        lines.append("the rows of train_file, or how they are encoded")
    if then.get("eval_data", now.get("eval_data")) != now.get("eval_data"):
        lines.append("the validation rows, or how they are encoded")
    return lines


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
