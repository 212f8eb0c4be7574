"""The modules and keys of docs/extend.md, as a user would write them: tests run what the page shows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ds_sft.config.extension import load
from tests.test_docs import blocks

PAGE = "docs/extend.md"
TICKETS = [
    {"subject": f"Order {i}", "body": "Where is it?", "reply": f"It is on its way to you, number {i}. " * (1 + i % 3)}
    for i in range(24)
]


def write_modules(folder: Path) -> None:
    """Each Python block, into the file that its first line names."""
    for _, language, text in blocks(PAGE):
        if language == "python":
            name = text.partition("\n")[0].removeprefix("# ")
            (folder / name).write_text(text, encoding="utf-8")


def keys_of_page() -> dict[str, Any]:
    """The keys of all YAML blocks."""
    keys: dict[str, Any] = {}
    for _, language, text in blocks(PAGE):
        keys |= yaml.safe_load(text) if language == "yaml" else {}
    return keys


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported inside the block, and are forgotten behind it."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    load.cache_clear()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        load.cache_clear()
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_relative_to(folder):
                del sys.modules[name]
