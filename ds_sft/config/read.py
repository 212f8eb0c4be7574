"""YAML and flags -> a `Config`. Precedence: defaults < YAML < flags. A key is spelled the same in both.

A mistake is answered with its file and line, before torch or transformers is imported.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ds_sft.config.help import help_text
from ds_sft.config.keys import ENGINES, EVAL_DEFAULTS, FILES, RECORD, STARTED_IN, TEMPLATES, TRAINING_DEFAULTS, Config
from ds_sft.config.rules import check
from ds_sft.config.upstream_keys import ALIASES, all_keys, known_key, our_keys
from ds_sft.config.values import Given, convert, plain
from ds_sft.errors import UserError, nearest_value

RESUME_WORDS = dict.fromkeys(("auto", "true", "yes"), "auto") | dict.fromkeys(("never", "false", "no"), "never")
PATHS: dict[str, tuple[str, ...]] = {  # keys that may name a file or a folder -> values that never do
    **dict.fromkeys(("model_name_or_path", *FILES, "output_dir", "cache_dir"), ()),
    "template": TEMPLATES, "deepspeed": ENGINES, "resume": tuple(RESUME_WORDS),
}  # fmt: skip
MADE = ("output_dir", "cache_dir")  # those of them that a run makes


def load_config(argv: Sequence[str], prog: str = "train.py", *, flags: Iterable[str] = ()) -> Config:
    """The configuration that a command line describes. `--help` prints and raises SystemExit.

    The first word may be the file, without --config.

    Args:
        flags: names of flags that a command has beside the keys, and has taken out; one may be meant by a wrong key.

    Raises:
        UserError: unknown key, wrong value, missing key, unreadable file.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(prog))
        raise SystemExit(0)
    read = _read_flags(argv, flags)
    file = read.pop("config", None)
    _check_resume(read)
    given = {} if file is None else _read_yaml(config_file(str(file.value)))
    return _resolve(_merge(given, read))


def config_file(given: str) -> Path:
    """The file that `--config` names; a run's output folder stands for its config.yaml.

    Raises:
        UserError: a folder that has none.
    """
    path = Path(given)
    if not path.is_dir():
        return path
    if not (path / RECORD).is_file():
        above = path.resolve().parent  # of an adapter or a checkpoint
        meant = f"did you mean {above / RECORD}?" if (above / RECORD).is_file() else "give the YAML file of a run"
        raise UserError(f"{path}: a folder, and no output folder of a run, which has a {RECORD}: {meant}")
    return path / RECORD


def _merge(*sources: Mapping[str, Given]) -> dict[str, Given]:
    merged: dict[str, Given] = {}
    for source in sources:
        renamed = {ALIASES.get(name, name): replace(value, alias=name) if name in ALIASES else value
                   for name, value in source.items()}  # fmt: skip
        if len(renamed) < len(source):
            both = next(f"{old} and {new}" for old, new in ALIASES.items() if {old, new} <= source.keys())
            raise UserError(f"{both} are the same key: give one of them")
        merged |= renamed
    return merged


def _read_flags(argv: Sequence[str], others: Iterable[str]) -> dict[str, Given]:
    flags: dict[str, Given] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        file = word.endswith((".yaml", ".yml")) or Path(word).exists()
        first = not flags.keys() - {"local_rank"}  # which `deepspeed` puts before all words
        if file and first:
            word = f"--config={word}"
        if not word.startswith("--") or word == "--":
            raise UserError(f"{word!r}: {_no_flag(word, flags, file=file, first=first)}")
        name, equals, value = word[2:].partition("=")
        if name != "config":
            known_key(name, "--", others)
        elif name in flags:
            raise UserError("--config is given twice: a run has one file, and flags beside it")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else _bare(name)
        flags[name] = Given("--", value)
    return flags


def _no_flag(word: str, before: Mapping[str, Given], *, file: bool, first: bool) -> str:
    """What was expected where a word is neither a flag nor the value of one, `before` those that precede it."""
    if file and "config" in before:
        return "expected --key value: a run has one file, and flags beside it"
    name, value = list(before.items())[-1] if before else ("", None)
    if value is not None and name != "config" and "list" in all_keys()[name].type:
        return f"expected --key value; a list is one word: --{name} '[{value.value.strip('[],')}, {word.strip('[],')}]'"
    return f"expected --config {word}" if file else f"expected {'FILE.yaml or ' if first else ''}--key value"


def given_twice(argv: Sequence[str]) -> list[str]:
    """Remarks for the flags that are there more than once: the last counts."""
    times = Counter(word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    return [f"--{name} is given {number} times: the last counts." for name, number in times.items() if number > 1]


def _bare(name: str) -> str:
    if name != "config" and "bool" in all_keys()[name].type:
        return "true"
    raise UserError(f"--{name}: expected a value after it")


def _read_yaml(path: Path) -> dict[str, Given]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (the current directory is {Path.cwd()})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected lines of `key: value`")
    given = _given_of(root, path)
    started = given.pop(STARTED_IN, None)
    if started is not None:  # a run has left it, and where it was resumed from may be gone
        return _found_again(given, Path(str(started.value)), path)
    _check_resume(given)
    return given


def _given_of(root: yaml.MappingNode, path: Path) -> dict[str, Given]:
    """The keys of a file.

    Raises:
        UserError: some are none; a line for each, for a file of another program has many.
    """
    given: dict[str, Given] = {}
    lines: dict[str, int] = {}
    mistakes: list[str] = []
    for key_node, node in root.value:
        line = key_node.start_mark.line + 1
        name = str(key_node.value)
        try:
            if name != STARTED_IN:
                known_key(name, f"{path}:{line}: ")
        except UserError as error:
            mistakes.append(str(error))
            continue
        if name in given:
            mistakes.append(f"{path}:{line}: {name} is given twice, first in line {lines[name]}")
        lines.setdefault(name, line)
        scalar = isinstance(node, yaml.ScalarNode)
        value = node.value if scalar else plain(node)
        given[name] = Given(f"{path}:{line}: ", value, plain=not scalar or node.style is None)
    if mistakes:
        raise UserError("\n".join(mistakes))
    return given


def _found_again(given: dict[str, Given], started: Path, record: Path) -> dict[str, Given]:
    """The keys of a run with the relative paths among them as they are named from here.

    They are of the folder where the run was started. It may have been moved with the output folder in it: that is so
    where one of them is found from there. What is not found stays as it is written, as the name of a model of the hub.
    """
    places, record = [started], record.absolute()
    output_dir = started / str(given["output_dir"].value) if "output_dir" in given else started
    if (record.parent.name, record.name) == (output_dir.name, RECORD) and started in output_dir.parents:
        above = os.path.relpath(started, output_dir)
        places.insert(0, Path(os.path.normpath(record.parent / above)))
    paths = {name: value for name, value in given.items() if name in PATHS and not value.empty}
    sought = [(name, value.value) for name, value in paths.items() if name not in MADE]
    home = next((place for place in places if any(_located(value, place, name) != value for name, value in sought)),
                started)  # fmt: skip
    if home.is_dir() and home.samefile(Path.cwd()):
        return given
    located = {name: replace(value, value=_located(value.value, home, name)) for name, value in paths.items()}
    return {**given, **located}


def _located(value: Any, home: Path, name: str) -> Any:
    """A path, a glob, or a list of these and of mappings with one, the value of a key, where it is in `home`."""
    if isinstance(value, list):
        return [_located(item, home, name) for item in value]
    if isinstance(value, dict):
        return {inner: _located(item, home, name) if inner == "path" else item for inner, item in value.items()}
    if not isinstance(value, str) or value in ("", *PATHS[name]) or value.startswith(("/", "~")):
        return value
    there = home.is_dir() if name in MADE else (home / value).exists() or any(glob.iglob(str(home / value)))
    return str(home / value) if there else value


def _check_resume(given: Mapping[str, Given]) -> None:
    """A word that is none of the key's, and no folder; of a path, which may have been there once, a run finds out."""
    value = given["resume"].value if "resume" in given else "auto"
    if not isinstance(value, str) or not value.isalpha() or value.lower() in RESUME_WORDS or Path(value).exists():
        return
    near = nearest_value(value, dict.fromkeys(RESUME_WORDS.values()))
    meant = f": did you mean {near}?" if near else ""
    raise UserError(f"{given['resume'].where}resume: expected auto, never or the folder of a checkpoint, found "
                    f"{value!r}{meant}")  # fmt: skip


def _resolve(given: Mapping[str, Given]) -> Config:
    values = {name: convert(all_keys()[name], value) for name, value in given.items()}
    values.pop("local_rank", None)  # DeepSpeed's launcher adds it; the environment says the same
    if values.get("fp16") and values.setdefault("bf16", False):
        raise UserError(f"{given['fp16'].where}fp16: yes beside bf16: yes: take one of the two")
    missing = [name for name in ("model_name_or_path", "train_file", "output_dir") if values.get(name) is None]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}: give each in the --config file or as --{missing[0]} VALUE")
    ours = {name: values.pop(name) for name in list(values) if name in our_keys()}
    if ours.get("eval_file") is not None and ours.get("val_size"):
        raise UserError(f"{given['val_size'].where}val_size: with an eval_file nothing is set aside: give one of them")
    has_eval = ours.get("eval_file") is not None or bool(ours.get("val_size"))
    ours["resume"] = RESUME_WORDS.get(str(ours.get("resume") or "auto").lower(), ours.get("resume"))
    if not has_eval and values.get("eval_strategy", "no") != "no":
        where = given["eval_strategy"].where
        raise UserError(f"{where}eval_strategy: {values['eval_strategy']} needs an eval_file (or val_size)")
    if not has_eval and ours.get("evaluate_rows"):
        raise UserError(f"{given['evaluate_rows'].where}evaluate_rows: it needs an eval_file (or val_size)")
    defaults = TRAINING_DEFAULTS | (EVAL_DEFAULTS if has_eval else {})
    if ours.get("max_tokens_per_batch") is not None:  # then it is absent unless given, and `save` keeps it so
        defaults = {name: value for name, value in defaults.items() if name != "per_device_train_batch_size"}
    config = Config(**ours, training=defaults | values)
    check(config, given)
    named = config.training["report_to"] or []
    if "none" in named and config.trackers:
        raise UserError(f"{given['report_to'].where}report_to: {', '.join(named)}: none is said alone")
    return config
