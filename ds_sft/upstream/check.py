"""Whether the libraries that are installed still have the names of `names.py`, as they were read there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from ds_sft.errors import UserError
from ds_sft.upstream.names import NAMES, OVERRIDDEN, READ_IN, TEXT, Name


def require_names(*libraries: str) -> None:
    """See that what is imported by now has all names; of these libraries, or of all.

    Raises:
        UserError: one has not: the version, and what would stop working.
    """
    found = next(faults(name for name in NAMES if not libraries or name.library in libraries), None)
    if found is not None:
        raise UserError(fault_in_words(*found))


def faults(names: Iterable[Name] = NAMES) -> Iterator[tuple[Name, str]]:
    """Each of these names that is otherwise in what is installed and imported, and how."""
    for name in names:
        if name.library in sys.modules and not _is_over(name) and (found := _fault(name)):
            yield name, found


def fault_in_words(name: Name, found: str) -> str:
    """One line for a user."""
    installed, read = importlib.metadata.version(name.library), READ_IN[name.library]
    # Of what is too new any version below will do, for an older CUDA an older one; what is too old must be as read.
    below = f"<{next_minor(read)}"
    wanted = f"'{name.library}{below}'" if _minor(installed) > _minor(read) else f"'{name.library}>={read},{below}'"
    return (
        f"{name.library} {installed}: {found}; ds_sft was written against {read}. Here {name.stops}: "
        f"pip install {wanted}"
    )


def _is_over(name: Name) -> bool:
    """Whether what is installed needs the name no more."""
    return bool(name.until) and _minor(importlib.metadata.version(name.library)) >= _minor(name.until)


def _minor(version: str) -> tuple[int, ...]:
    """(5, 23) of 5.23.0."""
    return tuple(map(int, version.split(".")[:2]))


def next_minor(version: str) -> str:
    """The first version of which nothing was read."""
    major, minor, *_ = version.split(".")
    return f"{major}.{int(minor) + 1}"


def _fault(name: Name) -> str | None:
    if name.kind == TEXT:
        return _fault_of_text(name)
    return _fault_of_use(name) or _fault_of_itself(name)


def _fault_of_text(name: Name) -> str | None:
    file = Path(str(sys.modules[name.library].__file__)).parents[1] / name.path
    return None if name.as_read in _source(file) else f"{name.path} has no `{name.as_read}`"


def _fault_of_use(name: Name) -> str | None:
    """Whether the library itself uses a name where it did; a caller that is gone uses nothing."""
    if not name.seen_in:
        return None
    try:
        caller = find(name.caller)
    except AttributeError:
        return f"{_dotted(name.caller)}, which used {name.last}, is gone"
    if caller is None or name.last in mentioned(caller):
        return None
    return f"{_dotted(name.caller)} does not use {name.last}"


def _fault_of_itself(name: Name) -> str | None:
    try:
        found = find(name.path)
    except AttributeError:
        return f"{_dotted(name.path)} is gone"
    if name.kind != OVERRIDDEN or found is None or parameters(found) == name.as_read:
        return None
    return f"{_dotted(name.path)} takes ({parameters(found)}) instead of ({name.as_read})"


def _dotted(path: str) -> str:
    return path.replace(":", ".")


@lru_cache(maxsize=1)  # rows of a file stand together
def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def find(path: str) -> Any:
    """What is at MODULE:NAME.NAME, of MODULE:NAME().NAME what is called; None where the module is not imported.

    Raises:
        AttributeError: there is no such name, or no such module in a package that is imported.
    """
    module, _, name = path.partition("().")[0].partition(":")
    if module in sys.modules:
        return attrgetter(name)(sys.modules[module])
    package = module.rpartition(".")[0]
    if package in sys.modules and importlib.util.find_spec(module) is None:
        raise AttributeError(path)
    return None


def mentioned(function: Any) -> set[str]:
    """Words in the code of a function, and of those inside of it: attributes, globals, strings; none of one in C.

    Those of a function that it wraps, too: torch's compiler puts one of its own around `Module.__init__`.
    """
    code = _code(function)
    return set(_words(code)).union(*map(_words, _wrapped_by(function))) if code else set()


def _wrapped_by(function: Any) -> Iterator[CodeType]:
    """The code of functions that a function has from around its definition."""
    cells = getattr(inspect.unwrap(function), "__closure__", None) or ()
    with suppress(ValueError):  # a cell with nothing in it yet
        yield from (cell.cell_contents.__code__ for cell in cells if isinstance(cell.cell_contents, FunctionType))


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)


def parameters(function: Any) -> str:
    """Parameters of a function by their names, without types and defaults; of one in C they are not known."""
    code = _code(function)
    if code is None:
        return "?"
    plain = code.co_argcount + code.co_kwonlyargcount
    names, many = list(code.co_varnames[:plain]), iter(code.co_varnames[plain:])
    if code.co_flags & inspect.CO_VARARGS:
        names.insert(code.co_argcount, f"*{next(many)}")
    if code.co_flags & inspect.CO_VARKEYWORDS:
        names.append(f"**{next(many)}")
    return ", ".join(names)


def _code(function: Any) -> CodeType | None:
    """Of a function or a property, without its decorators; None of one in C."""
    function = function.fget if isinstance(function, property) else function
    return getattr(inspect.unwrap(function), "__code__", None)
