"""Parsed values of a row: what they are, whether anything is in them, and fields that nobody reads."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

from ds_sft.data.bad_row import BadRow

SURROGATE = re.compile("[\ud800-\udfff]")
INDEX = re.compile(r"\[\d+\]")
MAX_NAME = 60  # characters of a field's name that are kept
MEDIA = frozenset(f"{kind}{end}" for kind in ("image", "audio", "video") for end in ("", "s", "_url", "_urls"))


def check_text(value: str, name: str) -> str:
    """Raises BadRow: half of a surrogate pair in it."""
    if not value.isascii() and SURROGATE.search(value):
        raise BadRow("not Unicode text", f"field {name!r} holds half of a surrogate pair; expected Unicode text")
    return value


def check_json(value: Any, name: str) -> Any:
    """The value without the null fields of its objects; items of lists that are null stay.

    Parquet gives every object of a column the fields of all others, as null: what is null cannot be told from what is
    absent. The same rows must give the same tokens from every kind of file, so it is left out of all of them.

    Raises:
        BadRow: half of a surrogate pair somewhere in it, or what JSON has no form for.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
        clean = _without_nulls(value) if "null" in text else value
    except (TypeError, ValueError, RecursionError) as error:  # a date or bytes of a Parquet file; nested without end
        reason = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON: {error}"
        raise BadRow("not JSON values", f"field {name!r} {reason}; expected JSON values") from None
    check_text(text, name)
    return clean


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def unpacked(value: Any) -> Any:
    """Lists and objects also come as JSON in a text: in CSV, and in ShareGPT's tools."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def is_empty(value: Any) -> bool:
    """Whether nothing is lost with it: null, or a text, a list or an object without anything in it."""
    try:
        return _empty(value)
    except RecursionError:  # nested without end: there is something in it
        return False


def _empty(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_empty, value.values()))
    return all(map(_empty, value)) if isinstance(value, (list, tuple)) else value is None or value == ""


def note_unread(holder: Mapping[str, Any], known: Collection[str], where: str, unread: set[str]) -> None:
    """Add to `unread` the names of the fields that are not `known` and hold something, as "messages[].id".

    Raises:
        BadRow: one of them holds images, audio or video.
    """
    names = holder.keys() - known
    for name in sorted(names, key=str) if names else ():
        value = holder[name]
        if is_empty(value):
            continue
        if name in MEDIA and not isinstance(value, (bool, int, float)):
            raise BadRow("images, audio or video", f"{where}{name} is {found(value)}; only text can be learned from")
        unread.add(field_name(f"{where}{name}"))


@lru_cache(maxsize=1024)
def field_name(path: str) -> str:
    """messages[3].id -> messages[].id, fit to be printed."""
    name = INDEX.sub("[]", path)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)[:MAX_NAME]


def found(value: Any) -> str:
    if value is None:
        return "null"
    try:
        return f"{json_type(value)}: {json.dumps(value, ensure_ascii=True)[:40]}"
    except (TypeError, ValueError, RecursionError):  # a date of a Parquet file
        return json_type(value)


def json_type(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")
