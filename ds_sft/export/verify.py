"""Does the model on disk compute what the trained one does? A process of its own loads it as any user would.

    python -m ds_sft.export.verify < question.json    # the arguments of `loss_on_disk`

prints the mean cross-entropy over the supervised tokens and their number as JSON; of a run with an adapter also that of
base + adapter, and how far the merged model's logits are from theirs. Nothing of the run's process reaches it: no
engine, no launcher's variables, no weights in memory. Where there is no memory for it, the question is kept:
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
from typing import TYPE_CHECKING, Any

from ds_sft.export.placement import is_out_of_memory, logits_size, place
from ds_sft.model.adapter_files import FOLDER, exported, find_base, load_on_disk
from ds_sft.plan.adapter import is_adapter
from ds_sft.ranks.launch import print_line, without_launch
from ds_sft.results import KEPT, write_json

if TYPE_CHECKING:
    import torch

# How far apart the two losses may be, relative to the larger of the loss and 1 (log-probabilities carry the error of
# logits, whose size does not shrink with the loss). float32: other batches, other order of summing; 1e-7 is usual.
# bfloat16 keeps 8 bits, so one rounding is up to 2^-9 = 0.2 %; five of them in a row, none cancelled, are 1 %, and the
# largest difference measured was 0.2 %. float16 keeps 11 bits. A merged model computes with weights that base + adapter
# does not have, each rounded once more: 0.4 % (SmolLM2-135M, rank 16, bfloat16). Its float32 merge is 1e-7 from base +
# adapter in float32, the rounding of the merge alone 0.03 %, base + adapter in bfloat16 0.3 %.
BOUNDS = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
LOGITS = 256  # tokens whose logits are compared: of 150,000 entries each they take 160 MB
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # what a scheduler sends to every process


class ExportError(RuntimeError):
    """The weights on disk are not the trained ones."""


class Interrupted(Exception):
    """The fresh process was told to stop, as the run was: it says nothing about the weights."""


class OutOfMemory(Exception):
    """The fresh process had no memory to load the model or to ask it: it says nothing about the weights."""


@dataclass(frozen=True)
class Question:
    """What the model on disk is asked. `dtypes` are those of training and of the export: the coarser sets the bound; an
    adapter is exported as it was trained."""

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
    of_adapter = BOUNDS[question.dtypes[0]] * max(1.0, trained_loss)
    coarser = max(BOUNDS[dtype] for dtype in question.dtypes) * max(1.0, trained_loss)
    bound = of_adapter if is_adapter(exported(folder)) else coarser
    difference = abs(found["loss"] - trained_loss)
    result = {
        "verified": difference <= bound,  # false for NaN, too
        "loss_trained": trained_loss,
        "loss_on_disk": found["loss"],
        "difference": difference,
        "bound": bound,
        "rows": len(rows),
        "supervised_tokens": found["tokens"],
    }
    if "merge" in found:
        loss = found["adapter"]["loss"]
        result["verified"] &= abs(loss - trained_loss) <= of_adapter
        result |= {"loss_of_adapter": loss, "bound_of_adapter": of_adapter, "merge": found["merge"]}
    return result


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
    what = str(folder) if exported(folder) == folder else f"{exported(folder)} on its base"
    line = (
        f"{what}, loaded in a fresh process, has loss {result['loss_on_disk']:.6f} on {result['rows']} rows, "
        f"the trained model {result['loss_trained']:.6f} (difference {result['difference']:.1e}, "
        f"bound {result['bound']:.1e})."
    )
    merge = result.get("merge")
    if merge is not None:
        line += (
            f" {folder / FOLDER} on its base has {result['loss_of_adapter']:.6f} "
            f"(bound {result['bound_of_adapter']:.1e})."
        )
    if not result["verified"]:
        raise ExportError(
            f"Export NOT verified: {line} Do not use these weights; the last checkpoint, if there is one, has the "
            "trained ones."
        )
    print_line(f"Export verified: {line}")
    if merge is not None:
        print_line(
            f"Rounding of the merge: logits of the merged model and of base + adapter differ by "
            f"{merge['largest_difference']:.2g} at most, where they reach {merge['largest_logit']:.3g} "
            f"({merge['tokens']} tokens)."
        )


def _ask_fresh_process(folder: Path, question: Question) -> dict[str, Any]:
    env = without_launch(os.environ)
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ds_sft.export.verify"]
    asked = {"folder": str(folder), "rows": question.rows, "use_cpu": question.use_cpu,
             "trust_remote_code": question.trust_remote_code,
             "finest": min(question.dtypes, key=BOUNDS.__getitem__)}  # fmt: skip
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


def loss_on_disk(
    folder: str, rows: list[dict[str, Any]], use_cpu: bool, trust_remote_code: bool, finest: str = "float32"
) -> dict[str, Any]:
    """Mean cross-entropy over supervised tokens, one row at a time, and their number; by plain transformers and peft.

    Where a run has left an adapter and the merged model, the first is asked too, after the other has gone: `adapter`
    has its loss, `merge` how far the logits differ at the first supervised tokens.

    Args:
        finest: the dtype that base + adapter compute in, of those of training and of the merged model the one that
            rounds less: a difference is then the merged model's own.
    """
    from ds_sft.export.kernels import avoid_plans

    avoid_plans()
    options = {"use_cpu": use_cpu, "trust_remote_code": trust_remote_code}
    adapter, main = Path(folder) / FOLDER, exported(Path(folder))
    dtype = finest if is_adapter(main) else "auto"
    found, remark, logits = _ask(main, rows, dtype, keep=LOGITS if is_adapter(adapter) else 0, **options)
    found |= {"remark": remark}
    if main != adapter and is_adapter(adapter):
        other, _, others = _ask(adapter, rows, finest, keep=LOGITS, **options)
        found["adapter"] = {"loss": other["loss"]}
        found["merge"] = {
            "largest_difference": max((a - b).abs().max().item() for a, b in zip(logits, others, strict=True)),
            "largest_logit": max(a.abs().max().item() for a in logits),
            "tokens": sum(map(len, logits)),
        }
    return found


def _ask(
    folder: Path, rows: list[dict[str, Any]], dtype: str, *, keep: int, use_cpu: bool, trust_remote_code: bool
) -> tuple[dict[str, Any], str | None, list[torch.Tensor]]:
    """Loss and number of supervised tokens, what is said of where the model went, and logits of the first of them.

    Returns:
        logits: of each row [tokens, vocab] in float32 on the CPU, of `keep` tokens at most.
    """
    import torch
    import torch.nn.functional as F
    from transformers import AutoConfig

    name = find_base(folder) if is_adapter(folder) else str(folder)
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    longest = max((len(row["input_ids"]) for row in rows), default=0)
    placement = place(name, working=logits_size(config, longest), use_cpu=use_cpu)
    model = load_on_disk(folder, dtype=dtype, trust_remote_code=trust_remote_code, **placement.options).eval()
    total, count, kept = 0.0, 0, []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row["input_ids"]], device=model.device)
            labels = torch.tensor(row["labels"][1:], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, labels.to(logits.device), ignore_index=-100, reduction="sum").item()
            if count < keep:
                kept.append(logits[(labels != -100).to(logits.device)][: keep - count].cpu())
            count += int((labels != -100).sum())
    return {"loss": total / max(count, 1), "tokens": count}, placement.remark, kept


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
