"""`ds-sft verify OUTPUT_DIR`: ask the final model for the loss that the run had no memory to ask for.

Such a run ends well, with "Export not verified: no memory for it", and leaves verify.json: a few rows and their loss in
training. It goes when the model was asked; run.json then has the answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ds_sft.commands.flags import FlagParser
from ds_sft.errors import UserError
from ds_sft.ranks.launch import print_line
from ds_sft.results import KEPT, RESULTS, write_json


def main(argv: Sequence[str]) -> int:
    """Run the command; 1 is the exit code where the model is not the trained one, or could again not be asked."""
    parser = FlagParser("verify", __doc__)
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="the output folder of the run")
    folder = parser.parse(argv).folder
    kept = folder / KEPT
    if not kept.is_file():
        raise UserError(
            f'{folder}: no {KEPT} in it; it is there where a run ended with "Export not verified: no memory"'
        )
    from ds_sft.export.verify import ExportError, Question, require_verified, verify_or_keep

    result = verify_or_keep(folder, Question(**json.loads(kept.read_text(encoding="utf-8"))))
    run = folder / RESULTS
    if run.is_file():
        write_json(run, json.loads(run.read_text(encoding="utf-8")) | {"export": result})
    try:
        require_verified(result, folder)
    except ExportError as error:
        print_line(str(error))
    return 0 if result["verified"] else 1
