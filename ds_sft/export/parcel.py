"""What goes to the hub: the exported files, by name, and a model card. Nothing else of a run's folder ever leaves it.

Checkpoints, predictions.jsonl, metrics, SwanLab's folder, run.json, config.yaml and data_report.json stay at home: they
hold text of the rows, paths and states. What is sent was compared with the trained model before.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from ds_sft.checkpoints.base import hash_base
from ds_sft.checkpoints.content import KINDS
from ds_sft.checkpoints.identity import base_differs
from ds_sft.errors import UserError
from ds_sft.export.card import Facts, model_card
from ds_sft.model.adapter_files import (
    BASE,
    FACTS,
    FOLDER,
    WEIGHTS,
    changes_of_config,
    facts_of,
    find_base,
    loading_in_4_bits,
)
from ds_sft.plan.adapter import CONFIG, is_adapter, read_json
from ds_sft.plan.size import model_folder
from ds_sft.plan.source import looks_like_path
from ds_sft.ranks.launch import print_line
from ds_sft.results import KEPT, RESULTS

CARD, TEMPLATE = "README.md", "chat_template.jinja"
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", TEMPLATE,
)  # fmt: skip
WHOLE = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors",
         "model.safetensors.index.json", *TOKENIZER)  # fmt: skip
OF_ADAPTER = (CONFIG, WEIGHTS, FACTS, "generation_config.json", *TOKENIZER)
# Code that comes with a model, where its config.json names such (auto_map).
CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
OWN = (*WHOLE, *OF_ADAPTER, *CODE, CARD)  # what a push may replace or take out of a repository


@dataclass(frozen=True)
class Parcel:
    """Files of a folder, as they lie there, and texts that are sent in their place or beside them."""

    folder: Path
    files: tuple[str, ...]
    texts: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is sent, the card first."""
        written = {name: len(text.encode()) for name, text in self.texts.items()}
        return written | {name: (self.folder / name).stat().st_size for name in self.files}


def pack(
    folder: Path,
    repo: str,
    *,
    merged: bool = False,
    base: str | None = None,
    license: str | None = None,
    unverified: bool = False,
) -> Parcel:
    """What of a finished run's output folder, or of an exported folder, goes to `repo`.

    Args:
        repo: OWNER/NAME.
        merged: of a run with an adapter the merged model, and not the adapter.
        base: hub id of the model that training began with; None: what the run began with, if it is of the hub.
        license: an identifier of the hub's; None: left to the author.
        unverified: also what was never compared with the trained weights; what was, and is not them, never.

    Raises:
        UserError: nothing to push there, weights that were not verified, or a private path in what would be sent.
    """
    if folder.name == FOLDER and (folder.parent / RESULTS).is_file():  # a run's own folder `adapter`
        folder = folder.parent
    run = read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}
    source = _source(folder, merged=merged)
    _require_verified(folder, run, unverified=unverified)
    if merged and (run.get("adapter") or {}).get("not_merged") is not None:
        raise UserError(
            f"{folder}: what was verified is its adapter, and not the merged model beside it, whose making was "
            "interrupted: start the run again with merge: yes"
        )
    files = _allowed(source)
    _require_no_paths(source, files)
    facts = _facts(folder, source, repo, run, base=base, license=license, unverified=unverified)
    texts = {CARD: model_card(facts)}
    if facts.adapter:
        known = {**read_json(source / CONFIG), "base_model_name_or_path": facts.base}
        texts[CONFIG] = json.dumps(known, indent=2, ensure_ascii=False) + "\n"
    return Parcel(source, tuple(name for name in files if name not in texts), texts)


def _source(folder: Path, *, merged: bool) -> Path:
    """The folder of the files to send: the output folder, or its folder of an adapter."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "trainer_state.json").is_file():
        raise UserError(
            f"{folder}: a checkpoint: push the output folder of the finished run, or make a model of it first: "
            f"ds-sft export {folder} OUT"
        )
    adapter = next((place for place in (folder, folder / FOLDER) if is_adapter(place)), None)
    whole = any(folder.glob("model*.safetensors"))
    if merged and (adapter is None or not whole):
        lacks = "no adapter in it: leave out --merged" if adapter is None else "the adapter was not merged (merge: yes)"
        raise UserError(f"{folder}: {lacks}")
    if adapter is None and not whole:
        raise UserError(f"{folder}: no model in it (model.safetensors, or {FOLDER}/): a run writes it at its end")
    return folder if adapter is None or merged else adapter


def _require_verified(folder: Path, run: dict[str, Any], *, unverified: bool) -> None:
    """See that the weights are the trained ones, as far as was asked.

    Raises:
        UserError: they are not, or nobody knows and `unverified` was not said.
    """
    export = run.get("export") or {}
    verified = export.get("verified")
    if verified or (verified is None and unverified):
        return
    if verified is False:
        raise UserError(
            f"{folder}: its export was compared and is NOT the trained model ({RESULTS}): it is not pushed; make one "
            f"of the last checkpoint: ds-sft export {folder}/checkpoint-N OUT"
        )
    if (folder / KEPT).is_file():
        why, how = "there was no memory to verify it", f"ds-sft verify {folder}"
    elif run:
        why, how = (
            f"it was not verified ({export.get('reason', 'verify_export: no')})",
            "--unverified pushes it as it is",
        )
    else:
        why = f"no {RESULTS}: not a finished run's output folder, so nobody compared its weights with the trained ones"
        how = "push the run's folder; --unverified pushes this one as it is"
    raise UserError(f"{folder}: {why}: {how}")


def _allowed(source: Path) -> list[str]:
    """Names of the files that may go, sorted."""
    allowed = OF_ADAPTER if is_adapter(source) else WHOLE
    if not is_adapter(source) and "auto_map" in read_json(source / "config.json"):
        allowed = (*allowed, *CODE)
    names = (path.name for path in source.iterdir() if path.is_file())
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in allowed))


def _require_no_paths(source: Path, files: list[str]) -> None:
    """See that no settings name a path of this machine; an adapter's base is written anew.

    Raises:
        UserError: the file and key that do.
    """
    for name in files:
        if name.endswith("config.json"):
            known = {**read_json(source / name), "base_model_name_or_path": None}
            for where, text in _texts(known):
                if _is_private(where, text):
                    raise UserError(f"{source / name}: {where}: holds a path of this machine, {text}: take it out")


def _is_private(where: str, text: str) -> bool:
    """Whether a text in settings is a path: of any machine where it should name a model; a token "/" is none."""
    if where.endswith("name_or_path"):
        return looks_like_path(text)
    return re.match(r"/[^/]+/|~/.", text) is not None and os.path.exists(os.path.expanduser(text))


def _texts(value: Any, where: str = "") -> list[tuple[str, str]]:
    """Every text in a JSON value, and where it stands."""
    if isinstance(value, dict):
        inside = [(f"{where}.{name}" if where else name, item) for name, item in value.items()]
    elif isinstance(value, list):
        inside = [(f"{where}[{i}]", item) for i, item in enumerate(value)]
    else:
        return [(where, value)] if isinstance(value, str) else []
    return [found for name, item in inside for found in _texts(item, name)]


def _facts(
    folder: Path,
    source: Path,
    repo: str,
    run: dict[str, Any],
    *,
    base: str | None,
    license: str | None,
    unverified: bool,
) -> Facts:
    record, report = folder / "config.yaml", folder / "data_report.json"
    keys = yaml.safe_load(record.read_text(encoding="utf-8")) if run and record.is_file() else {}
    data = read_json(report) if run and report.is_file() else {}
    if base is not None and is_adapter(source):
        require_same_base(source, base, unverified=unverified)
    datasets = dict.fromkeys(name for split in data.values() for name in split.get("hub_datasets", []))
    return Facts(
        repo=repo,
        run=run,
        keys=keys,
        data=data,
        base=base or _hub_base(source, run),
        datasets=list(datasets),
        adapter=is_adapter(source),
        loading=loading_in_4_bits(facts_of(source)),
        base_changes=changes_of_config(source, elsewhere=base) if is_adapter(source) else {},
        license=license,
    )


def require_same_base(source: Path, base: str, *, unverified: bool) -> None:
    """See that a model of the hub is the base that an adapter was trained on; say it where nobody can tell here.

    Args:
        source: the adapter's folder.
        base: hub id; compared is what the hub's cache has of it.
        unverified: another one is said, and not refused.

    Raises:
        UserError: it is another one.
    """
    known, copy = facts_of(source).get(BASE), model_folder(base)
    if known is None:
        why = "the adapter does not say on which it was trained"
    elif copy is None or not any(path for kind in KINDS for path in copy.glob(kind)):
        why = f"its weights are not here (hf download {base})"
    elif (other := base_differs(known, hash_base(str(copy)))) is None:
        return
    elif unverified:
        why = f"it differs in its {other} from the base of training"
    else:
        raise UserError(
            f"--base: {base} differs in its {other} from the base that {source} was trained on: name that one; "
            "--unverified pushes it as it is"
        )
    print_line(f"--base: nobody has seen that {source} fits {base}: {why}.")


def _hub_base(source: Path, run: dict[str, Any]) -> str | None:
    """The hub id of the model that training began with; None where it began with a folder.

    Raises:
        UserError: an adapter of a folder: nobody else could load it.
    """
    base = find_base(source) if is_adapter(source) else run.get("base_model")
    if base is None or not looks_like_path(base):
        return base
    if is_adapter(source):
        raise UserError(
            f"{source}: an adapter of the folder {base}, which nobody else has: --base OWNER/NAME says where the hub "
            "has it"
        )
    return None
