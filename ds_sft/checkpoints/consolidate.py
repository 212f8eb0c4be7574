"""The whole weights of a checkpoint, one tensor at a time: from Trainer's safetensors or from any ZeRO stage's shards.

Shards are mapped into memory, not read: what is held is the tensor asked for. DeepSpeed's own `zero_to_fp32` joins all
of ZeRO-2's shards in memory first; where the pieces of a parameter lie is the same here as there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ds_sft.checkpoints.universal import load_data_only
from ds_sft.errors import UserError


@dataclass(frozen=True)
class SavedWeight:
    """A tensor that is still on disk."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a checkpoint, of which none is read yet."""

    source: str  # what it is, in words
    weights: dict[str, SavedWeight]
    engine: bool  # names are those of the model's parameters; else those of published files


def open_weights(folder: Path) -> SavedWeights:
    """Find the weights of a folder `checkpoint-N`; masters where ZeRO-1, 2 or 3 keep them, float32 for the most part.

    Raises:
        UserError: no checkpoint, a shard is missing or cannot be read.
    """
    if (folder / "latest").is_file():
        return _open_engine(folder)
    if any(folder.glob("model*.safetensors")):
        return _open_safetensors(folder)
    inside = sorted(path.name for path in folder.glob("checkpoint-*")) if folder.is_dir() else []
    if inside:
        raise UserError(f"{folder}: the folder of a run; give one of its checkpoints: {', '.join(inside)}")
    what = "neither `latest` (DeepSpeed) nor model.safetensors in it" if folder.is_dir() else "no such folder"
    raise UserError(f"{folder}: not a checkpoint: {what}; expected a folder such as output/checkpoint-400")


# ---- Trainer's own files


def _open_safetensors(folder: Path) -> SavedWeights:
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    files = sorted(_files_of_index(index)) if index.is_file() else ["model.safetensors"]
    _require(folder, files)
    weights = {}
    for file in files:
        try:
            shard: Any = safe_open(folder / file, "pt")
        except SafetensorError as error:
            raise UserError(f"{folder / file}: cannot be read: {error}") from None
        for name in shard.keys():  # noqa: SIM118 (not a mapping)
            value = shard.get_tensor(name)  # mapped, like the shards of DeepSpeed
            weights[name] = _whole(value)
    return SavedWeights(f"safetensors, {len(files)} file{'s' if len(files) > 1 else ''}", weights, engine=False)


def _files_of_index(index: Path) -> set[str]:
    import json

    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())


# ---- DeepSpeed's shards


def _open_engine(folder: Path) -> SavedWeights:
    state = folder / (folder / "latest").read_text(encoding="utf-8").strip()
    models = _by_rank(state, "model_states")
    if not models:
        raise UserError(f"{state}: no *_model_states.pt in it; the checkpoint is incomplete")
    first = _load(next(iter(models.values())))
    ranks = int(first["dp_world_size"])
    if int(first["mp_world_size"]) != 1:
        raise UserError(f"{state}: saved with tensor or pipeline parallelism, which is not supported")
    shapes = first["param_shapes"]
    if shapes is None:  # stage 0: whole weights, no shards
        weights = {name: _whole(value) for name, value in first["module"].items()}
        return SavedWeights(f"DeepSpeed without partitions, {ranks} ranks", weights, engine=True)
    optims = _by_rank(state, "optim_states")
    example = next(iter(optims.values()), state / "zero_pp_rank_0_mp_rank_00_optim_states.pt").name
    _require(state, [re.sub(r"rank_\d+_mp", f"rank_{rank}_mp", example) for rank in range(ranks)])
    masters = [_load(optims[rank])["optimizer_state_dict"] for rank in range(ranks)]
    stage = int(masters[0]["zero_stage"])
    weights = {name: _whole(first["module"][name]) for name in first["buffer_names"]}
    if stage == 3:
        _require(state, [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks)])
        weights |= _stage3(shapes, [master["fp32_flat_groups"] for master in masters])
    else:
        weights |= _stage2(shapes, masters)
    if first["frozen_param_shapes"]:
        raise UserError(f"{state}: has frozen parameters, which are not supported")
    return SavedWeights(f"ZeRO-{stage}, {ranks} rank{'s' if ranks > 1 else ''}", weights, engine=True)


def _by_rank(state: Path, kind: str) -> dict[int, Path]:
    """Rank -> its file; stages 0 to 2 have one file of model states without a rank."""
    found = {}
    for path in state.glob(f"*_{kind}.pt"):
        rank = re.search(r"zero_pp_rank_(\d+)_", path.name)
        found[int(rank[1]) if rank else 0] = path
    return dict(sorted(found.items()))


def _require(folder: Path, files: Sequence[str]) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} shards missing: {', '.join(missing[:3])}{more}; "
            "copy them from the nodes that wrote them"
        )


def _load(path: Path) -> dict[str, Any]:
    """The tensors stay in the file until they are used; nothing in it is run."""
    load_data_only()
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, ImportError, UnpicklingError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{path}: cannot be read: {said[0][:200]}") from None
    return content


def _whole(value: torch.Tensor) -> SavedWeight:
    return SavedWeight(tuple(value.shape), lambda: value, value.dtype)


def _stage2(shapes: Sequence[dict[str, torch.Size]], masters: Sequence[dict[str, Any]]) -> dict[str, SavedWeight]:
    """Stages 1 and 2: a group's parameters lie one behind the other, and the ranks have a slice of that each."""
    weights = {}
    for number, group in enumerate(shapes):
        pieces = [master["single_partition_of_fp32_groups"][number] for master in masters]
        paddings = (masters[0].get("param_alignment_paddings") or {number: [0] * len(group)})[number]
        start = 0
        for (name, shape), padding in zip(group.items(), paddings, strict=True):
            weights[name] = SavedWeight(
                tuple(shape), _reader([(pieces, start, start + shape.numel())], shape), pieces[0].dtype
            )
            start += shape.numel() + padding
        _check_end(start, sum(piece.numel() for piece in pieces), slack=2 * len(masters))
    return weights


def _stage3(
    shapes: Sequence[dict[str, torch.Size]], pieces: Sequence[Sequence[torch.Tensor]]
) -> dict[str, SavedWeight]:
    """Stage 3: each rank has an equal slice of every parameter, the last one padded."""
    weights, start = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        stop = start + -(-shape.numel() // len(pieces))
        weights[name] = SavedWeight(
            tuple(shape), _reader([(p, start, stop) for p in pieces], shape), pieces[0][0].dtype
        )
        start = stop
    _check_end(start, sum(piece.numel() for piece in pieces[0]), slack=0)
    return weights


def _check_end(used: int, there: int, *, slack: int) -> None:
    """Shards that are longer or shorter than the parameters are not this model's, or of a format not known here."""
    if not used <= there <= used + slack:
        raise UserError(f"the shards have {there:,} elements where the parameters have {used:,}: not one checkpoint's")


def _reader(ranges: Sequence[tuple[Sequence[torch.Tensor], int, int]], shape: torch.Size) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        parts = [part for pieces, start, stop in ranges for part in _slices(pieces, start, stop)]
        return torch.cat(parts)[: shape.numel()].view(shape)

    return read


def _slices(pieces: Sequence[torch.Tensor], start: int, stop: int) -> Iterator[torch.Tensor]:
    """The elements [start, stop) of vectors that lie one behind the other."""
    offset = 0
    for piece in pieces:
        low, high = max(start - offset, 0), min(stop - offset, piece.numel())
        if low < high:
            yield piece[low:high]
        offset += piece.numel()
