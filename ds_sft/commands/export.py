"""`ds-sft export CHECKPOINT OUT`: a checkpoint of any kind -> a model folder that anything can load. Needs no GPU.

    ds-sft export output/checkpoint-400 exported --dtype bfloat16

From Trainer's own checkpoints and from those of ZeRO-0 to 3, of any number of ranks; with the float32 masters of ZeRO-1
to 3. Tensors are read, converted and written one file of weights at a time: memory is that of one such file, and of
one layer where published files have other tensors than the model in memory (mixtures of experts).

Of a run with an adapter CHECKPOINT is one of its checkpoints, or its folder `adapter`; OUT then has what such a run
leaves: the adapter in OUT/adapter and, where the disk has room, the merged model. Memory is then that of the base, as
under train_only, whose checkpoints have the trained weights alone. `--base` says where the base lies now.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.commands.flags import FlagParser
from ds_sft.config.keys import RECORD
from ds_sft.config.read import load_config
from ds_sft.config.values import is_size
from ds_sft.errors import UserError, first_line
from ds_sft.plan.source import is_folder

if TYPE_CHECKING:
    import torch

    from ds_sft.checkpoints.consolidate import SavedWeight

MERGE = {"yes": "--merge", "no": "--adapter-only", "auto": ""}  # the key of a run -> our flag


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    given = _parse(argv)
    started = time.monotonic()
    # Heavy imports stand here: --help and mistakes are answered without them.
    from ds_sft.checkpoints.consolidate import open_weights
    from ds_sft.checkpoints.trained import TRAINED
    from ds_sft.export.weights import PARTIAL, move_into
    from ds_sft.plan.adapter import is_adapter

    with_adapter = is_adapter(given.checkpoint)
    frozen = with_adapter or (given.checkpoint / TRAINED).is_file()
    if (given.merge or given.adapter_only) and not with_adapter:
        flag = "--merge" if given.merge else "--adapter-only"
        raise UserError(f"{given.checkpoint}: has no adapter (adapter_config.json): leave out {flag}")
    if given.base and not frozen:
        raise UserError(f"{given.checkpoint}: has all its weights: leave out --base")
    if frozen:
        _export_frozen(given)
        return 0
    saved = open_weights(given.checkpoint)
    _require_manifest(given.checkpoint)
    dtype = _dtype(given)
    model = _empty_model(given)
    weights = _named(saved.weights, model, given, dtype) if saved.engine else saved.weights
    partial = given.out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = _write_weights(weights, partial, _dtypes(weights, model, dtype), given.max_shard_size)
    _write_rest(given, partial, dtype)
    move_into(given.out, partial)
    print(
        f"{given.checkpoint} ({saved.source}) -> {given.out}: {len(weights)} tensors, {size / 2**30:.2f} GiB in "
        f"{str(dtype).split('.')[1]}, in {time.monotonic() - started:.0f} s."
    )
    return 0


def _export_frozen(given: argparse.Namespace) -> None:
    """Of a checkpoint that is without its frozen weights."""
    from ds_sft.commands.export_frozen import export_adapter, export_trained
    from ds_sft.model.adapter_files import FOLDER
    from ds_sft.plan.adapter import is_adapter

    at_the_end = given.checkpoint.resolve().name == FOLDER  # what a run leaves there is no checkpoint
    manifest = {} if at_the_end else _require_manifest(given.checkpoint)
    export = export_adapter if is_adapter(given.checkpoint) else export_trained
    export(given, manifest, _dtype(given))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("export", __doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a folder checkpoint-N")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: what the run itself would export (config.yaml beside the checkpoint), else that of config.json",
    )
    parser.add_argument("--max_shard_size", default="5GB", help="of a file of weights, such as 500MB [%(default)s]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--merge",
        action="store_true",
        help="of an adapter: fail where the disk or the memory has no room for the model",
    )
    what.add_argument("--adapter-only", action="store_true", help="of an adapter: without the merged model")
    parser.add_argument("--base", help="of an adapter or train_only: its base, where that has moved [where it was]")
    given = parser.parse(_merge_as_flags(argv))
    if given.base:
        is_folder(given.base, "--base")
    if not is_size(given.max_shard_size):
        raise UserError(f"--max_shard_size: expected a size such as 5GB or 500MB, found {given.max_shard_size!r}")
    if given.out.exists() and (not given.out.is_dir() or {path.name for path in given.out.iterdir()} - {".export"}):
        raise UserError(f"{given.out}: exists and is not empty; give a new folder")
    return given


def _merge_as_flags(argv: Sequence[str]) -> list[str]:
    """`--merge no`, as a run's key is written, in the flags of this command; `--merge` alone is yes."""
    words = [part for word in argv for part in (word.split("=", 1) if word.startswith("--merge=") else [word])]
    for index in [index for index, word in enumerate(words) if word == "--merge"]:
        value = "".join(words[index + 1 : index + 2])
        if value in MERGE:
            words[index : index + 2] = [MERGE[value], ""]
    return [word for word in words if word]


def _require_manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint of our runs is complete when it has a manifest; those of other programs never have one: empty.

    Raises:
        UserError: it has none, or one that cannot be read, in a folder that a run of ours has reported its data in.
    """
    from ds_sft.checkpoints.manifest import Broken, read_manifest

    if not (checkpoint.resolve().parent / "data_report.json").exists():
        return {}
    try:
        return read_manifest(checkpoint)
    except Broken as error:
        raise UserError(f"{checkpoint}: {error}; take another checkpoint") from None


def _dtype(given: argparse.Namespace) -> torch.dtype:
    """`--dtype`; auto is what the run exports at its end."""
    import torch
    import yaml

    name = given.dtype
    record = given.checkpoint.resolve().parent / RECORD
    if name == "auto" and record.is_file():
        keys = yaml.safe_load(record.read_text(encoding="utf-8"))
        trained = "bfloat16" if keys.get("bf16") else "float16" if keys.get("fp16") else "float32"
        name = keys.get("export_dtype", "auto")
        name = trained if name == "auto" else name
    if name == "auto":
        config = _read_config(_folder_of_config(given))
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, name)  # type: ignore[no-any-return]


def _folder_of_config(given: argparse.Namespace) -> Path:
    """Where config.json is: an adapter has that of its base.

    Raises:
        UserError: the base is not here.
    """
    from ds_sft.model.adapter_files import find_base
    from ds_sft.plan.adapter import is_adapter
    from ds_sft.plan.size import model_folder

    if not is_adapter(given.checkpoint):
        return Path(given.checkpoint)
    base = given.base or find_base(given.checkpoint)
    folder = model_folder(base)
    if folder is None:
        raise UserError(
            f"{given.checkpoint}: its base {base} is neither a folder here nor in the hub's cache: say where it is, "
            "--base FOLDER, or fetch it: hf download"
        )
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no config.json in it; copy it from the model that training started from") from None
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'}: not JSON: {error}") from None
    return config


def _empty_model(given: argparse.Namespace) -> Any:
    """The model without memory for its weights: which there must be, and which are one."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(given.checkpoint, trust_remote_code=given.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=given.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{given.checkpoint}: {first_line(error)}") from error


def _named(
    weights: Mapping[str, SavedWeight], model: Any, given: argparse.Namespace, dtype: torch.dtype
) -> dict[str, SavedWeight]:
    """An engine's weights under the names of published files, tied ones once.

    Raises:
        UserError: a parameter of the model is missing, or has another shape.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    model.tie_weights()
    persistent = set(model.state_dict())
    wanted = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if n in persistent}
    wrong = [n for n, value in wanted.items() if n not in weights or weights[n].shape != tuple(value.shape)]
    if wrong:
        found = f"has shape {list(weights[wrong[0]].shape)}" if wrong[0] in weights else "is missing"
        raise UserError(f"{given.checkpoint}: {wrong[0]} {found}: the weights are not those of its config.json")
    named = {name: weights[name] for name in wanted}
    if not get_model_conversion_mapping(model, add_legacy=False):
        return named
    return _as_published(named, model, _dtypes(named, model, dtype))


def _as_published(
    weights: Mapping[str, SavedWeight], model: Any, dtypes: Mapping[str, torch.dtype]
) -> dict[str, SavedWeight]:
    """The weights of a model that transformers holds in other tensors than are published, as mixtures of experts.

    No published tensor is of two layers: one is converted at a time, when the first tensor of it is read.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    from ds_sft.checkpoints.consolidate import SavedWeight

    layers: dict[str, list[str]] = {}
    for name in weights:
        layers.setdefault(_layer_of(name), []).append(name)

    @lru_cache(maxsize=1)
    def convert(layer: str) -> dict[str, torch.Tensor]:
        whole = {name: weights[name].read().to(dtypes[name]) for name in layers[layer]}
        return revert_weight_conversion(model, whole)  # type: ignore[no-any-return]

    def read(layer: str, name: str) -> torch.Tensor:
        return convert(layer)[name]

    found = {}
    for layer, names in layers.items():
        empty = {name: torch.empty(weights[name].shape, dtype=dtypes[name], device="meta") for name in names}
        for name, value in revert_weight_conversion(model, empty).items():
            found[name] = SavedWeight(tuple(value.shape), partial(read, layer, name), value.dtype)
    return found


def _layer_of(name: str) -> str:
    """`model.layers.3` of `model.layers.3.mlp.gate.weight`; empty for what is in no layer."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else ""


def _dtypes(weights: Mapping[str, SavedWeight], model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What each tensor is written in: parameters in `dtype`; buffers keep theirs, as in the export of a run."""
    buffers = {name for name, _ in model.named_buffers()}
    return {
        name: dtype if weight.dtype.is_floating_point and name not in buffers else weight.dtype
        for name, weight in weights.items()
    }


def _write_weights(
    weights: Mapping[str, SavedWeight], folder: Path, target: Mapping[str, torch.dtype], max_shard_size: str
) -> int:
    """Write safetensors, and the index where there are several; the number of bytes."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from rich.progress import track
    from safetensors.torch import save_file

    empty = {name: torch.empty(weight.shape, dtype=target[name], device="meta") for name, weight in weights.items()}
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=max_shard_size)
    files = plan.filename_to_tensors
    for file, names in track(files.items(), "Writing", transient=True, disable=not sys.stdout.isatty()):
        shard = {name: weights[name].read().to(target[name]).contiguous() for name in names}
        save_file(shard, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return int(plan.metadata["total_size"])


def _write_rest(given: argparse.Namespace, folder: Path, dtype: torch.dtype) -> None:
    """Configuration, generation configuration, tokenizer and chat template."""
    from transformers import AutoTokenizer

    config = _read_config(given.checkpoint) | {"dtype": str(dtype).split(".")[1]}
    config.pop("use_cache", None)  # Trainer switches the cache off for training; on is what a model has by default
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in (given.checkpoint / "generation_config.json", *given.checkpoint.glob("modeling_*.py")):
        if file.is_file():
            shutil.copy(file, folder)
    for source in (given.checkpoint, given.checkpoint.resolve().parent):
        if (source / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=given.trust_remote_code)
            tokenizer.save_pretrained(folder)
            _tell_servers(given, tokenizer, folder)
            return
    print(f"{given.checkpoint} has no tokenizer: copy it from the model that training started from.")


def _tell_servers(given: argparse.Namespace, tokenizer: Any, folder: Path) -> None:
    """As the run itself would at its end: where an answer ends, and the chat template; its config.yaml knows both."""
    from ds_sft.data.serving import serving
    from ds_sft.export.weights import end_answers_at, save_tokenizer

    record = given.checkpoint.resolve().parent / RECORD
    if not record.is_file():
        return
    try:
        served = serving(load_config(["--config", str(record)]), tokenizer)
    except UserError as error:
        print(f"{error}: the end of an answer and the chat template in {given.out} are those of the model before")
        return
    save_tokenizer(tokenizer, folder, served.chat_template, served.end_ids)
    end_answers_at(served.end_ids, folder)
