"""What a command asks a model with: its files, its tokenizer, and the keys of the run that trained it.

A model is named by the output folder of a run, its folder `adapter`, one of its checkpoints (exported on the way, into
a folder that is gone afterwards), a folder of `ds-sft export`, or any other folder or hub id. What a run taught is then
asked for as it was taught, by its config.yaml; other models are asked by their own chat template.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sft.config import Config, load_config
from ds_sft.errors import UserError
from ds_sft.plan.adapter import CONFIG, is_adapter
from ds_sft.runtime.checkpoint import newest_complete
from ds_sft.runtime.distributed import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "config.yaml"  # what a run leaves of its keys
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
        UserError: there is no such model, or it is not complete.
    """
    folder = Path(name).expanduser()
    if (folder / STATE).is_file():
        with _exported(folder) as path:
            yield _open(name, path, folder.resolve().parent, words, launch, flags)
        return
    if not (folder / RECORD).is_file():
        run = folder.resolve().parent if is_adapter(folder) else None
        yield _open(name, str(folder) if folder.is_dir() else name, run, words, launch, flags)
        return
    yield _open(name, str(_final(folder)), folder, words, launch, flags)


def _final(output_dir: Path) -> Path:
    """What a finished run's model is loaded from.

    Raises:
        UserError: the run is not finished.
    """
    from ds_sft.runtime.adapter import exported

    found = exported(output_dir)
    if is_adapter(found) or any(found.glob("model*.safetensors")):
        return found
    newest = newest_complete(output_dir)
    instead = f"its newest checkpoint can be asked: {newest.path}" if newest else "and no checkpoint yet"
    raise UserError(f"{output_dir}: the run in it has left no final model yet; {instead}")


@contextmanager
def _exported(checkpoint: Path) -> Iterator[str]:
    """The folder of a checkpoint's model, beside it or, where that cannot be written, in the system's folder."""
    from ds_sft.commands.export import main as export
    from ds_sft.runtime.adapter import FOLDER

    beside = checkpoint.resolve().parent
    try:
        made = Path(tempfile.mkdtemp(prefix=f".{checkpoint.name}-", dir=beside))
    except OSError:
        made = Path(tempfile.mkdtemp(prefix=f"{checkpoint.name}-"))
    try:
        alone = ["--adapter-only"] if (checkpoint / CONFIG).is_file() else []
        export([str(checkpoint), str(made), *alone])
        yield str(made / FOLDER if alone else made)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _open(name: str, path: str, run: Path | None, words: Sequence[str], launch: Launch, flags: Sequence[str]) -> Opened:
    """Config and tokenizer of the model in `path`; `run`: the output folder that it comes from, if any."""
    from ds_sft.training.model import load_tokenizer, open_tokenizer

    record = run / RECORD if run else None
    trained = record is not None and record.is_file()
    if trained:
        config = load_config(["--config", str(record), *words], flags=flags)
    else:  # the first three must be given, and are not read
        own = ["--model_name_or_path", name, "--train_file", "-", "--output_dir", "-"]
        config = load_config([*own, "--template", "tokenizer", "--system_prompt", "", *words], flags=flags)
    if is_adapter(Path(path)):
        tokenizer = open_tokenizer(path, launch, trust_remote_code=config.trust_remote_code)
    else:
        tokenizer = load_tokenizer(replace(config, model_name_or_path=path, quantization="none"), launch)
    # The file that `template` named may have moved: the model's own chat template is made of it.
    template = "reference" if config.template == "reference" else "tokenizer"
    return Opened(name, path, replace(config, template=template), tokenizer, trained)
