"""Base + adapter -> one model that needs no peft: merged in float32, rounded once, by peft's own arithmetic.

One layer at a time is float32, so that memory is that of the base as it was published. It happens on a CPU, from what
is on the disk: the same adapter becomes the same bytes, whichever engine trained it.
"""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.checkpoints.storage import nearest_folder
from ds_sft.config.keys import Config
from ds_sft.errors import UserError, first_line
from ds_sft.export.placement import is_out_of_memory, weights_size
from ds_sft.export.weights import PARTIAL, end_answers_at, move_into, own_ends
from ds_sft.model.adapter_files import (
    ADAPTER,
    COMPUTED_IN,
    FACTS,
    FOLDER,
    PREFIX,
    QUANTIZATION,
    ROPE_SCALING,
    WEIGHTS,
    facts_of,
    find_base,
    load_base,
)
from ds_sft.model.dtype import export_dtype
from ds_sft.model.load import mend_generation_config
from ds_sft.model.quantized import round_base, skeleton
from ds_sft.plan.adapter import CONFIG, whole_of
from ds_sft.plan.size import in_units
from ds_sft.ranks.host import free_memory_here
from ds_sft.ranks.launch import print_line

if TYPE_CHECKING:
    import torch


class NoRoom(UserError):
    """The merged model does not fit: on the disk, or in memory while it is made."""


def merge_as_asked(config: Config) -> str | None:
    """Merge a run's adapter as `merge` says; why it was not merged, which is said, or None.

    Raises:
        UserError: merge: yes, and there was no room. The adapter is complete in its folder.
    """
    from safetensors import SafetensorError

    if config.merge == "no":
        return "merge: no"
    adapter, dtype = config.output_dir / FOLDER, export_dtype(config)
    try:
        merge(adapter, config.output_dir, dtype, max_shard_size=config.export_max_shard_size,
              trust_remote_code=config.trust_remote_code)  # fmt: skip
    except Exception as error:
        if not isinstance(error, (NoRoom, OSError, SafetensorError)) and not is_out_of_memory(error):
            raise
        why = " ".join(str(error).split())[:200]
    else:
        of = "" if config.quantization == "none" else f", of the weights that {config.quantization} trained against"
        print_line(f"Merged model is in {config.output_dir} ({str(dtype).split('.')[1]}{of}).")
        return None
    command = f"ds-sft export {shlex.quote(str(adapter))} FOLDER"
    later = f"the adapter is complete in {adapter}, and {command} merges it elsewhere"
    if config.merge == "yes":
        raise UserError(f"merge: yes: {why}; {later}")
    print_line(f"Not merged: {why}; {later}.")
    return why


def merge(adapter: Path, out: Path, dtype: torch.dtype, *, max_shard_size: str, trust_remote_code: bool) -> None:
    """Write the adapter's base with the adapter merged, the tokenizer and what a server must know into `out`.

    Raises:
        NoRoom: the disk or the memory has no room for it; nothing is written.
        UserError: the adapter does not fit the base, or cannot be merged.
    """
    import torch

    base, facts = find_base(adapter), facts_of(adapter)
    require_room(out, base, dtype, trust_remote_code)
    require_memory(base, dtype, trust_remote_code)
    in_4_bits = facts.get(QUANTIZATION, "none") != "none"
    published = facts[COMPUTED_IN] if in_4_bits else "auto"  # the rounded weights have the dtype that they computed in
    model = load_base(base, facts.get(ROPE_SCALING), dtype=published, trust_remote_code=trust_remote_code)
    if in_4_bits:
        round_base(model, getattr(torch, facts[COMPUTED_IN]), whole_of(adapter))
    with torch.no_grad():
        merged = merge_into(model, adapter, dtype)
    merged.config.dtype = dtype
    mend_generation_config(merged)
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    try:
        merged.save_pretrained(partial, max_shard_size=max_shard_size)
        for file in adapter.iterdir():
            if file.is_file() and file.name not in (WEIGHTS, CONFIG, FACTS, "README.md"):
                shutil.copy(file, partial)
        end_answers_at(own_ends(adapter), partial)
        move_into(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def merged_bytes(name: str, dtype: torch.dtype, trust_remote_code: bool) -> int:
    """Bytes of the weights of a model, a folder or a hub id, in `dtype`; from its configuration alone."""
    try:
        model = skeleton(name, trust_remote_code=trust_remote_code)
    except OSError as error:
        raise UserError(f"base model {name}: {first_line(error)}") from error
    model.tie_weights()
    return int(dtype.itemsize * sum(parameter.numel() for parameter in model.parameters()))


def require_room(out: Path, base: str, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """See that the merged model fits on the disk of `out`.

    Raises:
        NoRoom: it does not.
    """
    needed, free = merged_bytes(base, dtype, trust_remote_code), shutil.disk_usage(nearest_folder(out)).free
    if free < needed:
        raise NoRoom(f"{out}: the merged model takes about {in_units(needed)}, the disk has {in_units(free)} free")


def require_memory(base: str, dtype: torch.dtype, trust_remote_code: bool) -> None:
    """See that there is memory for a merge: a process that takes too much is killed, and says nothing.

    Raises:
        NoRoom: there is not.
    """
    needed = max(weights_size(base), merged_bytes(base, dtype, trust_remote_code))
    free = free_memory_here()
    if free is not None and free < needed:
        raise NoRoom(f"a merge takes about {in_units(needed)} of memory, of which {in_units(free)} are free")


def merge_into(model: Any, adapter: Path, dtype: torch.dtype) -> Any:
    """Merge the adapter in its folder into the base, which is changed, and round all parameters to `dtype`."""
    put_on(model, adapter)
    refuse_tied(model, adapter)
    for name, module in reversed(list(model.named_modules())):  # the inner one of two around the same experts first
        if hasattr(module, "lora_A"):
            model.set_submodule(name, _merged(module, dtype))
        elif hasattr(module, "modules_to_save"):
            model.set_submodule(name, module.modules_to_save[ADAPTER])
    del model.peft_config
    _tie_what_is_equal(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def put_on(model: Any, adapter: Path) -> None:
    """Put the adapter's layers and values into a model, in float32 as in the file; peft would take the base's dtype.

    Raises:
        UserError: the adapter is of a model with other layers or other sizes.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        inject_adapter_in_model(LoraConfig.from_pretrained(str(adapter)), model, adapter_name=ADAPTER)
    except ValueError as error:
        raise UserError(_another_base(adapter, first_line(error))) from error
    for module in [module for module in model.modules() if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper))]:
        for part in module.adapter_layer_names:
            getattr(module, part).float()
    values = {name.removeprefix(PREFIX): value for name, value in load_file(adapter / WEIGHTS).items()}
    wanted = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    there, here = ({_bare(name): list(value.shape) for name, value in of.items()} for of in (values, wanted))
    differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if differing:
        name = differing[0]
        shapes = f"{name} is {_shape(there.get(name))} in it, {_shape(here.get(name))} in the model"
        raise UserError(_another_base(adapter, shapes))
    set_peft_model_state_dict(model, values, adapter_name=ADAPTER)


def _bare(name: str) -> str:
    """Both names of DoRA's magnitudes are one."""
    return name.removesuffix(".weight")


def _shape(shape: list[int] | None) -> str:
    return "absent" if shape is None else str(shape)


def _another_base(adapter: Path, why: str) -> str:
    return f"{adapter}: not an adapter of {find_base(adapter)}: {why}; give the model it was trained on as its base"


def refuse_tied(model: Any, adapter: Path) -> None:
    """See that no weight with an adapter on it is the weight of another module, too, whose outputs would move.

    Raises:
        UserError: one is: a merge would change the embedding with the output projection, or the other way round.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and uses[id(getattr(module.get_base_layer(), _adapted(module)))] > 1:
            raise UserError(
                f"{adapter}: cannot be merged: the weight of {name} is another module's, too (tie_word_embeddings), "
                "which would change with it: use base + adapter"
            )


def _merged(layer: Any, dtype: torch.dtype) -> Any:
    """The layer below the adapter with the adapter merged, its weight rounded once."""
    base = layer.get_base_layer()
    weight = getattr(base, _adapted(layer))
    weight.data = weight.data.float()
    layer.merge(safe_merge=True)
    weight.data = weight.data.to(dtype)
    return base


def _adapted(layer: Any) -> str:
    """The name, in the layer below, of the weight that an adapter is for: of experts there are several."""
    return getattr(layer, "parameter_name", "weight")


def _tie_what_is_equal(model: Any) -> None:
    """Embedding and output projection that were trained whole: one again, or two from now on where they came apart."""
    import torch

    text = model.config.get_text_config()
    if not text.tie_word_embeddings:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if torch.equal(embedding.weight, head.weight):
        model.tie_weights()
    else:
        text.tie_word_embeddings = model.config.tie_word_embeddings = False
