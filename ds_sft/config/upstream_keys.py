"""Which keys there are: ours, and every field of `TrainingArguments`, read from its source; and what others call them.

Importing transformers would take seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from ds_sft.config.keys import MUON, Config
from ds_sft.errors import UserError, nearest

# transformers 5 renamed these; everybody still says the old name. And our name for what Trainer calls differently.
ALIASES = {
    "resume_from_checkpoint": "resume",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
GONE = {  # keys that TrainingArguments no longer has -> what to write
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "warmup_ratio": "write warmup_steps with a value below 1, which is a share of all steps",
    "evaluation_strategy": "write eval_strategy",
    "overwrite_output_dir": "delete it",
    "save_safetensors": "delete it: weights are always safetensors",
    "logging_dir": "delete it: output_dir has the logs",
    "no_cuda": "write use_cpu",
    "dataset_text_field": "write data_fields",
}
UNSAFE = {  # keys of transformers that break what a run here promises -> how
    "enable_jit_checkpoint": "ranks would save at different steps and wait for each other; runs stop and save anyway",
    "auto_find_batch_size": "it changes the rows a step in mid-run; `ds-sft plan` tells what fits",
    "use_liger_kernel": "it exchanges classes for the whole process, and the loss; write fused_kernels: liger",
    "ignore_data_skip": "a resumed run would learn its first rows again",
    "logging_nan_inf_filter": "it would log a loss that is no number as 0.0; see on_nonfinite",
    "hub_always_push": "a run pushes once, after its export was verified",
    "restore_callback_states_from_checkpoint": "callbacks with a state go on from it in any case",
    "use_cache": "training does not read the cache, and with one rows laid end to end would see each other",
}
ELSEWHERE = {  # what other programs call a key of ours
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "dataset": "train_file",
    "cutoff_len": "max_length",
    **dict.fromkeys(("sequence_parallel_size", "sp_size", "context_parallel_size"), "sequence_parallel"),
    **dict.fromkeys(("finetuning_type", "tuner_type", "use_peft", "use_dora"), "adapter"),
    **dict.fromkeys(("lora_r", "r"), "lora_rank"),
    **dict.fromkeys(("target_modules", "target_parameters", "lora_target_modules", "lora_target"), "lora_targets"),
    "modules_to_save": "lora_modules_to_save",
    "init_lora_weights": "lora_init",
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "quant_bits"), "quantization"),
}


@dataclass(frozen=True)
class Key:
    """What is known of a key before a value is seen."""

    name: str
    type: str  # as annotated: "int", "float | None", "SchedulerType | str"
    default: str
    help: str
    choices: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        return "None" in self.type


@cache
def our_keys() -> dict[str, Key]:
    return {
        f.name: Key(f.name, str(f.type), str(f.default), f.metadata["help"], f.metadata["choices"])
        for f in fields(Config)
        if f.name != "training"
    }


@cache
def training_keys() -> dict[str, Key]:
    """Fields of `TrainingArguments` from its source: importing transformers takes seconds."""
    source = _transformers() / "training_args.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    choices = _enums(tree) | _enums(ast.parse((_transformers() / "trainer_utils.py").read_text(encoding="utf-8")))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            found[node.target.id] = _training_key(node.target.id, ast.unparse(node.annotation), node.value, choices)
    return found


def _transformers() -> Path:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformers is not installed: pip install transformers")
    return Path(spec.submodule_search_locations[0])


def _enums(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """Class name -> its values, for the enumerations of strings."""
    return {
        node.name: tuple(
            item.value.value
            for item in node.body
            if isinstance(item, ast.Assign)
            and isinstance(item.value, ast.Constant)
            and isinstance(item.value.value, str)
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases)
    }


def _training_key(name: str, annotation: str, call: ast.Call, choices: Mapping[str, tuple[str, ...]]) -> Key:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    default = ast.unparse(given["default"]) if "default" in given else "None"
    help_text = ""
    if isinstance(given.get("metadata"), ast.Dict):
        text = given["metadata"].values[0]  # type: ignore[attr-defined]
        help_text = str(ast.literal_eval(text)) if isinstance(text, ast.Constant) else ""
    # A list of options (debug) is checked by transformers; here only keys with one value.
    enum = next((values for cls, values in choices.items() if annotation.startswith(f"{cls} |")), ())
    enum += (MUON,) if name == "optim" else ()
    return Key(name, annotation, default, " ".join(help_text.split()), enum)


def all_keys() -> dict[str, Key]:
    return our_keys() | training_keys()


def known_key(name: str, where: str, flags: Iterable[str] = ()) -> Key:
    """A key by its name; `flags`: what else may be meant on the command line."""
    if name in all_keys():
        return all_keys()[name]
    flag = where == "--"
    place = f"--{name}: " if flag else where
    if name in GONE:
        raise UserError(f"{place}{name} is not a key of today's transformers: {GONE[name]}")
    near = ELSEWHERE.get(name) or nearest(name, flags, our_keys(), training_keys().keys() - UNSAFE.keys())
    remedy = f"did you mean {'--' if flag else ''}{near}?" if near else "--help lists all keys"
    raise UserError(f"{place}unknown key{'' if flag else f' {name!r}'}: {remedy}")
