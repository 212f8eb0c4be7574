"""What a run logs: every metric into OUTPUT_DIR/metrics.jsonl, and to each tracker that `report_to` names.

Trackers are asked on rank 0 alone. None can end a run, nor hold it up for long: see guard.py.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.config.extension import is_dotted, load, require_call, require_method
from ds_sft.config.keys import Config
from ds_sft.errors import UserError, nearest_value
from ds_sft.ranks.launch import Launch, print_line
from ds_sft.tracking.guard import FINISH_SECONDS, LOG_SECONDS, START_SECONDS, Guard
from ds_sft.tracking.integrations import NAMES, NAMING, Integration, keep_files_in, missing_package
from ds_sft.tracking.public import public_config, without_secrets
from ds_sft.tracking.swanlab_run import SwanLab

METRICS = "metrics.jsonl"  # of a run's output folder


class Tracker(Protocol):
    """What a tracker can be asked. `report_to: my.module:MyTracker` names a class, or a function that makes one.

    What it raises is said in one line, and the run goes on.
    """

    def start(self, keys: Mapping[str, Any], *, resumed: bool) -> None:
        """Before the first step. `keys`: all of the run, without secrets; `resumed`: it goes on in the same folder."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers under Trainer's names (loss, eval_loss, learning_rate ...), all of them finite."""

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        """What the trained model has answered, question and answer in one text. A tracker may be without it."""

    def finish(self, state: str, error: str | None = None) -> None:
        """At the end. `state`: success, crashed, or aborted, where the run was asked to stop."""


def require_trackers(config: Config) -> None:
    """See that every tracker of `report_to` can be had, before data are read.

    Raises:
        UserError: one that is not known, not installed, or cannot be asked what `Tracker` says.
    """
    for name in config.trackers:
        if is_dotted(name):
            _require_own(name)
        elif name not in (*NAMES, "all", "swanlab"):
            known = ("swanlab", *NAMES)
            near = nearest_value(name, known)
            raise UserError(
                f"report_to: {name}: expected none, all, my.module:Tracker, or any of {', '.join(known)}; "
                f"{f'did you mean {near}?' if near else 'several: [swanlab, wandb]'}"
            )
        elif name in NAMES and (package := missing_package(name)):
            raise UserError(f"report_to: {name}: it is not installed here: pip install {package}, or leave it out")


def _require_own(name: str) -> None:
    made = load(name, "report_to")
    require_call(made, name, "report_to")
    lacking = [method for method in ("start", "log", "finish") if not hasattr(made, method)]
    if not isinstance(made, type):
        return
    if lacking:
        raise UserError(f"report_to: {name}: it has no method {', '.join(lacking)}: see docs/extend.md")
    require_method(made, f"{name}.start", "report_to", "keys", keywords={"resumed": False})
    require_method(made, f"{name}.log", "report_to", "metrics", "step")
    require_method(made, f"{name}.finish", "report_to", "state", "error")
    if hasattr(made, "log_predictions"):
        require_method(made, f"{name}.log_predictions", "report_to", "texts", "step")


class Own:
    """A tracker of the user's, whose errors are said and end nothing."""

    def __init__(self, name: str, metrics: Path) -> None:
        self.name, self.guard = name, Guard(name, metrics)
        self.tracker: Any = None  # while it works

    def start(self, keys: Mapping[str, Any], *, resumed: bool) -> None:
        def begin() -> None:
            self.tracker = load(self.name, "report_to")()
            self.tracker.start(keys, resumed=resumed)

        if not self.guard.call(begin, START_SECONDS):
            self.tracker = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        if self.tracker is not None and self.guard.answers:
            self.guard.call(lambda: self.tracker.log(dict(metrics), step), LOG_SECONDS)

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        if self.tracker is not None and not hasattr(self.tracker, "log_predictions"):
            self.guard.say_once(f"{self.name} has no log_predictions: predictions.jsonl has the answers.")
        elif self.tracker is not None and self.guard.answers:
            self.guard.call(lambda: self.tracker.log_predictions(texts, step), LOG_SECONDS)

    def finish(self, state: str, error: str | None = None) -> None:
        if self.tracker is not None:
            self.guard.call(lambda: self.tracker.finish(state, error), FINISH_SECONDS)


def trackers_of(config: Config) -> list[Tracker]:
    """Those that `report_to` names, none of them started."""
    named, metrics = config.trackers, config.output_dir / METRICS
    others = [name for name in NAMES if missing_package(name) is None] if "all" in named else named
    found: list[Tracker] = [SwanLab(config)] if {"swanlab", "all"} & set(named) else []
    found += [Integration(name, metrics) for name in others if name in NAMES]
    return found + [Own(name, metrics) for name in named if is_dotted(name)]


class Log:
    """metrics.jsonl, and the trackers beside it."""

    def __init__(self, config: Config, metrics_bytes: int | None = None, earlier: Path | None = None) -> None:
        """Open the files.

        Args:
            metrics_bytes: of metrics.jsonl when the checkpoint to resume from was saved; None for a new run.
            earlier: the output folder of the run to resume from, where it is another one.
        """
        self.config = config
        self.metrics = config.output_dir / METRICS
        self.file = Guard(METRICS, self.metrics)
        other = earlier is not None and earlier.resolve() != config.output_dir.resolve()
        self.resumed = metrics_bytes is not None and not other  # the same experiment
        self.trackers = trackers_of(config)
        if other and earlier is not None:
            self._copy_metrics(earlier / self.metrics.name, metrics_bytes or 0)
        else:
            self._cut_metrics(metrics_bytes or 0)

    def _cut_metrics(self, size: int) -> None:
        """Forget the points behind the checkpoint: they come again."""
        self.metrics.touch()
        os.truncate(self.metrics, min(size, self.metrics.stat().st_size))

    def _copy_metrics(self, source: Path, size: int) -> None:
        """Begin with the points that the other run had at the checkpoint."""
        points = b""
        try:
            with source.open("rb") as file:
                points = file.read(size)
        except OSError as error:
            self.file.say_once(f"{source}: {error.strerror}; {self.metrics} begins at the checkpoint.")
        self.metrics.write_bytes(points)

    def start(self) -> None:
        """Start the trackers; say once where curves go, and by which key."""
        keys = public_config(self.config)
        if not self.resumed:
            self._forget_runs()
        for tracker in self.trackers:
            if isinstance(tracker, Integration):
                tracker.guard.call(partial(keep_files_in, self.config.output_dir, tracker.name), START_SECONDS)
            tracker.start(keys, resumed=self.resumed)
        if not any(isinstance(tracker, SwanLab) for tracker in self.trackers):
            named = self.config.trackers
            off = {tracker.name for tracker in self.trackers if isinstance(tracker, Own) and tracker.tracker is None}
            places = " and ".join([*(name for name in named if name not in off), str(self.metrics)])
            print_line(f"Curves go to {places}; SwanLab is off (report_to: {', '.join(named) or 'none'}).")

    def _forget_runs(self) -> None:
        """An earlier run in this folder may have had trackers that this one takes up when it is resumed, if ever."""
        for name in ("swanlab", *NAMING):
            with suppress(OSError):  # no file, as a rule
                (self.config.output_dir / f"{name}.json").unlink()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record Trainer's metrics under Trainer's names."""
        # JSON has no NaN.
        known = {k: v if isinstance(v, (int, float)) and math.isfinite(v) else None for k, v in metrics.items()}
        self._append({"step": step, **known})
        finite = {k: v for k, v in known.items() if v is not None}
        for tracker in self.trackers:
            tracker.log(finite, step)

    def log_changes(self, changed: Mapping[str, tuple[Any, Any]], step: int) -> None:
        """Show the seam of a run that goes on after `step` with other keys: key -> [what it was, what it is]."""
        shown = without_secrets({name: list(pair) for name, pair in changed.items()})
        self._append({"step": step, "changed": shown})
        for tracker in self.trackers:
            if isinstance(tracker, SwanLab):
                tracker.log_changes(shown, step)

    def _append(self, entry: Mapping[str, Any]) -> None:
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # a full disk ends the checkpoint, not the learning
            self.file.say_once(f"{self.metrics} is not complete: {error.strerror}")

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        """Show what the trained model answers, where a tracker has a place for texts."""
        for tracker in self.trackers if texts else ():
            tracker.log_predictions(texts, step)

    def finish(self, state: str, error: str | None = None) -> None:
        """Close every tracker. `state`: success, crashed or aborted."""
        for tracker in self.trackers:
            tracker.finish(state, error)


class TrackerCallback(TrainerCallback):
    """Hands what Trainer logs on rank 0 to the trackers, and before that what is otherwise than at the checkpoint.

    Trainer's own trackers hear of a few events more, which are all that those of transformers 5.23 listen to.
    """

    def __init__(self, log: Log | None, changed: Mapping[str, tuple[Any, Any]] | None = None) -> None:
        self.log, self.changed = log, changed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for tracker in self._integrations():
            tracker.begin(args, state, control, **kwargs)
        if self.log is not None and self.changed:
            self.log.log_changes(self.changed, state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for tracker in self._integrations():
            tracker.tell("on_step_end", **kwargs)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for tracker in self._integrations():
            tracker.tell("on_evaluate", **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for tracker in self._integrations():
            tracker.tell("on_save", **kwargs)

    def _integrations(self) -> list[Integration]:
        return [tracker for tracker in (self.log.trackers if self.log else ()) if isinstance(tracker, Integration)]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.log is not None and logs:
            self.log.log(logs, state.global_step)


@contextmanager
def open_tracker(
    config: Config, launch: Launch, metrics_bytes: int | None = None, earlier: Path | None = None
) -> Iterator[Log | None]:
    """The run's log on rank 0, None elsewhere; closed as success, aborted (asked to stop) or crashed."""
    if not launch.is_main:
        yield None
        return
    log = Log(config, metrics_bytes, earlier)
    log.start()
    try:
        yield log
    except BaseException as error:
        aborted = not isinstance(error, Exception)  # asked to stop
        log.finish("aborted" if aborted else "crashed", f"{type(error).__name__}: {error}")
        raise
    log.finish("success")
