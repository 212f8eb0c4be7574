"""Which weights are trained: all, adapters beside a frozen model (LoRA, DoRA; peft), or those `train_only` names.

peft's layers are put into the model itself, which stays the transformers model it was: our attention, loss and kernels,
Trainer and DeepSpeed see no wrapper around it. Adapters are float32 masters of 16-bit copies, as other trained weights;
frozen weights have the dtype of forward and backward.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ds_sft.config.keys import TRAINING_DEFAULTS, Config
from ds_sft.errors import UserError
from ds_sft.model.adapter_files import ADAPTER
from ds_sft.model.dtype import computing_dtype, training_dtype
from ds_sft.model.quantized import elements
from ds_sft.model.targets import (
    EXPERTS,
    count_by_end,
    expert_tensors,
    last,
    target_parameters,
    targets,
    whole_modules,
)
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, TrainingArguments


# Of rates that train all weights: "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025,
# thinkingmachines.ai/blog/lora) finds LoRA's best rate about ten times that of full fine-tuning, whatever the rank, and
# that it learns what full fine-tuning does with adapters on all linear layers, the MLP's above all; alpha 32 is theirs.
RATE_OF_ADAPTERS = 10
HIGH_RATE = 5 * TRAINING_DEFAULTS["learning_rate"]  # from here on a rate looks like one of adapters


@dataclass(frozen=True)
class Adapter:
    """What was put beside the frozen weights of a model."""

    kind: str  # lora, dora
    rank: int
    scale: float  # of the product of its two matrices
    reached: str  # layers that have one, in words
    whole: tuple[str, ...]  # modules that are trained whole
    experts_without: tuple[str, ...]

    def __str__(self) -> str:
        whole = f"; trained whole: {', '.join(self.whole)}" if self.whole else ""
        without = ", ".join(self.experts_without)
        without = f"; none on the experts ({without}), which lora_targets can name: {EXPERTS}" if without else ""
        return f"{self.kind}, rank {self.rank}, its product times {self.scale:g}, on {self.reached}{whole}{without}"


@dataclass(frozen=True)
class Trained:
    """How many of a model's parameters are trained; those of a quantised weight count as if it were not."""

    parameters: int
    whole: int  # all of them
    named: str = ""  # what `train_only` names, in words

    def __str__(self) -> str:
        if self.parameters == self.whole:
            return f"all {self.whole:,} parameters"
        named = f": {self.named}" if self.named else ""
        share = f"{self.parameters:,} of {self.whole:,} parameters ({self.parameters / self.whole:.2%})"
        return f"{share}{named}; the others are frozen"


def choose_weights(
    model: PreTrainedModel, config: Config, args: TrainingArguments, launch: Launch
) -> tuple[Adapter | None, Trained]:
    """Put adapters into the model, or freeze what `train_only` does not name; what is trained then.

    `launch` says where the learning rate is unusual for that.

    Raises:
        UserError: a key names nothing in this model.
    """
    if config.adapter == "none":
        _question_rate(config, launch)
    if config.optimizer_dtype == "bfloat16":
        _settle_dtypes(model, config, args)  # some models keep a few weights in float32, whatever they are loaded in
    if not config.freezes:
        return None, Trained(*count_parameters(model))
    adapter, named = None, ""
    if config.adapter != "none":
        _inject(model, config, args)
        adapter = _adapter_in(model, config)
        _expect_high_rate(config, launch)
    else:
        named = _freeze(model, config)
    _settle_dtypes(model, config, args)
    _leave_inputs_alone(model, args)
    return adapter, Trained(*count_parameters(model), named)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Elements that are trained, and all; those of a quantised weight as if it were not."""
    sizes = [(elements(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _settle_dtypes(model: nn.Module, config: Config, args: TrainingArguments) -> None:
    """Trained weights in the dtype of masters; frozen ones in that of forward and backward, in which DeepSpeed's engine
    has them, too, whatever a model keeps in float32."""
    for parameter in model.parameters():
        # 4-bit weights are bytes; those that ZeRO-3 has partitioned are its own.
        if parameter.is_floating_point() and not hasattr(parameter, "ds_tensor"):
            parameter.data = parameter.data.to(
                training_dtype(config, args) if parameter.requires_grad else computing_dtype(args)
            )


def _leave_inputs_alone(model: PreTrainedModel, args: TrainingArguments) -> None:
    """Let recomputed layers form gradients only above the first trained weight.

    With checkpointing transformers lets the embedding's output want a gradient, which reentrant checkpointing needs
    where the weights below are frozen; every frozen layer would be computed again and its gradient formed for nothing.
    """
    if not (args.activation_checkpointing_kwargs or {}).get("use_reentrant", True):
        model.enable_input_require_grads = lambda: None


# ---- Adapters


def lora_config(model: PreTrainedModel, config: Config) -> LoraConfig:
    """What peft is asked for, and writes beside the adapter.

    Raises:
        UserError: `lora_targets` or `lora_modules_to_save` name nothing in this model, or experts are among them and
            another key asks for what peft does not do on these.
    """
    from peft import LoraConfig

    whole = whole_modules(model, config.lora_modules_to_save or [])
    experts = target_parameters(model, config.lora_targets)
    if experts and (why := _against_experts(config)):
        raise UserError(f"lora_targets: {experts[0]}: {why}")
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=config.model_name_or_path,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=targets(model, config.lora_targets, apart_from=whole),
        target_parameters=experts or None,
        modules_to_save=whole or None,
        ensure_weight_tying=_trains_tied(model, whole),
        use_rslora=config.use_rslora,
        use_dora=config.adapter == "dora",
        init_lora_weights={"default": True}.get(config.lora_init, config.lora_init),  # type: ignore[arg-type]
    )


def _against_experts(config: Config) -> str | None:
    """Why experts cannot have adapters: peft adds B A to a tensor of experts itself, and sees nothing of its inputs."""
    if config.adapter == "dora":
        return "peft has no DoRA for tensors of experts: write adapter: lora"
    if config.lora_dropout:
        return "peft has no dropout for adapters on tensors of experts: write lora_dropout: 0"
    if config.lora_init == "orthogonal":
        return "peft cannot begin adapters on tensors of experts orthogonal: write lora_init: gaussian, or leave it out"
    return None


def _trains_tied(model: PreTrainedModel, whole: Sequence[str]) -> bool:
    """Whether what is trained whole is an embedding that is the output projection, too."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    named = any(module in ends and name.endswith(tuple(whole)) for name, module in model.named_modules())
    return bool(whole) and named and _is_tied(model)


def _is_tied(model: PreTrainedModel) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return getattr(head, "weight", None) is embedding.weight


def _inject(model: PreTrainedModel, config: Config, args: TrainingArguments) -> None:
    from peft import inject_adapter_in_model

    asked = lora_config(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)  # the same adapters on every rank, whatever was drawn before
        inject_adapter_in_model(asked, model, adapter_name=ADAPTER)
    if asked.ensure_weight_tying:
        _mend_tied(model, asked)
    _gather_experts_whole(model)
    for layer in (module for module in model.modules() if hasattr(module, "cast_input_dtype_enabled")):
        # To the dtype of the master, and autocast back to that of its copy: activations in float32 for nothing.
        layer.cast_input_dtype_enabled = False
    for names in ("target_modules", "target_parameters", "modules_to_save"):  # sets have another order everywhere
        setattr(asked, names, sorted(getattr(asked, names) or []) or None)
    asked.target_modules = asked.target_modules or []  # None would be peft's own choice for the kind of model
    if config.quantization != "none":
        model._hf_peft_config_loaded = True  # what Trainer asks of a quantised model: something in it can be trained


def _gather_experts_whole(model: PreTrainedModel) -> None:
    """Under ZeRO-3 let experts and the adapters on them be gathered before any of them is called, and at once.

    peft takes a tensor out of the experts' module for the time of its forward, so where that has biases, too, DeepSpeed
    finds other parameters in it than it remembers from between steps (0.19.8: "tracing error").
    """
    wrappers = [module for module in model.modules() if hasattr(module, "parameter_name")]
    inner = {id(wrapper.base_layer) for wrapper in wrappers}
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        from deepspeed.utils import set_z3_leaf_module

        for wrapper in wrappers:
            if id(wrapper) not in inner:
                set_z3_leaf_module(wrapper, True)


def _mend_tied(model: PreTrainedModel, asked: LoraConfig) -> None:
    """See that the embedding is still the output projection; peft swaps the sizes of the layer it ties to it.

    Raises:
        UserError: two copies of what was one tensor.
    """
    if not _is_tied(model):
        raise UserError(
            f"lora_modules_to_save: {', '.join(asked.modules_to_save or [])}: peft does not keep the embedding and the "
            f"output projection of {type(model).__name__} one tensor: leave it out"
        )
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    head.modules_to_save[ADAPTER].in_features = embedding.embedding_dim
    head.modules_to_save[ADAPTER].out_features = embedding.num_embeddings


def _adapter_in(model: nn.Module, config: Config) -> Adapter:
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    on_experts = [module.parameter_name for module in adapted.values() if hasattr(module, "parameter_name")]
    reached = count_by_end(name for name, module in adapted.items() if not hasattr(module, "parameter_name"))
    reached += (", " if reached and on_experts else "") + (
        f"every expert of {count_by_end(on_experts)}" if on_experts else ""
    )
    whole = [name for name, module in model.named_modules() if ADAPTER in getattr(module, "modules_to_save", ())]
    scale = config.lora_alpha / (config.lora_rank**0.5 if config.use_rslora else config.lora_rank)
    frozen = sorted({last(name) for name in expert_tensors(model)} - set(on_experts))
    return Adapter(config.adapter, config.lora_rank, scale, reached, tuple(whole), tuple(frozen))


def _expect_high_rate(config: Config, launch: Launch) -> None:
    """Say it where an adapter is trained at the default rate, which is that of a model's own weights."""
    if config.training["learning_rate"] == TRAINING_DEFAULTS["learning_rate"]:
        launch.say(
            f"learning_rate {config.training['learning_rate']:g} is the default of full fine-tuning: adapters learn as "
            f"much at about {RATE_OF_ADAPTERS} times that ({RATE_OF_ADAPTERS * config.training['learning_rate']:g})."
        )


def _question_rate(config: Config, launch: Launch) -> None:
    """Say it where weights of the model itself are trained at a rate of adapters; other optimizers have other rates."""
    usual = TRAINING_DEFAULTS["learning_rate"]
    rate = config.training.get("learning_rate", usual)
    if rate >= HIGH_RATE and config.training.get("optim", "adamw").startswith("adamw"):
        launch.say(
            f"learning_rate {rate:g} is high where the model's own weights are trained, and usual for adapters: "
            f"{usual:g} is the default. Small models bear it; or was adapter: lora meant?"
        )


# ---- Without adapters


def _freeze(model: PreTrainedModel, config: Config) -> str:
    """Train only the weights whose names contain one of the patterns, in which * stands for anything; in words."""
    weights = dict(model.named_parameters(remove_duplicate=False))  # a tied one has two names
    found = {pattern: [name for name in weights if _contains(name, pattern)] for pattern in config.train_only or []}
    for pattern in (pattern for pattern, names in found.items() if not names):
        parts = sorted({part for name in weights for part in name.split(".") if not part.isdigit()})
        near = difflib.get_close_matches(pattern, parts, n=3, cutoff=0.4) or parts
        raise UserError(f"train_only: {pattern!r} is in no weight's name; near it: {', '.join(near)}")
    trained = {id(weights[name]) for names in found.values() for name in names}
    if trained >= {id(p) for p in weights.values()}:
        raise UserError(f"train_only: {', '.join(found)}: these name all weights of the model: leave it out")
    for parameter in weights.values():
        parameter.requires_grad_(id(parameter) in trained)
    if config.resize_embeddings and not model.get_input_embeddings().weight.requires_grad:
        raise UserError(
            "resize_embeddings: new rows of a frozen embedding would never be learned: name it in train_only"
        )
    said = ", ".join(f"{pattern} ({_how_many(names)})" for pattern, names in found.items())
    both = _is_tied(model) and model.get_input_embeddings().weight.requires_grad
    return said + (", the embedding being the output projection, too" if both else "")


def _how_many(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} weights"


def _contains(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, f"*{pattern}*")
