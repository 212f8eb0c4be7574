"""What is in the files that keys name: a project that was moved is the same run, under other names.

Whole models are not read for it. Those that frozen weights need are hashed by base.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

# Of config.json: what says where a model is from, which tokens end a text and how it is stored, not what it computes.
IDLE = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "use_cache",
        "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")  # fmt: skip
KINDS = ("model*.safetensors", "pytorch_model*.bin")  # in the order in which transformers looks for them
SAMPLES, SAMPLE = 2048, 16_384  # of a model's weights, about; bytes of each
AT_LEAST = 8  # samples of each file


def content(path: Path) -> str | None:
    """A hash of a file, or of a model's folder; None where it cannot be read, or has code of its own.

    Of weights `SAMPLES` places count, half of them where tensors begin: two models of which only some layers were
    trained apart differ there.
    """
    try:
        if path.is_file():
            return xxhash.xxh3_64(path.read_bytes()).hexdigest()
        if any(path.glob("*.py")):
            return None
        weights = xxhash.xxh3_64()
        files = weights_in(path)
        for file in files:
            weights.update(f"{file.name} {file.stat().st_size}".encode())
            for sample in _samples(file, max(AT_LEAST, SAMPLES // len(files))):
                weights.update(sample)
        return f"{weights.hexdigest()}-{hash_config(path / 'config.json')}"
    except (OSError, ValueError):
        return None


def weights_in(folder: Path) -> list[Path]:
    """The files of a model's weights, in the order of their names.

    Raises:
        FileNotFoundError: there are none.
    """
    for kind in KINDS:
        if files := sorted(folder.glob(kind)):
            return files
    raise FileNotFoundError(f"{folder}: no {' or '.join(KINDS)}")


def _samples(file: Path, number: int) -> Iterator[bytes]:
    """Of a file of weights, about `number`: from its head to its end, and where tensors begin."""
    size, half = file.stat().st_size, number // 2
    with file.open("rb") as weights:
        tensors = _tensors(weights.fileno(), size)
        places = [max(size - SAMPLE, 0) * place // (half - 1) for place in range(half)]
        for begin in places + tensors[:: max(1, -(-len(tensors) // half))]:
            yield os.pread(weights.fileno(), SAMPLE, begin)


def _tensors(file: int, size: int) -> list[int]:
    """Where the tensors of a safetensors file begin, in their order; none of another file."""
    head = int.from_bytes(os.pread(file, 8, 0), "little")
    if head + 8 > size:
        return []
    try:
        named = json.loads(os.pread(file, head, 8))
        return sorted(head + 8 + tensor["data_offsets"][0] for name, tensor in named.items() if name != "__metadata__")
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


def hash_config(file: Path) -> str:
    """A hash of what a config.json says that decides the model's outputs."""
    config = json.loads(file.read_text(encoding="utf-8"))
    return xxhash.xxh3_64(json.dumps(_computing(config), sort_keys=True).encode()).hexdigest()


def _computing(config: Any) -> Any:
    """What of a configuration decides the model's outputs; a key that is null is as one that is not there."""
    if not isinstance(config, dict):
        return config
    return {name: _computing(value) for name, value in config.items() if name not in IDLE and value is not None}
