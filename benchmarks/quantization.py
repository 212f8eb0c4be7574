"""LoRA beside a base in 4 bits and beside the same in 16: memory, loss, CPU time. After `ds-sft demo`:

    python benchmarks/quantization.py --steps 100

Each is a run of train.py in one process on the CPU, on the same rows in the same order. `docs/quantization.md` has the
table it prints.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "ds_sft" / "train.py"
WAYS = {
    "LoRA": ["--adapter", "lora"],
    "LoRA, nf4": ["--adapter", "lora", "--quantization", "nf4"],
    "DoRA": ["--adapter", "dora"],
    "DoRA, nf4": ["--adapter", "dora", "--quantization", "nf4"],
}
LAST = 20  # steps whose mean is the loss at the end
HEAD = "| base and adapter | loss of the last 20 steps | `eval_loss` before | after | host memory at most | CPU time |"


def measure(flags: list[str], folder: Path) -> dict[str, Any]:
    """Train once: losses, GiB of the process, its CPU seconds from start to end, and how it describes its weights."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, TRAIN, *flags, "--output_dir", folder], capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    measured = [row["eval_loss"] for row in rows if "eval_loss" in row]
    said = re.search(r"Quantization .*", done.stdout + done.stderr)
    return {
        "loss": fmean(losses[-LAST:]),
        "before": measured[0],
        "after": measured[-1],
        "memory": json.loads((folder / "run.json").read_text(encoding="utf-8"))["peak_memory"][0]["host_gib"],
        "seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "said": said[0] if said else "",
    }


def line(name: str, found: dict[str, Any]) -> str:
    losses = " | ".join(f"{found[key]:.4f}" for key in ("loss", "before", "after"))
    return f"| {name} | {losses} | {found['memory']:.2f} GiB | {found['seconds']:,.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `ds-sft demo` has made")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--only", nargs="*", default=list(WAYS), choices=list(WAYS))
    args = parser.parse_args()
    keys = {
        "model_name_or_path": args.demo / "model", "train_file": args.demo / "train.jsonl",
        "eval_file": args.demo / "eval.jsonl", "system_prompt": "You are a helpful assistant. Answer briefly.",
        "max_length": 256, "max_steps": args.steps, "per_device_train_batch_size": args.rows,
        "gradient_accumulation_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
        "eval_strategy": "steps", "eval_on_start": "yes", "eval_steps": args.steps, "per_device_eval_batch_size": 8,
        "save_strategy": "no", "resume": "never", "report_to": "none", "num_predictions": 0, "verify_export": "no",
        "merge": "no", "use_cpu": "yes",
    }  # fmt: skip
    shared = [word for name, value in keys.items() for word in (f"--{name}", str(value))]
    print(HEAD + "\n|" + "---|" * 6)
    for name in args.only:
        with TemporaryDirectory() as folder:
            found = measure([*shared, *WAYS[name]], Path(folder))
        print(line(name, found), flush=True)
        if found["said"]:
            print(f"<!-- {found['said']} -->", flush=True)


if __name__ == "__main__":
    main()
