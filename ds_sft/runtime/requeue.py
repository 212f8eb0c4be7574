"""Whether a Slurm job that stopped should start again; asked by slurm/job.sh on the first node.

    python -m ds_sft.runtime.requeue begin --starts FILE --config CONFIG.yaml [--key value ...]    # 0: go on
    python -m ds_sft.runtime.requeue end --starts FILE --config CONFIG.yaml [--key value ...]      # 0: requeue, 3: done

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
from typing import Any

from ds_sft.config import load_config
from ds_sft.errors import UserError
from ds_sft.runtime.checkpoint import newest_complete
from ds_sft.runtime.preempt import PREEMPTED

DONE = 3  # exit code of a run that was not stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run `begin` or `end`; 2 is the exit code of a mistake in the configuration."""
    question, _, file, *words = sys.argv[1:] if argv is None else argv
    try:
        output_dir = load_config(words, "train.sbatch").output_dir
        limit = max_stalls()
    except UserError as error:
        print(f"ds_sft: error: {error}", file=sys.stderr)
        return 2
    return begin(Path(file), output_dir, limit) if question == "begin" else end(Path(file), output_dir, limit)


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
    """Note from which step this start goes on; 1 if it is one start too many from there."""
    (output_dir / PREEMPTED).unlink(missing_ok=True)
    step = newest_step(output_dir)
    steps = [*read_steps(starts), step]
    with starts.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "time": time.strftime("%FT%T%z")}) + "\n")
    if stalls(steps) < limit:
        return 0
    print(no_progress(step, limit), file=sys.stderr)
    return 1


def end(starts: Path, output_dir: Path, limit: int) -> int:
    """0 if the run was stopped before its end, 1 if it came no further too often, `DONE` if it was not stopped."""
    stopped = read_stopped(output_dir / PREEMPTED)
    if stopped is None:
        return DONE
    step = stopped["step"]
    print(f"The run was stopped at step {step} ({stopped.get('reason', 'no reason given')}).")
    if stalls([*read_steps(starts), step]) < limit:
        return 0
    print(no_progress(step, limit), file=sys.stderr)
    return 1


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
    """The step from which each earlier start of this job went on."""
    lines = starts.read_text(encoding="utf-8").splitlines() if starts.exists() else []
    return [json.loads(line)["step"] for line in lines]


def read_stopped(path: Path) -> dict[str, Any] | None:
    """PREEMPTED.json; None where the run was not stopped."""
    try:
        stopped = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return {**stopped, "step": int(stopped["step"])}


def newest_step(output_dir: Path) -> int:
    """The step of the newest complete checkpoint; 0 without one."""
    found = newest_complete(output_dir)
    return found.step if found else 0


if __name__ == "__main__":
    sys.exit(main())
