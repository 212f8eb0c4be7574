"""In which dtype autocast lets a device compute; the meta device, on which shapes alone are computed, knows none."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """None: autocast is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
