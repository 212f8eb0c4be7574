"""`ds-sft report OUTPUT_DIR...`: what runs have come to, on one page that needs nothing else: curves, time, memory,
rows, keys, answers; several runs in the same figures. A run may still be going on, or have been stopped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ds_sft.commands.flags import FlagParser
from ds_sft.commands.report_runs import read_runs
from ds_sft.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Write the page, and say of each run what it could not show.

    Raises:
        UserError: plotly is not installed, a folder has no run in it, or the page cannot be written.
    """
    parser = FlagParser("report", __doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="OUTPUT_DIR", help="the output folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE.html",
                        help="[report.html: of one run in its folder, of several in the current one]")  # fmt: skip
    given = parser.parse(argv)
    runs = read_runs(given.folders)
    if importlib.util.find_spec("plotly") is None:
        raise UserError("report: needs plotly: pip install plotly")
    from ds_sft.commands.page import write_page
    from ds_sft.commands.report_page import report_html

    out = given.out or (given.folders[0] if len(given.folders) == 1 else Path()) / "report.html"
    write_page(out, report_html(runs), "--out")
    for run in runs:
        if run.missing:
            print(f"{run.name}: {run.state}; {'; '.join(run.missing)}")
    print(f"Wrote {out} ({len(runs)} run{'s' * (len(runs) > 1)}): open it in a browser.")
    return 0
