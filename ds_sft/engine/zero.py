"""Which DeepSpeed configuration a run uses, if any."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_sft.config.keys import ENGINES, MUON, Config
from ds_sft.engine.lint import problems
from ds_sft.errors import UserError, nearest
from ds_sft.ranks.launch import Launch
from ds_sft.shipped import CONFIGS, command

# Keys that must be there: without them DeepSpeed has values of its own, or none.
OURS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
# What `optimizer_dtype: bfloat16` tells DeepSpeed: its flat partitions, gradients and states are bfloat16.
IN_BFLOAT16 = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def engine_config(config: Config, launch: Launch) -> dict[str, Any] | None:
    """The DeepSpeed configuration as a dict; None where Trainer runs alone.

    Without a launcher DeepSpeed looks for MPI and dies, and a single process gains nothing from it: the key is then
    ignored with one line.

    Raises:
        UserError: the file is missing, not a JSON object, or contradicts the run.
    """
    value, found = config.training.get("deepspeed"), configured_engine(config)
    if found is None:
        return None
    for problem in problems(found, config, launch):
        place = "deepspeed" if isinstance(value, dict) else f"deepspeed: {value}" if value in ENGINES else value
        raise UserError(f"{place}: {problem}")
    if not launch.distributed:
        launch.say(
            "No launcher: plain Trainer in one process, the deepspeed key is ignored "
            f"(`{command('deepspeed')} ...` uses it, and all GPUs)."
        )
        return None
    return _complete(found, config)


def configured_engine(config: Config) -> dict[str, Any] | None:
    """What the key `deepspeed` names, as it is written there; None without the key.

    Raises:
        UserError: the file is missing, or not a JSON object.
    """
    value = config.training.get("deepspeed")
    return value if value is None or isinstance(value, dict) else read_engine(value)


def _complete(engine: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """With what nobody wrote: DeepSpeed would not clip, accelerate would accumulate over 1 and know no stage."""
    absent: dict[str, Any] = {name: "auto" for name in OURS if engine.get(name) is None}
    if config.optimizer_dtype == "bfloat16":
        absent["bf16"] = {"enabled": "auto", **engine.get("bf16", {}), **IN_BFLOAT16}
    zero = {"stage": 0, **engine.get("zero_optimization", {})}
    if config.training.get("optim") == MUON and zero["stage"] == 3:
        zero["reduce_scatter"] = False  # its Muon wants whole gradients, and dies without
    return {**engine, **absent, "zero_optimization": zero}


def read_engine(value: str) -> dict[str, Any]:
    """The options of a configuration that comes with the package, by its name, or of a DeepSpeed file.

    A name wins over a file that has it, so that it means the same in every folder.

    Raises:
        UserError: no such name or file, or not a JSON object.
    """
    path = CONFIGS / f"{value}.json" if value in ENGINES else Path(value)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed: {value}: {_no_engine(value)}") from None
    except OSError as error:
        raise UserError(f"deepspeed: {path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    if not isinstance(options, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed options")
    return options


def _no_engine(value: str) -> str:
    """What to write instead of a name or a path that there is nothing behind."""
    path = Path(value)
    what = "no such file" if path.suffix or len(path.parts) > 1 else "neither a name nor a file"
    if path.stem in ENGINES:
        return f"{what}; write {path.stem}, which needs none"
    near = nearest(path.stem, *([name] for name in ENGINES))  # of equals the first
    return f"{what}; {f'did you mean {near}? There' if near else 'there'} are {', '.join(ENGINES)}"


def stage(engine: dict[str, Any] | None) -> int | None:
    """The ZeRO stage; None without DeepSpeed."""
    return None if engine is None else int(engine.get("zero_optimization", {}).get("stage", 0))
