"""`ds-sft push FOLDER OWNER/NAME`: give a trained model to others, on the Hugging Face hub.

    ds-sft push output me/my-model --dry-run     # what would go: files, sizes, card, template
    ds-sft push output me/my-model               # a private repository, in one commit

FOLDER is the output folder of a finished run, whose weights were compared with the trained ones. Only the model, its
tokenizer and chat template go, and a model card that is made of run.json, config.yaml and data_report.json; these,
checkpoints, predictions and metrics stay here. The chat template has the system prompt in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ds_sft.commands.flags import FlagParser
from ds_sft.config.values import is_repo
from ds_sft.errors import UserError

if TYPE_CHECKING:
    from ds_sft.export.parcel import Parcel


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    given = _parse(argv)
    from ds_sft.export.hub import Address, send
    from ds_sft.export.parcel import pack

    parcel = pack(given.folder, given.repo, merged=given.merged, base=given.base, license=given.license,
                  unverified=given.unverified)  # fmt: skip
    if given.dry_run:
        show(parcel)
        return 0
    address = Address(given.repo, public=given.public, revision=given.revision, update=given.update)
    try:
        where = send(parcel, address, given.message)
    except KeyboardInterrupt:
        print(f"{given.repo} has all files of this push or none. The same command goes on: what arrived stays there.")
        raise
    print(f"Pushed: {where}")
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = FlagParser("push", __doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the output folder of a finished run")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository on the hub")
    parser.add_argument("--public", action="store_true", help="for everybody; else it is private")
    parser.add_argument("--dry-run", action="store_true", help="send nothing: print files, sizes, card and template")
    parser.add_argument("--merged", action="store_true", help="of a run with an adapter: the merged model")
    parser.add_argument("--base", metavar="OWNER/NAME", help="where the hub has the model that training began with")
    parser.add_argument("--license", metavar="ID", help="for the card, such as apache-2.0 or mit")
    parser.add_argument("--update", action="store_true", help="into a repository that has files already")
    parser.add_argument("--revision", metavar="BRANCH", help="of the repository; default: main")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--unverified", action="store_true", help="also weights that nobody compared with the trained")
    given = parser.parse(argv)
    for name, value in (("OWNER/NAME", given.repo), ("--base", given.base)):
        if value is not None and not is_repo(value):
            raise UserError(f"{name}: expected a repository such as me/my-model, found {value!r}")
    return given


def show(parcel: Parcel) -> None:
    """Print what a push would send: names and sizes, and all that a person wrote."""
    from rich.console import Console
    from rich.table import Table

    from ds_sft.export.parcel import TEMPLATE
    from ds_sft.plan.size import in_units

    sizes = parcel.sizes
    table = Table(title=f"{len(sizes)} files, {in_units(sum(sizes.values()))}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    for name, size in sorted(sizes.items()):
        table.add_row(name, in_units(size))
    console = Console(markup=False, highlight=False)
    console.print(table)
    for name, text in parcel.texts.items():
        console.print(f"\n{name}:\n", soft_wrap=True)
        console.print(text, soft_wrap=True)
    if TEMPLATE in parcel.files:  # it may have a system prompt that others should not read
        console.print(f"\n{TEMPLATE}:\n", soft_wrap=True)
        console.print((parcel.folder / TEMPLATE).read_text(encoding="utf-8"), soft_wrap=True)
    print("Nothing was sent.")
