"""How long a save holds training up, by part, beside a step and beside writing the same bytes.

python benchmarks/checkpoint.py --model demo/model                                    # after `make demo`
torchrun --nproc_per_node 2 benchmarks/checkpoint.py --model demo/model --deepspeed ds_configs/zero2.json
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import Trainer, TrainerCallback

from ds_sft.checkpoints import manifest
from ds_sft.train import main as train
from ds_sft.training import saving, trainer
from tests.conftest import questions_and_answers, write_rows

STEPS, SAVES = 9, 3
SECONDS: dict[str, list[float]] = defaultdict(list)  # by part, one entry a call


def timed(owner: Any, name: str, part: str) -> None:
    """Time every call of a function from now on."""
    function: Callable[..., Any] = getattr(owner, name)

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            SECONDS[part].append(time.perf_counter() - started)

    setattr(owner, name, wrapper)


class Steps(TrainerCallback):
    """Seconds of the steps without a save."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        SECONDS["step"].append(time.perf_counter() - self.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--deepspeed")
    parser.add_argument("--dir", default=tempfile.gettempdir(), help="where checkpoints go")
    given = parser.parse_args()
    rank = os.environ.get("RANK", "0")
    folder = Path(given.dir) / f"checkpoint-{os.environ.get('MASTER_PORT', os.getpid())}"
    if rank == "0":
        folder.mkdir()
        write_rows(folder / "train.jsonl", questions_and_answers(4 * STEPS))
    while not (folder / "train.jsonl").exists():
        time.sleep(0.1)
    for owner, name, part in (
        (trainer.SFTTrainer, "_save_checkpoint", "whole"), (saving.SavingTrainer, "finish_save", "whole"),
        (Trainer, "save_model", "weights"),
        (trainer.SFTTrainer, "_save_optimizer_and_scheduler", "states"), (saving, "complete", "manifest"),
        (manifest, "hash_file", "hash"), (manifest, "sync", "fsync"),
    ):  # fmt: skip
        timed(owner, name, part)
    init = trainer.SFTTrainer.__init__

    def with_steps(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(Steps())

    trainer.SFTTrainer.__init__ = with_steps  # type: ignore[method-assign]
    keys = {
        "model_name_or_path": given.model, "train_file": folder / "train.jsonl", "output_dir": folder / "out",
        "cache_dir": folder / "cache", "max_steps": STEPS, "num_train_epochs": 2, "save_steps": STEPS // SAVES,
        "save_total_limit": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
        "logging_steps": STEPS, "num_predictions": 0, "verify_export": "no", "swanlab_mode": "disabled",
        **({"deepspeed": given.deepspeed} if given.deepspeed else {}),
    }  # fmt: skip
    code = train([str(word) for key, value in keys.items() for word in (f"--{key}", value)])
    if code == 0 and rank == "0":
        report(folder)
        shutil.rmtree(folder)


def report(folder: Path) -> None:
    """Print rank 0's seconds a save, its last `SAVES` saves averaged, and what a bare write of the bytes takes."""
    newest = max((folder / "out").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    written, synced = bare_write(folder / "bare", size)
    step = statistics.median(SECONDS["step"])
    whole = sum(SECONDS["whole"]) / SAVES
    print(
        f"A save of {size / 2**20:,.0f} MiB holds training up for {whole:.2f} s: {whole / step:.2f} steps of "
        f"{step:.2f} s, {whole / (written + synced):.2f} bare writes ({written:.2f} s, fsync {synced:.2f} s)."
    )
    notes = {"manifest": "what of it training waits for", "hash": "beside the next step", "fsync": "the same"}
    for part in ("weights", "states", "manifest", "hash", "fsync"):
        seconds = sum(SECONDS[part]) / SAVES
        print(f"  {part:<10}{seconds:6.2f} s  {seconds / whole:6.1%}  {notes.get(part, '')}")


def bare_write(path: Path, size: int) -> tuple[float, float]:
    """Seconds of writing `size` bytes, and of syncing them."""
    block = os.urandom(1 << 24)
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
        written = time.perf_counter()
        os.fsync(file.fileno())
    return written - started, time.perf_counter() - written


if __name__ == "__main__":
    main()
