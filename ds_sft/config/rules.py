"""Which keys exclude each other, and which mean nothing without another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ds_sft.config.extension import is_dotted
from ds_sft.config.keys import ADAFACTOR, LION, MUON, OUR_ORDERS, TORCH_ADAMW, Config
from ds_sft.config.values import Given
from ds_sft.errors import UserError

# Keys that mean nothing without `adapter`.
OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_modules_to_save", "use_rslora",
               "lora_init", "merge")  # fmt: skip
AGAINST_ADAPTERS = {
    "train_only": "an adapter freezes all weights of the model (lora_modules_to_save trains some of them)",
    "resize_embeddings": "new rows of a frozen embedding would never be learned, and the adapter would fit no base",
}
# Optimizers that do not read all options of Adam -> those; one of the user's reads none.
UNREAD_BY = {ADAFACTOR: ("adam_beta1", "adam_beta2", "adam_epsilon"), LION: ("adam_epsilon",)}
# Keys that a row over several ranks cannot be exact with, where they have another value than this -> why.
AGAINST_SEQUENCE_PARALLEL: dict[str, tuple[Any, str]] = {
    "batching": ("padding_free", "parts are cut from rows laid end to end"),
    "attn_implementation": (None, "only this package's attention exchanges heads between ranks"),
    "lora_dropout": (0.0, "what is left out would depend on the number of ranks"),
    "fp16": (False, "a model's own loss, which float16 keeps, would lose the first token of every part"),
    "torch_compile": (False, "no test trains with both"),
    "neftune_noise_alpha": (None, "its noise depends on the tokens that a rank has"),
}

# Keys of transformers that do nothing without another one -> that, and what to write.
ALONE_NOTHING = {
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"),
                    ("dataloader_num_workers", "dataloader_num_workers: 2")),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), ("torch_compile", "torch_compile: yes")),
}  # fmt: skip
FIXED_SCHEDULES = ("constant", "constant_with_warmup")  # which transformers gives no options
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # what it gives no warm-up


def check(config: Config, given: Mapping[str, Given]) -> None:
    """See that no key of a run excludes another.

    Args:
        given: what a person wrote of it, and where: for the message.

    Raises:
        UserError: one does.
    """
    _check_batching(config, given)
    _check_checkpointing(config, given)
    _check_sequence_parallel(config, given)
    _check_adapter(config, given)
    _check_optimizer(config, given)
    _check_push(config, given)
    _check_best(config, given)
    _check_company(config, given)


def _check_batching(config: Config, given: Mapping[str, Given]) -> None:
    order, name = config.training.get("train_sampling_strategy", "random"), "max_tokens_per_batch"
    if config.packing != "none" and config.max_tokens_per_batch is not None:
        raise UserError(
            f"{given[name].where}{name}: packing: concat fills sequences of max_length, and a micro batch is "
            "per_device_train_batch_size of them: leave out one of the two"
        )
    if config.packing != "none" and config.batching == "padded":
        raise UserError(f"{given['batching'].where}batching: padded: packing: concat has no padding: leave out one")
    if config.max_tokens_per_batch is not None and order not in OUR_ORDERS:
        raise UserError(f"{given[name].where}{name}: train_sampling_strategy {order} makes batches of its own")
    if config.fills_batches and order == "group_by_length":
        raise UserError(
            f"{given[name].where}{name}: micro batches filled by tokens are about equal, train_sampling_strategy "
            "group_by_length has nothing to order: leave it out, or give per_device_train_batch_size"
        )


def _check_checkpointing(config: Config, given: Mapping[str, Given]) -> None:
    """Keys of what is kept of a layer, and of how its MLP is computed, beside others that exclude them."""
    options = config.training.get("activation_checkpointing_kwargs")
    if isinstance(options, dict) and "offload" in options:
        raise UserError(
            f"{given['activation_checkpointing_kwargs'].where}activation_checkpointing_kwargs: offload: computation "
            "would wait for its copies: write activation_checkpointing: offload"
        )
    compiler = "torch_compile" if config.training.get("torch_compile") else "fused_kernels"
    if compiler == "fused_kernels" and config.fused_kernels != "compile":
        return
    for name, value in (("activation_checkpointing", "offload"), ("tiled_mlp", "yes")):
        if config.to_dict().get(name) == value:
            raise UserError(
                f"{given[name].where}{name}: {value}: beside {compiler}: {given[compiler].value} a layer is compiled "
                "in one: leave out one of the two"
            )


def _check_sequence_parallel(config: Config, given: Mapping[str, Given]) -> None:
    """Keys that exclude `sequence_parallel`."""
    if config.sequence_parallel == 1:
        return
    place = f"{given['sequence_parallel'].where}sequence_parallel: {config.sequence_parallel}"
    found = config.to_dict()
    for name, (allowed, why) in AGAINST_SEQUENCE_PARALLEL.items():
        if found.get(name, allowed) != allowed:
            raise UserError(f"{place}: {name}: {given[name].value}: {why}: leave out one of the two")
    if config.fused_kernels == "compile":
        raise UserError(f"{place}: fused_kernels: compile: no test trains with both: write liger, none or auto")
    order = config.training.get("train_sampling_strategy", "random")
    if order not in OUR_ORDERS:
        raise UserError(f"{place}: train_sampling_strategy: {order}: it makes batches of its own: leave it out")


def _check_adapter(config: Config, given: Mapping[str, Given]) -> None:
    """Keys of adapters beside others that exclude them, or without `adapter`, which alone turns them on."""
    ours = {f.name: f.default for f in fields(Config)}
    alone = [name for name in OF_ADAPTERS if name in given and getattr(config, name) != ours[name]]
    if config.adapter == "none" and alone:
        raise UserError(
            f"{given[alone[0]].where}{alone[0]}: it is of adapters: write adapter: lora too, or leave it out"
        )
    if config.adapter == "none" and config.quantization != "none":
        raise UserError(
            f"{given['quantization'].where}quantization: {config.quantization}: weights of 4 bits cannot be trained: "
            "write adapter: lora too"
        )
    if config.adapter == "none":
        return
    _check_targets(config, given)
    if config.lora_init == "orthogonal" and config.lora_rank % 2:
        where = given.get("lora_rank", given["lora_init"]).where
        raise UserError(f"{where}lora_rank: {config.lora_rank}: lora_init: orthogonal wants an even rank")
    compiler = "torch_compile" if config.training.get("torch_compile") else "fused_kernels"
    if config.adapter == "dora" and (compiler == "torch_compile" or config.fused_kernels == "compile"):
        raise UserError(
            f"{given[compiler].where}{compiler}: {given[compiler].value}: Dynamo breaks layers with peft's DoRA into "
            "dozens of pieces, each compiled: leave it out, or write adapter: lora"
        )
    for name, why in AGAINST_ADAPTERS.items():
        if getattr(config, name):
            raise UserError(f"{given[name].where}{name}: {why}: leave out {name} or adapter: {config.adapter}")


def _check_targets(config: Config, given: Mapping[str, Given]) -> None:
    """Forms of `lora_targets` that other programs take; which names a model has is seen when it is loaded."""
    for name in config.lora_targets or ():
        where = f"{given['lora_targets'].where}lora_targets: {name}: "
        if name == "all":
            raise UserError(f"{where}all linear layers are all-linear, which is the default: leave it out")
        if re.fullmatch(r"[\w.]+(,\s*[\w.]+)+", name):
            raise UserError(f"{where}it is one text: write a list, [{', '.join(re.findall(r'[^, ]+', name))}]")


def _check_optimizer(config: Config, given: Mapping[str, Given]) -> None:
    """Optimizers that no run here has, and keys that leave `optimizer_dtype` nothing to be of."""
    optim = config.training.get("optim", TORCH_ADAMW[0])
    for name in UNREAD_BY[ADAFACTOR] if is_dotted(optim) else UNREAD_BY.get(optim, ()):
        if name in given:
            instead = "write optim_args" if is_dotted(optim) else "leave it out"
            raise UserError(f"{given[name].where}{name}: optim: {optim} has none: {instead}")
    if config.training.get("optim_args") and not is_dotted(optim):
        raise UserError(
            f"{given['optim_args'].where}optim_args: they are of an optimizer of your own (optim: my.module:Thing): "
            "leave it out"
        )
    if optim == MUON and config.adapter != "none":
        raise UserError(
            f"{given['optim'].where}optim: {MUON}: an adapter's matrices are no updates of their own, their product "
            f"is: leave out one of optim: {MUON} and adapter: {config.adapter}"
        )
    if config.optimizer_dtype == "float32":
        return
    place = f"{given['optimizer_dtype'].where}optimizer_dtype: {config.optimizer_dtype}: "
    if not config.training.get("bf16"):
        raise UserError(f"{place}forward and backward are not in bfloat16: write bf16: yes too, or leave it out")
    if config.adapter != "none":
        raise UserError(f"{place}the states of adapter: {config.adapter} are small, and stay float32: leave it out")
    if optim not in TORCH_ADAMW:
        raise UserError(f"{place}optim: {optim} rounds to nearest, which loses small updates: leave out one of the two")


def _check_push(config: Config, given: Mapping[str, Given]) -> None:
    """A run pushes to a repository with a name, what was verified."""
    if not config.training.get("push_to_hub"):
        return
    where = given["push_to_hub"].where
    if config.training.get("hub_model_id") is None:
        raise UserError(f"{where}push_to_hub: to which repository? write hub_model_id: OWNER/NAME too")
    if not config.verify_export:
        raise UserError(
            f"{given['verify_export'].where}verify_export: push_to_hub: yes pushes what was verified: leave it out, "
            "or push later with ds-sft push --unverified"
        )


def _check_best(config: Config, given: Mapping[str, Given]) -> None:
    """What is the best model, for the keys that ask for it."""
    asked = [name for name, value in (("load_best_model_at_end", True), ("save_strategy", "best"))
             if config.training.get(name) == value]  # fmt: skip
    if config.early_stopping_patience is not None and "load_best_model_at_end" not in asked:
        raise UserError(
            f"{given['early_stopping_patience'].where}early_stopping_patience: the run would end with a model that is "
            "not the best: write load_best_model_at_end: yes too"
        )
    if asked and config.training.get("eval_strategy", "no") == "no":
        raise UserError(
            f"{given[asked[0]].where}{asked[0]}: {given[asked[0]].value}: it needs an eval_file (or val_size), and an "
            "eval_strategy"
        )


def _check_company(config: Config, given: Mapping[str, Given]) -> None:
    """Keys of transformers that it would leave out beside others without a word."""
    training = config.training
    for name, (needed, remedy) in ALONE_NOTHING.items():
        if training.get(name) and not training.get(needed):
            raise UserError(f"{given[name].where}{name}: it does nothing alone: write {remedy} too, or leave it out")
    if training.get("neftune_noise_alpha") and training.get("torch_compile"):
        raise UserError(
            f"{given['neftune_noise_alpha'].where}neftune_noise_alpha: no test trains with it beside torch_compile: "
            "leave out one of the two"
        )
    schedule = training.get("lr_scheduler_type", "linear")
    if training.get("lr_scheduler_kwargs") and schedule in FIXED_SCHEDULES:
        raise UserError(
            f"{given['lr_scheduler_kwargs'].where}lr_scheduler_kwargs: lr_scheduler_type: {schedule} has no options: "
            "leave it out"
        )
    if training.get("warmup_steps") and schedule in WITHOUT_WARMUP:
        instead = "write constant_with_warmup" if schedule == "constant" else "leave it out"
        raise UserError(
            f"{given['warmup_steps'].where}warmup_steps: lr_scheduler_type: {schedule} has no warm-up: {instead}"
        )
