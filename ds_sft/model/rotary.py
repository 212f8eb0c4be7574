"""A model's configuration with the run's `rope_scaling` in it: for whoever loads the model that was published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_sft.errors import UserError
from ds_sft.plan.rope import ORIGINAL, scaled

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Scaling = Mapping[str, Any] | None  # the key `rope_scaling`


def read_config(name: str, *, trust_remote_code: bool, scaling: Scaling = None) -> PreTrainedConfig:
    """The configuration of a model, a folder or a hub id, with its rotary positions scaled.

    Raises:
        OSError, ValueError: there is no such model.
        UserError: it cannot be scaled so.
    """
    from transformers import AutoConfig

    found: PreTrainedConfig = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if scaling is not None:
        _scale(found.get_text_config(), scaling)
    return found


def _scale(text: Any, scaling: Mapping[str, Any]) -> None:
    from huggingface_hub.errors import StrictDataclassError

    changed = scaled(text.to_dict(), scaling)
    for name, value in changed.items():
        setattr(text, name, value)
    if hasattr(text, ORIGINAL):  # some state it outside, too, and that wins
        setattr(text, ORIGINAL, changed["rope_parameters"].get(ORIGINAL, changed["max_position_embeddings"]))
    text.standardize_rope_params()
    try:
        text.validate()
    except (StrictDataclassError, ValueError, KeyError) as error:  # Phi-3 takes no type but longrope
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"rope_scaling: {text.model_type}: {reason}: leave it out") from None


def scaled_options(name: str, scaling: Scaling, *, trust_remote_code: bool) -> dict[str, Any]:
    """Keywords of `from_pretrained` that load the model with its positions scaled; none where they are not."""
    if scaling is None:
        return {}
    return {"config": read_config(name, trust_remote_code=trust_remote_code, scaling=scaling)}


def knows_scaling(model: Any, scaling: Mapping[str, Any]) -> bool:
    """Whether a model (its weights may be absent) turns its queries and keys as `rope_scaling` says."""
    return any(getattr(module, "rope_type", None) == scaling["rope_type"] for module in model.modules())
