from __future__ import annotations
import inspect
from collections.abc import Iterator
from types import CodeType
from typing import Any
NAMES=(); READ_IN={}; Name=None; faults=None

def mentioned(function: Any) -> set[str]:
    """Names that the code of a function uses: globals, attributes and methods, in functions inside of it, too."""
    return set(_names_in(inspect.unwrap(function).__code__))


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)
