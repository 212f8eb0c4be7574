"""Which DeepSpeed configuration a run uses, if any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_sft.config import Config
from ds_sft.errors import UserError
from ds_sft.runtime.distributed import Launch


def engine_config(config: Config, launch: Launch) -> dict[str, Any] | None:
    """The DeepSpeed configuration as a dict; None where Trainer runs alone.

    Without a launcher DeepSpeed looks for MPI and dies, and a single process gains nothing from it: the key is then
    ignored with one line.

    Raises:
        UserError: the file is missing or not a JSON object.
    """
    value = config.training.get("deepspeed")
    if value is None:
        return None
    found = value if isinstance(value, dict) else _read(Path(value))
    if not launch.distributed:
        launch.say(
            "No launcher: plain Trainer in one process, the deepspeed key is ignored "
            "(`deepspeed ds_sft/train.py ...` uses it, and all GPUs)."
        )
        return None
    return dict(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"deepspeed: {path}: no such file; ds_configs/ has zero2.json and others") from None
    except OSError as error:
        raise UserError(f"deepspeed: {path}: cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object of DeepSpeed options")
    return value


def stage(engine: dict[str, Any] | None) -> int | None:
    """The ZeRO stage; None without DeepSpeed."""
    return None if engine is None else int(engine.get("zero_optimization", {}).get("stage", 0))
