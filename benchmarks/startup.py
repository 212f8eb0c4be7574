"""From the command to the first optimizer step: where the seconds go.

    make demo                                    # the model and the dialogues; encoded data and compiled ops are cached
    python benchmarks/startup.py                 # python, torchrun and deepspeed, each several times
    python benchmarks/startup.py --rounds 5 --only python

Each part is the time of its own, without what another part takes inside it; of the rank that needed longest, the median
of the rounds. `launcher` is what passes before Python starts in a rank, `imports` the modules that `train.py` imports
before it reads data. A round before the first fills the caches and is not counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

PARTS = ("launcher", "imports", "tokenizer", "data", "process group", "model", "SwanLab", "engine", "first step",
         "rest")  # fmt: skip
CALLS = (  # module or class, function -> part
    ("ds_sft.model.tokenizer", "load_tokenizer", "tokenizer"),
    ("ds_sft.data.dataset", "load_data", "data"),
    ("ds_sft.data.loader", "dataset_and_collator", "data"),
    ("ds_sft.data.rows", "fingerprint", "data"),
    ("ds_sft.training.arguments", "training_arguments", "process group"),
    ("ds_sft.model.load", "load_model", "model"),
    ("ds_sft.tracking.swanlab_run.SwanLab", "start", "SwanLab"),
    ("ds_sft.training.trainer.SFTTrainer", "_prepare_for_training", "engine"),
)
BEGAN = "STARTUP_BEGAN"  # in a rank: when the command was given, seconds since 1970
OUT = "STARTUP_OUT"  # in a rank: the folder for its seconds
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node=2"]
ENTRIES = {  # name -> what starts the script, its engine
    "python": (["python"], None),
    "torchrun, ZeRO-2": (TORCHRUN, "zero2"),
    "torchrun, ZeRO-3": (TORCHRUN, "zero3"),
    "deepspeed, ZeRO-2": (["deepspeed", "--num_accelerators=2"], "zero2"),
}


# ---- In a rank


class Clock:
    """Seconds of each part; a part that begins inside another stops the other's."""

    def __init__(self, began: float) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running, self.last = ["launcher"], began

    def _lap(self) -> None:
        now = time.time()
        self.seconds[self.running[-1]] += now - self.last
        self.last = now

    def start(self, part: str) -> None:
        self._lap()
        self.running.append(part)

    def stop(self) -> None:
        self._lap()
        self.running.pop()

    def wrap(self, owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.start(part)
            try:
                return call(*args, **kwargs)
            finally:
                self.stop()

        setattr(owner, name, timed)


def in_rank(out: Path, words: list[str]) -> None:
    """Train until the first step has ended and leave the seconds in `out`."""
    clock = Clock(float(os.environ[BEGAN]))
    clock.start("imports")
    import ds_sft.train
    from ds_sft.engine import zero
    from ds_sft.training.resumable import StepBoundary

    for place, name, part in CALLS:
        clock.wrap(find(place), name, part)
    engine_config, train_begins = zero.engine_config, StepBoundary.on_train_begin

    def imported(*args: Any) -> Any:  # what comes first after train.py's imports
        clock.start("rest")
        return engine_config(*args)

    def begin(*args: Any, **kwargs: Any) -> None:
        clock.start("first step")
        train_begins(*args, **kwargs)

    def end(*args: Any, **kwargs: Any) -> NoReturn:
        clock.stop()
        (out / f"rank-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(clock.seconds))
        os._exit(0)

    zero.engine_config = imported
    StepBoundary.on_train_begin, StepBoundary.on_step_end = begin, end  # type: ignore[method-assign]
    ds_sft.train.main(words)


def find(place: str) -> Any:
    """A module, or a class in one."""
    module, _, name = place.rpartition(".")
    return getattr(importlib.import_module(module), name) if name[0].isupper() else importlib.import_module(place)


# ---- Outside


def measure(entry: str, config: Path, folder: Path) -> dict[str, float]:
    """Seconds of each part, of the rank with the longest start. Ends the program where a start fails."""
    launcher, engine = ENTRIES[entry]
    out = Path(tempfile.mkdtemp(dir=folder))
    keys: dict[str, Any] = {"config": config, "output_dir": out / "run", "eval_on_start": "no"}
    if engine:
        keys["deepspeed"] = ROOT / "ds_configs" / f"{engine}.json"
    flags = [str(word) for name, value in keys.items() for word in (f"--{name}", value)]
    command = [str(Path(sys.executable).with_name(launcher[0])), *launcher[1:], str(Path(__file__).resolve())]
    env = {**os.environ, "OMP_NUM_THREADS": "1", BEGAN: str(time.time()), OUT: str(out)}
    done = subprocess.run([*command, *flags], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    ranks = [json.loads(file.read_text()) for file in out.glob("rank-*.json")]
    if not ranks:
        sys.exit(f"{entry}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    return max(ranks, key=lambda seconds: sum(seconds.values()))


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a line for each entry, medians in seconds."""
    lines = [f"| entry | {' | '.join(PARTS)} | all |", "|---|" + "--:|" * (len(PARTS) + 1)]
    for entry, rounds in found.items():
        parts = [f"{statistics.median(seconds[part] for seconds in rounds):.1f}" for part in PARTS]
        whole = statistics.median(sum(seconds.values()) for seconds in rounds)
        lines.append(f"| {entry} | {' | '.join(parts)} | {whole:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "ds_configs" / "demo.yaml", help="default: the demo's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=ENTRIES, action="append", help="may be given several times")
    args = parser.parse_args()
    entries = args.only or list(ENTRIES)
    found: dict[str, list[dict[str, float]]] = {entry: [] for entry in entries}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds + 1):
            for entry in entries:
                seconds = measure(entry, args.config, Path(folder))
                print(f"round {number}: {entry}: {sum(seconds.values()):.1f} s", file=sys.stderr, flush=True)
                if number:
                    found[entry].append(seconds)
    print(table(found))


if __name__ == "__main__":
    if OUT in os.environ:
        in_rank(Path(os.environ[OUT]), sys.argv[1:])
    else:
        main()
