"""Started by test_tiling.py: runs of train.py, one after the other, whose MLPs compute a few tokens at a time."""

from __future__ import annotations

import sys

from ds_sft.model import tiling
from tests.distributed.splits import main

if __name__ == "__main__":
    tiling.TILE = 50
    main(sys.argv[1:])
