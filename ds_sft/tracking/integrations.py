"""Trainer's own trackers (tensorboard, wandb, mlflow ...), each asked as one of ours, on rank 0.

They are callbacks of transformers'. Here each is guarded, and its end is put off until the model has answered, so that
answers and scores reach it, too. Where the tracker can, a resumed run goes on in its run of the earlier start, whose id
OUTPUT_DIR/NAME.json keeps.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import os
import shlex
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ds_sft.ranks.launch import print_line
from ds_sft.results import write_json
from ds_sft.tracking.guard import FINISH_SECONDS, LOG_SECONDS, START_SECONDS, Guard

# What transformers calls them -> what pip does, where that is another name.
PACKAGES = {"azure_ml": "azureml-sdk mlflow", "comet_ml": "comet-ml", "neptune": "neptune", "dagshub": "dagshub mlflow"}
NAMES = sorted(
    INTEGRATION_TO_CALLBACK.keys() - {"swanlab"}
)  # its SwanLab fails on swanlab 0.10; swanlab_run.py is ours


def missing_package(name: str) -> str | None:
    """What pip would install for a tracker that is not here; None: it is."""
    if name in get_available_reporting_integrations() or (name == "flyte" and importlib.util.find_spec("flytekit")):
        return None
    return PACKAGES.get(name, name)


class Integration:
    """One of Trainer's own trackers."""

    def __init__(self, name: str, metrics: Path) -> None:
        self.name, self.guard = name, Guard(name, metrics)
        self.callback: TrainerCallback | None = None  # while it works
        self.record = metrics.with_name(f"{name}.json")  # the id of its run, where a later start can name that
        self.known: str | None = None  # that id, once a resumed run has read it
        self.seen: tuple[TrainingArguments, TrainerState, TrainerControl] | None = None  # of the Trainer, once it began

    def begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start it at the beginning of training; where that fails a second time, offline or as a new run."""
        self.seen = args, state, control

        def start() -> None:
            with variables(self._naming()):
                (kind,) = get_reporting_integration_callbacks([self.name])
                self.callback = kind()
                self.callback.on_init_end(args, state, control, **kwargs)
                self.callback.on_train_begin(args, state, control, **kwargs)

        started = self.guard.call(start, START_SECONDS)
        if not started and (self._go_offline() or self._begin_anew()):
            started = self.guard.call(start, START_SECONDS)
        if not started:
            self.callback = None
            print_line(f"{self.name} is off.")
        elif self.name in NAMING:
            self.guard.call(self._keep_id, LOG_SECONDS)

    def _naming(self) -> dict[str, str]:
        """The variables by which this start goes on in the known run, unless the user's own name one."""
        naming = NAMING.get(self.name, {})
        if self.known is None or THEIRS & naming.keys() & os.environ.keys():
            return {}
        return {name: value.format(id=self.known) for name, value in naming.items()}

    def _keep_id(self) -> None:
        write_json(self.record, {"id": RUN_ID[self.name]()})

    def _begin_anew(self) -> bool:
        """Whether the run that was to go on, and may be gone, can be done without."""
        anew, self.known = bool(self._naming()), None
        if anew:
            print_line(f"{self.name}: beginning a new run.")
        return anew

    def _go_offline(self) -> bool:
        """Whether this tracker can be told to wait for its key and its network, and was not told so before."""
        if self.name != "wandb" or os.environ.get("WANDB_MODE") == "offline":
            return False
        os.environ["WANDB_MODE"] = "offline"
        if not self.guard.call(importlib.import_module("wandb").teardown, START_SECONDS):  # it has read the variable
            return False
        files = shlex.quote(os.environ.get("WANDB_DIR", ".")) + "/wandb/offline-run-*"
        print_line(f"wandb: going on offline (WANDB_MODE=offline); `wandb sync {files}` uploads it later.")
        return True

    def tell(self, event: str, *, seconds: float = LOG_SECONDS, **kwargs: Any) -> None:
        """Hand on an event of Trainer's; of its control a tracker gets a copy, so that it cannot stop the run."""
        if self.callback is None or self.seen is None or not self.guard.answers:
            return
        args, state, control = self.seen
        handle = getattr(self.callback, event)
        self.guard.call(lambda: handle(args, state, copy.copy(control), **kwargs), seconds)

    # ---- As one of our trackers

    def start(self, keys: Mapping[str, Any], *, resumed: bool) -> None:
        """Know the run to go on in; it is started by the Trainer, whose arguments it shows."""
        if resumed and self.name in NAMING:
            with suppress(OSError, ValueError, KeyError, TypeError):  # else it is a new one
                self.known = str(json.loads(self.record.read_text(encoding="utf-8"))["id"])

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.tell("on_log", logs=dict(metrics))

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        show = SHOW.get(self.name)
        if self.callback is None or not self.guard.answers:
            return
        if show is None:
            self.guard.say_once(f"{self.name}: no place for texts; predictions.jsonl has the answers.")
            return
        callback = self.callback
        self.guard.call(lambda: show(callback, list(texts), step), LOG_SECONDS)

    def finish(self, state: str, error: str | None = None) -> None:
        end = END.get(self.name)
        if self.callback is not None and end is not None:
            self.guard.call(lambda: end(state), FINISH_SECONDS)
        self.tell("on_train_end", seconds=FINISH_SECONDS)
        self.callback = self.seen = None


# ---- How a start goes on in the run of an earlier one

NAMING = {
    "wandb": {"WANDB_RUN_ID": "{id}", "WANDB_RESUME": "allow"},
    "mlflow": {"MLFLOW_RUN_ID": "{id}", "MLFLOW_MAX_LOG_PARAMS": "0"},  # a run's are there, and it lets none change
}
THEIRS = {"WANDB_RUN_ID", "WANDB_RESUME", "MLFLOW_RUN_ID"}  # a user who sets one says himself which run it is


@contextmanager
def variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment in the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)  # MLflow has taken its own out
            os.environ.update({} if value is None else {name: value})


def _id_in_wandb() -> str:
    wandb: Any = importlib.import_module("wandb")
    return str(wandb.run.id)


def _id_in_mlflow() -> str:
    mlflow: Any = importlib.import_module("mlflow")
    return str(mlflow.active_run().info.run_id)


RUN_ID: dict[str, Callable[[], str]] = {"wandb": _id_in_wandb, "mlflow": _id_in_mlflow}


# ---- Where each shows a text, and how it is told how a run ended


def _in_tensorboard(callback: Any, texts: list[str], step: int) -> None:
    for number, text in enumerate(texts):
        callback.tb_writer.add_text(f"Prediction/{number}", text, step)


def _in_wandb(callback: Any, texts: list[str], step: int) -> None:
    wandb: Any = importlib.import_module("wandb")
    wandb.log({"Prediction": wandb.Table(columns=["step", "text"], data=[[step, text] for text in texts])})


def _in_mlflow(callback: Any, texts: list[str], step: int) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.log_text("\n\n".join(texts), "predictions.txt")


def _end_wandb(state: str) -> None:
    wandb: Any = importlib.import_module("wandb")
    wandb.finish(exit_code=0 if state == "success" else 1)


def _end_mlflow(state: str) -> None:
    mlflow: Any = importlib.import_module("mlflow")
    mlflow.end_run({"success": "FINISHED", "aborted": "KILLED"}.get(state, "FAILED"))


SHOW: dict[str, Callable[[Any, list[str], int], None]] = {
    "tensorboard": _in_tensorboard, "wandb": _in_wandb, "mlflow": _in_mlflow,
}  # fmt: skip
END: dict[str, Callable[[str], None]] = {"wandb": _end_wandb, "mlflow": _end_mlflow}


# ---- Where each has its files, which would else lie in the folder where the run was started


def keep_files_in(folder: Path, name: str) -> None:
    """Let a tracker write into a run's output folder, unless its own variables say where; the others do by themselves.

    It imports MLflow, which may fail.
    """
    if name == "wandb":
        os.environ.setdefault("WANDB_DIR", str(folder))
    if name == "mlflow":
        _keep_mlflow_in(folder.resolve())


def _keep_mlflow_in(folder: Path) -> None:
    """A database and an experiment of its own: only an experiment has a place for the files beside the numbers."""
    mlflow: Any = importlib.import_module("mlflow")
    if mlflow.is_tracking_uri_set():
        return
    store = f"sqlite:///{folder / 'mlflow.db'}"
    mlflow.set_tracking_uri(store)
    experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ds_sft")
    place, known = (folder / "mlruns").as_uri(), mlflow.get_experiment_by_name(experiment)
    if known is None:
        mlflow.create_experiment(experiment, artifact_location=place)
    elif known.artifact_location != place:
        _move_artifacts(folder / "mlflow.db", known.artifact_location, place)
    mlflow.set_experiment(experiment)
    print_line(f"mlflow: `mlflow ui --backend-store-uri {shlex.quote(store)}` shows the curves.")


def _move_artifacts(database: Path, then: str, now: str) -> None:
    """Let the runs of an output folder that was moved or copied have their files in it: MLflow, which has no call for
    it, would make the old folder again, or write into the original."""
    with closing(sqlite3.connect(database)) as connection, connection:
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(
                f"UPDATE {table} SET {column} = :now || substr({column}, :behind) "
                f"WHERE {column} = :then OR substr({column}, 1, :behind) = :then || '/'",
                {"then": then, "now": now, "behind": len(then) + 1},
            )
