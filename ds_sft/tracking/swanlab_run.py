"""SwanLab: which mode and project, a run that goes on with its experiment, and how to upload what has not arrived."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ds_sft.config.extension import said
from ds_sft.config.keys import Config
from ds_sft.ranks.launch import print_line
from ds_sft.results import write_json
from ds_sft.tracking.guard import FINISH_SECONDS, LOG_SECONDS, START_SECONDS, Guard, TimeUp, time_limit
from ds_sft.tracking.public import SECRET

MODES = ("online", "offline", "local", "disabled")
EXIT_SECONDS = 5.0
# What transformers' integrations keep apart from the curves: one value a run.
SINGLE_VALUES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


class SwanLab:
    """A SwanLab run, where SwanLab works."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.log_dir = config.output_dir / "swanlog"
        self.guard = Guard("SwanLab", config.output_dir / "metrics.jsonl")
        self.swanlab: Any = None  # the module, while a run of it is open
        self.mode = "disabled"
        self.record = config.output_dir / "swanlab.json"  # the experiment's id, and a folder for each start
        self.known: dict[str, Any] = {"id": None, "folders": []}

    def _read_record(self) -> dict[str, Any]:
        """What earlier starts of this run left; a new experiment where it cannot be read."""
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            return {"id": known["id"], "folders": [str(folder) for folder in known["folders"]]}
        except (OSError, ValueError, KeyError, TypeError):
            return {"id": None, "folders": []}

    def start(self, keys: Mapping[str, Any], *, resumed: bool) -> None:
        """Open a run, of the same experiment where the training is resumed; say once where it is, and by which key."""
        self.known = self._read_record() if resumed else self.known
        project, mode = take_environment(self.config)
        if mode == "disabled":
            print_line(f"Curves go to {self.guard.metrics}; SwanLab is off (swanlab_mode or SWANLAB_MODE: disabled).")
            return
        trouble = self._open(mode, project, keys)
        if trouble and mode != "offline":
            if "API key" in trouble:
                print_line("SwanLab: nobody is logged in here (`swanlab login`, or SWANLAB_API_KEY); going on offline.")
            else:
                print_line(f"SwanLab: {mode} mode failed ({trouble}); going on offline.")
            trouble = self._open("offline", project, keys)
        if trouble:
            print_line(f"SwanLab is off ({trouble}); {self.guard.metrics} has every metric.")
        else:
            where = "" if self.mode == "offline" else f", project {project}"
            print_line(f"SwanLab: {self.mode}{where}. `report_to: none` turns it off.")

    def _open(self, mode: str, project: str, keys: Mapping[str, Any]) -> str | None:
        """Open a run in `mode`; None, or what went wrong."""
        if mode == "local" and importlib.util.find_spec("swanboard") is None:  # else nothing could show the run
            return "pip install 'swanlab[dashboard]' for it"
        handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
        try:
            with time_limit(START_SECONDS):
                import swanlab

                _leave_sync_to_us()
                run = swanlab.init(
                    mode=mode, project=project, name=self.config.training.get("run_name"), log_dir=str(self.log_dir),
                    config=dict(keys), settings=_settings(swanlab), reinit=True,
                    **({"id": self.known["id"], "resume": "allow"} if self.known["id"] else {}),
                )  # fmt: skip
        except (Exception, SystemExit, TimeUp) as error:
            return said(error)
        finally:
            # Ctrl-C and errors are this package's to handle: it closes the tracker itself.
            sys.excepthook = hook
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
        self.swanlab, self.mode = swanlab, mode
        self.known = {"id": run.id, "folders": [*self.known["folders"], str(run.dir)]}
        self._write_record()
        return None

    def _write_record(self) -> None:
        try:
            write_json(self.record, self.known)
        except OSError as error:
            self.guard.say_once(f"{self.record}: {error.strerror}; a resumed run would be a new experiment.")

    def _sync_commands(self) -> str:
        """What uploads every start of this run into one experiment, in order."""
        folders = [shlex.quote(folder) for folder in self.known["folders"]]
        if len(folders) == 1:
            return f"`swanlab sync {folders[0]}`"
        experiment = shlex.quote(str(self.known["id"]))
        return "`" + " && ".join(f"swanlab sync {folder} --id {experiment}" for folder in folders) + "`"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record Trainer's metrics under transformers' names of charts."""
        self._send(lambda: {chart_name(name): value for name, value in metrics.items()}, step)

    def log_changes(self, changed: Mapping[str, Sequence[Any]], step: int) -> None:
        """Show what is otherwise since the checkpoint: key -> [what it was, what it is]."""
        text = "\n".join(f"{name}: {then} -> {now}" for name, (then, now) in changed.items())
        self._send(lambda: {"Changed on resume": self.swanlab.Text(text)}, step)

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        """Show predictions under the name the reference script uses."""
        self._send(lambda: {"Prediction": [self.swanlab.Text(text) for text in texts]}, step)

    def _send(self, values: Callable[[], Mapping[str, Any]], step: int) -> None:
        if self.swanlab is not None and self.guard.answers:
            self.guard.call(lambda: self.swanlab.log(values(), step=step), LOG_SECONDS)

    def finish(self, state: str, error: str | None = None) -> None:
        """Close the run. `state` is SwanLab's: success, crashed or aborted."""
        if self.swanlab is None:
            return
        done = self.guard.call(lambda: self.swanlab.finish(state=state, error=error), FINISH_SECONDS)
        if not done:
            if self.mode == "online":
                print_line(f"SwanLab may lack the last points; complete it with {self._sync_commands()}.")
            _exit_despite_its_threads(1 if state == "crashed" else 0)
        if self.mode == "offline":
            print_line(f"SwanLab: upload the curves with {self._sync_commands()}.")
        self.swanlab = None


def _exit_despite_its_threads(code: int) -> None:
    """End this process some seconds after its main thread: an upload that hangs would keep it for ever."""

    def wait() -> None:
        threading.main_thread().join()
        time.sleep(EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()


def _leave_sync_to_us() -> None:
    """Keep SwanLab from saying `swanlab sync` at each start and end: of one start, without the experiment's id."""
    with suppress(Exception):  # another version, which then says it
        from swanlab.sdk.internal.run import greeting

        greeting._print_offline_tip = lambda ctx: None


def _settings(swanlab: Any) -> Any:
    """SwanLab records the command line, unless there is a secret in it; never git's remote, which may carry a token."""
    flags = (word.removeprefix("--").partition("=")[0] for word in sys.argv if word.startswith("--"))
    return swanlab.Settings(probe={"runtime": not any(map(SECRET.search, flags)), "git": False})


def take_environment(config: Config) -> tuple[str, str]:
    """Project and mode: the run's keys, else SwanLab's variables, else ds_sft and online.

    The variables are taken out of the environment: swanlab 0.10 fails on an old SWANLAB_PROJECT, which it reads as
    JSON, and on modes of other versions. Without a key SwanLab must not ask for one: `start` then goes on offline.
    """
    os.environ["SWANLAB_INTERACTIVE"] = "false"
    taken = {name: os.environ.pop(f"SWANLAB_{name}", None) for name in ("PROJECT", "PROJ_NAME", "MODE")}
    mode = config.swanlab_mode or taken["MODE"] or "online"
    mode = {"cloud": "online"}.get(mode, mode)
    if mode not in MODES:
        print_line(f"SwanLab: SWANLAB_MODE={mode} is none of {', '.join(MODES)}; going on offline.")
        mode = "offline"
    project = config.swanlab_project or taken["PROJECT"] or taken["PROJ_NAME"] or "ds_sft"
    # SwanLab's own rule for names.
    return re.sub(r"[^0-9a-zA-Z_\-+.]", "-", project.strip("\"'"))[:100] or "ds_sft", mode


def chart_name(name: str) -> str:
    """Trainer's name -> what its integrations call it: eval_loss -> eval/loss, loss -> train/loss."""
    if name in SINGLE_VALUES:
        return f"single_value/{name}"
    for split in ("eval", "test"):
        if name.startswith(f"{split}_"):
            return f"{split}/{name.removeprefix(f'{split}_')}"
    return f"train/{name}"
