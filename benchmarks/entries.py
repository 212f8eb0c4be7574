"""One config through the three entries: do they learn the same, how fast, in how much memory?

    python benchmarks/entries.py                                     # after `make demo`
    python benchmarks/entries.py --train_file rows.jsonl --bf16 yes --ranks 2

Prints, for each entry, the largest difference of a step's training loss from that of plain `python`, tokens a second,
and the peak resident memory of a rank in GiB. Speeds are of this machine, now: read them as ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = str(ROOT / "ds_sft" / "train.py")


def main() -> None:
    given = arguments()
    with tempfile.TemporaryDirectory(prefix="ds_sft-entries-") as name:
        folder = Path(name)
        with open(given.train_file, encoding="utf-8") as file:
            rows = "".join(itertools.islice(file, given.rows))
        (folder / "train.jsonl").write_text(rows, encoding="utf-8")
        launched = [f"--nproc_per_node={given.ranks}", "--master_port=29611", TRAIN]
        commands = {
            "python": [sys.executable, TRAIN],
            "torchrun, ZeRO-2": ["torchrun", *launched],
            "deepspeed, ZeRO-2": ["deepspeed", f"--num_accelerators={given.ranks}", "--master_port=29612", TRAIN],
            "torchrun, ZeRO-3": ["torchrun", *launched, "--deepspeed", str(ROOT / "ds_configs/zero3.json")],
        }
        print(f"{given.rows} rows, {given.batch} a step, {given.epochs} epochs, bf16 {given.bf16}", flush=True)
        print(f"{'entry':<20}{'largest difference':>20}{'last loss':>11}{'tokens/s':>10}{'GiB a rank':>12}", flush=True)
        plain: list[float] = []
        for entry, command in commands.items():
            out = folder / entry.replace(", ", "-")
            losses, results = measure(command, out, folder, given, 1 if entry == "python" else given.ranks)
            plain = plain or losses
            difference = max(abs(a - b) for a, b in zip(losses, plain, strict=True))
            memory = max(peaks["host_gib"] for peaks in results["peak_memory"])
            print(
                f"{entry:<20}{difference:>20.2e}{losses[-1]:>11.4f}"
                f"{results['tokens_per_second']:>10.0f}{memory:>12.2f}",
                flush=True,
            )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="[%(default)s]")
    parser.add_argument("--train_file", default="demo/train.jsonl", help="[%(default)s]")
    parser.add_argument("--rows", type=int, default=64, help="first rows of the file [%(default)s]")
    parser.add_argument("--batch", type=int, default=8, help="rows a step, over all ranks [%(default)s]")
    parser.add_argument("--epochs", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--ranks", type=int, default=2, help="of the launched entries [%(default)s]")
    parser.add_argument("--bf16", default="no", help="yes or no [%(default)s]")
    parser.add_argument("--max_length", type=int, default=256, help="[%(default)s]")
    return parser.parse_args()


def measure(
    command: list[str], out: Path, folder: Path, given: argparse.Namespace, ranks: int
) -> tuple[list[float], dict[str, Any]]:
    """Train once; the loss of every step, and run.json. The first engine named in `command` wins."""
    keys = {
        "model_name_or_path": given.model,
        "train_file": folder / "train.jsonl",
        "output_dir": out,
        "cache_dir": folder / "cache",
        "max_length": given.max_length,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": given.batch // (2 * ranks),
        "num_train_epochs": given.epochs,
        "learning_rate": "2e-5",
        "bf16": given.bf16,
        "gradient_checkpointing": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "num_predictions": 0,
        "swanlab_mode": "disabled",
    }
    if "--deepspeed" not in command:
        keys["deepspeed"] = ROOT / "ds_configs/zero2.json"
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    done = subprocess.run(
        [*command, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        # The same threads in all: two ranks that each take every core would only wait for each other.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line["loss"] for line in lines if "loss" in line], json.loads((out / "run.json").read_text())


if __name__ == "__main__":
    main()
