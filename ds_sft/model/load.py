"""Tokenizer and model loading."""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.dtype import computing_dtype, loading_dtype
from ds_sft.model.quantized import nf4_config, require_bitsandbytes, require_float, settle, skeleton
from ds_sft.model.rotary import read_config, scaled_options
from ds_sft.plan.shape import positions_of, resized_vocab
from ds_sft.plan.size import model_folder, tensor_shapes
from ds_sft.plan.source import require_model
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt, malloc.h


def load_tokenizer(config: Config, launch: Launch) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token, which ends every answer, is replaced by the end-of-sequence token.

    Also looks for the model's configuration, so that a wrong `model_name_or_path` is found before data is encoded.

    Raises:
        UserError: no such model, or a tokenizer this package cannot use.
    """
    name = config.model_name_or_path
    if remark := require_model(name):
        launch.say(remark)
    require_bitsandbytes(config.quantization, config.training.get("optim", ""))
    try:
        found = read_config(name, trust_remote_code=config.trust_remote_code, scaling=config.rope_scaling)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {name}: {_first_line(error)}") from error
    require_float(found, name, config.quantization)
    tokenizer = open_tokenizer(name, launch, trust_remote_code=config.trust_remote_code)
    if config.rope_scaling is not None:  # a server takes the smaller of the tokenizer's length and the model's
        tokenizer.model_max_length = max(tokenizer.model_max_length, positions_of(found.get_text_config().to_dict()))
    return tokenizer


def open_tokenizer(name: str, launch: Launch, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in `name`, a folder, of an adapter too, or a hub id, as `load_tokenizer` leaves it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {name}: {_first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"model_name_or_path: {name}: has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model_name_or_path: {name}: its tokenizer has neither a pad nor an eos token")
        launch.say(f"The tokenizer has no pad token: {tokenizer.eos_token!r} (eos) ends the answers instead.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # training batches; left is for generation
    return tokenizer


def _first_line(error: BaseException) -> str:
    """What transformers says, without the paragraphs that follow."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def read_ahead(config: Config, launch: Launch) -> None:
    """Let the system read the weights from disk while the data are prepared; on each node local rank 0.

    A hint: it returns at once, and whoever loads them later finds in memory what has come by then.
    """
    from huggingface_hub import try_to_load_from_cache

    if launch.local_rank != 0 or not hasattr(os, "posix_fadvise"):
        return
    folder = Path(config.model_name_or_path).expanduser()
    if not folder.is_dir():
        cached = try_to_load_from_cache(config.model_name_or_path, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
    for file in sorted(folder.glob("*.safetensors")):
        with suppress(OSError), file.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def load_model(config: Config, args: TrainingArguments) -> PreTrainedModel:
    """Load the model to train; under ZeRO-3 every rank receives its share only, which `args` has arranged.

    Raises:
        UserError: the folder has no usable weights.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    name, trust = config.model_name_or_path, config.trust_remote_code
    options: dict[str, Any] = {"dtype": loading_dtype(config, args), "trust_remote_code": trust}
    options |= scaled_options(name, config.rope_scaling, trust_remote_code=trust)
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if args.device.type == "cuda" and not is_deepspeed_zero3_enabled():
        options["device_map"] = {"": args.device}  # else every rank of a node has the whole model in host memory first
    if config.quantization == "nf4":
        bare = skeleton(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
        whole = config.lora_modules_to_save or []
        options["quantization_config"] = nf4_config(bare, computing_dtype(args), whole)
    try:
        with freed_memory_returned() if is_deepspeed_zero3_enabled() else nullcontext():
            model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{_blamed(config, error)}: {_first_line(error)}") from error
    if config.quantization == "nf4":
        settle(model)
    elif getattr(model, "is_quantized", False):
        raise UserError(
            f"model_name_or_path: {config.model_name_or_path}: its weights are quantised, and cannot be trained here; "
            "give the model they were made of"
        )
    mend_generation_config(model)
    return model


def _blamed(config: Config, error: BaseException) -> str:
    """The key, and its value, for which a model cannot be loaded."""
    asked = config.attn_implementation
    if asked is not None and re.search(r"attention|attn|`kernels`", str(error), re.IGNORECASE):
        return f"attn_implementation: {asked}"
    return f"model_name_or_path: {config.model_name_or_path}"


def say_not_loaded(model: PreTrainedModel, name: str, launch: Launch) -> None:
    """Say which published weights transformers has no layers for, and leaves out without a word: those that predict
    further tokens (MTP) of DeepSeek-V3, GLM-4.5 and others."""
    if not launch.is_main:
        return
    known = "|".join(model._keys_to_ignore_on_load_unexpected or ()) or "(?!)"
    layers = model.config.get_text_config().num_hidden_layers  # one size's last layer is another's in the middle
    left = [key for key in published_weights(name) if re.search(known, key) and not 0 <= _layer(key) < layers]
    if left:
        launch.say(
            f"{name}: {len(left):,} of its tensors are not loaded, {left[0]} the first: transformers has no layers for "
            "them (multi-token prediction, as a rule). They are not trained, and the final model is without them."
        )


def _layer(key: str) -> int:
    """61 of model.layers.61.eh_proj.weight; -1 of what is in no layer."""
    found = re.match(r"model\.layers\.(\d+)\.", key)
    return int(found[1]) if found else -1


def published_weights(name: str) -> list[str]:
    """Names of the tensors in a model's safetensors files; none where it has none here."""
    folder = model_folder(name)
    if folder is None:
        return []
    with suppress(OSError, ValueError, KeyError):
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            return sorted(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        return sorted(tensor_shapes(folder / "model.safetensors"))
    return []


def make_room(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> None:
    """Under `resize_embeddings` let a model have a row for every token."""
    if config.resize_embeddings:
        resize_embeddings(model, resized_vocab(model.config.get_text_config().vocab_size, tokenizer))


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give input and output embeddings so many rows, if they have fewer; new ones are the mean of the others.

    As transformers, which draws them from a narrow normal distribution around that mean; here every engine and rank
    starts from the same, so the mean is summed in float64 and rounded to bfloat16, what weights are published in.
    Under ZeRO-3 the new tensors are whole on every rank until the engine is made, which partitions them.

    Raises:
        UserError: a model whose embeddings transformers cannot resize.
    """
    import torch

    before = model.get_input_embeddings().num_embeddings  # ZeRO-3 leaves the weight itself no shape
    if rows <= before:
        return
    try:
        model.resize_token_embeddings(rows, mean_resizing=False)
    except (NotImplementedError, TypeError) as error:
        raise UserError(f"resize_embeddings: {type(model).__name__}: {_first_line(error)}") from error
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if values is not None:
                    values[before:] = _mean(values[:before])


def _mean(rows: torch.Tensor) -> torch.Tensor:
    """Over the first dimension, without a copy of all rows in float64."""
    import torch

    parts = [rows[start : start + 8192].sum(0, dtype=torch.float64) for start in range(0, len(rows), 8192)]
    return (torch.stack(parts).sum(0) / len(rows)).to(torch.bfloat16)


def why_rows_mix(model_class: type, config: Any) -> str | None:
    """Why rows of one sequence would see each other in a model; None where it keeps them apart.

    It does where attention is all that joins tokens, and transformers builds its mask from the position ids.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return ", ".join(sorted(kinds))
    source = inspect.getsource(sys.modules[model_class.__module__])
    takes_positions = "position_ids" in inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    if takes_positions and "create_causal_mask" in source and any(map(_gives_positions, ast.walk(ast.parse(source)))):
        return None
    return "its mask knows no position ids"


def _gives_positions(node: ast.AST) -> bool:
    """Whether an expression hands position ids to a function that makes a mask, directly or as its keywords."""
    if isinstance(node, ast.Call):
        return "mask" in ast.unparse(node.func) and "position_ids" in {keyword.arg for keyword in node.keywords}
    if not isinstance(node, ast.Dict):
        return False
    return {"attention_mask", "position_ids"} <= {key.value for key in node.keys if isinstance(key, ast.Constant)}


def uses_padding(config: Config, launch: Launch) -> bool:
    """Whether micro batches are padded: as asked, or because this model would mix rows that are laid end to end.

    Raises:
        UserError: it would, and rows are to be packed.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if config.batching == "padded":
        return True
    found = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(found)]
    except KeyError:  # code that comes with the model
        mixing: str | None = "its own code"
    else:
        mixing = why_rows_mix(model_class, found)
    if mixing and config.packing != "none":
        raise UserError(
            f"packing: {config.packing}: {type(found).__name__} ({mixing}) does not keep packed rows apart; write none"
        )
    if mixing:
        launch.say(f"batching: padded: {type(found).__name__} ({mixing}) would mix rows that are laid end to end.")
    return mixing is not None


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Let freed tensors go back to the system at once while this lasts.

    Under ZeRO-3 each parameter is whole for a moment, then partitioned. glibc keeps freed blocks of up to 32 MiB for
    later, and the small partitions allocated between pin them: every rank then grew to more than the whole model
    (benchmarks/zero3_loading.py: 1188 MiB kept for a share of 497, and 518 with this).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl does not
    if mallopt is None:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 256 * 1024)
    try:
        yield
    finally:  # where glibc's own adjustment ends: training allocates and frees large tensors all the time
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(M_TRIM_THRESHOLD, 64 * 2**20)


def mend_generation_config(model: Any) -> None:
    """Let a generation config be saved that contradicts itself.

    Some published ones carry a temperature without `do_sample`; transformers loads them, and refuses to save them: at
    the first checkpoint, hours later, with the weights not written.
    """
    if model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True
