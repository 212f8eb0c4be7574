"""The final weights: whole, in the dtype asked for, tied weights once, from any ZeRO stage."""

from __future__ import annotations

import copy
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.checkpoints.identity import BASE
from ds_sft.config.keys import Config
from ds_sft.engine.values import full_value
from ds_sft.export.verify import Question, verify_or_keep
from ds_sft.model import adapter_files
from ds_sft.model.dtype import computed_in, export_dtype
from ds_sft.plan.size import model_folder
from ds_sft.ranks.collectives import barrier
from ds_sft.ranks.launch import Launch, print_line
from ds_sft.results import write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

PARTIAL = ".export"  # files are written here, then renamed into the output folder
GENERATION = "generation_config.json"
TOKENIZER = "tokenizer_config.json"

VERIFIED_ROWS, VERIFIED_TOKENS = 8, 8192  # tokens of a row: a fresh process makes logits of them all, 5 GB in float32


def adapter_facts(config: Config, *, base: str) -> dict[str, Any]:
    """What is remembered beside an adapter; `base`: hash of the base's files, "" where none was made."""
    facts: dict[str, Any] = {
        adapter_files.QUANTIZATION: config.quantization,
        adapter_files.COMPUTED_IN: computed_in(config),
    }
    facts |= {adapter_files.ROPE_SCALING: config.rope_scaling} if config.rope_scaling else {}
    return facts | ({adapter_files.BASE: base} if base else {})


def export_model(
    trainer: Any,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    launch: Launch,
    *,
    end_ids: Sequence[int],
    chat_template: str,
) -> None:
    """Write model and tokenizer into the output folder, or adapter and tokenizer into its folder `adapter`.

    All ranks must call it.

    Args:
        end_ids: tokens that training taught to end an answer with.
        chat_template: the Jinja template that was trained with.
    """
    from ds_sft.checkpoints.trained import trained_weights

    folder = config.output_dir / PARTIAL
    if launch.is_main:
        shutil.rmtree(folder, ignore_errors=True)
    if config.adapter != "none":
        weights = trained_weights(trainer.model, keep=launch.is_main)
        if launch.is_main:
            adapter_files.save_adapter(trainer.model, weights, folder)
            write_json(folder / adapter_files.FACTS, adapter_facts(config, base=trainer.run.identity.get(BASE, "")))
            finish_adapter(config.output_dir, folder, tokenizer, end_ids=end_ids, chat_template=chat_template)
            launch.say(f"Adapter and tokenizer are in {config.output_dir / adapter_files.FOLDER} (float32).")
            say_where_answers_end(config.output_dir / adapter_files.FOLDER, end_ids)
            say_how_its_base_is_loaded(
                config.output_dir / adapter_files.FOLDER, trust_remote_code=config.trust_remote_code
            )
    else:
        weights = full_weights(trainer.model, export_dtype(config), keep=launch.is_main)
        if launch.is_main:
            _save(trainer.model, weights, config, folder)
            save_tokenizer(tokenizer, folder, chat_template, end_ids)
            end_answers_at(end_ids, folder)
            move_into(config.output_dir, folder)
            shutil.rmtree(config.output_dir / adapter_files.FOLDER, ignore_errors=True)  # an earlier run's
            launch.say(f"Model and tokenizer are in {config.output_dir} ({str(export_dtype(config)).split('.')[1]}).")
    barrier()


def finish_adapter(
    output_dir: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, *, end_ids: Sequence[int], chat_template: str
) -> None:
    """Put what a server must know beside the adapter in `folder`, and all of it in place.

    A merged model that is in `output_dir` is another adapter's, and goes.
    """
    save_tokenizer(tokenizer, folder, chat_template, end_ids)
    base = model_folder(adapter_files.find_base(folder))
    generation, model = (_read(base / name) if base else {} for name in (GENERATION, "config.json"))
    _write_generation(folder, generation, model, end_ids)
    let_others_read(folder)
    _remove_weights(output_dir)
    for name in ("config.json", GENERATION):
        (output_dir / name).unlink(missing_ok=True)
    shutil.rmtree(output_dir / adapter_files.FOLDER, ignore_errors=True)
    folder.rename(output_dir / adapter_files.FOLDER)


def let_others_read(folder: Path) -> None:
    """Let everybody read the files in a folder: safetensors writes its own with mode 0600, for this user alone."""
    for file in folder.iterdir():
        file.chmod(0o644)


def say_where_answers_end(folder: Path, end_ids: Sequence[int]) -> None:
    """Say it where the base of the adapter in `folder` knows other ends: who serves both reads the base's files."""
    base = model_folder(adapter_files.find_base(folder))
    if base is not None and not set(end_ids) <= set(own_ends(base)):
        print_line(
            f"The base ends answers at other tokens: who serves it with the adapter gives the server "
            f"{folder / GENERATION}, or answers do not stop."
        )


def say_how_its_base_is_loaded(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Say it of an adapter in `folder` that was trained beside a base in 4 bits, or one with scaled positions: peft's
    files do not."""
    loading = adapter_files.loading_in_4_bits(adapter_files.facts_of(folder))
    if loading:
        print_line(
            f"Its base was in 4 bits, and is another model in 16. To put the adapter on it: AutoModelForCausalLM."
            f"from_pretrained({adapter_files.find_base(folder)!r}, {loading}). A merged model is whole by itself."
        )
    if changes := adapter_files.changes_of_config(folder, trust_remote_code=trust_remote_code):
        print_line(
            f"Its base was trained with other positions than its config.json says. Whoever serves both gives them: "
            f"vllm serve --hf-overrides {shlex.quote(json.dumps(changes))}. A merged model is whole by itself."
        )


def rows_to_verify(rows: Any) -> Any:
    """The first rows of a data set, of a long one a stretch with the first token that is learned."""
    from datasets import Dataset

    first = rows.take(VERIFIED_ROWS)
    if all(len(row["input_ids"]) <= VERIFIED_TOKENS for row in first):
        return first
    return Dataset.from_list([_stretch(row) for row in first], features=first.features)


def _stretch(row: dict[str, list[int]]) -> dict[str, list[int]]:
    learned = next((i for i, label in enumerate(row["labels"]) if label != -100), 0)
    start = max(0, min(learned - VERIFIED_TOKENS // 2, len(row["labels"]) - VERIFIED_TOKENS))
    return {name: row[name][start : start + VERIFIED_TOKENS] for name in ("input_ids", "labels")}


def check_export(rows: Any, trained_loss: float | None, config: Config) -> dict[str, Any] | None:
    """Compare the exported model's loss on `rows` with the trained engine's; what `run.json` says about it.

    None where the engine was not asked (`verify_export: no`). What could not be asked for want of memory is left in
    the folder for `ds-sft verify`.
    """
    if trained_loss is None:
        return None
    dtypes = [
        str(export_dtype(replace(config, export_dtype=name))).split(".")[1] for name in ("auto", config.export_dtype)
    ]
    question = Question(
        rows=[{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows],
        trained_loss=trained_loss,
        dtypes=dtypes,
        use_cpu=bool(config.training.get("use_cpu")),
        trust_remote_code=config.trust_remote_code,
    )
    return verify_or_keep(config.output_dir, question)


def full_weights(model: Any, dtype: torch.dtype, *, keep: bool) -> dict[str, torch.Tensor]:
    """Every parameter and saved buffer, whole, on the CPU; one parameter is gathered at a time.

    The values are those of the float32 masters where DeepSpeed keeps them, else of the weights themselves. Tied weights
    appear once, under their first name. All ranks must call it; those without `keep` get an empty dict.
    """
    weights: dict[str, Any] = {}
    for name, parameter in model.named_parameters():  # yields a tied parameter once
        value = full_value(parameter)
        if keep:
            weights[name] = value.detach().to("cpu", dtype, copy=True).contiguous()
    if keep:
        saved = set(model.state_dict().keys())  # leaves out buffers that are computed, such as rotary frequencies
        weights |= {n: b.detach().cpu().clone() for n, b in model.named_buffers() if n in saved}
    return weights


def _save(model: Any, weights: dict[str, torch.Tensor], config: Config, folder: Path) -> None:
    from transformers import AutoConfig

    model.save_pretrained(folder, state_dict=weights, max_shard_size=config.export_max_shard_size)
    # Trainer switched the cache off for training; whoever loads the model wants what its author set.
    original = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    exported = copy.deepcopy(model.config)
    exported.use_cache = getattr(original, "use_cache", True)
    exported.dtype = export_dtype(config)  # save_pretrained wrote the dtype of training
    exported.save_pretrained(folder)


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str, end_ids: Sequence[int]
) -> None:
    """Save it with this chat template alone: of several, others would be taken for tools.

    Its end of text is the first of these ends: llama.cpp's converter reads it there, and no generation_config.json. But
    where the template writes the tokenizer's own, which would then be another text.
    """
    with_template(tokenizer, chat_template).save_pretrained(folder)
    if end_ids and tokenizer.eos_token_id not in end_ids and "eos_token" not in chat_template:
        end = tokenizer.convert_ids_to_tokens(end_ids[0])  # in the file: the copy shares its special tokens
        write_json(folder / TOKENIZER, _read(folder / TOKENIZER) | {"eos_token": end})


def with_template(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> PreTrainedTokenizerBase:
    """The tokenizer with this chat template; the one given keeps its own, which answers are encoded by."""
    exported = copy.copy(tokenizer)
    exported.chat_template = chat_template
    return exported


def end_answers_at(end_ids: Sequence[int], folder: Path) -> None:
    """Let the model in `folder` stop at these tokens, before its own, wherever a server looks for them.

    vLLM and `generate` read generation_config.json first; config.json is read where that is missing.
    """
    model = _read(folder / "config.json")
    ends = _write_generation(folder, _read(folder / GENERATION), model, end_ids)
    if ends:
        for part in _parts_that_end(model):
            part["eos_token_id"] = ends if len(ends) > 1 else ends[0]
        write_json(folder / "config.json", model)


def _write_generation(folder: Path, own: dict[str, Any], model: dict[str, Any], end_ids: Sequence[int]) -> list[int]:
    """generation_config.json with these ends before those of `own`, else of the configuration `model`; all ends."""
    ends = list(dict.fromkeys([*end_ids, *_ends_of(own, *_parts_that_end(model))]))
    if ends:
        write_json(folder / GENERATION, own | {"eos_token_id": ends if len(ends) > 1 else ends[0]})
    return ends


def _parts_that_end(model: dict[str, Any]) -> list[dict[str, Any]]:
    """The parts of a config.json that say where an answer ends."""
    return [part for part in (model, model.get("text_config")) if part and part.get("eos_token_id") is not None]


def _ends_of(*parts: dict[str, Any]) -> list[int]:
    """The tokens that end an answer by the first part that says it."""
    own: Any = next((part["eos_token_id"] for part in parts if part.get("eos_token_id") is not None), [])
    return own if isinstance(own, list) else [own]


def own_ends(folder: Path) -> list[int]:
    """The tokens that end an answer by the files of a model or an adapter in `folder`."""
    return _ends_of(_read(folder / GENERATION), *_parts_that_end(_read(folder / "config.json")))


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def move_into(output_dir: Path, folder: Path) -> None:
    """Put finished files in place; weights of an earlier export, perhaps in other shards, go first."""
    _remove_weights(output_dir)
    let_others_read(folder)
    for file in sorted(folder.iterdir()):
        os.replace(file, output_dir / file.name)
    folder.rmdir()


def _remove_weights(output_dir: Path) -> None:
    for old in (*output_dir.glob("model*.safetensors"), *output_dir.glob("model.safetensors.index.json")):
        old.unlink()
