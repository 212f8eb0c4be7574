"""What `ds-sft export` makes of a checkpoint that is without its frozen weights: the base is loaded for them.

An adapter becomes what a run leaves at its end, in the same bytes: OUT/adapter, and the merged model in OUT. Weights
that `train_only` named become a whole model.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.checkpoints.base import require_base
from ds_sft.checkpoints.identity import BASE
from ds_sft.checkpoints.trained import TRAINED
from ds_sft.config.keys import RECORD, Config
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.export.merge import NoRoom, merge, require_memory, require_room
from ds_sft.export.weights import (
    PARTIAL,
    end_answers_at,
    finish_adapter,
    move_into,
    own_ends,
    save_tokenizer,
    say_how_its_base_is_loaded,
    say_where_answers_end,
)
from ds_sft.model.adapter_files import (
    COMPUTED_IN,
    FACTS,
    FOLDER,
    QUANTIZATION,
    ROPE_SCALING,
    WEIGHTS,
    facts_of,
    find_base,
    from_anywhere,
    load_base,
)
from ds_sft.plan.adapter import CONFIG, base_of, is_adapter, read_json
from ds_sft.results import write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


GIVE_BASE = "--base FOLDER"


# ---- An adapter


def export_adapter(given: argparse.Namespace, manifest: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write OUT/adapter and, unless it was not asked for, or the disk has no room, the merged model.

    Args:
        given: the command line.
        manifest: of the checkpoint; empty for an adapter that a run has left at its end, or another program.
        dtype: of the merged model.

    Raises:
        NoRoom: --merge, and the disk or the memory has none; nothing is written.
        UserError: the base is another one than was trained on, or the adapter does not fit it.
    """
    base, facts = given.base or find_base(given.checkpoint), facts_of(given.checkpoint) | _facts(manifest)
    require_base(given.checkpoint, base, facts.get(BASE), GIVE_BASE)
    if given.merge:
        require_room(given.out, base, dtype, given.trust_remote_code)
        require_memory(base, dtype, given.trust_remote_code)
    end_ids = _write_adapter(given, facts)
    print(f"{given.checkpoint} -> {given.out / FOLDER}: an adapter of {base}.")
    say_where_answers_end(given.out / FOLDER, end_ids)
    say_how_its_base_is_loaded(given.out / FOLDER, trust_remote_code=given.trust_remote_code)
    if given.adapter_only:
        return
    try:
        merge(given.out / FOLDER, given.out, dtype, max_shard_size=given.max_shard_size,
              trust_remote_code=given.trust_remote_code)  # fmt: skip
    except NoRoom as error:
        print(f"Not merged: {error}.")
    else:
        print(f"{given.out}: {base} with the adapter merged in float32, in {str(dtype).split('.')[1]}.")


def _facts(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """What a run writes beside its adapter at the end, see `model/adapter_files.py`, from a checkpoint's manifest."""
    keys = manifest.get("config")
    if keys is None:
        return {}
    computed_in = "bfloat16" if keys.get("bf16") else "float16" if keys.get("fp16") else "float32"
    facts = {QUANTIZATION: keys.get("quantization", "none"), COMPUTED_IN: computed_in}
    facts |= {ROPE_SCALING: keys[ROPE_SCALING]} if keys.get(ROPE_SCALING) else {}
    return facts | ({BASE: manifest[BASE]} if BASE in manifest else {})


def _write_adapter(given: argparse.Namespace, facts: Mapping[str, Any]) -> list[int]:
    """Tokens that end its answers."""
    partial = given.out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        shutil.copy(given.checkpoint / name, partial)
    base = given.base or find_base(given.checkpoint)
    if from_anywhere(base) != base_of(given.checkpoint):
        keys = read_json(partial / CONFIG) | {"base_model_name_or_path": from_anywhere(base)}
        write_json(partial / CONFIG, keys)
    if facts:
        write_json(partial / FACTS, facts)
    tokenizer, end_ids, template = _served(given)
    finish_adapter(given.out, partial, tokenizer, end_ids=end_ids, chat_template=template)
    return end_ids


def _served(given: argparse.Namespace) -> tuple[PreTrainedTokenizerBase, list[int], str]:
    """Tokenizer, tokens that end an answer, chat template: as the run would write them, whose config.yaml knows."""
    from transformers import AutoTokenizer

    from ds_sft.data.serving import serving

    beside = (given.checkpoint / "tokenizer_config.json").is_file() or not is_adapter(given.checkpoint)
    source = given.checkpoint if beside else given.base or find_base(given.checkpoint)  # peft writes none
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=given.trust_remote_code)
    config = config_beside(given.checkpoint)
    try:
        if config is None:
            return tokenizer, own_ends(given.checkpoint), tokenizer.chat_template
        served = serving(config, tokenizer)
    except UserError as error:
        print(f"{error}: the end of an answer and the chat template in {given.out} are those of the model before")
        return tokenizer, own_ends(given.checkpoint), tokenizer.chat_template
    return tokenizer, served.end_ids, served.chat_template


def config_beside(checkpoint: Path) -> Config | None:
    """The configuration of the run that has left a folder; None where it is nowhere."""
    record = checkpoint.resolve().parent / RECORD
    return load_config(["--config", str(record)]) if record.is_file() else None


# ---- Weights that `train_only` named


def export_trained(given: argparse.Namespace, manifest: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Write the base with the trained weights in it.

    Raises:
        UserError: the run's config.yaml is missing, the base is another one, or has no such weights.
    """
    import torch
    from safetensors.torch import load_file

    config = config_beside(given.checkpoint)
    if config is None:
        raise UserError(
            f"{given.checkpoint}: has the trained weights alone, and no config.yaml beside it names the base"
        )
    base = given.base or config.model_name_or_path
    require_base(given.checkpoint, base, manifest.get(BASE), GIVE_BASE)
    computed_in = getattr(torch, _facts(manifest).get(COMPUTED_IN, "float32"))
    model = load_base(base, config.rope_scaling, dtype=computed_in, trust_remote_code=given.trust_remote_code)
    weights = load_file(given.checkpoint / TRAINED)
    _make_room(model, weights)
    state = {name: parameter.detach() for name, parameter in model.named_parameters()}
    strange = [name for name, value in weights.items() if name not in state or state[name].shape != value.shape]
    if strange:
        raise UserError(f"{given.checkpoint}: {strange[0]} is no weight of {base}, or has another shape there")
    state = {name: weights.get(name, value).to(dtype) for name, value in state.items()}
    _write_model(given, model, state, dtype)
    print(
        f"{given.checkpoint} ({len(weights)} trained weights) on {base} -> {given.out}: in {str(dtype).split('.')[1]}."
    )


def _make_room(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Under `resize_embeddings` the trained embedding has more rows than the base's."""
    from ds_sft.model.embeddings import resize_embeddings

    embedding = model.get_input_embeddings().weight
    rows = [len(weights[n]) for n, p in model.named_parameters() if p is embedding and n in weights]
    resize_embeddings(model, max(rows, default=0))


def _write_model(given: argparse.Namespace, model: Any, state: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    saved = set(model.state_dict())
    buffers = {name: value for name, value in model.named_buffers() if name in saved}
    partial = given.out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    model.config.dtype = dtype
    model.save_pretrained(partial, state_dict=state | buffers, max_shard_size=given.max_shard_size)
    tokenizer, end_ids, template = _served(given)
    save_tokenizer(tokenizer, partial, template, end_ids)
    end_answers_at(end_ids, partial)
    move_into(given.out, partial)
