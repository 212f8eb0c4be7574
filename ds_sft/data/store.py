"""Encoded files on disk: where they lie, what they are named after, and whether they are still what was written.

An encoded file is a folder of parts. A part is rows in Arrow, figures of each row, and counts with the hashes of the
other files. A folder with a byte changed or missing is not intact, and is built again.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import xxhash

from ds_sft.config.extension import is_dotted, source_hash
from ds_sft.config.keys import TEMPLATES, Config
from ds_sft.data.counts import Counts
from ds_sft.data.sources import DataFile
from ds_sft.errors import UserError

STATS = np.dtype(
    [
        ("row", "<i8"),  # line in the file
        ("length", "<i4"),  # tokens before any was cut
        ("tokens", "<i4"),
        ("supervised", "<i4"),
        ("supervised_cut", "<i4"),
        ("hash", "<u8"),  # of the ids
        ("forged", "?"),  # whether text of it became special tokens
        ("textless", "?"),  # whether an answer in it has no text
    ]
)
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class EncodedFile:
    """A file as it lies in the cache."""

    file: DataFile
    data: datasets.Dataset  # columns input_ids, labels
    stats: np.ndarray  # [rows] of STATS
    lost: np.ndarray  # [rows left out because of their length] of STATS
    counts: Counts


def cache_dir(config: Config) -> Path:
    """`cache_dir`, else DS_SFT_CACHE, else ds_sft under the user's cache; made if absent."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ds_sft"
    path = Path(config.cache_dir or os.environ.get("DS_SFT_CACHE") or home).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cache_dir: {path} cannot be made: {error.strerror}; name another folder") from None
    return path


def settings_key(config: Config, tokenizer: Any) -> str:
    """A hash of all but the file that decides the encoded rows: tokenizer, settings, and the code that encodes."""
    settings = [
        config.system_prompt, config.max_length, config.on_bad_row, code_of_shape(config.data_format),
        config.data_fields, config.template, config.mask, config.thinking, config.allow_special_tokens, config.overlong,
        str(tokenizer.pad_token), tokenizer.pad_token_id, tokenizer.special_tokens_map, tokenizer.chat_template,
        version("tokenizers"), version("transformers"), version("pyarrow"),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(settings, default=str, sort_keys=True).encode())
    if config.template not in TEMPLATES and Path(config.template).expanduser().is_file():
        digest.update(Path(config.template).expanduser().read_bytes())
    # The backend's own description holds vocabulary, merges, normaliser and special tokens.
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name in (
        "answers",
        "bad_row",
        "build",
        "content",
        "counts",
        "encode",
        "hermes",
        "messages",
        "pieces",
        "readers",
        "records",
        "rendered",
        "shapes",
        "sources",
        "store",
        "templates",
        "turns",
        "values",
    ):
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    return digest.hexdigest()


def code_of_shape(data_format: str | None) -> str | None:
    """The name of a shape; of a user's function with a hash of the source that it is in."""
    source = f" {source_hash(data_format, 'data_format')}" if data_format and is_dotted(data_format) else ""
    return data_format and data_format + source


def file_key(file: DataFile, settings: str, memory: Path) -> str:
    """What an encoded file is named after. `memory`: see `DataFile.digest`."""
    read = (file.kind, file.limit, code_of_shape(file.data_format), file.data_fields)
    return hashlib.sha256(f"{file.digest(memory)} {read} {settings}".encode()).hexdigest()[:24]


def intact(folder: Path) -> bool:
    """Whether a folder is complete and every file in it has the size and the hash it was written with."""
    try:
        names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parts"]
        return bool(names) and all(part_intact(folder, name) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def part_intact(folder: Path, name: str) -> bool:
    """Whether the files of a part have the hashes that its counts were written with."""
    try:
        files = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["files"]
        return all(file_hash(folder / file) == written for file, written in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def file_hash(path: Path) -> str:
    """XXH3 with 128 bits of a file's bytes."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def open_encoded(file: DataFile, folder: Path) -> EncodedFile:
    """The rows of an intact folder, mapped into memory and not read."""
    names = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parts"]
    counts, stats, lost, parts = Counts(), [], [], []
    for name in names:
        counts.add(Counts(**json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["counts"]))
        stats.append(np.load(folder / f"{name}.npy", mmap_mode="r"))
        lost.append(np.load(folder / f"{name}.lost.npy"))
        parts.append(datasets.Dataset.from_file(str(folder / f"{name}.arrow")))
    return EncodedFile(file, datasets.concatenate_datasets(parts), np.concatenate(stats), np.concatenate(lost), counts)
