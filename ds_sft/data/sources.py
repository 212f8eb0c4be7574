"""What `train_file` and `eval_file` name: files, folders, globs and hub data sets, and how much of each is wanted.

Only what these keys name is opened.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ds_sft.config.extension import is_dotted
from ds_sft.config.keys import DATA_FORMATS
from ds_sft.data.readers import CHUNK, COMPRESSED, KINDS, BytesRead, Raw, file_rows, hub_rows, kind_of, readable
from ds_sft.errors import UserError

HUB = re.compile(r"hub:(?P<name>.+)|(?P<bare>[A-Za-z0-9][\w.-]*/[\w.-]+)")


@dataclass(frozen=True)
class DataFile:
    """One file, or one split of a hub data set, and how much of it is wanted."""

    name: str  # a path, or a hub data set's name
    weight: float = 1.0  # how often each row is learned from in an epoch; 0.5 takes half of the rows
    limit: int | None = None  # rows read at most
    hub: bool = False
    split: str = "train"  # of a hub data set, as is `config`
    config: str | None = None
    data_format: str | None = None  # of this file; None: what the run's key says, as with `data_fields`
    data_fields: tuple[tuple[str, str], ...] | None = None

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where it is not known."""
        return None if self.hub else Path(self.name).stat().st_size

    @property
    def kind(self) -> str:
        """How its bytes are read: the same ones may be a JSON array, or lines, or compressed."""
        path = Path(self.name)
        return "hub" if self.hub else f"{kind_of(path) or 'json'} {COMPRESSED.get(path.suffix.lower())}"

    def rows(self, bytes_read: BytesRead | None = None) -> Iterator[tuple[int, Raw]]:
        """Yield the line number (the row number in Parquet and on the hub) and the row.

        Raises:
            UserError: the file as a whole cannot be read, from here on.
        """
        rows = hub_rows(self.name, self.config, self.split) if self.hub else file_rows(Path(self.name), bytes_read)
        yield from islice(rows, self.limit)  # and not a row further: what comes next may be broken

    def digest(self, memory: Path | None = None) -> str:
        """A hash of the bytes; of the commit for a hub data set.

        Args:
            memory: folder where commits are written down, for nodes that cannot ask the hub.
        """
        if self.hub:
            return _hub_digest(self, memory)
        with readable(Path(self.name)), open(self.name, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(CHUNK):
                digest.update(block)
            return digest.hexdigest()


def find_files(value: Any, key: str) -> list[DataFile]:
    """The files that a key names: a path, a glob, a folder, a hub data set, or a list of these.

    In a list, an item may be a mapping of `path` and any of weight, limit, data_format, data_fields, split, config.

    Raises:
        UserError: nothing there, or an item that is not understood.
    """
    items = value if isinstance(value, list) else [value]
    found = [file for item in items for file in _find(item, key)]
    if not found:
        raise UserError(f"{key}: expected at least one file")
    return found


def _find(item: Any, key: str) -> list[DataFile]:
    options = dict(item) if isinstance(item, dict) else {"path": item}
    path, weight, limit = options.pop("path", None), options.pop("weight", 1), options.pop("limit", None)
    split, config = options.pop("split", "train"), options.pop("config", None)
    shape, names = options.pop("data_format", None), options.pop("data_fields", None)
    if not isinstance(path, str) or not path or options:
        found = json.dumps(item, ensure_ascii=False, default=str)[:80]
        keys = "weight, limit, split, config, data_format, data_fields"
        raise UserError(f"{key}: {found}: expected a path, or a mapping of path and any of {keys}")
    weight, limit = _number(weight, f"{key}: {path}: weight"), limit and _number(limit, f"{key}: {path}: limit")
    if limit is not None and (limit != int(limit) or limit < 1):
        raise UserError(f"{key}: {path}: limit: expected a whole number of rows, found {limit}")
    limit = None if limit is None else int(limit)
    read: dict[str, Any] = {
        "data_format": _shape(shape, f"{key}: {path}"),
        "data_fields": _fields(names, f"{key}: {path}"),
    }
    if (name := hub_name(path)) is not None:
        return [DataFile(name, weight, limit, hub=True, split=str(split), config=config, **read)]
    return [DataFile(str(file), weight, limit, **read) for file in _paths(path, key)]


def _shape(value: Any, where: str) -> Any:
    if value is not None and value not in DATA_FORMATS and not is_dotted(value):
        known = ", ".join(DATA_FORMATS)
        raise UserError(f"{where}: data_format: expected one of {known}, or my.module:function, found {value!r}")
    return value


def _fields(value: Any, where: str) -> tuple[tuple[str, str], ...] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise UserError(f"{where}: data_fields: expected our names and the file's: {{question: prompt}}")
    return tuple(value.items())


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1e9:
        raise UserError(f"{where}: expected a number above 0, found {value!r}")
    return number


def hub_name(path: str) -> str | None:
    """The data set that a text names: hub:NAME, or OWNER/NAME where no such file is here."""
    match = HUB.fullmatch(path)
    if match is None:
        return None
    if match["name"]:
        return match["name"]
    here = Path(path).exists() or Path(path).parent.is_dir() or kind_of(Path(path)) is not None
    return None if here else path


def _paths(text: str, key: str) -> list[Path]:
    path = Path(text).expanduser()
    if path.is_dir():
        return _inside(path, key)
    if path.exists() or not glob.has_magic(text):
        return [path]  # reading says what is wrong with it
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    if not found:
        raise UserError(f"{key}: {text}: no file matches (the current directory is {Path.cwd()})")
    return [file for name in found for file in ([name] if name.is_file() else _inside(name, key))]


def _inside(folder: Path, key: str) -> list[Path]:
    """The data files of a folder and those below it; links that lead out of it are not followed."""
    root = folder.resolve()
    found = [path for path in sorted(folder.rglob("*")) if kind_of(path) is not None and path.is_file()]
    inside = [path for path in found if path.resolve().is_relative_to(root)]
    if not inside:
        raise UserError(f"{key}: {folder}: no data in it; expected {', '.join(KINDS)}, or these with .gz, .zst")
    return inside


def _hub_digest(file: DataFile, memory: Path | None) -> str:
    """Its commit; for a folder given as hub:FOLDER the names, sizes and times of what is in it."""
    folder = Path(file.name)
    if folder.is_dir():
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))]
        return repr((stats, file.split, file.config))
    from huggingface_hub import HfApi

    note = memory and memory / f"hub-{hashlib.sha256(file.name.encode()).hexdigest()[:24]}.commit"
    try:
        commit = HfApi().dataset_info(file.name).sha
        if note:
            beside = note.with_name(f"{note.name}.{os.getpid()}")
            beside.write_text(str(commit), encoding="utf-8")
            os.replace(beside, note)
        return repr((commit, file.split, file.config))
    except Exception as error:
        unreachable = isinstance(error, (OSError, RuntimeError)) and getattr(error, "response", None) is None
        if note and unreachable and note.is_file():  # as on a node without network: what `prepare` saw
            return repr((note.read_text(encoding="utf-8"), file.split, file.config))
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"hub data set {file.name!r}: {type(error).__name__}: {reason}") from None
