"""What holds of the templates without running them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import INSTALL, ROOT, SLURM

TEMPLATES = sorted(SLURM.glob("*.sbatch"))
SCRIPTS = [*TEMPLATES, *sorted(SLURM.glob("*.sh"))]


@pytest.mark.parametrize("file", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda file: file.name)
def test_shellcheck_is_silent(file: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip(f"shellcheck is not installed: {INSTALL}")
    done = subprocess.run(
        ["shellcheck", "--external-sources", str(file)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_a_site_edits_ten_lines_at_most() -> None:
    """Those of train.sbatch and site.sh together."""
    edits = []
    for name in ("train.sbatch", "site.sh"):
        text = (SLURM / name).read_text(encoding="utf-8")
        part = re.split(r"^# ---- .*\n", text, flags=re.M)[1]
        edits += part.splitlines()
    assert 5 <= len(edits) <= 10, edits


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.name)
def test_every_template(file: Path) -> None:
    """Says how it is used, appends to its log, and shares its code with the others."""
    text = file.read_text(encoding="utf-8")
    assert f"sbatch slurm/{file.name} " in text
    assert "#SBATCH --open-mode=append\n" in text
    assert '. "$DS_SFT_HOME/slurm/job.sh"\n' in text
