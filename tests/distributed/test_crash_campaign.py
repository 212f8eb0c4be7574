"""A bounded crash campaign; `python tests/crash_campaign.py --rounds 100` is a longer one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT, run

pytestmark = pytest.mark.distributed


@pytest.mark.timeout(4000)
def test_crash_campaign(tmp_path: Path) -> None:
    script = str(ROOT / "tests" / "crash_campaign.py")
    done = run([sys.executable, script, "--rounds", "12", "--seed", "4"], cwd=tmp_path, timeout=3900)
    print(done.output[-6000:])
    assert done.code == 0, done.output[-6000:]
    assert "rounds: 12" in done.output
    assert "wrong resumes: 0" in done.output
    assert "differing results: 0" in done.output
    assert "orphans: 0" in done.output
