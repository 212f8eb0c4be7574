"""Where a model goes that one process loads to ask it: one GPU where it fits, else several, else the CPU."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_sft.plan.size import model_folder

GIB = 2**30
RESERVE = GIB  # bytes of a GPU for CUDA's libraries, activations, and what the allocator loses between blocks
# What torch, the C library and Rust say when there is no memory; Python has MemoryError.
OUT_OF_MEMORY = re.compile(r"out of memory|can(no|')t allocate memory|bad_alloc|not enough memory", re.IGNORECASE)


@dataclass(frozen=True)
class Placement:
    """Keywords of `from_pretrained`, and what the user is told where they are not one GPU, the first."""

    options: dict[str, Any]
    remark: str | None = None


def choose_devices(needed: int, free: Mapping[int, int]) -> list[int]:
    """The numbers of the GPUs that take `needed` bytes; none: they go to the CPU.

    Args:
        free: bytes of each GPU, the preferred one first. One that holds all is taken before several do.
    """
    fits = [number for number, size in free.items() if size >= needed]
    if fits:
        return fits[:1]
    first, *others = free
    chosen: list[int] = []
    for number in (first, *sorted(others, key=lambda other: -free[other])):
        chosen.append(number)
        if sum(int(0.9 * free[n]) for n in chosen) >= needed:  # layers are not cut: no GPU is filled to its last byte
            return chosen
    return []


def place(name: str, *, working: int = 0, use_cpu: bool) -> Placement:
    """Where the model `name`, a folder or a hub id, goes; `working`: bytes it takes beside its weights.

    Other GPUs than this process's own are looked at only where that one is too small: looking takes memory of them.
    """
    import torch

    if use_cpu or not torch.cuda.is_available():
        return Placement({"device_map": None})
    needed = weights_size(name) + working + RESERVE
    own = torch.cuda.current_device()
    free = {own: torch.cuda.mem_get_info(own)[0]}
    if free[own] < needed:
        others = [number for number in range(torch.cuda.device_count()) if number != own]
        free |= {number: torch.cuda.mem_get_info(number)[0] for number in others}
    devices = choose_devices(needed, free)
    if devices == [own]:
        return Placement({"device_map": {"": own}})
    small = f"{name} needs {needed / GIB:.1f} GiB, cuda:{own} has {free[own] / GIB:.1f} GiB free"
    if not devices:
        every = f", all {len(free)} GPUs {sum(free.values()) / GIB:.1f} GiB" if len(free) > 1 else ""
        return Placement({"device_map": None}, f"{small}{every}: it runs on the CPU, which is slow.")
    told = f"{small}: it is put on {' and '.join(f'cuda:{number}' for number in devices)}."
    if len(devices) == 1:
        return Placement({"device_map": {"": devices[0]}}, told)
    room = {number: free[number] - RESERVE for number in devices}
    return Placement({"device_map": "auto", "max_memory": room}, told)


def weights_size(name: str) -> int:
    """Bytes of a model's files of weights, in a folder or in the hub's cache; 0 where they are not to be found."""
    folder = model_folder(name)
    if folder is None:
        return 0
    index = folder / "model.safetensors.index.json"
    if index.is_file():  # others may lie beside them, as Mistral's consolidated.safetensors
        files = {folder / file for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    else:
        files = {*folder.glob("model.safetensors")} or {*folder.glob("*.safetensors")} or {*folder.glob("*.bin")}
    return sum(file.stat().st_size for file in files if file.is_file())


def cache_size(config: Any, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in 16 bits, of a model of this configuration."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 0)
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(heads, 1)
    return int(2 * 2 * getattr(text, "num_hidden_layers", 0) * key_heads * head_dim * tokens)


def logits_size(config: Any, tokens: int) -> int:
    """Bytes of the logits of so many tokens: 16 bits, and twice float32 where their cross-entropy is computed."""
    return int(10 * getattr(config.get_text_config(), "vocab_size", 0) * tokens)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one behind it, is a want of memory, on a GPU or not."""
    while error is not None:
        if isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
