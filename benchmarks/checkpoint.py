"""What the manifest costs: hashing a checkpoint's files beside writing and syncing them.

python benchmarks/checkpoint.py --gib 2 --dir /where/checkpoints/go
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch

from ds_sft.runtime.checkpoint import Site, complete, hash_file, sync
from ds_sft.runtime.distributed import Launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--dir", default=None)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.dir))
    part = torch.randn(int(given.gib * 2**30 / 16))
    started = time.monotonic()
    for number in range(4):
        torch.save({"part": part}, folder / f"part{number}.pt")
    written = time.monotonic()
    for path in folder.iterdir():
        sync(path)
    synced = time.monotonic()
    for path in folder.iterdir():
        hash_file(path)
    hashed = time.monotonic()
    assert complete(folder, {"step": 0}, Site(Launch(launcher="python"), shared=True)) is None
    done = time.monotonic()
    print(
        f"{given.gib:g} GiB: torch.save {written - started:.2f} s, fsync {synced - written:.2f} s, hash one file at a"
    )
    print(f"time {hashed - synced:.2f} s; the manifest (hash in threads, sync) {done - hashed:.2f} s, "
          f"{(done - hashed) / (synced - started):.1%} of writing")  # fmt: skip
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
