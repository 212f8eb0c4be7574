"""Functions that one object has in place of its class's, for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def lend(owner: Any, functions: dict[str, Callable[..., Any]]) -> Callable[[], None]:
    """Let an object have these functions of its own; what is returned takes them off again."""
    own = {name: vars(owner)[name] for name in functions if name in vars(owner)}
    vars(owner).update(functions)

    def take_off() -> None:
        for name in functions:
            vars(owner).pop(name, None)
        vars(owner).update(own)

    return take_off
