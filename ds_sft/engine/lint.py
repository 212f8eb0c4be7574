"""What is wrong with a DeepSpeed configuration, told before the model is loaded.

DeepSpeed ignores a misspelt key, dies of others late, and has defaults of its own where the run's keys say otherwise.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ds_sft.config.keys import ADAFACTOR, ENGINES, LION, MUON, OPTIMS, TORCH_ADAMW, Config
from ds_sft.config.upstream_keys import training_keys
from ds_sft.engine.deepspeed_keys import BLOCKS, fields_of, known_keys, package_folder
from ds_sft.ranks.launch import Launch

# What DeepSpeed and Trainer both decide: a key of DeepSpeed's -> that of the run.
SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
# The options of its Adam: an absent one of the first four has DeepSpeed's own default, whatever the run says.
ADAM = (
    "lr", "betas", "eps", "weight_decay",
    "adam_w_mode", "amsgrad", "bias_correction", "capturable", "differentiable", "foreach", "fp32_optimizer_states",
    "fused", "maximize", "set_grad_none", "torch_adam",
)  # fmt: skip
# The options of its schedules; those of `NEEDED` have defaults (1e-3, 1,000 steps) that are not the run's.
WARMUP = ("warmup_num_steps", "warmup_type", "last_batch_iteration")
SCHEDULERS = {
    "WarmupLR": (*WARMUP, "warmup_min_lr", "warmup_max_lr"),
    "WarmupDecayLR": (*WARMUP, "warmup_min_lr", "warmup_max_lr", "total_num_steps"),
    "WarmupCosineLR": (*WARMUP, "total_num_steps", "warmup_min_ratio", "cos_min_ratio"),
}
NEEDED = ("warmup_max_lr", "warmup_num_steps", "total_num_steps")
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear", "WarmupCosineLR": "cosine"}

# Parts of DeepSpeed that make a step in another way -> why no run here has them. Until a test trains with one, a plan
# and the promise of one training whatever the engine would be wrong of it.
NOT_HERE = {
    "expert_parallel.enabled": "DeepSpeed's AutoEP fails with this transformers or with Trainer's optimizer; delete "
    "the block: under ZeRO-3 experts are partitioned like all weights",  # DeepSpeed 0.19.8, see docs/experts.md
    "tensor_parallel.autotp_size": "the ranks of a group would need the same rows, and each has rows of its own here; "
    "delete the block: ZeRO-3 divides the weights",
    "sequence_parallel_size": "ranks share rows by the run's key sequence_parallel; write that, and delete it",
    "compile.deepcompile": "no training under DeepCompile is tested; delete it, or give the run torch_compile: yes",
    "zero_optimization.zenflow": "it changes weights steps after their gradients, which is another training; delete it",
    "zero_optimization.offload_optimizer.super_offload": "no training with it is tested; delete it",
    **dict.fromkeys(
        ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states", "fp16.fp16_master_weights_and_grads"),
        "DeepSpeed rounds to nearest, and loses small updates; delete it, and give the run optimizer_dtype: bfloat16",
    ),
}
# What a block may look like, for whoever wrote something else there.
EXAMPLES = {
    "zero_optimization": '{"stage": 2}',
    "zero_optimization.offload_optimizer": '{"device": "cpu"}',
    "zero_optimization.offload_param": '{"device": "cpu"}',
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": "auto"}',
}


def problems(engine: Mapping[str, Any], config: Config, launch: Launch) -> Iterator[str]:
    """What is wrong with `engine`, one line each: the key, its value and what to write instead."""
    training = {**config.training, "per_device_train_batch_size": config.micro_batch}
    if config.training["deepspeed"] in ENGINES:
        yield from _against_shipped(config, launch)
    yield from _unknown_keys(engine)
    yield from _zero_block(engine, training)
    yield from _unsound_steps(engine, training, config.on_nonfinite)
    yield from _contradictions(engine, training)
    yield from _another_training(engine)
    if not config.trackers:
        yield from _monitors(engine)
    yield from _optimizer_block(engine)
    if config.optimizer_dtype == "bfloat16":
        yield from _against_bfloat16(engine)
    yield from _scheduler_block(engine)
    if launch.distributed:  # else DeepSpeed is not used
        yield from _against_optim(engine, training.get("optim", TORCH_ADAMW[0]))
        if training.get("optim") == MUON:
            yield from _against_muon(engine, training)
        if config.quantization != "none" and _stage(engine) == 3:
            yield (
                f"zero_optimization.stage: 3: it cannot partition the 4-bit weights of quantization: "
                f"{config.quantization}; write 2, or leave quantization out"
            )
        yield from _batch_size(engine, training, launch, group=config.sequence_parallel)
        yield from _missing_tools(engine)


def _against_shipped(config: Config, launch: Launch) -> Iterator[str]:
    """What an engine of the package cannot do: nobody can delete a block of it, so other names are what to write."""
    name, optim = config.training["deepspeed"], config.training.get("optim", TORCH_ADAMW[0])
    if launch.distributed and config.quantization != "none" and name.startswith("zero3"):
        yield (
            f"it cannot partition the 4-bit weights of quantization: {config.quantization}; write deepspeed: "
            f"{name.replace('3', '2')}, or leave quantization out"
        )
    if not name.endswith("_offload"):
        return
    if optim not in TORCH_ADAMW:
        yield (
            f"DeepSpeed updates with its CPU Adam there, and the run has optim: {optim}; write deepspeed: zero2 or "
            "zero3, or optim: adamw_torch"
        )
    if config.optimizer_dtype == "bfloat16":
        yield (
            "DeepSpeed's CPU Adam rounds to nearest, which loses small updates (optimizer_dtype: bfloat16); write "
            "deepspeed: zero2 or zero3, or optimizer_dtype: float32"
        )


def _another_training(engine: Mapping[str, Any]) -> Iterator[str]:
    for name, why in NOT_HERE.items():
        value = _get(engine, name)
        if value is True or value not in (None, False, 0, 1):  # a group of one rank divides nothing
            yield f"{name}: {_show(value)}: {why}"


def _unknown_keys(engine: Mapping[str, Any]) -> Iterator[str]:
    yield from _not_among(known_keys(), engine, "")
    for name, (file, cls) in BLOCKS.items():
        block = _get(engine, name)
        if isinstance(block, Mapping):
            yield from _not_among(fields_of(file, cls), block, f"{name}.")
        elif block is not None or name in engine:  # null is no option of `engine`; some of zero_optimization's may be
            yield f"{name}: {_show(block)}: expected an object of options, such as {EXAMPLES.get(name, '{...}')}"


def _not_among(known: Collection[str], block: Mapping[str, Any], place: str) -> Iterator[str]:
    for name in block:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            remedy = f"did you mean {near[0]}?" if near else "DeepSpeed has no such option, delete it"
            yield f"{place}{name}: {_show(block[name])}: unknown key: {remedy}"


def _zero_block(engine: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    zero = engine.get("zero_optimization", {})
    number = _stage(engine)
    if number not in (0, 1, 2, 3) or isinstance(number, bool):
        yield f"zero_optimization.stage: {_show(number)}: expected 0, 1, 2 or 3"
    if number == 0 and training.get("bf16"):
        found = "0" if "stage" in zero else "not given, so 0"
        yield (
            f"zero_optimization.stage: {found}: with bf16 it keeps no float32 weights and loses updates below a "
            "rounding (weights of 1 never moved at 1e-3); write 1, or delete the deepspeed key: DDP needs the same "
            "memory"
        )
    gather = "stage3_gather_16bit_weights_on_model_save"
    if number == 3 and zero.get(gather) is not True:
        found = _show(zero[gather]) if gather in zero else "not given"
        yield f"zero_optimization.{gather}: {found}: checkpoints would have no model weights; write true"
    if number != 3 and _device(engine, "offload_param") != "none":
        yield f"zero_optimization.offload_param: only stage 3 partitions parameters, and stage is {number}; delete it"
    for name in ("offload_optimizer", "offload_param"):
        device = _device(engine, name)
        if device not in ("none", "cpu", "nvme"):
            yield f"zero_optimization.{name}.device: {_show(device)}: expected none, cpu or nvme"
        if device == "nvme" and not zero[name].get("nvme_path"):
            yield f"zero_optimization.{name}.nvme_path: not given: device nvme needs the path of a folder on that disk"


def _unsound_steps(engine: Mapping[str, Any], training: Mapping[str, Any], on_nonfinite: str) -> Iterator[str]:
    """What keeps DeepSpeed from leaving out a step whose gradients are not finite."""
    number = _stage(engine)
    for name in ("bf16.check_grad_overflow", "zero_optimization.compute_grad_norm"):
        if number in (1, 2) and _get(engine, name) is False:
            yield f"{name}: false: gradients that are not finite would be applied; delete it"
    if number == 0 and on_nonfinite == "skip" and not training.get("fp16"):
        yield (
            "zero_optimization.stage: 0: it cannot leave out a step (on_nonfinite: skip); write 1, or delete the "
            "deepspeed key: DDP needs the same memory"
        )


def _contradictions(engine: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    for name, ours in SAME.items():
        found, wanted = _get(engine, name), _value(training, ours)
        if found not in (None, "auto") and found != wanted:
            yield f'{name}: {_show(found)}: the run has {ours}: {_show(wanted)}; write "auto", or change one of the two'
    betas = [_value(training, "adam_beta1"), _value(training, "adam_beta2")]
    found = _get(engine, "optimizer.params.betas")
    if found not in (None, "auto", betas):
        yield f'optimizer.params.betas: {_show(found)}: the run has adam_beta1, adam_beta2: {betas}; write "auto"'
    kind, optim = _get(engine, "optimizer.type"), training.get("optim")
    if kind is not None and optim is not None and optim not in (*TORCH_ADAMW, str(kind).lower()):
        yield f"optimizer.type: {_show(kind)}: the run has optim: {optim}; delete one of the two"
    kind, schedule = _get(engine, "scheduler.type"), training.get("lr_scheduler_type")
    if kind is not None and schedule is not None and SCHEDULES.get(kind) != schedule:
        yield f"scheduler.type: {_show(kind)}: the run has lr_scheduler_type: {schedule}; delete the scheduler block"


def _monitors(engine: Mapping[str, Any]) -> Iterator[str]:
    """DeepSpeed's own trackers, in a run that is to have none."""
    for name in ("tensorboard", "wandb", "comet", "csv_monitor"):
        if _get(engine, f"{name}.enabled"):
            yield f"{name}.enabled: true: the run has report_to: none; delete one of the two"


def _optimizer_block(engine: Mapping[str, Any]) -> Iterator[str]:
    """Optimizers of which no training is tested or planned, and what the block leaves to DeepSpeed's defaults (learning
    rate 1e-3, decay 0.01)."""
    if engine.get("optimizer") is None:
        return
    found = _get(engine, "optimizer.type")
    kind = str(found).lower()
    if kind == MUON:
        yield (
            f"optimizer.type: {_show(found)}: its rates are not those of a run without "
            f"DeepSpeed; delete the block, and give the run optim: {MUON}"
        )
    elif kind not in ("adam", "adamw"):
        ours = f"optim: {LION}" if kind == "lion" else f"another optim ({', '.join(OPTIMS)})"
        untested = f'{_show(found)}: no training with it is tested; write "AdamW"'
        yield f"optimizer.type: {untested}, or delete the block for {ours}"
    params = _get(engine, "optimizer.params") or {}
    yield from _not_among(ADAM, params, "optimizer.params.")
    yield from _not_given(ADAM[:4], params, "optimizer.params.")


def _against_bfloat16(engine: Mapping[str, Any]) -> Iterator[str]:
    """What would update weights of `optimizer_dtype: bfloat16` in another way than `training/optimizer.py`."""
    rounding = "rounds to nearest, which loses small updates (optimizer_dtype: bfloat16)"
    if (kind := _get(engine, "optimizer.type")) is not None:
        yield f"optimizer.type: {_show(kind)}: DeepSpeed's own optimizer {rounding}; delete the block"
    if (dtype := _get(engine, "data_types.grad_accum_dtype")) not in (None, "bf16"):
        yield (
            f"data_types.grad_accum_dtype: {_show(dtype)}: under optimizer_dtype: bfloat16 gradients are, too; "
            "delete it"
        )
    if (device := _device(engine, "offload_optimizer")) != "none":
        yield (
            f"zero_optimization.offload_optimizer.device: {device}: DeepSpeed's CPU Adam {rounding}; delete the block, "
            "or write optimizer_dtype: float32"
        )


def _against_optim(engine: Mapping[str, Any], optim: str) -> Iterator[str]:
    """What DeepSpeed cannot update as `optim` says."""
    if optim == ADAFACTOR:
        yield (
            f"optim: {ADAFACTOR}: it keeps sums over rows and columns of a matrix, and DeepSpeed gives it flat parts; "
            "write adamw_8bit, or delete the deepspeed key"
        )
    device = _device(engine, "offload_optimizer")
    forced = engine.get("zero_force_ds_cpu_optimizer", True) and _get(engine, "optimizer.type") is None
    if device != "none" and forced and optim not in TORCH_ADAMW:
        yield (
            f"zero_optimization.offload_optimizer.device: {device}: DeepSpeed updates with its CPU Adam there, and the "
            f"run has optim: {optim}; delete the block, or write optim: adamw_torch"
        )


def _against_muon(engine: Mapping[str, Any], training: Mapping[str, Any]) -> Iterator[str]:
    """What DeepSpeed's Muon does in another way than torch's, or not at all."""
    number = _stage(engine)
    if number == 0:
        yield f"zero_optimization.stage: 0: no training with optim: {MUON} is tested; write 1, 2 or 3"
    if norm := _value(training, "max_grad_norm"):
        yield (
            f"max_grad_norm: {_show(norm)}: DeepSpeed clips what optim: {MUON} has made of the gradients, which makes "
            "every step shorter; write 0, or delete the deepspeed key"
        )
    if training.get("fp16"):
        yield (
            f"fp16: true: DeepSpeed adds scaled gradients to the momentum of optim: {MUON}, and the scale changes; "
            "write bf16: yes"
        )
    if number == 3 and _get(engine, "zero_optimization.reduce_scatter"):
        yield f"zero_optimization.reduce_scatter: true: optim: {MUON} wants whole gradients in stage 3; delete it"
    for name in ("offload_optimizer.device", "offload_param.device", "zero_quantized_gradients"):
        if (found := _get(engine, f"zero_optimization.{name}")) not in (None, False, "none"):
            yield (
                f"zero_optimization.{name}: {_show(found)}: no training with it and optim: {MUON} is tested; delete it"
            )


def _scheduler_block(engine: Mapping[str, Any]) -> Iterator[str]:
    known = SCHEDULERS.get(_get(engine, "scheduler.type"))
    if known:
        params = _get(engine, "scheduler.params") or {}
        yield from _not_among(known, params, "scheduler.params.")
        yield from _not_given([name for name in NEEDED if name in known], params, "scheduler.params.")


def _not_given(needed: Collection[str], block: Mapping[str, Any], place: str) -> Iterator[str]:
    for name in needed:
        if name not in block:
            yield f"{place}{name}: not given: DeepSpeed's own default would hold instead of the run's; write \"auto\""


def _batch_size(engine: Mapping[str, Any], training: Mapping[str, Any], launch: Launch, *, group: int) -> Iterator[str]:
    """DeepSpeed knows ranks alone; of groups that share rows it would be told a number that no step has."""
    found = engine.get("train_batch_size")
    if group > 1 and found not in (None, "auto"):
        yield f'train_batch_size: {_show(found)}: the run has sequence_parallel: {group}; write "auto"'
        return
    micro, accumulation = training["per_device_train_batch_size"], training["gradient_accumulation_steps"]
    rows = micro * accumulation * launch.world_size
    if found not in (None, "auto", rows):
        yield (
            f"train_batch_size: {_show(found)}: the run has {micro} (per_device_train_batch_size) x {accumulation} "
            f'(gradient_accumulation_steps) x {launch.world_size} ranks = {rows}; write "auto"'
        )


def _missing_tools(engine: Mapping[str, Any]) -> Iterator[str]:
    """DeepSpeed compiles its CPU Adam at the first start, with the model already loaded."""
    device = _device(engine, "offload_optimizer")
    if (
        device == "none"
        or _get(engine, "optimizer.params.torch_adam")
        or not engine.get("zero_force_ds_cpu_optimizer", True)
    ):
        return
    if any((package_folder("deepspeed") / "ops" / "adam").glob("cpu_adam*.so")):
        return  # built when DeepSpeed was installed
    compiler = os.environ.get("CXX", "c++")
    missing = [tool for tool in ("ninja", compiler) if shutil.which(tool) is None]
    if missing:
        yield (
            f"zero_optimization.offload_optimizer.device: {device}: DeepSpeed compiles its CPU Adam for it and "
            f"{' and '.join(missing)} cannot be found; pip install ninja, install a C++ compiler (Debian: g++), or "
            'write "torch_adam": true into optimizer.params'
        )


def _get(engine: Mapping[str, Any], dotted: str) -> Any:
    value: Any = engine
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _stage(engine: Mapping[str, Any]) -> Any:
    """As it is written; 0, DeepSpeed's default, where it is not."""
    return engine.get("zero_optimization", {}).get("stage", 0)


def _device(engine: Mapping[str, Any], block: str) -> str:
    return _get(engine, f"zero_optimization.{block}.device") or "none"


def _value(training: Mapping[str, Any], name: str) -> Any:
    """A key of the run, or the default that transformers has for it."""
    return training[name] if name in training else ast.literal_eval(training_keys()[name].default)


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
