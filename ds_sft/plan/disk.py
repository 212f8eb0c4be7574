"""Bytes that a run writes: a checkpoint, the final model."""

from __future__ import annotations

from typing import Protocol

from ds_sft.config.keys import Config
from ds_sft.plan.optimizer import FLOAT32, StateBytes


class Sized(Protocol):
    """A `Shape`, or what the headers of a model's files say (`plan/size.py`)."""

    @property
    def parameters(self) -> int: ...
    @property
    def embedding(self) -> int: ...
    @property
    def tied(self) -> bool: ...


def checkpoint_bytes(shape: Sized, *, stage: int | None, weight_bytes: int, kept: StateBytes = FLOAT32) -> int:
    """One `checkpoint-N`, of all ranks together, without the few MB of tokenizer, scheduler and random states.

    Args:
        stage: of ZeRO; None without DeepSpeed, where the weights themselves are the masters.
        weight_bytes: of a parameter in the model: 2 under DeepSpeed with bf16 or fp16, else 4.
        kept: of masters and of the optimizer's states.
    """
    weights = shape.parameters * weight_bytes  # model.safetensors
    if stage is None:
        return weights + round(shape.parameters * kept.moments)
    states = round(shape.parameters * sum(kept))  # *_optim_states.pt
    if stage == 3:
        return weights + states  # *_model_states.pt has no parameters
    # mp_rank_00_model_states.pt holds the weights again, and model.safetensors a tied embedding twice
    return 2 * weights + states + (shape.embedding * weight_bytes if shape.tied else 0)


def trained_checkpoint_bytes(
    trained: int, twice: int, *, stage: int | None, weight_bytes: int, kept: StateBytes = FLOAT32
) -> int:
    """One `checkpoint-N` where weights are frozen, which it leaves out.

    Args:
        trained: elements of what is trained.
        twice: of a tied head among them, which an adapter's file has under both its names.
        stage, weight_bytes, kept: as above.
    """
    file = (trained + twice) * kept.master  # adapter_model.safetensors or trained.safetensors
    if stage is None:
        return file + round(trained * kept.moments)
    states = round(trained * sum(kept))
    return file + states + (0 if stage == 3 else trained * weight_bytes)


def export_bytes(shape: Sized, export_bytes_per_parameter: int) -> int:
    """The final `model.safetensors`."""
    return shape.parameters * export_bytes_per_parameter


def final_bytes(model: int, trained: int, twice: int, config: Config) -> int:
    """What a run with frozen weights leaves: the model, of so many bytes; with adapters these, and it unless `merge` is
    no."""
    if config.adapter == "none":
        return model
    return adapter_bytes(trained, twice) + (0 if config.merge == "no" else model)


def adapter_bytes(trained: int, twice: int) -> int:
    """The final `adapter_model.safetensors`, in float32."""
    return (trained + twice) * FLOAT32.master
