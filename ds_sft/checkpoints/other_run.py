"""Whether an output folder, or a checkpoint, is of this run or of another one: finished, exported, refused."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ds_sft.checkpoints.identity import Changes, changes, changes_in_words, unchangeable
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch
from ds_sft.results import EXPORTED, RESULTS

FINAL = ("model*.safetensors", "adapter/adapter_model.safetensors")  # what a finished run leaves in its output folder
Stages = tuple[int | None, int | None]  # ZeRO's, then and now; None is without DeepSpeed
FinishedRun = tuple[Changes, bool, Stages]  # in what it differs, whether nothing is left to do
NO_RUN: FinishedRun = ({}, False, (None, None))


def exported_step(output_dir: Path) -> int | None:
    """The step of the exported weights with which a run goes on that was stopped behind its export; else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((output_dir / EXPORTED).read_text(encoding="utf-8"))["results"]["steps"])
    return None


def refuse_another_stage(what: str, stages: Stages, config: Config, launch: Launch) -> None:
    """See that DeepSpeed keeps the states as it did; `what` begins the line.

    Raises:
        UserError: it is another stage, or was none.
    """
    then, now = stages
    if then == now:
        return
    names = ["without DeepSpeed" if stage is None else f"under ZeRO-{stage}" for stage in stages]
    if _engine_is_ignored(config, launch):
        names[1] += ", as no launcher started it"
    raise UserError(
        f"{what} {names[0]}, and this start is {names[1]}: a checkpoint can change its number of ranks, not its form. "
        f"{_as_before(then, config, launch)}, or --resume never to start anew (`ds-sft export` gives its model)"
    )


def _as_before(then: int | None, config: Config, launch: Launch) -> str:
    """What to do for a start under the stage of the checkpoint."""
    if then is None:
        return "Leave out deepspeed"
    written = "" if _engine_is_ignored(config, launch) else f"Write a deepspeed key of ZeRO-{then}"
    started = "" if launch.distributed else "Start it under a launcher, one process by torchrun --nproc_per_node 1 ..."
    return f"{written}. {started}" if written and started else written or started


def _engine_is_ignored(config: Config, launch: Launch) -> bool:
    return bool(config.training.get("deepspeed")) and not launch.distributed


def is_finished(config: Config, this_run: Mapping[str, Any], launch: Launch) -> bool:
    """Whether the output folder holds this run, done, with its weights; says so."""
    done = _holds(RESULTS, config, this_run, launch)
    if done:
        merged = any(config.output_dir.glob(FINAL[0]))
        later = "" if merged or config.merge != "auto" else "merge: yes merges it; "
        launch.say(
            f"This run is finished: {config.output_dir} holds its {'model' if merged else 'adapter'}. ({later}--resume "
            "never trains it anew.)"
        )
    return done


def is_exported(config: Config, this_run: Mapping[str, Any], launch: Launch) -> bool:
    """Whether the output folder holds this run's weights, and what a stop left to be done with them; says so."""
    left = _holds(EXPORTED, config, this_run, launch)
    if left:
        launch.say(f"This run is trained, {config.output_dir} has its weights: going on with verification and answers.")
    return left


def _holds(record: str, config: Config, this_run: Mapping[str, Any], launch: Launch) -> bool:
    """Whether a file of the output folder is this run's, with its weights beside it; refuses another run's."""
    other, found, stages = gather(_recorded_run(record, config, this_run, launch) if launch.is_main else NO_RUN)[0]
    if not found:
        refuse_another_stage(f"{config.output_dir} holds a run that was finished", stages, config, launch)
        refuse_another_run(config.output_dir, other, this_run, config)
    return found


def _recorded_run(record: str, config: Config, this_run: Mapping[str, Any], launch: Launch) -> FinishedRun:
    """The one that a file of the output folder is of, beside this one."""
    try:
        then = json.loads((config.output_dir / record).read_text(encoding="utf-8"))["identity"]
        other = changes(then, this_run)
    except (OSError, ValueError, KeyError):
        return NO_RUN
    if _engine_is_ignored(config, launch):  # whether there is anything left to do does not hang on the launcher
        other = {name: pair for name, pair in other.items() if not name.startswith("deepspeed.")}
    done = not other and any(map(any, (config.output_dir.glob(weights) for weights in FINAL)))
    now = this_run.get("zero_stage")
    return other, done, (then.get("zero_stage", now), now)


def refuse_another_run(where: Path, changed: Changes, this_run: Mapping[str, Any], config: Config) -> None:
    """See that a run may go on with what has `changed` since `where` was written.

    Raises:
        UserError: it may never, or may with `resume_anyway` alone.
    """
    never = unchangeable(changed, this_run)
    if never:
        raise UserError(
            f"{where} cannot go on with {changes_in_words({name: changed[name] for name in never})}: "
            f"{'; '.join(dict.fromkeys(never.values()))}. Write it as before, or take another output_dir, or --resume "
            "never to start anew"
        )
    if changed and not config.resume_anyway:
        raise UserError(another_run(where, changed))


def another_run(where: Path, changed: Changes) -> str:
    """What is said where a run has changed and was not told to go on."""
    return (
        f"{where} is of another run, which differs in: {changes_in_words(changed)}. Take another output_dir, "
        "or --resume never to start anew, or --resume_anyway to go on with the changes"
    )
