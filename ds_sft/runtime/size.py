"""How large a model is and how large its checkpoints will be, from the headers of its files; loads no tensor."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_sft.config import Config

MAX_HEADER = 100 << 20  # bytes; the safetensors format's own limit


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters."""

    parameters: int
    tied: int  # of the embedding, where the output layer is the same tensor; else 0


def model_folder(name: str) -> Path | None:
    """The folder of a model on this disk: the one that is named, or the hub's cache; None where neither is."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def model_size(folder: Path) -> ModelSize | None:
    """Parameters of a model in safetensors files; None where it is in another format or not complete.

    Raises:
        OSError, ValueError: a file cannot be read, or is not what its name says.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if not all((folder / name).is_file() for name in names):
        return None
    shapes = {name: shape for file in names for name, shape in tensor_shapes(folder / file).items()}
    embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
    tied = embedding is not None and not any(name.endswith("lm_head.weight") for name in shapes)
    return ModelSize(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        tied=math.prod(shapes[embedding]) if embedding is not None and tied else 0,
    )


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Name -> shape of each tensor in a safetensors file: https://huggingface.co/docs/safetensors#format."""
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= MAX_HEADER:
            raise ValueError(f"{file}: not a safetensors file")
        header: dict[str, Any] = json.loads(stream.read(length))
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if file.stat().st_size < 8 + length + end:
        raise ValueError(f"{file}: is cut off: {file.stat().st_size:,} of {8 + length + end:,} bytes")
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def checkpoint_bytes(size: ModelSize, stage: int | None, config: Config) -> int:
    """Bytes of one checkpoint, all ranks together; 1 % is left out: tokenizer, random states, file headers.

    `stage` is ZeRO's, None without DeepSpeed. Adam keeps two float32 numbers a parameter, ZeRO float32 masters besides.
    Up to stage 2 DeepSpeed writes the weights a second time, and a tied embedding twice into the first.
    """
    half = bool(config.training.get("bf16") or config.training.get("fp16"))
    weight = 2 if half and stage is not None else 4
    if stage is None:
        return size.parameters * (4 + 8)
    if stage == 3:
        return size.parameters * (weight + 12)
    return size.parameters * (2 * weight + 12) + size.tied * weight


def weight_bytes(size: ModelSize, config: Config) -> int:
    """Bytes of the final model."""
    half = config.training.get("bf16") or config.training.get("fp16")
    dtype = {"auto": 2 if half else 4, "float32": 4}.get(config.export_dtype, 2)
    return size.parameters * dtype


def in_units(num_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    power = min(4, max(0, int(math.log2(max(num_bytes, 1)) // 10)))
    return f"{num_bytes:,.0f} bytes" if power == 0 else f"{num_bytes / 1024**power:,.1f} {' KMGT'[power]}iB"
