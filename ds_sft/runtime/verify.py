"""Does the model on disk compute what the trained one does? A process of its own loads it as any user would.

    python -m ds_sft.runtime.verify < question.json    # the arguments of `loss_on_disk`

prints the mean cross-entropy over the supervised tokens and their number as JSON. Nothing of the run's process reaches
it: no engine, no launcher's variables, no weights in memory. Where there is no memory for it, the question is kept:
`ds-sft verify OUTPUT_DIR` asks it again.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_sft.runtime.distributed import print_line
from ds_sft.runtime.placement import is_out_of_memory, logits_size, place
from ds_sft.runtime.results import KEPT, write_json

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


class OutOfMemory(Exception):
    """The fresh process had no memory to load the model or to ask it: it says nothing about the weights."""


@dataclass(frozen=True)
class Question:
    """What the model on disk is asked. `dtypes` are those of training and of the export: the coarser sets the bound."""

    rows: list[dict[str, Any]]  # input_ids, labels: [tokens] each
    trained_loss: float
    dtypes: list[str]
    use_cpu: bool
    trust_remote_code: bool = False


def verify(folder: Path, question: Question) -> dict[str, Any]:
    """Compare the loss of the model in `folder` with the trained one; what `run.json` says about it."""
    rows, trained_loss = question.rows, question.trained_loss
    try:
        found = _ask_fresh_process(folder, question)
    except ExportError as error:
        return {"verified": False, "error": str(error)}
    except Interrupted:
        return {"verified": None, "reason": "the fresh process was stopped by a signal"}
    except OutOfMemory as error:
        return {"verified": None, "reason": f"no memory for it in a fresh process ({error})", "out_of_memory": True}
    if not found["tokens"]:
        return {"verified": None, "reason": f"none of the {len(rows)} rows asked has a supervised token"}
    bound = max(BOUNDS[dtype] for dtype in question.dtypes) * max(1.0, trained_loss)
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


def verify_or_keep(folder: Path, question: Question) -> dict[str, Any]:
    """`verify`; where there was no memory for it, the question stays in the folder, else none does."""
    result = verify(folder, question)
    if result.get("out_of_memory"):
        write_json(folder / KEPT, asdict(question))
    else:
        (folder / KEPT).unlink(missing_ok=True)
    return result


def require_verified(result: dict[str, Any] | None, folder: Path) -> None:
    """Say what `verify` found; None: it was not asked.

    Raises:
        ExportError: the model on disk is not the trained one. A run must not end well with the wrong weights.
    """
    if result is None:
        return
    if result["verified"] is None:
        later = f" Verify it later: ds-sft verify {shlex.quote(str(folder))}" if result.get("out_of_memory") else ""
        print_line(f"Export not verified: {result['reason']}.{later}")
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


def _ask_fresh_process(folder: Path, question: Question) -> dict[str, Any]:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHER and not k.startswith(LAUNCHER_PREFIXES)}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ds_sft.runtime.verify"]
    asked = {"folder": str(folder), "rows": question.rows, "use_cpu": question.use_cpu,
             "trust_remote_code": question.trust_remote_code}  # fmt: skip
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False, env=env)
    if -done.returncode in STOPS:
        raise Interrupted
    if done.returncode == -signal.SIGKILL:  # what the kernel does to a process, or a cgroup, that takes too much
        raise OutOfMemory("killed by SIGKILL")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ExportError(f"{folder} cannot be loaded in a fresh process: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "out_of_memory" in found:
        raise OutOfMemory(found["out_of_memory"])
    if found["remark"]:
        print_line(f"Verifying: {found['remark']}")
    return found


def loss_on_disk(folder: str, rows: list[dict[str, Any]], use_cpu: bool, trust_remote_code: bool) -> dict[str, Any]:
    """Mean cross-entropy over supervised tokens, one row at a time, and their number; by plain transformers."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig, AutoModelForCausalLM

    from ds_sft.runtime.kernels import avoid_plans

    avoid_plans()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    placement = place(folder, working=logits_size(config, longest), use_cpu=use_cpu)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, **placement.options
    ).eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor(row["labels"][1:], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, labels.to(logits.device), ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    return {"loss": total / max(count, 1), "tokens": count, "remark": placement.remark}


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """`loss_on_disk`, or that there was no memory for it, which another exit code could not be told from a failure."""
    try:
        return loss_on_disk(**asked)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": " ".join(str(error).split())[:150] or type(error).__name__}


if __name__ == "__main__":
    print(json.dumps(answer(json.load(sys.stdin))))
