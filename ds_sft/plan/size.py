"""How large a model of any architecture is, from the headers of its files; loads no tensor."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.adapter import read_json
from ds_sft.plan.disk import checkpoint_bytes, export_bytes, final_bytes, trained_checkpoint_bytes
from ds_sft.plan.optimizer import state_bytes
from ds_sft.plan.run import planned_weights
from ds_sft.plan.shape import FAMILIES, MIXTURES, Shape, read_shape
from ds_sft.plan.weights import ALL, Choice, weights_of

MAX_HEADER = 100 << 20  # bytes; the safetensors format's own limit


@dataclass(frozen=True)
class ModelSize:
    """Numbers of parameters."""

    parameters: int
    embedding: int
    tied: bool  # the output projection is the embedding
    trained: int | None = None  # where others are frozen; None: all are trained
    frozen: int = 0
    twice: int = 0  # of a tied head among them, see `trained_checkpoint_bytes`
    active: int | None = None  # that a token meets, in a mixture of experts; None: all


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


def model_size(folder: Path, choice: Choice = ALL) -> ModelSize | None:
    """Parameters of a model in safetensors files; None where it is in another format or not complete.

    What `choice` trains is counted by the names in the files, of a mixture of experts that can be planned by those in
    memory, where experts are joined. Of other architectures transformers may join what is apart there, and a run's own
    count differs; or it has other names, such as transformer.h.0 of GPT-2's h.0: None where these are meant.

    Raises:
        OSError, ValueError: a file cannot be read, or is not what its name says.
        UserError: `choice` names nothing in it, and the files have the names of the model.
    """
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if not all((folder / name).is_file() for name in names):
        return None
    found = {name: tuple(shape) for file in names for name, shape in tensor_shapes(folder / file).items()}
    mixture = _mixture(folder)
    shapes = mixture.shapes() if mixture is not None else found
    embedding = next((name for name in shapes if name.endswith("embed_tokens.weight")), None)
    try:
        weights = weights_of(shapes, choice) if mixture is None else planned_weights(mixture, choice)
    except UserError:
        if read_json(folder / "config.json").get("model_type") in (*FAMILIES, *MIXTURES):
            raise
        return None
    return ModelSize(
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        embedding=0 if embedding is None else math.prod(shapes[embedding]),
        tied=not any(name.endswith("lm_head.weight") for name in shapes),
        trained=None if choice.whole else weights.number_trained,
        frozen=weights.number_frozen,
        twice=weights.twice,
        active=None if mixture is None else mixture.active,
    )


def _mixture(folder: Path) -> Shape | None:
    """The shape of a mixture of experts that can be planned; files have each expert apart, and what no run loads."""
    try:
        shape = read_shape(str(folder))
    except UserError:
        return None
    return shape if shape.experts is not None else None


def parameters_in_words(size: ModelSize) -> str:
    """30,532,122,624 parameters, 3,353,032,704 of them active."""
    active = "" if size.active is None else f", {size.active:,} of them active"
    return f"{size.parameters:,} parameters{active}"


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


def written_bytes(size: ModelSize, stage: int | None, config: Config) -> tuple[int, int]:
    """Bytes of one checkpoint of all ranks together, and of the final model; `stage` is ZeRO's, None without it."""
    half = bool(config.training.get("bf16") or config.training.get("fp16"))
    kept = state_bytes(config)
    weight = 2 if half and stage is not None else kept.master
    exported = export_bytes(size, {"auto": 2 if half else 4, "float32": 4}.get(config.export_dtype, 2))
    if size.trained is None:
        return checkpoint_bytes(size, stage=stage, weight_bytes=weight, kept=kept), exported
    one = trained_checkpoint_bytes(size.trained, size.twice, stage=stage, weight_bytes=weight, kept=kept)
    return one, final_bytes(exported, size.trained, size.twice, config)


def in_units(num_bytes: float) -> str:
    """1536 -> 1.5 KiB."""
    power = min(4, max(0, int(math.log2(max(num_bytes, 1)) // 10)))
    return f"{num_bytes:,.0f} bytes" if power == 0 else f"{num_bytes / 1024**power:,.1f} {' KMGT'[power]}iB"
