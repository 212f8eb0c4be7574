"""The ways to divide a run over its ranks, and whether one of them fits."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.cost import Hardware, Step, step_time
from ds_sft.plan.memory import Memory, peak
from ds_sft.plan.optimizer import ADAMW, planned_optimizer
from ds_sft.plan.run import Engine, Run
from ds_sft.plan.shape import Shape
from ds_sft.plan.weights import choice_of

LAYOUTS: dict[str, tuple[int | None, bool, bool]] = {  # name -> stage, optimizer offloaded, parameters offloaded
    "no DeepSpeed": (None, False, False),
    "ZeRO-1": (1, False, False),
    "ZeRO-2": (2, False, False),
    "ZeRO-3": (3, False, False),
    "ZeRO-2 offload": (2, True, False),
    "ZeRO-3 offload": (3, True, True),
}
# Those that `deepspeed` has a name for. ZeRO-2 never needs more than ZeRO-1, so that one is shown and never advised.
NAMED = {"ZeRO-2": "zero2", "ZeRO-3": "zero3", "ZeRO-2 offload": "zero2_offload", "ZeRO-3 offload": "zero3_offload"}
# Elements, of ds_configs/. Transformers' "auto" is hidden x hidden: 0.3 M at 135 M parameters, 200 reductions a step.
REDUCE_BUCKET = 50_000_000
CUDA_CONTEXT = int(1.4 * 2**30)  # of a process outside PyTorch's allocator, bytes: 1.39 GiB on an H200, driver 580
PYTHON = int(0.6 * 2**30)  # of a process on a CPU beside what training takes, bytes: 0.55 GiB with DeepSpeed imported
FRAGMENTS = 0.05  # of what is allocated, lost between blocks (ZeRO paper, section 3.2); not measured here


def engine_of(zero: Mapping[str, Any], shape: Shape) -> Engine:
    """The DeepSpeed options that have a size; "auto" as transformers fills it in (`integrations/deepspeed.py`).

    Raises:
        UserError: stage 0, which is DeepSpeed without ZeRO, or an option that DeepSpeed could not read.
    """
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"zero_optimization.stage: {stage!r}: expected 1, 2 or 3")
    if stage == 0:
        raise UserError("zero_optimization.stage: 0: cannot be planned; leave the deepspeed key out, or take stage 1")
    h, given = shape.hidden, Engine(stage=stage)

    def size(key: str, auto: int, default: int) -> int:
        value = zero.get(key, default)
        if value == "auto":
            return auto
        try:
            return int(value)
        except (TypeError, ValueError):
            raise UserError(f'zero_optimization.{key}: {value!r}: expected a number of elements, or "auto"') from None

    return replace(
        given,
        offload_optimizer=_offloaded(zero, "offload_optimizer"),
        offload_param=stage == 3 and _offloaded(zero, "offload_param"),
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        allreduce=bool(zero.get("use_multi_rank_bucket_allreduce", True)) or not zero.get("reduce_scatter", True),
        reduce_bucket=size("reduce_bucket_size", h * h, given.reduce_bucket),
        prefetch_bucket=size("stage3_prefetch_bucket_size", int(0.9 * h * h), given.prefetch_bucket),
        persistence_threshold=size("stage3_param_persistence_threshold", 10 * h, given.persistence_threshold),
        max_reuse_distance=size("stage3_max_reuse_distance", given.max_reuse_distance, given.max_reuse_distance),
        sub_group=size("sub_group_size", given.sub_group, given.sub_group),
        hierarchical=max(size("zero_hpz_partition_size", 1, 1), 1),
    )


def _offloaded(zero: Mapping[str, Any], name: str) -> bool:
    block = zero.get(name) or {}
    if not isinstance(block, Mapping):
        raise UserError(f'zero_optimization.{name}: {block!r}: expected an object, such as {{"device": "cpu"}}')
    return str(block.get("device", "none")) != "none"


def shipped_engine(name: str, shape: Shape) -> Engine:
    """The engine of a layout as ds_configs/ has it."""
    stage, offload_optimizer, offload_param = LAYOUTS[name]
    if stage is None:
        return Engine(stage=None)
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "reduce_bucket_size": REDUCE_BUCKET}
    if stage == 3:
        zero |= dict.fromkeys(("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto")
    zero |= {"offload_optimizer": {"device": "cpu"}} if offload_optimizer else {}
    zero |= {"offload_param": {"device": "cpu"}} if offload_param else {}
    return engine_of(zero, shape)


def name_of(engine: Engine) -> str:
    """The layout that an engine is."""
    wanted = (engine.stage, engine.offload_optimizer, engine.offload_param)
    exact = next((name for name, layout in LAYOUTS.items() if layout == wanted), None)
    return exact or f"ZeRO-{engine.stage} offload"  # stage 3 with its optimizer alone offloaded


def run_of(config: Config, shape: Shape, engine: Engine, ranks: int, *, lazy: bool = False) -> Run:
    """The memory question that a configuration asks.

    Raises:
        UserError: ranks or attention's heads cannot be divided by `sequence_parallel`.
    """
    _check_groups(config.sequence_parallel, shape, ranks)
    training, length, most = config.training, config.max_length, config.max_tokens_per_batch
    if config.fills_batches and most is not None:
        length = min(length, most)
        micro = math.ceil(most / length)  # the fewest rows that fill it
    else:
        micro = config.micro_batch
    flat = config.batching == "padding_free"
    compiled = bool(training.get("torch_compile"))
    kernels = chosen_kernels(config.fused_kernels, on_gpu=not lazy, compiled=compiled)
    return Run(
        shape=shape,
        engine=engine,
        ranks=ranks,
        micro_batch=micro,
        length=length,
        accumulation=training["gradient_accumulation_steps"],
        checkpointing=bool(training["activation_checkpointing"]),
        half=bool(training.get("bf16") or training.get("fp16")),
        padded=micro > 1 and not flat,
        packed=config.packing != "none",
        flat=flat,
        max_tokens=most,
        attention=config.attn_implementation or "rows",
        eval_batch=training.get("per_device_eval_batch_size", 8) if training.get("eval_strategy", "no") != "no" else 0,
        lazy=lazy,
        fused=kernels == "liger",
        choice=choice_of(config),
        sequence=config.sequence_parallel,
        inputs_on_host=config.offloads and not lazy,
        tiling="no" if compiled or kernels == "compile" else config.tiled_mlp,
        optimizer=planned_optimizer(config),
        clipped=training.get("max_grad_norm", 1.0) > 0,
        fused_steps=training.get("optim") != ADAMW,
        smoothed=training.get("label_smoothing_factor", 0) > 0,
        narrow=config.optimizer_dtype == "bfloat16",
    )


def _check_groups(group: int, shape: Shape, ranks: int) -> None:
    """Refuse ranks that cannot share rows evenly."""
    for number, what in ((ranks, "ranks"), (shape.heads, "attention heads")):
        if number % group:
            *fewer, last = [str(n) for n in range(1, number + 1) if ranks % n == shape.heads % n == 0]
            sizes = f"{', '.join(fewer)} or {last}" if fewer else last
            raise UserError(f"sequence_parallel: {group}: does not divide {number} {what}: write {sizes}")


def chosen_kernels(wanted: str, *, on_gpu: bool, compiled: bool) -> str:
    """What the key `fused_kernels` comes to: liger, compile or none.

    Args:
        wanted: one of them or auto, which is Liger's on a GPU where they are installed.
        on_gpu: where the model computes.
        compiled: `torch_compile` compiles the whole model.
    """
    if wanted != "auto":
        return wanted
    return "liger" if on_gpu and not compiled and has_liger() else "none"


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


@dataclass(frozen=True)
class Option:
    """A layout with a micro batch, and whether it fits."""

    name: str
    run: Run
    memory: Memory
    margin: int  # bytes of a GPU that the allocator and CUDA need beside
    node_bytes: int  # host memory of a node, for all of its ranks
    step: Step
    fits_gpu: bool
    fits_host: bool

    @property
    def gpu_bytes(self) -> int:
        return self.memory.device_bytes + self.margin

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.fits_host and not self.run.refused


def option(name: str, run: Run, hardware: Hardware, gpu_memory: float, host_memory: float | None) -> Option:
    """Judge one layout. `host_memory` is a node's, for all of its ranks; on a CPU (`run.lazy`) all is in there."""
    memory, margin, node_bytes = needed(run, hardware.gpus_per_node, gpu_memory)
    fits_host = host_memory is None or node_bytes <= host_memory
    fits_gpu = run.lazy or memory.device_bytes + margin <= gpu_memory
    return Option(name, run, memory, margin, node_bytes, step_time(run, hardware), fits_gpu, fits_host)


def needed(run: Run, per_node: int, gpu_memory: float) -> tuple[Memory, int, int]:
    """What a rank takes, the margin beside it, and bytes of host memory of all `per_node` ranks of a node."""
    if run.lazy:
        memory = peak(run)
        return memory, PYTHON, (memory.device_bytes + memory.host_bytes + PYTHON) * per_node
    # DeepSpeed flattens the weights on the host where a GPU has no room for two copies of them.
    memory = peak(run, loading=False)
    margin = CUDA_CONTEXT + int(FRAGMENTS * memory.device_bytes)
    return memory, margin, max(memory.host_bytes, loading_bytes(run, gpu_memory)) * per_node


def loading_bytes(run: Run, gpu_memory: float) -> int:
    """Host memory of a rank while it loads (`model/load.py`), and DeepSpeed makes its flat weights.

    Weights go to the GPU a tensor at a time; under stage 3 a rank's share is counted beside it. Stages 1 and 2 copy
    what is trained into one buffer (`stage_1_and_2.py`): on the GPU where that is free there, else on the host, from
    copies that lie on the host, too.
    """
    weights, engine = run.weights, run.engine
    tensor = max(weights.sizes) * run.weight
    trained, frozen = weights.number_trained * run.weight, weights.frozen_bytes(run.width)
    if engine.stage == 3:
        return -(-(trained + frozen) // run.ranks) + tensor
    flattened_on_gpu = engine.stage is None or CUDA_CONTEXT + frozen + 2 * trained <= gpu_memory
    return tensor if flattened_on_gpu else max(tensor, 2 * trained)


def options(base: Mapping[str, Run], hardware: Hardware, gpu_memory: float, host: float | None) -> list[Option]:
    """Every layout as the configuration has it."""
    return [option(name, run, hardware, gpu_memory, host) for name, run in base.items()]
