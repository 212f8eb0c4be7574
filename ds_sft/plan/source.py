"""Where a model is: a folder, or the Hugging Face hub and its cache; what is in none of them is said at once."""

from __future__ import annotations

import difflib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from ds_sft.errors import UserError
from ds_sft.plan.adapter import base_of, is_adapter

REACH_SECONDS = 5  # for the hub to take a connection


def require_model(name: str) -> str | None:
    """See that a model can be had, before anything heavy is imported; a remark where its cache alone has it.

    Without a network the hub's library would ask six times for every file, aloud, for half a minute each, also where
    its cache has all of them: then it is told not to.

    Raises:
        UserError: no such folder, or one without a model; a hub id that is neither in the cache nor to be fetched.
    """
    if is_folder(name):
        return None
    cached = cached_config(name)
    trouble = unreachable()
    if trouble is None:
        return None
    if cached is None:
        near = None if "/" in name else nearest_name(name)
        no_folder = f"no such folder (did you mean {near}?)" if near else "no such folder"
        raise UserError(
            f"model_name_or_path: {name}: {no_folder}, not in the hub's cache, and {trouble}; give the folder of a "
            f"model, or fetch it where there is a network: hf download {name}"
        )
    return None if _stay_offline() else f"{name} comes from the hub's cache: {trouble}."


def is_folder(name: str, key: str = "model_name_or_path") -> bool:
    """Whether `name`, the value of `key`, is the folder of a model; else it may be a hub id.

    Raises:
        UserError: a folder without a model, a file, or what looks like a path and is not there.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if is_adapter(path):
            raise UserError(
                f"{key}: {name}: is an adapter of {base_of(path)}, not a model: write "
                f"{key}: {base_of(path)}, or a folder that it is merged into: ds-sft export {name} FOLDER"
            )
        if not (path / "config.json").is_file():
            raise UserError(f"{key}: {name}: this folder has no config.json, so it is not a model")
        return True
    if path.exists():
        raise UserError(f"{key}: {name}: is a file; give the folder of a model, or a hub id")
    if looks_like_path(name):
        raise UserError(f"{key}: {name}: {no_such_folder(name)}")
    return False


def looks_like_path(name: str) -> bool:
    """Whether nobody means a hub id by it, such as Qwen/Qwen3-0.6B or gpt2."""
    first, slash, _ = name.partition("/")
    in_a_folder = bool(slash) and Path(first).is_dir()
    return name.startswith(("/", ".", "~")) or name.endswith("/") or name.count("/") > 1 or in_a_folder


def no_such_folder(name: str) -> str:
    """That it is not there, and what is that has about its name."""
    near = nearest_name(name)
    if near is not None:
        return f"no such folder; did you mean {near}?"
    return f"no such folder (the current directory is {Path.cwd()}), and not a hub id such as Qwen/Qwen3-0.6B"


def nearest_name(name: str) -> str | None:
    """The path with its first part that is not there replaced by one that is."""
    parts = Path(name).parts
    for number, part in enumerate(parts):
        parent = Path(*parts[:number])
        here = parent.expanduser()
        if (parent / part).expanduser().exists() or not here.is_dir():
            continue
        folders = {path.name.lower(): path.name for path in here.iterdir() if path.is_dir()}
        near = difflib.get_close_matches(part.lower(), folders, n=1)
        if not near:
            return None
        found, rest = parent / folders[near[0]], Path(*parts[number + 1 :])
        return str(found / rest if (found / rest).expanduser().is_dir() else found)
    return None


def cached_config(name: str) -> Path | None:
    """The config.json of a hub id in the hub's cache; None where it was never fetched.

    Raises:
        UserError: no hub id.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(name, "config.json")
    except ValueError:
        raise UserError(f"model_name_or_path: {name}: {no_such_folder(name)}") from None
    return Path(cached) if isinstance(cached, str) else None


def unreachable() -> str | None:
    """Why nothing comes from the hub; None where it answers, or a proxy would have to be asked."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if getproxies():  # it resolves names for us
        return None
    hub = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=REACH_SECONDS).close()
    except OSError as error:
        return f"{hub.hostname} cannot be reached ({error.strerror or error})"
    return None


def _stay_offline() -> bool:
    """Tell the hub's library, here and in processes to come, not to ask the hub; whether it was told before."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    return before
