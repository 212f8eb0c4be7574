"""The values of parameters, whole, whatever the engine has made of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def full_value(parameter: Any) -> torch.Tensor:
    """The whole parameter on this rank, as precise as it is kept; a collective under ZeRO."""
    if not parameter.requires_grad and hasattr(parameter, "ds_id"):  # ZeRO-3 has no master of what is frozen
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.data.clone()  # type: ignore[no-any-return]
    if "deepspeed" in sys.modules:  # else there is no engine
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        if value is not None:
            return value  # type: ignore[no-any-return]
    return parameter  # type: ignore[no-any-return]
