"""An adapter on the disk, as peft writes it: adapter_model.safetensors and adapter_config.json, and base + adapter in
memory.

A finished run has it in a folder of its own, `output_dir/adapter`: beside a model's files transformers would take the
two for base and adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import RECORD
from ds_sft.config.read import load_config
from ds_sft.errors import UserError, first_line
from ds_sft.model.quantized import nf4_config, settle, skeleton
from ds_sft.model.rotary import Scaling, read_config, scaled_options
from ds_sft.plan.adapter import base_of, is_adapter, read_json, whole_of
from ds_sft.plan.rope import CHANGED
from ds_sft.plan.source import looks_like_path

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

FOLDER = "adapter"  # of a run's output folder
ADAPTER = "default"  # peft's name of the one adapter in a model
WEIGHTS = "adapter_model.safetensors"  # peft's name
PREFIX = "base_model.model."  # of every tensor: peft's wrapper around a model, which ours does without
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA
# What the adapter was trained beside, in a file of ours: a hash of the base's files, how these were quantised, the
# dtype of forward and backward, how its rotary positions were scaled. (In safetensors' metadata, which has no order,
# the same adapter had other bytes.)
FACTS = "trained_on.json"
BASE, QUANTIZATION, COMPUTED_IN, ROPE_SCALING = "base", "quantization", "computed_in", "rope_scaling"


def adapter_of(model: Any) -> LoraConfig | None:
    """What peft was asked for, of the adapter in a model; None where it has none."""
    asked: LoraConfig | None = getattr(model, "peft_config", {}).get(ADAPTER)  # by which peft itself knows it
    return asked


# ---- Writing


def adapter_parts(model: Any) -> dict[str, torch.nn.Parameter]:
    """The trained parameters of a model with an adapter in it, by their names in peft's files; tied ones under each.

    DoRA's magnitudes get the full name of the parameter, which peft would shorten: it reads both, but transformers 5.23
    (`AutoModelForCausalLM.from_pretrained` of the adapter's folder) only the full one, and would answer as if they were
    not there.
    """
    from peft import get_peft_model_state_dict

    trained = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    found = get_peft_model_state_dict(model, state_dict=trained, adapter_name=ADAPTER, save_embedding_layers=False)
    names = {name: f"{name}.weight" if name.endswith(MAGNITUDE) else name for name in found}
    return {f"{PREFIX}{names[name]}": parameter for name, parameter in found.items()}


def adapter_tensors(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """An adapter's tensors under the names of peft's files.

    Args:
        model: with the adapter in it (`model/adapters.py`).
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


def save_adapter(model: Any, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Write the adapter in `model` with these values, see `adapter_tensors`; `PeftModel.from_pretrained` reads it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(adapter_tensors(model, weights), folder / WEIGHTS, metadata={"format": "pt"})
    written: Any = copy.copy(adapter_of(model))
    written.inference_mode = True  # as peft's own: whoever loads it to train on says so
    written.base_model_name_or_path = from_anywhere(written.base_model_name_or_path)
    written.save_pretrained(folder)


def from_anywhere(name: str) -> str:
    """A model's name that holds in every working directory: a folder in full, a hub id as it is."""
    folder = Path(name).expanduser()
    return str(folder.resolve()) if folder.is_dir() else name


# ---- Reading


def find_base(folder: Path) -> str:
    """The model that the adapter in `folder` was trained on, as `base_of`, or where it lies since it has moved together
    with the output folder, whose config.yaml finds it again.

    Raises:
        UserError: the adapter names none.
    """
    name, record = base_of(folder), folder.resolve().parent / RECORD
    if not Path(name).is_absolute() or Path(name).is_dir() or not record.is_file():
        return name
    try:
        moved = load_config(["--config", str(record)]).model_name_or_path
    except UserError:
        return name
    return from_anywhere(moved) if Path(moved).is_dir() else name


def facts_of(folder: Path) -> dict[str, Any]:
    """What the adapter in `folder` was trained beside: `BASE`, `QUANTIZATION`, `COMPUTED_IN`, and `ROPE_SCALING` where
    there was one; empty if peft wrote it.

    Raises:
        UserError: its file is damaged.
    """
    return read_json(folder / FACTS) if (folder / FACTS).is_file() else {}


def loading_in_4_bits(facts: Mapping[str, Any]) -> str:
    """Arguments of `from_pretrained`, as code, that load the base as training had it; "" where it was in 16 bits."""
    if facts.get(QUANTIZATION, "none") == "none":
        return ""
    dtype = facts[COMPUTED_IN]
    return (
        f"dtype={dtype!r}, quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        f"bnb_4bit_compute_dtype={dtype!r})"
    )


def changes_of_config(folder: Path, *, elsewhere: str | None = None, trust_remote_code: bool = False) -> dict[str, Any]:
    """Keys of the base's config.json that the adapter in `folder` was trained with other values of: rotary positions
    that were scaled; none as a rule.

    Args:
        elsewhere: where the base is, too, for an adapter whose own is a folder that is gone.

    Raises:
        UserError: the base is not there, and with it the numbers that were scaled.
    """
    scaling = facts_of(folder).get(ROPE_SCALING)
    if scaling is None:
        return {}
    base = find_base(folder)
    base = elsewhere if elsewhere and looks_like_path(base) and not Path(base).is_dir() else base
    try:
        text = read_config(base, trust_remote_code=trust_remote_code, scaling=scaling).get_text_config()
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(f"{folder}: rope_scaling: config.json of its base {base} cannot be read: {reason}") from error
    return {name: getattr(text, name) for name in CHANGED}


def load_on_disk(name: str | Path, **options: Any) -> Any:
    """The model `name`, a folder or a hub id; of an adapter's folder base + adapter, which end answers as it says.

    Args:
        options: keywords of `from_pretrained`.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    folder = Path(name)
    if not is_adapter(folder):
        return AutoModelForCausalLM.from_pretrained(name, **options)
    from peft import PeftModel

    base = _load_base_as_trained(folder, **options)
    model = PeftModel.from_pretrained(base, str(folder)).get_base_model()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _load_base_as_trained(folder: Path, **options: Any) -> Any:
    """The base of the adapter in `folder`, in 4 bits where it was trained beside these."""
    import torch

    name, facts = find_base(folder), facts_of(folder)
    if facts.get(QUANTIZATION, "none") == "none":
        return load_base(name, facts.get(ROPE_SCALING), **options)
    dtype = getattr(torch, facts[COMPUTED_IN])
    bare = skeleton(name, trust_remote_code=options.get("trust_remote_code", False))
    quantization = nf4_config(bare, dtype, whole_of(folder))
    options |= {"dtype": dtype, "quantization_config": quantization}
    model = load_base(name, facts.get(ROPE_SCALING), **options)
    settle(model)
    return model


def load_base(name: str, scaling: Scaling = None, **options: Any) -> Any:
    """The model that an adapter is put on.

    Args:
        scaling: of its rotary positions, the key `rope_scaling` that the adapter was trained with.

    Raises:
        UserError: it is not there.
    """
    from transformers import AutoModelForCausalLM

    try:
        options |= scaled_options(name, scaling, trust_remote_code=options.get("trust_remote_code", False))
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise UserError(f"base model {name}: {first_line(error)}") from error


def exported(output_dir: Path) -> Path:
    """The folder to load a finished run's model from: the output folder, or its adapter where it was not merged."""
    adapter = output_dir / FOLDER
    return adapter if is_adapter(adapter) and not any(output_dir.glob("model*.safetensors")) else output_dir
