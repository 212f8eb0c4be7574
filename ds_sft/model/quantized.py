"""The frozen weights under an adapter in 4 bits: NF4 (QLoRA, arXiv 2305.14314), by bitsandbytes.

A weight becomes one of 16 numbers times the largest magnitude of its block of 64, a float32: 4.5 bits. Those magnitudes
are not rounded again, as QLoRA does to have 4.13 bits: bitsandbytes takes their mean off first, whose last bits depend
on the number of threads, and a run that goes on with other ranks would learn beside another base. So the same weights
and dtype give the same 4 bits wherever they are made.

Linear layers are in 4 bits, but those that transformers leaves out (the output projection, what is tied, what a model
wants in float32) and those that `lora_modules_to_save` trains. Embeddings and norms stay as they are. A layer makes its
weight whole, in the dtype of forward and backward, each time it is used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ds_sft.config.extension import is_dotted
from ds_sft.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedModel

BLOCK = 64  # weights that share a magnitude


# How the values of `optim` begin that are optimizers of bitsandbytes.
THEIR_OPTIMS = ("adamw_8bit", "adamw_bnb", "ademamix", "lion", "paged", "rmsprop_bnb")


def require_bitsandbytes(quantization: str, optim: str) -> None:
    """Before anything is loaded.

    Raises:
        UserError: one of the two keys wants a package that is not installed.
    """
    theirs = optim.startswith(THEIR_OPTIMS) and not is_dotted(optim)
    wants = {"quantization": quantization != "none" and quantization, "optim": theirs and optim}
    for key, value in wants.items():
        if value and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"{key}: {value}: bitsandbytes is not installed: pip install bitsandbytes")


def require_float(model_config: Any, name: str, wanted: str) -> None:
    """See that a model to be quantised is not quantised as it is.

    Raises:
        UserError: its config.json says that it is.
    """
    found = getattr(model_config, "quantization_config", None)
    method = found.get("quant_method", "bitsandbytes") if isinstance(found, dict) else None
    if method is not None and (wanted != "none" or method == "bitsandbytes"):
        raise UserError(
            f"model_name_or_path: {name}: its weights are quantised already ({method}); give the model they were made "
            "of, and for 4 bits quantization: nf4 beside adapter: lora"
        )


# ---- Which layers, and their loading


def skeleton(name: str, *, trust_remote_code: bool) -> PreTrainedModel:
    """A model without weights, to ask what it is made of."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    found = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(found, trust_remote_code=trust_remote_code)
    return model


def left_out(model: PreTrainedModel, whole: Sequence[str]) -> list[str]:
    """Names of what stays whole: what transformers leaves out, and the modules that `whole` names, by names' ends."""
    from transformers.quantizers.base import get_keys_to_not_convert

    trained = [n for n, _ in model.named_modules() if any(n == end or n.endswith(f".{end}") for end in whole)]
    return sorted({*get_keys_to_not_convert(model), *trained})


def quantised_layers(model: PreTrainedModel, whole: Sequence[str] = ()) -> list[str]:
    """Names of the linear layers of a model (its weights may be absent) that `nf4` has in 4 bits.

    Args:
        model: not quantised, without adapters.
        whole: `lora_modules_to_save`.
    """
    from torch import nn
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = HfQuantizer.get_modules_to_not_convert(model, left_out(model, whole), model._keep_in_fp32_modules)
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(n, kept)]


def nf4_config(model: PreTrainedModel, dtype: torch.dtype, whole: Sequence[str]) -> BitsAndBytesConfig:
    """What transformers is asked for while it loads.

    Args:
        model: the one to load, without weights.
        dtype: of forward and backward.
        whole: `lora_modules_to_save`.

    Raises:
        UserError: it has no layer that 4 bits are for.
    """
    from transformers import BitsAndBytesConfig

    kind = type(model).__name__
    if any(type(module).__name__ == "Conv1D" for module in model.modules()):
        raise UserError(f"quantization: nf4: {kind} has its matrices transposed (Conv1D); leave quantization out")
    if not quantised_layers(model, whole):
        raise UserError(f"quantization: nf4: {kind} has no linear layer beside what is trained; leave it out")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=left_out(model, whole),
    )


def settle(model: nn.Module) -> None:
    """Let a model that was loaded in 4 bits train as others do, whatever comes between two steps."""
    from bitsandbytes.nn.modules import Linear4bit

    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            # Off the mapped file, whose pages, all read to be quantised, would stay in memory as long as this is used.
            parameter.data = parameter.data.clone()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            # On a CPU that computes in bfloat16 its first evaluation would repack the weight for a kernel that rounds
            # otherwise and has no backward: from then on layers below got no gradient through it.
            module.support_avx512bf16_for_cpu = False
            module.register_state_dict_post_hook(_leave_base_out)  # type: ignore[no-untyped-call]


def _leave_base_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A state has what is trained; magnitudes are no parameters, and whoever leaves out frozen ones would keep them."""
    for name in [name for name in state if name.startswith(f"{prefix}weight")]:
        del state[name]


def elements(parameter: Any) -> int:
    """Of a parameter: of the whole where ZeRO-3 has partitioned it, or two to a byte where it is in 4 bits."""
    if (state := getattr(parameter, "quant_state", None)) is not None:
        return int(state.shape.numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def describe(model: nn.Module) -> str:
    """How much of a model is in 4 bits, and what it takes."""
    parameters = list(model.parameters())
    packed = [p for p in parameters if hasattr(p, "quant_state")]
    small, whole = sum(map(elements, packed)), sum(map(elements, parameters))
    others = [p for p in parameters if not hasattr(p, "quant_state")]
    rest = sum(p.numel() * p.element_size() for p in others)
    taken = rest + sum(p.numel() + p.quant_state.absmax.numel() * 4 for p in packed)
    dtype = packed[0].quant_state.dtype
    return (
        f"Quantization: nf4 (bitsandbytes {importlib.metadata.version('bitsandbytes')}): {small:,} of {whole:,} "
        f"parameters in 4.5 bits; {taken / 2**20:,.1f} MiB instead of {(rest + small * dtype.itemsize) / 2**20:,.1f}."
    )


# ---- The weights that were trained against


def as_trained(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A layer's weight as it computes with it in 4 bits, bit for bit, in `dtype`, that of forward and backward.

    Args:
        weight: [out, in], as it lies on the disk; on a GPU as on a CPU.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(dtype).contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
    )
    values: torch.Tensor = dequantize_4bit(packed, state)
    return values


def round_base(model: PreTrainedModel, dtype: torch.dtype, whole: Sequence[str] = ()) -> None:
    """Give a model of ordinary weights, without adapters, those that `nf4` has trained against; one layer at a time."""
    for name in quantised_layers(model, whole):
        weight = model.get_submodule(name).weight
        weight.data = as_trained(weight.data, dtype).to(weight.dtype)
