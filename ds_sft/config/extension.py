"""A user's own code, which a key names as `my.module:thing`: docs/extend.md has what each key takes.

The module is sought where Python looks (PYTHONPATH), and last in the folder where the command was started.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

from ds_sft.config.keys import FILES, Config
from ds_sft.errors import UserError, nearest

DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
EXAMPLE = "my.module:thing"


def is_dotted(value: Any) -> bool:
    """Whether a value of a key names a user's own code, and not one of the key's own words."""
    return isinstance(value, str) and DOTTED.fullmatch(value) is not None


@cache
def load(name: str, key: str) -> Any:
    """What `my.module:thing` is; imported once.

    Args:
        key: of the run, that has it as a value.

    Raises:
        UserError: no such module, one that fails when it is imported, or no such name in it.
    """
    module_name, _, attributes = name.partition(":")
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that reads flags, or ends, wherever it is imported
        raise UserError(f"{key}: {name}: {_why_not_imported(module_name, error)}") from error
    for attribute in attributes.split("."):
        if not hasattr(found, attribute):
            near = nearest(attribute, (known for known in vars(found) if not known.startswith("_")))
            meant = f"did you mean {near}?" if near else f"write {EXAMPLE}, a name that the module has"
            raise UserError(f"{key}: {name}: {_place(module_name)} has no {attribute}: {meant}")
        found = getattr(found, attribute)
    return found


def _why_not_imported(module: str, error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return f"no module {error.name}: put its folder into PYTHONPATH, or start in it (here: {Path.cwd()})"
    return f"importing {module} ends in {said(error)}"


def said(error: BaseException) -> str:
    """An error of a user's code in one line, with the last line of that code that was at work."""
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {error.msg} ({Path(error.filename or '').name}:{error.lineno})"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{where}"


def _is_users(file: str) -> bool:
    """Whether a source file is neither of this package, nor of Python, nor installed."""
    path = Path(file).resolve()
    ours, python = Path(__file__).resolve().parents[1], Path(traceback.__file__).resolve().parent
    installed = {"site-packages", "dist-packages"} & set(path.parts)
    return not (file.startswith("<") or installed or path.is_relative_to(ours) or path.is_relative_to(python))


def require_call(found: Any, name: str, key: str, *arguments: str, keywords: Mapping[str, Any] | None = None) -> None:
    """See that something can be called with these arguments; `arguments` are their names, for the message.

    Raises:
        UserError: it cannot.
    """
    given = dict(keywords or {})
    call = ", ".join([*arguments, *(f"{keyword}=..." for keyword in given)])
    expected = f"it is called as {name.rpartition(':')[2]}({call})"
    if not callable(found):
        raise UserError(f"{key}: {name}: no function or class but {type(found).__name__}: {expected}")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of compiled code: the call itself shows it
        return
    try:
        signature.bind(*arguments, **given)
    except TypeError as error:
        raise UserError(f"{key}: {name}{signature}: {error}: {expected}") from None


def require_method(kind: Any, name: str, key: str, *arguments: str, keywords: Mapping[str, Any] | None = None) -> None:
    """See that a method of a class, or of an object, can be called with these arguments, as `require_call` does.

    Args:
        name: my.module:Thing.method

    Raises:
        UserError: it cannot.
    """
    method = name.rpartition(".")[2]
    found = getattr(kind, method)
    if isinstance(kind, type) and inspect.isfunction(inspect.getattr_static(kind, method)):
        found = partial(found, None)  # the object, which is made later
    require_call(found, name, key, *arguments, keywords=keywords)


def _place(module: str) -> str:
    file = getattr(sys.modules[module], "__file__", None)
    return str(file) if file else module


def source_hash(name: str, key: str) -> str:
    """Of the bytes of the module that a dotted name names, and of the one it is defined in, where that is another."""
    found, files = load(name, key), [getattr(sys.modules[name.partition(":")[0]], "__file__", None)]
    with suppress(TypeError):  # no class and no function, or none in Python
        files.append(inspect.getsourcefile(inspect.unwrap(found)))
    digest = hashlib.sha256()
    for path in dict.fromkeys(Path(file).resolve() for file in files if file):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def callbacks_of(config: Config) -> list[tuple[str, dict[str, Any]]]:
    """Name and arguments of each of the `callbacks`."""
    pairs = [next(iter(item.items())) if isinstance(item, Mapping) else (item, None) for item in config.callbacks or []]
    return [(name, dict(options or {})) for name, options in pairs]


def find_own_code(config: Config) -> None:
    """Import all of the user's code that a run names, which takes no library that it does not import itself.

    Raises:
        UserError: some cannot be had.
    """
    files = [item for name in FILES if isinstance(items := getattr(config, name), list) for item in items]
    shapes = [config.data_format, *(item.get("data_format") for item in files if isinstance(item, Mapping))]
    named = dict.fromkeys(shapes, "data_format") | dict.fromkeys(config.trackers, "report_to") | learned_with(config)
    for name, key in named.items():
        if is_dotted(name):
            load(name, key)


def learned_with(config: Config) -> dict[str, str]:
    """The dotted names that decide what is learned -> the keys that have them; the shapes of rows show in the rows."""
    named = {name: "callbacks" for name, _ in callbacks_of(config)}
    named |= {str(config.attn_implementation): "attn_implementation", str(config.training.get("optim")): "optim"}
    return {name: key for name, key in named.items() if is_dotted(name)}
