"""Does the model on disk compute what the trained one does? A process of its own loads it as any user would.

    python -m ds_sft.runtime.verify < question.json    # the arguments of `loss_on_disk`

prints the mean cross-entropy over the supervised tokens and their number as JSON. Nothing of the run's process reaches
it: no engine, no launcher's variables, no weights in memory.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ds_sft.runtime.distributed import print_line

# How far apart the two losses may be, relative to the larger of the loss and 1 (log-probabilities carry the error of
# logits, whose size does not shrink with the loss). float32: other batches, other order of summing; 1e-7 is usual.
# bfloat16 keeps 8 bits, so one rounding is up to 2^-9 = 0.2 %; five of them in a row, none cancelled, are 1 %, and the
# largest difference measured was 0.2 %. float16 keeps 11 bits.
BOUNDS = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PREFIXES = ("TORCHELASTIC_", "ACCELERATE_", "SLURM_", "PMI_", "OMPI_")


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # what a scheduler sends to every process


class ExportError(RuntimeError):
    """The weights on disk are not the trained ones."""


class Interrupted(Exception):
    """The fresh process was told to stop, as the run was: it says nothing about the weights."""


def verify(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    trained_loss: float,
    dtypes: Sequence[str],
    *,
    use_cpu: bool,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare the loss of the model in `folder` on `rows` with `trained_loss`; what `run.json` says about it.

    `dtypes` are those of training and of the export: the coarser one sets the bound.
    """
    question = {"folder": str(folder), "rows": rows, "use_cpu": use_cpu, "trust_remote_code": trust_remote_code}
    try:
        found = _ask_fresh_process(question)
    except ExportError as error:
        return {"verified": False, "error": str(error)}
    except Interrupted:
        return {"verified": None, "reason": "the fresh process was stopped by a signal"}
    if not found["tokens"]:
        return {"verified": None, "reason": f"none of the {len(rows)} rows asked has a supervised token"}
    bound = max(BOUNDS[dtype] for dtype in dtypes) * max(1.0, trained_loss)
    difference = abs(found["loss"] - trained_loss)
    return {
        "verified": difference <= bound,  # false for NaN, too
        "loss_trained": trained_loss,
        "loss_on_disk": found["loss"],
        "difference": difference,
        "bound": bound,
        "rows": len(rows),
        "supervised_tokens": found["tokens"],
    }


def require_verified(result: dict[str, Any] | None, folder: Path) -> None:
    """Say what `verify` found; None: it was not asked.

    Raises:
        ExportError: the model on disk is not the trained one. A run must not end well with the wrong weights.
    """
    if result is None:
        return
    if result["verified"] is None:
        print_line(f"Export not verified: {result['reason']}.")
        return
    if "error" in result:
        raise ExportError(f"Export NOT verified: {result['error']}")
    line = (
        f"{folder}, loaded in a fresh process, has loss {result['loss_on_disk']:.6f} on {result['rows']} rows, "
        f"the trained model {result['loss_trained']:.6f} (difference {result['difference']:.1e}, "
        f"bound {result['bound']:.1e})."
    )
    if not result["verified"]:
        raise ExportError(
            f"Export NOT verified: {line} Do not use these weights; the last checkpoint has the trained ones."
        )
    print_line(f"Export verified: {line}")


def _ask_fresh_process(question: dict[str, Any]) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(LAUNCHER_PREFIXES)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ds_sft.runtime.verify"]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, check=False, env=env)
    if -done.returncode in STOPS:
        raise Interrupted
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{question['folder']} cannot be loaded in a fresh process: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def loss_on_disk(folder: str, rows: Sequence[dict[str, Any]], use_cpu: bool, trust_remote_code: bool) -> dict[str, Any]:
    """Mean cross-entropy over supervised tokens, one row at a time, and their number; by plain transformers."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from ds_sft.runtime.kernels import avoid_plans

    avoid_plans()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype="auto",
        device_map="auto" if torch.cuda.is_available() and not use_cpu else None,
        trust_remote_code=trust_remote_code,
    ).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor(row["labels"][1:], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return {"loss": total / max(count, 1), "tokens": count}


if __name__ == "__main__":
    print(json.dumps(loss_on_disk(**json.load(sys.stdin))))
