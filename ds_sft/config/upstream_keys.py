"""Which keys there are: ours, and every field of `TrainingArguments`, read from its source.

Importing transformers would take seconds.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from ds_sft.config.elsewhere import CALLED_HERE, NOT_HERE
from ds_sft.config.keys import OPTIMS, Config
from ds_sft.config.refused import UNSAFE, UNUSED
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
_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")  # of transformers.utils.logging
LISTED = {  # keys that transformers checks late, or takes from other libraries -> their values
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
    "torch_compile_backend": ("inductor", "eager", "aot_eager", "cudagraphs", "onnxrt", "tensorrt", "tvm"),
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
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
    enum = enum or LISTED.get(name) or _listed(given.get("metadata"))
    return Key(name, annotation, default, " ".join(help_text.split()), OPTIMS if name == "optim" else enum)


def _listed(metadata: ast.expr | None) -> tuple[str, ...]:
    """The values that a field's metadata lists; transformers gives them to its own parser of flags alone."""
    if not isinstance(metadata, ast.Dict):
        return ()
    values = {ast.unparse(name): value for name, value in zip(metadata.keys, metadata.values, strict=True) if name}
    listed = values.get("'choices'")
    return tuple(ast.literal_eval(listed)) if isinstance(listed, ast.List) else ()


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
    obeyed = training_keys().keys() - UNSAFE.keys() - UNUSED.keys()
    near = CALLED_HERE.get(name) or nearest(name, flags, our_keys(), obeyed)
    meant = f"did you mean {'--' if flag else ''}{near}?" if near else "--help lists all keys"
    remedy = NOT_HERE.get(name, meant)
    raise UserError(f"{place}unknown key{'' if flag else f' {name!r}'}: {remedy}")
