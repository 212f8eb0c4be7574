"""Does memory grow with the data? `ds-sft prepare` on few and on many generated rows, peak resident memory of each.

    python benchmarks/data_memory.py --model DIR       # 10,000 and 1,000,000 rows; DIR: config.json and a tokenizer
    python benchmarks/data_memory.py --model DIR --rows 2 8 --row_bytes 4000000    # dialogues of 4 MB

Prints, for each, the peak of the process that reads and the largest peak of those that encode, in MiB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = [
    "Paris",
    "is",
    "the",
    "capital",
    "of",
    "France",
    "and",
    "the",
    "seat",
    "of",
    "its",
    "government",
    "since",
    "long",
    "ago",
]
PREPARE = """
import resource, sys
from ds_sft.cli import main
from ds_sft.results import peak_resident_kib
code = main(sys.argv[1:])
print("PEAKS", peak_resident_kib() // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="[%(default)s]")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000], help="[%(default)s]")
    parser.add_argument("--row_bytes", type=int, default=0, help="of dialogues with turns of 8,000; 0: short rows")
    given = parser.parse_args()
    for rows in given.rows:
        with tempfile.TemporaryDirectory(prefix="ds_sft-memory-") as folder:
            reader, encoder = measure(given.model, rows, Path(folder), given.row_bytes)
            print(f"{rows:>10,} rows: {reader:,} MiB reading, {encoder:,} MiB encoding", flush=True)


def text(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * k) % len(WORDS)] for k in range(1, words))


def long_row(seed: int, size: int) -> str:
    """A dialogue of so many bytes."""
    turn = [{"role": "user", "content": text(seed, 400)}, {"role": "assistant", "content": text(seed + 1, 1200)}]
    return json.dumps({"messages": turn * (size // len(json.dumps(turn)))})


def measure(model: str, rows: int, folder: Path, row_bytes: int) -> list[int]:
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            short = f'{{"question": "What is number {i}?", "answer": "{text(i, 20 + i % 30)}"}}'
            file.write((long_row(i, row_bytes) if row_bytes else short) + "\n")
    flags = {"model_name_or_path": model, "train_file": folder / "rows.jsonl", "output_dir": folder / "out",
             "cache_dir": folder / "cache", "max_length": 1_000_000}  # fmt: skip
    words = [str(word) for key, value in flags.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-c", PREPARE, "prepare", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    print("\n".join(line for line in done.stdout.splitlines() if "rows/s)" in line), flush=True)
    return [int(word) for word in done.stdout.rsplit("PEAKS", 1)[1].split()]


if __name__ == "__main__":
    main()
