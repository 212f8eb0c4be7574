"""What comes with the package beside its code, and how a run is started: from a clone by its file, else as a module."""

from __future__ import annotations

import shlex
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# In a clone these are links to the folders beside the package; a wheel has the files themselves.
CONFIGS, TEMPLATES = PACKAGE / "ds_configs", PACKAGE / "slurm"


def clone() -> Path | None:
    """The repository that this package runs from; None where it was installed from a wheel."""
    root = PACKAGE.parent
    return root if (root / "setup.cfg").is_file() and (root / "slurm").is_dir() else None


def shown(path: Path) -> str:
    """A path as the current folder names it: short below it, in full elsewhere."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def program(launcher: str) -> list[str]:
    """What a command says behind its launcher to train: `torchrun ds_sft/train.py`, without a clone
    `torchrun -m ds_sft train`."""
    root, short = clone(), Path("ds_sft/train.py")
    if root is not None:
        whole = PACKAGE / "train.py"
        return [str(short if short.exists() and short.samefile(whole) else whole)]
    return ["--module" if launcher == "deepspeed" else "-m", "ds_sft", "train"]


def command(launcher: str, *flags: str) -> str:
    """A command that trains, as one would type it, but for the keys of the run."""
    return shlex.join([launcher, *flags, *program(launcher)])
