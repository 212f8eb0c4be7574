"""The text of a configuration with other values of some keys; all else stays as it was written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import yaml

from ds_sft.config.keys import whole
from ds_sft.config.upstream_keys import ALIASES
from ds_sft.config.values import plain


def with_changes(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a configuration with other values of some keys; None takes a key out. All else stays as written."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # it was read before
    left = {name: value for name, value in changes.items() if value is not None}
    if root.flow_style:
        named = ((ALIASES.get(str(key_node.value), str(key_node.value)), node) for key_node, node in root.value)
        kept = {name: plain(node) for name, node in named if name not in changes}
        return _yaml({name: whole(value) for name, value in (kept | left).items()})
    for key_node, node in reversed(root.value):  # from the end: places before it stay
        name = ALIASES.get(str(key_node.value), str(key_node.value))
        if name in changes:
            text = _exchanged(text, key_node, node, left.pop(name, None))
    lines = [f"{name}: {_in_one_line(value)}\n" for name, value in left.items()]
    return "".join([text if text.endswith("\n") or not text else f"{text}\n", *lines])


def _exchanged(text: str, key_node: yaml.Node, node: yaml.Node, value: Any) -> str:
    """The text with another value for one key, or without the key."""
    end = len(text[: _end(node)].rstrip())
    if value is None:
        return text[: key_node.start_mark.index] + text[end:]
    behind_colon = text.index(":", key_node.end_mark.index) + 1
    return f"{text[:behind_colon]} {_in_one_line(value)}{text[max(end, behind_colon) :]}"


def _end(node: yaml.Node) -> int:
    """Where the text of a value ends; a block's own mark stands behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _in_one_line(value: Any) -> str:
    return _yaml([whole(value)], flow=True).strip()[1:-1]


def _yaml(value: Any, *, flow: bool = False) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True, sort_keys=False, width=math.inf)
    return text
