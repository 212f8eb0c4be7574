"""Whether a Slurm job that stopped should start again; asked by slurm/job.sh on the first node.

    python -m ds_sft.checkpoints.requeue begin --starts FILE --config CONFIG.yaml [--key value ...]  # 0: go on
    python -m ds_sft.checkpoints.requeue end --starts FILE --config CONFIG.yaml [--key value ...]  # 0: requeue, 3: done

Other codes: 2 a mistake in the configuration, or another run in `output_dir`, 4 no progress; any further one says that
there was no answer.

Decided from what the run left in `output_dir`, never from an exit code: launchers and srun change those. A job that
comes no further between its starts would run for ever; after `DS_SFT_MAX_STALLS` (2) such starts it stops.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.checkpoints.other_run import exported_step
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.ranks.stop import PREEMPTED

DONE = 3  # exit code of a run that was not stopped
NO_PROGRESS = 4  # never 1, with which a Python ends that fails


def main(argv: Sequence[str] | None = None) -> int:
    """Run `begin` or `end`; 2 is the exit code of a mistake in the configuration."""
    question, _, file, *words = sys.argv[1:] if argv is None else argv
    answer = begin if question == "begin" else end
    try:
        return answer(Path(file), load_config(words, "train.sbatch").output_dir, max_stalls())
    except UserError as error:
        print(f"ds_sft: error: {error}", file=sys.stderr)
        return 2


def max_stalls() -> int:
    """How many starts in a row may come no further.

    Raises:
        UserError: the variable is no number above 0.
    """
    text = os.environ.get("DS_SFT_MAX_STALLS", "2")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"environment: DS_SFT_MAX_STALLS={text!r}: expected a whole number, 1 or more")
    return int(text)


def begin(starts: Path, output_dir: Path, limit: int) -> int:
    """Note from which step this start goes on; `NO_PROGRESS` if it is one start too many from there.

    Raises:
        UserError: another run has the folder, and another job may be about to read its PREEMPTED.json.
    """
    if output_dir.is_dir():
        with FolderLock(output_dir) as lock:
            lock.take()
            (output_dir / PREEMPTED).unlink(missing_ok=True)
    step = newest_step(output_dir)
    steps = [*read_steps(starts), step]
    with starts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": time.strftime("%FT%T%z")}) + "\n")
    if stalls(steps) < limit:
        return 0
    print(no_progress(step, limit), file=sys.stderr)
    return NO_PROGRESS


def end(starts: Path, output_dir: Path, limit: int) -> int:
    """0 if the run was stopped before its end, `NO_PROGRESS` if it came no further too often, `DONE` if not stopped."""
    stopped = read_stopped(output_dir / PREEMPTED)
    if stopped is None:
        return DONE
    step, reason = stopped
    if step is None:
        step = newest_step(output_dir)
    print(f"The run was stopped at step {step} ({reason}).")
    if stalls([*read_steps(starts), step]) < limit:
        return 0
    print(no_progress(step, limit), file=sys.stderr)
    return NO_PROGRESS


def no_progress(step: int, limit: int) -> str:
    starts = "the last start" if limit == 1 else f"the last {limit} starts"
    return (
        f"No progress: {starts} of this job came no further than step {step}; it is not requeued. Give it more time "
        "before the signal (--time, --signal), save more often (save_steps), or raise DS_SFT_MAX_STALLS."
    )


def stalls(steps: Sequence[int]) -> int:
    """How many starts, counted from the last back, ended where they began."""
    return len(list(takewhile(lambda step: step == steps[-1], reversed(steps)))) - 1


def read_steps(starts: Path) -> list[int]:
    """The step from which each earlier start of this job went on; a line that was cut off says nothing."""
    lines = starts.read_text(encoding="utf-8").splitlines() if starts.exists() else []
    return [step for line in lines if (step := _read(line)[0]) is not None]


def read_stopped(path: Path) -> tuple[int | None, str] | None:
    """Step and reason of PREEMPTED.json; no step where it is malformed; None where the run was not stopped."""
    try:
        step, reason = _read(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    if step is None:
        print(f"{path}: malformed; the newest complete checkpoint stands for its step", file=sys.stderr)
    return step, reason


def _read(text: str) -> tuple[int | None, str]:
    """The step and the reason in a JSON object; no step where there is none."""
    try:
        found = json.loads(text)
        return int(found["step"]), str(found.get("reason", "no reason given"))
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, "no reason given"


def newest_step(output_dir: Path) -> int:
    """The step of the exported weights or of the newest checkpoint to go on from; 0 without any."""
    found = newest_complete(output_dir, resumable=True)
    return exported_step(output_dir) or (found.step if found else 0)


if __name__ == "__main__":
    sys.exit(main())
