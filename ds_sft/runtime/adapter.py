"""An adapter on the disk, as peft writes it: adapter_model.safetensors and adapter_config.json."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ADAPTER = "default"  # peft's name of the one adapter in a model
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names
PREFIX = "base_model.model."  # of every tensor: peft's wrapper around a model, which ours does without


def adapter_parts(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of a model with an adapter in it, by their names in peft's files; tied ones under each."""
    from peft import get_peft_model_state_dict

    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    found = get_peft_model_state_dict(model, state_dict=trained, adapter_name=ADAPTER, save_embedding_layers=False)
    return {f"{PREFIX}{name}": parameter for name, parameter in found.items()}


def adapter_tensors(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the names of peft's files.

    Args:
        model: with the adapter in it (`training/adapters.py`).
        weights: whole values of its trained parameters, by their names in the model, tied ones once.
    """
    values = {id(p): weights[name] for name, p in model.named_parameters() if name in weights}
    parts = adapter_parts(model)
    for name, parameter in parts.items():
        require_whole(name, parameter, values[id(parameter)])
    return {name: values[id(parameter)].contiguous().clone() for name, parameter in parts.items()}


def require_whole(name: str, parameter: Any, value: torch.Tensor) -> None:
    """See that a value is all of a parameter: under ZeRO-3 what a rank has of it looks empty, and would be written."""
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    assert tuple(value.shape) == shape, f"{name}: {tuple(value.shape)} of {shape}: the parameter was not gathered"


def save_adapter(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter in `model` with these values, see `adapter_tensors`; `PeftModel.from_pretrained` reads it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model, weights), folder / WEIGHTS, metadata={"format": "pt"})
    written = copy.copy(model.adapter_config)
    written.inference_mode = True  # as peft's own: whoever loads it to train on says so
    written.save_pretrained(folder)
