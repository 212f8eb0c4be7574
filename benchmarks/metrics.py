"""What measuring costs: steps of one run with it on and off in turn.

python benchmarks/metrics.py --model demo/model            # after `make demo`; and without --model a tiny model
torchrun --nproc_per_node 2 benchmarks/metrics.py --model demo/model --deepspeed ds_configs/zero3.json
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from transformers import TrainerCallback

import ds_sft.training.trainer as ours
from ds_sft.train import main as train
from ds_sft.training.clock import Clock
from ds_sft.training.metrics import Throughput
from tests.conftest import make_model, make_tokenizer, questions_and_answers, write_rows

BLOCK = 5  # steps measured, then as many that are not, and so on


class InTurn(TrainerCallback):
    """Switches the clock and the counting off and on, and times the steps of each kind."""

    clock: Clock

    def __init__(self) -> None:
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.on, self.last, self.marks = True, 0.0, 0
        self.mark, self.count = Clock._mark, Throughput.count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 2:  # nothing is logged or settled between the first two
            self.marks = len(self.clock.marks) - self.marks
        self.marks = len(self.clock.marks) if state.global_step == 1 else self.marks
        if state.global_step % BLOCK != 1:  # the first step of a block also did the switching
            self.seconds[self.on].append(now - self.last)
        if state.global_step % BLOCK == 0:
            self.on = not self.on
            Clock._mark = self.mark if self.on else lambda clock, lap=False: None
            Throughput.count = self.count if self.on else lambda throughput, metadata: None
        self.last = now


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a tiny one, whose steps take milliseconds")
    parser.add_argument("--deepspeed")
    parser.add_argument("--steps", type=int, default=80)
    given = parser.parse_args()
    in_turn = InTurn()
    init = ours.SFTTrainer.__init__

    def with_callback(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.add_callback(in_turn)
        in_turn.clock = self.clock

    ours.SFTTrainer.__init__ = with_callback  # type: ignore[method-assign]
    rank = os.environ.get("RANK", "0")
    folder = Path(tempfile.gettempdir()) / f"metrics-{os.environ.get('MASTER_PORT', os.getpid())}"
    if rank == "0":
        make_model(folder / "model", make_tokenizer(folder / "tokenizer"))
        write_rows(folder / "train.jsonl", questions_and_answers(4 * given.steps))
        (folder / "ready").touch()
    while not (folder / "ready").exists():
        time.sleep(0.1)
    keys = {
        "model_name_or_path": given.model or folder / "model", "train_file": folder / "train.jsonl",
        "output_dir": folder / "out", "cache_dir": folder / "cache", "max_steps": given.steps, "num_train_epochs": 2,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 10,
        "save_strategy": "no", "num_predictions": 0, "verify_export": "no", "swanlab_mode": "disabled",
        **({"deepspeed": given.deepspeed} if given.deepspeed else {}),
    }  # fmt: skip
    code = train([str(word) for key, value in keys.items() for word in (f"--{key}", value)])
    on, off = (statistics.median(in_turn.seconds[kind]) for kind in (True, False))
    if code == 0 and rank == "0":
        speed = json.loads((folder / "out" / "run.json").read_text(encoding="utf-8"))["speed"]
        counts = [len(in_turn.seconds[kind]) for kind in (True, False)]
        print(
            f"Median step: {on * 1e3:.2f} ms measured, {off * 1e3:.2f} not measured, {on / off - 1:+.2%}; "
            f"{counts[0]} and {counts[1]} steps, {speed['tokens']:,} tokens counted."
        )
        print(f"By itself: {own_cost() * 1e6:,.2f} us a mark; a step of this run has about {in_turn.marks:,} marks.")
        shutil.rmtree(folder)


def own_cost(marks: int = 100_000) -> float:
    """Seconds that a mark takes, and its part of turning marks into seconds."""
    clock = Clock()
    started = time.perf_counter()
    for _ in range(marks // 2):
        with clock.part("communication"):
            pass
    clock.settle()
    return (time.perf_counter() - started) / marks


if __name__ == "__main__":
    main()
