"""What the folder of an adapter says of it: adapter_config.json, as peft writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ds_sft.errors import UserError

CONFIG = "adapter_config.json"  # peft's name


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The model that the adapter in `folder` was trained on: a folder, or a hub id.

    Raises:
        UserError: its adapter_config.json names none.
    """
    name = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not name:
        raise UserError(
            f"{folder / CONFIG}: names no base_model_name_or_path: write the model there that it was trained on"
        )
    return str(name)


def whole_of(folder: Path) -> list[str]:
    """The modules that were trained whole beside the adapter in `folder`."""
    return read_json(folder / CONFIG).get("modules_to_save") or []


def read_json(file: Path) -> dict[str, Any]:
    """The content of a small file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    return found
