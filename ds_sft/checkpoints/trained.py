"""What a checkpoint has of a model with frozen weights: those that are trained, whole and as precise as they are kept.

An adapter is written as peft does (`model/adapter_files.py`), weights that `train_only` names under their names in the
model. Beside them are optimizer states as ever; the frozen weights are those of the base, which the manifest names by a
hash of its files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.engine.values import full_value
from ds_sft.model.adapter_files import WEIGHTS, adapter_of, adapter_parts, require_whole, save_adapter

if TYPE_CHECKING:
    import torch

TRAINED = "trained.safetensors"  # without an adapter


def trained_weights(model: Any, *, keep: bool) -> dict[str, torch.Tensor]:
    """Each trained parameter, whole, on the CPU, by its name in the model, tied ones once; float32 masters where there
    are some. All ranks must call it; those without `keep` get an empty dict.
    """
    weights: dict[str, Any] = {}
    for name, parameter in trained_parts(model).items():
        value = full_value(parameter)
        if keep:
            weights[name] = value.detach().to("cpu", copy=True).contiguous()
    return weights


def save_trained(model: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Write `trained_weights` into a folder: peft's two files, or `TRAINED`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if adapter_of(model) is not None:
        save_adapter(model, weights, folder)
        return
    for name, parameter in trained_parts(model).items():
        require_whole(name, parameter, weights[name])
    save_file(weights, folder / TRAINED, metadata={"format": "pt"})


def load_trained(model: Any, folder: Path) -> None:
    """Give the trained parameters of a model that no engine has partitioned the values of a folder.

    Raises:
        KeyError: the folder lacks one of them.
    """
    import torch
    from safetensors import safe_open

    parts, file = (adapter_parts(model), WEIGHTS) if adapter_of(model) else (trained_parts(model), TRAINED)
    with torch.no_grad(), safe_open(folder / file, "pt") as values:
        if missing := parts.keys() - set(values.keys()):
            raise KeyError(f"{folder / file} lacks {', '.join(sorted(missing)[:3])}")
        for name, parameter in parts.items():
            parameter.copy_(values.get_tensor(name))


def is_converted(model: Any) -> bool:
    """Whether a model's files have other tensors than it has in memory, as those of most mixtures of experts."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(get_model_conversion_mapping(model, add_legacy=False))


def load_converted(model: Any, folder: Path) -> None:
    """Give such a model, which no engine has partitioned, the values of a folder.

    Trainer 5.23 looks for the names in memory, finds no experts, warns, and goes on with those of the start.
    """
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def expect_trained_only(model: Any) -> None:
    """Let a state of the model have no frozen weights, and the model load one; a trained one that is missing is an
    error as before.

    DeepSpeed leaves out frozen weights by the first name of each, so that a tied output projection would stay.
    """

    def leave_out(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name in _frozen_names(module):
            state.pop(prefix + name, None)

    def forgive(module: Any, result: Any) -> None:
        frozen = _frozen_names(module)
        result.missing_keys[:] = [name for name in result.missing_keys if name not in frozen]

    model.register_state_dict_post_hook(leave_out)
    model.register_load_state_dict_post_hook(forgive)


def _frozen_names(module: Any) -> set[str]:
    """Tied ones by each of their names."""
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def trained_parts(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters that are trained, by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
