"""The model that frozen weights are of, known again by a hash of its files: checkpoints have none of these weights.

Its config.json counts as well: another base of rotations, window or number of heads is another model with the same
weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from multiprocessing.pool import ThreadPool
from pathlib import Path
from threading import Thread

import xxhash

from ds_sft.checkpoints.content import KINDS, hash_config, weights_in
from ds_sft.checkpoints.identity import base_differs
from ds_sft.checkpoints.manifest import HASH_THREADS, hash_file
from ds_sft.config.keys import Config
from ds_sft.errors import UserError, first_line
from ds_sft.ranks.launch import Launch


def begin_to_hash_base(config: Config, launch: Launch) -> Future[str]:
    """`hash_base` of the model to train, in a thread of rank 0 beside other work; "" where no weight is frozen."""
    found: Future[str] = Future()
    if config.freezes and launch.is_main:
        Thread(target=_answer, args=(found, config.model_name_or_path), daemon=True).start()
    else:
        found.set_result("")
    return found


def _answer(found: Future[str], name: str) -> None:
    try:
        found.set_result(hash_base(name))
    except (OSError, ValueError):  # the model cannot be loaded either, and loading it says why
        found.set_result("")
    except BaseException as error:  # to whoever waits
        found.set_exception(error)


def hash_base(name: str) -> str:
    """Hashes of a model's weight files and of its config.json (`identity.base_differs`): of a folder, or the id of one
    in the hub, which is fetched if need be.

    Raises:
        OSError, ValueError: a file cannot be read, or there is no such model.
    """
    files = weight_files(name)
    with ThreadPool(HASH_THREADS) as pool:  # of threads that a process does not wait for when it ends
        weights = xxhash.xxh3_128("".join(pool.map(hash_file, files)).encode()).hexdigest()
    return f"{weights}-{hash_config(files[0].parent / 'config.json')}"


def require_base(folder: Path, base: str, known: str | None, remedy: str) -> None:
    """See that the base's files are those that training had, where it said which (`known`, see `hash_base`).

    Args:
        folder: the adapter or checkpoint that has no base of its own.
        remedy: how its own is given.

    Raises:
        UserError: they are others, or not there.
    """
    if known is None:
        return
    try:
        found = hash_base(base)
    except (OSError, ValueError) as error:
        said = first_line(error)
        raise UserError(f"{folder}: its base {base} is not there ({said}): say where it is: {remedy}") from None
    if (other := base_differs(known, found)) is not None:
        raise UserError(
            f"{folder}: {base} differs in its {other} from the base that it was trained on (hash {known}, found "
            f"{found}): give its own: {remedy}"
        )


def weight_files(name: str) -> Sequence[Path]:
    """The files of a model's weights, in the order of their names.

    Raises:
        OSError, ValueError: there are none.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, allow_patterns=[KINDS[0], "*.json"]))
        if not any(folder.glob(KINDS[0])):
            folder = Path(snapshot_download(name, allow_patterns=[KINDS[1], "*.json"]))
    return weights_in(folder)
