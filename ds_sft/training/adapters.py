"""Which weights are trained: all, adapters beside a frozen model (LoRA, DoRA; peft), or those `train_only` names.

peft's layers are put into the model itself, which stays the transformers model it was: our attention, loss and kernels,
Trainer and DeepSpeed see no wrapper around it. Adapters are float32 masters of 16-bit copies, as other trained weights;
frozen weights have the dtype of forward and backward.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_sft.config import TRAINING_DEFAULTS, Config
from ds_sft.errors import UserError
from ds_sft.runtime.adapter import ADAPTER
from ds_sft.runtime.distributed import Launch
from ds_sft.runtime.merge import refuse_tied
from ds_sft.runtime.quantized import describe, elements
from ds_sft.training.model import computing_dtype, training_dtype

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, TrainingArguments


ALL_LINEAR = "all-linear"
# Of rates that train all weights: "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025,
# thinkingmachines.ai/blog/lora) finds LoRA's best rate about ten times that of full fine-tuning, whatever the rank, and
# that it learns what full fine-tuning does with adapters on all linear layers, the MLP's above all; alpha 32 is theirs.
RATE_OF_ADAPTERS = 10


def choose_weights(model: PreTrainedModel, config: Config, args: TrainingArguments, launch: Launch) -> None:
    """Put adapters into the model, or freeze what `train_only` does not name; says what is trained.

    Raises:
        UserError: a key names nothing in this model.
    """
    if config.quantization != "none":
        launch.say(describe(model))
    if config.adapter != "none":
        _inject(model, config, args, launch)
    elif config.train_only:
        _freeze(model, config.train_only, args)
    else:
        return
    trained, whole = count_parameters(model)
    launch.say(f"Trained: {trained:,} of {whole:,} parameters ({trained / whole:.2%}); the others are frozen.")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements that are trained, and all; those of a quantised weight as if it were not."""
    sizes = [(elements(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def trained_parts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in the model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- Adapters


def lora_config(model: nn.Module, config: Config) -> LoraConfig:
    """What peft is asked for, and writes beside the adapter.

    Raises:
        UserError: `lora_targets` or `lora_modules_to_save` name nothing in this model.
    """
    from peft import LoraConfig

    whole = config.lora_modules_to_save or []
    for name in whole:
        _require_match("lora_modules_to_save", name, [n for n, _ in model.named_modules()])
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model_name_or_path,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets(model, config.lora_targets, apart_from=whole),
        modules_to_save=whole or None,
        ensure_weight_tying=bool(whole),
        use_rslora=config.use_rslora,
        use_dora=config.adapter == "dora",
        init_lora_weights={"default": True}.get(config.lora_init, config.lora_init),  # type: ignore[arg-type]
    )


def targets(model: nn.Module, asked: Sequence[str] | None, *, apart_from: Sequence[str] = ()) -> list[str] | str:
    """`target_modules` as peft takes them: ends of names, or one regular expression of whole names.

    Raises:
        UserError: one names no linear layer.
    """
    names, linear = list(asked or [ALL_LINEAR]), linear_layers(model)
    if names == [ALL_LINEAR]:
        return sorted({name.rpartition(".")[2] for name in linear} - set(apart_from))
    expressions = []
    for name in names:
        if any(_ends_with(layer, name) for layer in linear):
            expressions.append(rf"(.*\.)?{re.escape(name)}")
        else:
            _require_match("lora_targets", name, linear)
            expressions.append(name)
    plain = all(re.fullmatch(r"[\w.]+", name) and any(_ends_with(layer, name) for layer in linear) for name in names)
    return names if plain else "|".join(f"({expression})" for expression in expressions)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can have adapters, without the output projection."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def _ends_with(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _require_match(key: str, pattern: str, names: Iterable[str]) -> None:
    """See that a name or an expression matches one of `names`.

    Raises:
        UserError: it matches none, or is no regular expression.
    """
    known = list(names)
    try:
        if any(_ends_with(name, pattern) or re.fullmatch(pattern, name) for name in known):
            return
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is neither a name nor a regular expression: {error}") from None
    ends = sorted({name.rpartition(".")[2] for name in known if name})
    near = difflib.get_close_matches(pattern.rpartition(".")[2], ends, n=3, cutoff=0.4) or ends[:8]
    raise UserError(f"{key}: {pattern!r} matches no part of this model; near it: {', '.join(near)}")


def _inject(model: PreTrainedModel, config: Config, args: TrainingArguments, launch: Launch) -> None:
    from peft import inject_adapter_in_model

    asked = lora_config(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # the same adapters on every rank, whatever was drawn before
        inject_adapter_in_model(asked, model, adapter_name=ADAPTER)
    dtype = training_dtype(args)
    for parameter in trained_parts(model).values():
        parameter.data = parameter.data.to(dtype)
    refuse_tied(model)
    model.adapter_config = asked
    if config.quantization != "none":
        model._hf_peft_config_loaded = True  # what Trainer asks of a quantised model: something in it can be trained
    reached = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")})
    scale = config.lora_alpha / (config.lora_rank**0.5 if config.use_rslora else config.lora_rank)
    launch.say(
        f"Adapter: {config.adapter}, rank {config.lora_rank}, its product times {scale:g}, on {', '.join(reached)}."
    )
    if config.training["learning_rate"] == TRAINING_DEFAULTS["learning_rate"]:
        launch.say(
            f"learning_rate {config.training['learning_rate']:g} is the default of full fine-tuning: adapters learn as "
            f"much at about {RATE_OF_ADAPTERS} times that ({RATE_OF_ADAPTERS * config.training['learning_rate']:g})."
        )


# ---- Without adapters


def _freeze(model: PreTrainedModel, patterns: Sequence[str], args: TrainingArguments) -> None:
    """Train only the weights whose names contain one of the patterns, in which * stands for anything."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(_contains(name, pattern) for name in names):
            ends = sorted({part for name in names for part in name.split(".") if not part.isdigit()})
            near = difflib.get_close_matches(pattern, ends, n=3, cutoff=0.4) or ends
            raise UserError(f"train_only: {pattern!r} is in no weight's name; near it: {', '.join(near)}")
    for name, parameter in model.named_parameters():
        if not any(_contains(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(computing_dtype(args))


def _contains(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, f"*{pattern}*")
