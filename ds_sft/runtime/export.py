"""The final weights: whole, in the dtype asked for, tied weights once, from any ZeRO stage."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.config import Config
from ds_sft.runtime.distributed import Launch, barrier
from ds_sft.runtime.results import write_json
from ds_sft.runtime.verify import Question, verify_or_keep

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Trainer

PARTIAL = ".export"  # files are written here, then renamed into the output folder


VERIFIED_ROWS = 8


def export_dtype(config: Config) -> torch.dtype:
    """`export_dtype`; auto is the dtype that was trained in, so every launcher leaves the same files."""
    import torch

    if config.export_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.export_dtype)
        return dtype
    if config.training.get("bf16"):
        return torch.bfloat16
    return torch.float16 if config.training.get("fp16") else torch.float32


def export_model(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    config: Config,
    launch: Launch,
    *,
    end_ids: Sequence[int],
    chat_template: str,
) -> None:
    """Write model and tokenizer into the output folder; all ranks must call it.

    Args:
        end_ids: tokens that training taught to end an answer with.
        chat_template: the Jinja template that was trained with.
    """
    weights = full_weights(trainer.model, export_dtype(config), keep=launch.is_main)
    if launch.is_main:
        folder = config.output_dir / PARTIAL
        shutil.rmtree(folder, ignore_errors=True)
        _save(trainer.model, weights, config, folder)
        save_tokenizer(tokenizer, folder, chat_template)
        end_answers_at(end_ids, folder)
        move_into(config.output_dir, folder)
        launch.say(f"Model and tokenizer are in {config.output_dir} ({str(export_dtype(config)).split('.')[1]}).")
    barrier()


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


def full_value(parameter: Any) -> torch.Tensor:
    """The whole parameter on this rank, as precise as it is kept; a collective under ZeRO."""
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):  # set by DeepSpeed's ZeRO-1/2, ZeRO-3
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(parameter)
        if value is not None:
            return value  # type: ignore[no-any-return]
    return parameter  # type: ignore[no-any-return]


def _save(model: Any, weights: dict[str, torch.Tensor], config: Config, folder: Path) -> None:
    from transformers import AutoConfig

    model.save_pretrained(folder, state_dict=weights, max_shard_size=config.export_max_shard_size)
    # Trainer switched the cache off for training; whoever loads the model wants what its author set.
    original = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    exported = copy.deepcopy(model.config)
    exported.use_cache = getattr(original, "use_cache", True)
    exported.dtype = export_dtype(config)  # save_pretrained wrote the dtype of training
    exported.save_pretrained(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, chat_template: str) -> None:
    """Save it with this chat template alone: of several, others would be taken for tools."""
    exported = copy.copy(tokenizer)
    exported.chat_template = chat_template
    exported.save_pretrained(folder)


def end_answers_at(end_ids: Sequence[int], folder: Path) -> None:
    """Let the model in `folder` stop at these tokens, before its own, wherever a server looks for them.

    vLLM and `generate` read generation_config.json first; config.json is read where that is missing.
    """
    file = folder / "generation_config.json"
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    parts = [part for part in (model, model.get("text_config")) if part and part.get("eos_token_id") is not None]
    own: Any = next((part["eos_token_id"] for part in (generation, *parts) if part.get("eos_token_id") is not None), [])
    ends = list(dict.fromkeys([*end_ids, *(own if isinstance(own, list) else [own])]))
    if not ends:
        return
    for part in (generation, *parts):
        part["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(file, generation)
    write_json(folder / "config.json", model)


def move_into(output_dir: Path, folder: Path) -> None:
    """Put finished files in place; weights of an earlier export, perhaps in other shards, go first."""
    for old in (*output_dir.glob("model*.safetensors"), *output_dir.glob("model.safetensors.index.json")):
        old.unlink()
    for file in sorted(folder.iterdir()):
        file.chmod(0o644)  # safetensors writes 0600: others on a cluster could not read the model
        os.replace(file, output_dir / file.name)
    folder.rmdir()
