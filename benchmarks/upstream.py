"""Every name of a library's that ds_sft overrides, uses or assigns although it is none of its public ones: where.

    python benchmarks/upstream.py                          # all of them, with FILE:LINE of each use
    python benchmarks/upstream.py transformers deepspeed   # of these libraries
    python benchmarks/upstream.py --changed                # what another version, installed now, has otherwise

What it lists is found in the source of ds_sft: methods that a class of ours has from a library's class, too; names that
begin with _ and that ds_sft does not define; attributes whose presence is asked for by hasattr or getattr; attributes
that are given to objects of a library's; and source that is read as text. `ds_sft/upstream/names.py` has a row for
each, and `tests/test_upstream.py` fails for a use without a row and for a row without a use.
"""

from __future__ import annotations

import argparse
import ast
import builtins
import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ds_sft.quiet import quiet  # noqa: E402
from ds_sft.upstream.check import fault_in_words, faults, mentioned  # noqa: E402
from ds_sft.upstream.names import ASSIGNED, NAMES, OVERRIDDEN, READ_IN, TEXT, USED, Name  # noqa: E402

# Classes that are there to be subclassed: what their subclasses must have is documented.
MADE_FOR_IT = {"Function", "Linear", "Dataset", "Sampler", "Optimizer", "TrainerCallback", "ArgumentParser"}
# Attributes whose assignment is documented, of objects that libraries hand out for it.
SETTABLE = {
    # torch, Python
    "__class__", "data", "grad", "in_features", "out_features", "restype", "excepthook", "__annotations__",
    "__kwdefaults__", "usage", "caption", "param_groups",
    # configurations of models and of their answers, tokenizers
    "chat_template", "pad_token", "padding_side", "model_max_length", "encode_special_tokens", "generation_config",
    "do_sample", "use_cache", "dtype", "tie_word_embeddings", "router_aux_loss_coef",
    # `TrainingArguments`, `TrainerControl` and `TrainerState`
    "report_to", "gradient_accumulation_steps", "save_on_each_node", "save_total_limit", "eval_on_start", "epoch",
    "best_metric", "best_global_step", "best_model_checkpoint", "should_training_stop", "should_save", "should_log",
    "should_evaluate", "log_history",
    # peft's `LoraConfig`, accelerate's `DistributedDataParallelKwargs`
    "inference_mode", "base_model_name_or_path", "target_modules", "gradient_as_bucket_view",
    "use_muon",  # by which DeepSpeed's Muon knows its matrices
}  # fmt: skip
# What ds_sft itself puts into a model, a function, or an object of its own where a model has a method of that name.
OWN = {"buffers", "by_flock", "ds_sft", "rows_under_way"}
# Whose presence tells more than a library's version does: of the system, of Python, of any module or configuration.
ASKED = {"strerror", "response", "weight", "bias", "shape", "lm_head", "experts", "wait", "data", "posix_fadvise",
         "intermediate_size", "router_logits", "tqdm", "mallinfo2", "malloc_trim", "mallopt", "co_names"}  # fmt: skip
CONFIGS = re.compile(r"config|^(text|original|found)\b")  # their attributes are the keys of config.json
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


class Use(NamedTuple):
    """One place in ds_sft; `name` is the last part of the library's name, nothing for source that is read as text."""

    kind: str
    name: str
    file: str
    line: int


def uses() -> list[Use]:
    """All of them, in the order of files and lines."""
    trees = {str(file.relative_to(ROOT / "ds_sft")): ast.parse(file.read_text(encoding="utf-8"))
             for file in sorted((ROOT / "ds_sft").rglob("*.py")) if file.parent.name != "upstream"}  # fmt: skip
    ours = {name for tree in trees.values() for name in defined(tree)}
    found = set()
    for file, tree in trees.items():
        inherited = inherited_by(file, tree)
        found |= {Use(OVERRIDDEN, name, file, line) for name, line in overridden(file, tree)}
        found.update(in_tree(file, tree, ours - inherited, inherited))
    return sorted(found, key=lambda use: (use.file, use.line, use.name))


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file defines: functions, classes, fields, variables, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


# ---- Classes


def classes(file: str, tree: ast.Module) -> Iterator[tuple[ast.ClassDef, list[type]]]:
    """Each class of a file that has a library's class among its bases, with those of the library's."""
    nodes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]
    plain = set(dir(builtins)) | {"NamedTuple", "Protocol", "UserError"}
    if not any(ast.unparse(base) not in plain for node in nodes for base in node.bases):
        return
    module = importlib.import_module(f"ds_sft.{file.removesuffix('.py').replace('/', '.')}")
    for node in nodes:
        bases = [base for base in getattr(module, node.name).__mro__[1:] if is_foreign(base.__module__)]
        if bases and not {base.__name__ for base in bases[:1]} & MADE_FOR_IT:
            yield node, bases


def is_foreign(module: str) -> bool:
    return module.partition(".")[0] not in sys.stdlib_module_names | {"ds_sft", "builtins"}


def overridden(file: str, tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node, bases in classes(file, tree):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                owner = next((base for base in bases if method.name in vars(base)), None)
                if owner is not None:
                    yield f"{owner.__module__}.{owner.__qualname__}.{method.name}", method.lineno


def inherited_by(file: str, tree: ast.Module) -> set[str]:
    """Names that a library's class uses, of which a class in this file is a kind."""
    bases = {base for _, found in classes(file, tree) for base in found}
    functions = [function for base in bases for function in vars(base).values() if inspect.isfunction(function)]
    return {name for function in functions for name in mentioned(function)}


# ---- Names


def in_tree(file: str, tree: ast.Module, ours: set[str], inherited: set[str]) -> Iterator[Use]:
    methods = names_of_methods()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            if stored(node, methods, ours):
                yield Use(ASSIGNED, node.attr, file, node.lineno)
            elif PRIVATE.fullmatch(node.attr) and node.attr not in ours and not of_system(node) and not is_super(node):
                overrides = ast.unparse(node.value) == "self" and node.attr not in inherited
                if not overrides:
                    yield Use(USED, node.attr, file, node.lineno)
        elif isinstance(node, ast.ImportFrom) and is_foreign(node.module or ""):
            for name in (alias.name for alias in node.names if PRIVATE.fullmatch(alias.name)):
                yield Use(USED, name, file, node.lineno)
        elif isinstance(node, ast.Call):
            yield from called(file, node, ours)
        elif isinstance(node, ast.Tuple) and len(node.elts) == 2:  # an object and a name of its
            yield from named(file, node.elts[1], ours)


def called(file: str, node: ast.Call, ours: set[str]) -> Iterator[Use]:
    """What a call asks for by a name in quotes, and whether it reads source, or puts functions into an object."""
    function, arguments = ast.unparse(node.func), node.args
    given = arguments[1] if len(arguments) > 1 else None
    if given is not None and not function.endswith("partition"):
        yield from named(file, given, ours)
    if function in ("hasattr", "getattr") and isinstance(given, ast.Constant):
        name, of = str(given.value), ast.unparse(arguments[0])
        unknown = function == "hasattr" or len(arguments) > 2
        if unknown and name not in ours | ASKED | OWN and not name.startswith("_") and not CONFIGS.search(of):
            yield Use(USED, name, file, node.lineno)
    elif function in ("setattr", "delattr", "lend"):
        yield Use(ASSIGNED, "", file, node.lineno)
    elif function == "inspect.getsource" or (function == "ast.parse" and "read" in ast.unparse(node)):
        yield Use(TEXT, "", file, node.lineno)


def named(file: str, node: ast.expr, ours: set[str]) -> Iterator[Use]:
    """A private name in quotes, the second of two: of an object and one of its attributes."""
    if isinstance(node, ast.Constant) and PRIVATE.fullmatch(str(node.value)) and node.value not in ours:
        yield Use(USED, str(node.value), file, node.lineno)


def stored(node: ast.Attribute, methods: set[str], ours: set[str]) -> bool:
    """Whether an attribute of a library's object is assigned that nobody documents for it."""
    if isinstance(node.ctx, ast.Load) or node.attr in SETTABLE | OWN:
        return False
    owner = ast.unparse(node.value)
    if owner in ("self", "cls"):
        return bool(PRIVATE.fullmatch(node.attr)) and node.attr not in ours
    return owner != "ctx" and (node.attr in methods or node.attr not in ours)


@cache
def names_of_methods() -> set[str]:
    """Methods of what a run puts something into."""
    from accelerate import Accelerator
    from deepspeed import DeepSpeedEngine
    from transformers import PreTrainedModel

    owners = (Accelerator, DeepSpeedEngine, PreTrainedModel)
    return {name for owner in owners for name in dir(owner) if callable(getattr(owner, name, None))}


def of_system(node: ast.Attribute) -> bool:
    return ast.unparse(node.value).partition(".")[0] in sys.stdlib_module_names or node.attr in ("_replace", "_asdict")


def is_super(node: ast.Attribute) -> bool:
    return ast.unparse(node.value).startswith("super(")


# ---- The table


def places(name: Name, found: list[Use]) -> list[tuple[str, int]]:
    """FILE and line of each use of a row; those of its users alone.

    Where a name is put together or kept in a list, what the scanner does not see, its words in the file count.
    """
    seen = [(use.file, use.line) for use in found if is_use_of(use, name) and use.name]
    unseen = set(name.users.split()) - {file for file, _ in seen}
    if name.kind == OVERRIDDEN:
        return seen
    if name.kind == TEXT:
        return [(use.file, use.line) for use in found if is_use_of(use, name)]
    return seen + [(file, line) for file in sorted(unseen) for line in lines_with(name.last, file)]


def is_use_of(use: Use, name: Name) -> bool:
    """Whether a row answers for a use."""
    if use.file not in name.users.split() or (use.kind == TEXT) != (name.kind == TEXT):
        return False
    if name.kind == TEXT:
        return True
    if name.kind == OVERRIDDEN:  # and perhaps called elsewhere
        return use.name in (name.path.replace(":", "."), name.last)
    return use.name == name.last if use.name else name.kind == ASSIGNED


def lines_with(word: str, file: str) -> list[int]:
    lines = (ROOT / "ds_sft" / file).read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, 1) if re.search(rf"\b{word}\b", line)]


def import_all(names: Iterable[Name]) -> None:
    """Import what has these names, as far as it is installed."""
    for path in {path for name in names if name.kind != TEXT for path in (name.path, name.caller)}:
        with suppress(ImportError):  # `faults` says what is no longer there
            importlib.import_module(path.partition(":")[0])


def not_imported(libraries: Iterable[str]) -> Iterator[str]:
    """A line for each library that is not there, or says that it cannot work with another one that is."""
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError as error:
            yield f"{library} cannot be imported: {' '.join(str(error).split())}"


def summary(names: Sequence[Name]) -> str:
    """How many there are."""
    kinds = Counter(name.kind for name in names)
    private = sum(bool(PRIVATE.fullmatch(name.last)) for name in names if name.kind != TEXT)
    return f"{len(names)} names, {private} of them private: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items())


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python benchmarks/upstream.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("library", nargs="*", help=f"of {', '.join(READ_IN)}; all, where none is given")
    parser.add_argument("--changed", action="store_true", help="what is otherwise in the installed version; 1 if any")
    given = parser.parse_args(argv)
    if unknown := set(given.library) - set(READ_IN):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(READ_IN)}")
    quiet(bars=False)
    names = [name for name in NAMES if not given.library or name.library in given.library]
    if given.changed:
        import_all(names)
        changed = [*not_imported(dict.fromkeys(name.library for name in names))]
        changed += [fault_in_words(*found) for found in faults(names)]
        print(*changed or ["Nothing: all names are as they were read."], sep="\n")
        return int(bool(changed))
    found = uses()
    for name in names:
        where = ", ".join(f"ds_sft/{file}:{line}" for file, line in places(name, found))
        known = {OVERRIDDEN: f"({name.as_read})", TEXT: f": `{name.as_read}`"}.get(name.kind, "")
        print(f"{name.path.replace(':', '.')}{known}  {name.kind}\n    {where}\n    without it {name.stops}")
    print(summary(names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
