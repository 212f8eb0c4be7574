"""Kill, stop and damage small runs at random, resume them, and compare each with one that nobody touched.

python tests/crash_campaign.py --rounds 100        # --seed S repeats a campaign, --dir keeps its folders

A round trains from the start: the run is killed (SIGKILL to one rank, all ranks or the launcher) or asked to stop (a
signal to a rank, all ranks or the launcher, or a stop file), at a random instant or inside a save; its newest
checkpoint is perhaps damaged; then it is started again until it is done. Weights and metrics must be bit-equal to the
reference's, no process may be left, no damaged checkpoint may have been taken. Exit code 1 where one of that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import psutil

from ds_sft.training.clock import PARTS
from tests.conftest import make_model, make_tokenizer, questions_and_answers, write_rows
from tests.distributed.harness import BIN, ROOT, TRAIN, entry, run_forked

# name: launcher, ranks, DeepSpeed configuration, whether adapters are trained
RUNS = {
    "plain": ("python", 1, None, False),
    "plain-lora": ("python", 1, None, True),
    "torchrun-zero2": ("torchrun", 2, "zero2", False),
    "torchrun-zero3": ("torchrun", 2, "zero3", False),
    "torchrun-zero3-lora": ("torchrun", 2, "zero3", True),
    "deepspeed-zero2-lora": ("deepspeed", 2, "zero2", True),
}
# Of 12 rounds:
SHARES = {"plain": 4, "plain-lora": 2, "torchrun-zero2": 2, "torchrun-zero3": 2, "torchrun-zero3-lora": 1,
          "deepspeed-zero2-lora": 1}  # fmt: skip
LORA = {"adapter": "lora", "lora_rank": 4, "lora_dropout": 0.1, "merge": "no"}
KILLS = [("SIGKILL", "rank"), ("SIGKILL", "all"), ("SIGKILL", "launcher")]
STOPS = [("SIGTERM", "rank"), ("SIGINT", "all"), ("SIGUSR1", "rank"), ("SIGTERM", "launcher"), ("SIGUSR1", "launcher"),
         ("stop file", "")]  # fmt: skip
DAMAGES = ["none", "truncated", "byte flipped", "file missing", "manifest missing", "empty newer directory"]
LIMIT = 500.0  # seconds of one start, on a busy machine
ENDS = 200.0  # seconds in which every process must be gone
TIMES = {  # the only figures of metrics.jsonl that may differ
    "tokens_per_second", "supervised_tokens_per_second", "mfu", "interval_seconds", "peak_memory_gib",
    *(f"{part}_share" for part in ("waiting", *PARTS)),
    *(f"{split}_{rate}" for split in ("train", "eval") for rate in ("runtime", "samples_per_second",
                                                                    "steps_per_second")),
}  # fmt: skip


@dataclass
class Figures:
    """What the campaign reports."""

    rounds: int = 0
    starts: int = 0
    events: Counter[str] = field(default_factory=Counter)
    kills_inside_a_save: int = 0
    damages: Counter[str] = field(default_factory=Counter)
    checkpoints_refused: int = 0
    wrong_resumes: int = 0
    differing_results: int = 0
    orphans: int = 0
    stops_without_a_record: int = 0

    @property
    def failures(self) -> int:
        return self.wrong_resumes + self.differing_results + self.orphans + self.stops_without_a_record


class Campaign:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.figures = folder, random.Random(seed), Figures()
        self.model = make_model(folder / "model", make_tokenizer(folder / "tokenizer"), attention_dropout=0.1)
        write_rows(folder / "train.jsonl", questions_and_answers(22))
        write_rows(folder / "eval.jsonl", questions_and_answers(3))

    def flags(self, name: str, out: Path) -> list[str]:
        _, ranks, engine, adapters = RUNS[name]
        keys = {
            "model_name_or_path": self.model, "train_file": self.folder / "train.jsonl",
            "eval_file": self.folder / "eval.jsonl", "cache_dir": self.folder / "cache", "output_dir": out,
            "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // ranks, "num_train_epochs": 4,
            "learning_rate": 1e-3, "bf16": False, "logging_steps": 3, "eval_steps": 7, "save_steps": 2,
            "save_total_limit": 3, "num_predictions": 0, "verify_export": False, "disable_tqdm": True,
            **({"deepspeed": ROOT / "ds_configs" / f"{engine}.json"} if engine else {}), **(LORA if adapters else {}),
        }  # fmt: skip
        return [str(word) for key, value in keys.items() for word in (f"--{key}", value)]

    # ---- One start of a run

    @contextlib.contextmanager
    def started(self, name: str, out: Path) -> Iterator[subprocess.Popen[bytes]]:
        """A start of the run; at the end of the block it and all its processes have to be gone."""
        self.figures.starts += 1
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1",
               "SWANLAB_MODE": "disabled", "CAMPAIGN": str(out)}  # fmt: skip
        with Path(f"{out}.log").open("ab") as log:
            command = [*entry(*RUNS[name][:2]), *self.flags(name, out)]
            process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
            process.wait(LIMIT)
            deadline = time.monotonic() + ENDS
            while processes_of(out) and time.monotonic() < deadline:
                time.sleep(0.1)
        finally:
            left = processes_of(out)
            self.figures.orphans += len(left)
            for orphan in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    print(f"  left running: {orphan.pid} {' '.join(orphan.cmdline())[:100]}", flush=True)
                    orphan.kill()

    def disturb(self, name: str, out: Path, process: subprocess.Popen[bytes]) -> str:
        """Wait for a random save, and kill or stop the run in it or some time after; returns what was done."""
        kinds = self.random.choice([KILLS, STOPS])
        how, target = self.random.choice([k for k in kinds if k[1] != "launcher" or RUNS[name][0] != "python"])
        wanted, inside = self.random.randrange(1, 7) * 2, self.random.random() < 0.7
        folder = out / f"checkpoint-{wanted}"
        deadline = time.monotonic() + LIMIT
        while not folder.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(self.random.uniform(0, 0.04 if inside else 1.0))
        self.send(how, target, out, process)
        if how == "SIGKILL":
            self.figures.kills_inside_a_save += any(not (path / "manifest.json").exists() for path in checkpoints(out))
        self.figures.events[f"{how} {target}".strip()] += 1
        return f"{how} {target} at checkpoint-{wanted}"

    def send(self, how: str, target: str, out: Path, process: subprocess.Popen[bytes]) -> None:
        if how == "stop file":
            (out / "STOP").touch()
            return
        everyone = processes_of(out)
        ranks = [p for p in everyone if is_rank(p)] or everyone
        chosen = {"rank": [self.random.choice(ranks)] if ranks else [], "all": everyone,
                  "launcher": [p for p in everyone if p.pid == process.pid]}[target]  # fmt: skip
        for victim in chosen:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(getattr(signal, how))

    def damage(self, out: Path) -> Path | None:
        """Break the newest complete checkpoint; the folder that must not be taken."""
        kind = self.random.choice(DAMAGES)
        self.figures.damages[kind] += 1
        complete = [path for path in checkpoints(out) if (path / "manifest.json").exists()]
        if kind == "empty newer directory":
            newer = out / "checkpoint-1000"
            newer.mkdir(parents=True, exist_ok=True)
            return newer
        if kind == "none" or not complete:
            return None
        newest = complete[-1]
        files = sorted(json.loads((newest / "manifest.json").read_text())["files"])
        victim = newest / self.random.choice(files)
        if kind == "manifest missing":
            (newest / "manifest.json").unlink()
        elif kind == "file missing":
            victim.unlink()
        elif kind == "truncated":
            os.truncate(victim, victim.stat().st_size // 2)
        else:
            flip_a_byte(victim, self.random)
        return newest

    # ---- Rounds

    def round(self, number: int, name: str, reference: Path) -> None:
        self.figures.rounds += 1
        out = self.folder / f"round{number}"
        log = Path(f"{out}.log")
        with self.started(name, out) as process:
            done = self.disturb(name, out, process)
        finished = (out / "run.json").exists()
        if not finished and "SIGKILL" not in done and not (out / "PREEMPTED.json").exists():
            self.figures.stops_without_a_record += 1
        bad = None if finished else self.damage(out)
        said = len(log.read_text(errors="replace"))
        with self.started(name, out):
            pass
        after = log.read_text(errors="replace")[said:]
        refused = re.findall(r"Passed over \S*/(checkpoint-\d+)", after)
        taken = re.findall(r"from \S*/(checkpoint-\d+), s", after)
        self.figures.checkpoints_refused += len(refused)
        self.figures.wrong_resumes += bad is not None and (bad.name in taken or bad.name not in refused)
        equal = same(out, reference)
        self.figures.differing_results += not equal
        what = f"damaged {bad.name}" if bad else "nothing damaged"
        start = ", ".join(taken) or "the beginning"
        verdict = "bit-equal" if equal else f"DIFFERS, see {log}"
        print(f"round {number}: {name}: {done}; {what}; resumed from {start}; {verdict}", flush=True)
        if equal:
            shutil.rmtree(out)

    def reference(self, name: str) -> Path:
        """A run that nobody touches; whichever launcher would start it."""
        launcher, ranks, *others = RUNS[name]
        out = self.folder / "-".join(["reference", str(ranks), *map(str, others)])
        if not out.exists():
            argv = [TRAIN, *self.flags(name, out)]
            done = run_forked(argv, None if launcher == "python" else ranks, cwd=self.folder, timeout=LIMIT,
                              env={"SWANLAB_MODE": "disabled", "HF_HUB_OFFLINE": "1"})  # fmt: skip
            assert done.code == 0, done.output[-4000:]
        return out


def processes_of(out: Path) -> list[psutil.Process]:
    """The processes of a run: they carry its folder in their environment; the launcher first."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("CAMPAIGN") == str(out):
                found.append(process)
    return sorted(found, key=lambda process: process.pid)


def is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return TRAIN in words[:3]
    return False


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def flip_a_byte(path: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)


def same(out: Path, reference: Path) -> bool:
    """Bit-equal weights, of the model or in the newest checkpoint of an adapter, and metrics equal but for times."""
    if not (out / "run.json").exists():
        return False
    return weights(out).read_bytes() == weights(reference).read_bytes() and metrics(out) == metrics(reference)


def weights(out: Path) -> Path:
    adapters = [path / "adapter_model.safetensors" for path in reversed(checkpoints(out))]  # one may be empty
    return next((file for file in adapters if file.exists()), out / "model.safetensors")


def metrics(out: Path) -> list[dict[str, Any]]:
    """What was logged, without times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dir", type=Path, help="where; default: a temporary folder, removed after success")
    parser.add_argument("--only", choices=RUNS, help="rounds of this kind of run alone")
    given = parser.parse_args()
    folder = given.dir or Path(tempfile.mkdtemp(prefix="campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    campaign = Campaign(folder, given.seed)
    order = [given.only] if given.only else [name for name, share in SHARES.items() for _ in range(share)]
    started = time.monotonic()
    for number in range(given.rounds):
        name = order[number % len(order)]
        campaign.round(number, name, campaign.reference(name))
    figures = campaign.figures
    for key, value in vars(figures).items():
        counts = ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, Counter) else value
        print(f"{key.replace('_', ' ')}: {counts}")
    print(f"{time.monotonic() - started:.0f} s; {'FAILED' if figures.failures else 'passed'}")
    if not given.dir and not figures.failures:
        shutil.rmtree(folder)
    return 1 if figures.failures else 0


if __name__ == "__main__":
    sys.exit(main())
