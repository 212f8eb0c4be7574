"""Which keys a DeepSpeed configuration may have, read from DeepSpeed's source: importing it would take seconds."""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from ds_sft.errors import UserError

# Keys that DeepSpeed 0.19 reads beside those its `constants.py` names: runtime/config.py, monitor/config.py,
# elasticity/, compression/, runtime/tensor_parallel/, runtime/activation_checkpointing/ and their siblings.
OTHER_KEYS = {
    "activation_checkpointing", "amp", "comet", "compile", "compression_training", "csv_monitor",
    "datastates_ckpt", "eigenvalue", "elasticity", "expert_parallel", "hybrid_engine", "load_universal_checkpoint",
    "nebula", "pipeline", "progressive_layer_drop", "sequence_parallel_size", "sparse_attention",
    "sparse_gradients", "tensor_parallel", "tensorboard", "timers", "wandb", "weight_quantization",
    "zero_optimization",
}  # fmt: skip
# Blocks whose keys are the fields of a class in DeepSpeed's source.
BLOCKS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_optimizer": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadOptimizerConfig"),
    "zero_optimization.offload_param": ("runtime/zero/offload_config.py", "DeepSpeedZeroOffloadParamConfig"),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
}


@cache
def known_keys() -> frozenset[str]:
    """Top-level keys."""
    found: set[str] = set()
    for file in package_folder("deepspeed").glob("*/**/constants.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                found.add(node.value.value)
    deeper = {"type", "params"}.union(*(fields_of(file, cls) for file, cls in BLOCKS.values()))
    return frozenset(found - deeper | OTHER_KEYS)


@cache
def fields_of(file: str, cls: str) -> frozenset[str]:
    """Names and aliases (both may be written) of the fields of a pydantic class in DeepSpeed's source."""
    tree = ast.parse((package_folder("deepspeed") / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls)
    names = set()
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            options = node.value.keywords if isinstance(node.value, ast.Call) else []
            aliases = (o.value.value for o in options if o.arg == "alias" and isinstance(o.value, ast.Constant))
            names |= {node.target.id, *map(str, aliases)}
    return frozenset(names)


@cache
def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is not installed: pip install {name}")
    return Path(spec.submodule_search_locations[0])
