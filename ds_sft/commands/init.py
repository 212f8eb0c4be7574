"""`ds-sft init`: a commented configuration to begin with, and with --slurm the templates of jobs.

    ds-sft init                       # run.yaml
    ds-sft init other.yaml --slurm    # other.yaml, and the folder slurm

It asks for nothing and replaces nothing.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from ds_sft.commands.flags import FlagParser
from ds_sft.errors import UserError
from ds_sft.shipped import CONFIGS, TEMPLATES, command

FOLDER = Path("slurm")  # the templates look for each other by this name


def main(argv: Sequence[str]) -> int:
    """Write the files.

    Raises:
        UserError: one of them is there already, or cannot be written.
    """
    parser = FlagParser("init", __doc__)
    parser.add_argument("file", metavar="FILE.yaml", type=Path, nargs="?", default=Path("run.yaml"),
                        help="the configuration [%(default)s]")  # fmt: skip
    parser.add_argument("--slurm", action="store_true", help="also write slurm/, from where `sbatch` starts runs")
    given = parser.parse(argv)
    files = {FOLDER / file.name: file for file in templates()} if given.slurm else {}
    if given.slurm and given.file.is_file():  # of an earlier `ds-sft init`
        print(f"{given.file} stays as it is.")
    else:
        files |= {given.file: CONFIGS / "run.yaml"}
    copy_files(files)
    print(next_steps(given.file, slurm=given.slurm))
    return 0


def templates() -> list[Path]:
    """Those that the package has; in a clone their folder may hold logs of jobs, too."""
    return sorted(file for file in TEMPLATES.iterdir() if file.suffix in (".sbatch", ".sh", ".md"))


def copy_files(files: dict[Path, Path]) -> None:
    """Copy files, new -> source, if none of the new ones is there; task.sh stays executable.

    Raises:
        UserError: one is there already, or cannot be written.
    """
    for new in files:
        if os.path.lexists(new):
            raise UserError(f"{new} is there already, and nothing is replaced: move it away")
    for new, source in files.items():
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, new)
        except OSError as error:
            raise UserError(f"{new}: cannot be written: {error.filename}: {error.strerror}") from None
        print(f"Wrote {new}")


def next_steps(file: Path, *, slurm: bool) -> str:
    """What to do with the files, as commands."""
    import torch  # here: the files are written before it is imported

    name = shlex.quote(str(file))
    ranks, what = "2", "two CPU processes; where there are GPUs: gpu instead of 2"
    if torch.cuda.is_available():
        ranks, what = "gpu", "all GPUs of this machine"
    steps = [
        (f"ds-sft preview {name}", "what a model sees of the first rows, and what it learns"),
        (f"ds-sft plan {name}", "memory, disk and time"),
        (f"ds-sft train {name}", "one GPU, or a CPU"),
        (f"{command('torchrun', '--nproc_per_node', ranks)} {name}", what),
    ]
    if slurm:
        steps.append((f"ds-sft launch {name} --nodes 2 --gpus-per-node 8", "a cluster; slurm/README.md first"))
    width = max(len(words) for words, _ in steps)
    lines = [f"    {words:<{width}}  # {what}" for words, what in steps]
    return "\n".join([f"Next: name your model and data in {file}, then", *lines])
