"""The model to train, loaded from a folder or the hub."""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError, first_line
from ds_sft.model.dtype import computing_dtype, loading_dtype
from ds_sft.model.quantized import nf4_config, settle, skeleton
from ds_sft.model.rotary import scaled_options
from ds_sft.plan.size import model_folder, tensor_shapes
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt, malloc.h


def read_ahead(config: Config, launch: Launch) -> None:
    """Let the system read the weights from disk while the data are prepared; on each node local rank 0.

    A hint: it returns at once, and whoever loads them later finds in memory what has come by then.
    """
    from huggingface_hub import try_to_load_from_cache

    if launch.local_rank != 0 or not hasattr(os, "posix_fadvise"):
        return
    folder = Path(config.model_name_or_path).expanduser()
    if not folder.is_dir():
        cached = try_to_load_from_cache(config.model_name_or_path, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(OSError), file.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def load_model(config: Config, args: TrainingArguments) -> PreTrainedModel:
    """Load the model to train; under ZeRO-3 every rank receives its share only, which `args` has arranged.

    Raises:
        UserError: the folder has no usable weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    name, trust = config.model_name_or_path, config.trust_remote_code
    options: dict[str, Any] = {"dtype": loading_dtype(config, args), "trust_remote_code": trust}
    options |= scaled_options(name, config.rope_scaling, trust_remote_code=trust)
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if args.device.type == "cuda" and not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": args.device}  # else every rank of a node has the whole model in host memory first
    if config.quantization == "nf4":
        bare = skeleton(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        whole = config.lora_modules_to_save or []
        options["quantization_config"] = nf4_config(bare, computing_dtype(args), whole)
    try:
        with freed_memory_returned() if is_deepspeed_zero3_enabled() else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{_blamed(config, error)}: {first_line(error)}") from error
    if config.quantization == "nf4":
        settle(model)
    elif getattr(model, "is_quantized", False):
        raise UserError(
            f"model_name_or_path: {config.model_name_or_path}: its weights are quantised, and cannot be trained here; "
            "give the model they were made of"
        )
    mend_generation_config(model)
    return model


def _blamed(config: Config, error: BaseException) -> str:
    """The key, and its value, for which a model cannot be loaded."""
    asked = config.attn_implementation
    if asked is not None and re.search(r"attention|attn|`kernels`", str(error), re.IGNORECASE):
        return f"attn_implementation: {asked}"
    return f"model_name_or_path: {config.model_name_or_path}"


def say_not_loaded(model: PreTrainedModel, name: str, launch: Launch) -> None:
    """Say which published weights transformers has no layers for, and leaves out without a word: those that predict
    further tokens (MTP) of DeepSeek-V3, GLM-4.5 and others."""
    if not launch.is_main:
        return
    known = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
    layers = model.config.get_text_config().num_hidden_layers  # one size's last layer is another's in the middle
    left = [key for key in published_weights(name) if re.search(known, key) and not 0 <= _layer(key) < layers]
    if left:
        launch.say(
            f"{name}: {len(left):,} of its tensors are not loaded, {left[0]} the first: transformers has no layers for "
            "them (multi-token prediction, as a rule). They are not trained, and the final model is without them."
        )


def _layer(key: str) -> int:
    """61 of model.layers.61.eh_proj.weight; -1 of what is in no layer."""
    found = re.match(r"model\.layers\.(\d+)\.", key)
    return int(found[1]) if found else -1


def published_weights(name: str) -> list[str]:
    """Names of the tensors in a model's safetensors files; none where it has none here."""
    folder = model_folder(name)
    if folder is None:
        return []
    with suppress(OSError, ValueError, KeyError):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return sorted(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        return sorted(tensor_shapes(folder / "model.safetensors"))
    return []


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Let freed tensors go back to the system at once while this lasts.

    Under ZeRO-3 each parameter is whole for a moment, then partitioned. glibc keeps freed blocks of up to 32 MiB for
    later, and the small partitions allocated between pin them: every rank then grew to more than the whole model
    (benchmarks/zero3_loading.py: 1188 MiB kept for a share of 497, and 518 with this).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 256 * 1024)
    try:
        yield
    finally:  # where glibc's own adjustment ends: training allocates and frees large tensors all the time
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def mend_generation_config(model: Any) -> None:
    """Let a generation config be saved that contradicts itself.

    Some published ones carry a temperature without `do_sample`; transformers loads them, and refuses to save them: at
    the first checkpoint, hours later, with the weights not written.
    """
    if model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
