"""What a command asks a model with: its files, its tokenizer, and the keys of the run that trained it.

A model is named by the output folder of a run, its folder `adapter`, one of its checkpoints (exported on the way, into
a folder that is gone afterwards), a folder of `ds-sft export`, or any other folder or hub id. What a run taught is then
asked for as it was taught, by its config.yaml; other models are asked by their own chat template.
"""

from __future__ import annotations

import io
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.config.keys import RECORD, TEMPLATES, Config
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.plan.adapter import CONFIG, is_adapter
from ds_sft.plan.source import require_model
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STATE = "trainer_state.json"  # Trainer's file of every checkpoint, and of nothing else


@dataclass(frozen=True)
class Opened:
    """A model to ask. `predict.load_to_answer(path, ...)` loads it, `data.encode.Encoder` makes its prompts."""

    name: str  # as it was called for
    path: str  # of its files: a folder, of an adapter's too, or a hub id
    config: Config  # the run's keys; `model_name_or_path` is what was trained, the base
    tokenizer: PreTrainedTokenizerBase
    trained: bool  # a run of ours tells how it was taught


@contextmanager
def open_model(name: str, words: Sequence[str], launch: Launch, *, flags: Sequence[str] = ()) -> Iterator[Opened]:
    """Find the model `name` and how it is asked; a folder that had to be made for it is removed at the end.

    Args:
        words: keys that win over those of the run, as flags.
        flags: names of the command's own flags, see `load_config`.

    Raises:
        UserError: there is no such model, or it is not complete; or a key is wrong.
    """
    folder = Path(name).expanduser()
    if not (folder / STATE).is_file():
        path, run = _place(name)
        yield _open(name, path, launch, *_keys(name, run, words, flags))
        return
    asked = _keys(name, folder.resolve().parent, words, flags)
    _require_template(folder)
    if is_adapter(folder):
        _require_base(folder)
    with _exported(folder, launch) as path:
        yield _open(name, path, launch, *asked)


def _place(name: str) -> tuple[str, Path | None]:
    """Where the model is that is no checkpoint, and the output folder of its run, if it has one.

    Raises:
        UserError: the run is not finished, or the base of an adapter is not there.
    """
    folder = Path(name).expanduser()
    if (folder / RECORD).is_file():
        found, run = _final(folder), folder
    elif is_adapter(folder):
        found, run = folder, folder.resolve().parent
    else:
        return str(folder) if folder.is_dir() else name, None
    if is_adapter(found):
        _require_base(found)
    return str(found), run


def _final(output_dir: Path) -> Path:
    """What a finished run's model is loaded from.

    Raises:
        UserError: the run is not finished.
    """
    from ds_sft.model.adapter_files import exported

    found = exported(output_dir)
    if is_adapter(found) or any(found.glob("model*.safetensors")):
        return found
    newest = newest_complete(output_dir)
    instead = f"its newest checkpoint can be asked: {newest.path}" if newest else "and no checkpoint yet"
    raise UserError(f"{output_dir}: the run in it has left no final model yet; {instead}")


def _require_base(folder: Path) -> None:
    """See that the base of an adapter is there, and the one that it was trained on.

    Raises:
        UserError: it is not.
    """
    from ds_sft.checkpoints.base import require_base
    from ds_sft.model.adapter_files import BASE, facts_of, find_base

    base = find_base(folder)
    try:
        require_model(base)
    except UserError as error:
        said = _without_key(error).removeprefix(f"{base}: ")
        place = f"{folder / CONFIG}: base_model_name_or_path"
        raise UserError(f"{place}: {base}: {said}: write there where the base of the adapter is now") from None
    remedy = f"write it as base_model_name_or_path into {folder / CONFIG}"
    require_base(folder, base, facts_of(folder).get(BASE), remedy)


def keys_alone(words: Sequence[str], flags: Sequence[str], name: str = "-") -> Config:
    """Keys without a run's: the first three must be given, and are not read.

    Raises:
        UserError: a mistake in one of `words`.
    """
    own = ["--model_name_or_path", name, "--train_file", "-", "--output_dir", "-"]
    return load_config([*own, *words], flags=flags)


def _keys(name: str, run: Path | None, words: Sequence[str], flags: Sequence[str]) -> tuple[Config, bool]:
    """The keys of a run, or of a model that none of ours has trained; and whether one has."""
    record = run / RECORD if run else None
    if record is None or not record.is_file():
        return keys_alone(["--template", "tokenizer", "--system_prompt", "", *words], flags, name), False
    config = load_config(["--config", str(record), *words], flags=flags)
    given = any(word.partition("=")[0] == "--template" for word in words)
    if config.template in TEMPLATES or given:
        return config, True
    return replace(config, template="tokenizer"), True  # the file may have moved; the model has what was in it


def _require_template(checkpoint: Path) -> None:
    """See that the file is there which a run's chat template is in: a checkpoint has none of its own.

    Raises:
        UserError: it is not.
    """
    record = checkpoint.resolve().parent / RECORD
    template = load_config(["--config", str(record)]).template if record.is_file() else TEMPLATES[0]
    if template not in TEMPLATES and not Path(template).expanduser().is_file():
        raise UserError(
            f"{record}: template: {template}: no such file (the current directory is {Path.cwd()}): put it back, or go "
            "to the folder where the run was started"
        )


@contextmanager
def _exported(checkpoint: Path, launch: Launch) -> Iterator[str]:
    """The folder of a checkpoint's model, beside it or, where that cannot be written, in the system's folder."""
    from ds_sft.commands.export import main as export
    from ds_sft.model.adapter_files import FOLDER

    launch.say(f"Exporting {checkpoint.name} first, into a folder that is removed afterwards.")
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}-", dir=checkpoint.resolve().parent))
    except OSError:
        made = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name}-"))
    kept = [(number, signal.signal(number, _leave)) for number in (signal.SIGHUP, signal.SIGTERM)]
    try:
        alone = ["--adapter-only"] if is_adapter(checkpoint) else []
        with redirect_stdout(io.StringIO()):  # its lines name the folder, and what to do with it
            export([str(checkpoint), str(made), *alone])
        yield str(made / FOLDER if alone else made)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        for number, handler in kept:
            signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    """End as an exception does: whoever closes a terminal leaves no copy of a model behind."""
    sys.exit(128 + number)


def _open(name: str, path: str, launch: Launch, config: Config, trained: bool) -> Opened:
    """The model in `path` with its tokenizer, whose chat template is the one that training had.

    Raises:
        UserError: it cannot be opened.
    """
    from ds_sft.data.serving import authors_template
    from ds_sft.model.tokenizer import load_tokenizer, open_tokenizer

    try:
        if is_adapter(Path(path)):
            tokenizer = open_tokenizer(path, launch, trust_remote_code=config.trust_remote_code)
        else:
            as_it_is = replace(config, model_name_or_path=path, quantization="none", rope_scaling=None)
            tokenizer = load_tokenizer(as_it_is, launch)
    except UserError as error:
        raise UserError(_without_key(error)) from None
    if trained and isinstance(tokenizer.chat_template, str):
        tokenizer.chat_template = authors_template(tokenizer.chat_template)
    return Opened(name, path, config, tokenizer, trained)


def _without_key(error: UserError) -> str:
    """What is wrong with a model that no key has named."""
    return str(error).removeprefix("model_name_or_path: ")
