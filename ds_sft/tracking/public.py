"""What trackers are told of a run: its keys, without secrets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ds_sft.config.keys import Config

SECRET = re.compile(r"(^|[_-])(token|api_key|key|secret|password)$", re.IGNORECASE)


def public_config(config: Config) -> dict[str, Any]:
    """The run's keys without secrets, and the three that the reference script records under these names."""
    return {
        "model": config.model_name_or_path,
        "prompt": config.system_prompt,
        "data_max_length": config.max_length,
        **without_secrets(config.to_dict()),
    }


def without_secrets(value: Any) -> Any:
    """The value without the keys of mappings, at any depth, whose name says secret."""
    if isinstance(value, Mapping):
        return {k: without_secrets(v) for k, v in value.items() if not SECRET.search(str(k))}
    return [without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value
