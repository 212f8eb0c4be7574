"""SwanLab on rank 0, which can never end a run, and every metric in OUTPUT_DIR/metrics.jsonl."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.config.keys import Config
from ds_sft.ranks.launch import Launch, print_line

MODES = ("online", "offline", "local", "disabled")
START_SECONDS, LOG_SECONDS = 60.0, 30.0  # without a network SwanLab gives up after 15 s by itself
FINISH_SECONDS = 120.0  # the last points may need the network; after that the run ends without them
EXIT_SECONDS = 5.0
SECRET = re.compile(r"(^|[_-])(token|api_key|key|secret|password)$", re.IGNORECASE)
# What transformers' integrations keep apart from the curves: one value a run.
SINGLE_VALUES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


class Tracker:
    """metrics.jsonl, and a SwanLab run beside it where SwanLab works."""

    def __init__(self, config: Config, metrics_bytes: int | None = None, earlier: Path | None = None) -> None:
        """Open the files.

        Args:
            metrics_bytes: of metrics.jsonl when the checkpoint to resume from was saved; None for a new run.
            earlier: the output folder of the run to resume from, where it is another one.
        """
        self.config = config
        self.log_dir = config.output_dir / "swanlog"
        self.metrics = config.output_dir / "metrics.jsonl"
        self.swanlab: Any = None  # the module, while a run of it is open
        self.mode = "disabled"
        self.answers = True  # in time, so far
        other = earlier is not None and earlier.resolve() != config.output_dir.resolve()
        self.resumed = metrics_bytes is not None and not other  # the same experiment
        self.record = config.output_dir / "swanlab.json"  # the experiment's id, and a folder for each start
        self.known = self._read_record() if self.resumed else {"id": None, "folders": []}
        self.troubles: set[str] = set()  # what was said to fail; each is said once
        if other and earlier is not None:
            self._copy_metrics(earlier / self.metrics.name, metrics_bytes or 0)
        else:
            self._cut_metrics(metrics_bytes or 0)

    def _read_record(self) -> dict[str, Any]:
        """What earlier starts of this run left; a new experiment where it cannot be read."""
        try:
            known = json.loads(self.record.read_text(encoding="utf-8"))
            return {"id": known["id"], "folders": [str(folder) for folder in known["folders"]]}
        except (OSError, ValueError, KeyError, TypeError):
            return {"id": None, "folders": []}

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
            self._say_once(f"{source}: {error.strerror}; {self.metrics} begins at the checkpoint.")
        self.metrics.write_bytes(points)

    def start(self) -> None:
        """Open a SwanLab run if it is wanted; say once where curves go, by which key, and why if not as asked for."""
        trackers = self.config.trackers
        if not {"swanlab", "all"} & set(trackers):
            self._say_off(f"report_to: {', '.join(trackers) or 'none'}")
            return
        project, mode = take_environment(self.config)
        if mode == "disabled":
            self._say_off("swanlab_mode or SWANLAB_MODE: disabled")
            return
        trouble = self._open(mode, project)
        if trouble and mode != "offline":
            if "API key" in trouble:
                print_line("SwanLab: nobody is logged in here (`swanlab login`, or SWANLAB_API_KEY); going on offline.")
            else:
                print_line(f"SwanLab: {mode} mode failed ({trouble}); going on offline.")
            trouble = self._open("offline", project)
        if trouble:
            print_line(f"SwanLab is off ({trouble}); {self.metrics} has every metric.")
        else:
            where = "" if self.mode == "offline" else f", project {project}"
            print_line(f"SwanLab: {self.mode}{where}. `report_to: none` turns it off.")

    def _say_off(self, switch: str) -> None:
        others = [name for name in self.config.trackers if name != "swanlab"]
        print_line(f"Curves go to {' and '.join([*others, str(self.metrics)])}; SwanLab is off ({switch}).")

    def _open(self, mode: str, project: str) -> str | None:
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
                    config=public_config(self.config), settings=_settings(swanlab), reinit=True,
                    **({"id": self.known["id"], "resume": "allow"} if self.known["id"] else {}),
                )  # fmt: skip
        except (Exception, SystemExit, TimeUp) as error:
            return _describe(error)
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
        beside = self.record.with_name(self.record.name + ".tmp")
        try:
            beside.write_text(json.dumps(self.known, indent=2) + "\n", encoding="utf-8")
            os.replace(beside, self.record)
        except OSError as error:
            self._say_once(f"{self.record}: {error.strerror}; a resumed run would be a new experiment.")

    def _sync_commands(self) -> str:
        """What uploads every start of this run into one experiment, in order."""
        folders = [shlex.quote(folder) for folder in self.known["folders"]]
        if len(folders) == 1:
            return f"`swanlab sync {folders[0]}`"
        experiment = shlex.quote(str(self.known["id"]))
        return "`" + " && ".join(f"swanlab sync {folder} --id {experiment}" for folder in folders) + "`"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record Trainer's metrics under Trainer's names; SwanLab gets them under transformers' chart names."""
        # JSON has no NaN.
        finite = {k: v if isinstance(v, (int, float)) and math.isfinite(v) else None for k, v in metrics.items()}
        self._append({"step": step, **finite})
        self._send(lambda: {chart_name(k): v for k, v in finite.items() if v is not None}, step)

    def log_changes(self, changed: Mapping[str, tuple[Any, Any]], step: int) -> None:
        """Show the seam of a run that goes on after `step` with other keys: key -> [what it was, what it is]."""
        shown = without_secrets({name: list(pair) for name, pair in changed.items()})
        self._append({"step": step, "changed": shown})
        text = "\n".join(f"{name}: {then} -> {now}" for name, (then, now) in shown.items())
        self._send(lambda: {"Changed on resume": self.swanlab.Text(text)}, step)

    def _append(self, entry: Mapping[str, Any]) -> None:
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:  # a full disk ends the checkpoint, not the learning
            self._say_once(f"{self.metrics} is not complete: {error.strerror}")

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        """Show predictions under the name the reference script uses."""
        if texts:
            self._send(lambda: {"Prediction": [self.swanlab.Text(text) for text in texts]}, step)

    def _send(self, values: Callable[[], Mapping[str, Any]], step: int) -> None:
        if self.swanlab is not None and self.answers:  # else each entry would hold training up for LOG_SECONDS
            self._guard(lambda: self.swanlab.log(values(), step=step), LOG_SECONDS)

    def finish(self, state: str, error: str | None = None) -> None:
        """Close the run. `state` is SwanLab's: success, crashed or aborted."""
        if self.swanlab is None:
            return
        done = self._guard(lambda: self.swanlab.finish(state=state, error=error), FINISH_SECONDS)
        if not done:
            if self.mode == "online":
                print_line(f"SwanLab may lack the last points; complete it with {self._sync_commands()}.")
            _exit_despite_its_threads(1 if state == "crashed" else 0)
        if self.mode == "offline":
            print_line(f"SwanLab: upload the curves with {self._sync_commands()}.")
        self.swanlab = None

    def _guard(self, action: Callable[[], Any], seconds: float) -> bool:
        """Whether SwanLab could do something in time; what went wrong is said once."""
        try:
            with time_limit(seconds):
                action()
        except (Exception, SystemExit, TimeUp) as error:
            self.answers = not isinstance(error, TimeUp)
            self._say_once(f"SwanLab failed ({_describe(error)}); {self.metrics} has every metric.")
            return False
        return True

    def _say_once(self, message: str) -> None:
        if message not in self.troubles:
            self.troubles.add(message)
            print_line(message)


class TimeUp(BaseException):
    """No Exception, so that no handler between here and `time_limit` takes it for one of its own."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeUp in the block after `seconds`; unlimited outside the main thread, where no signal arrives.

    An alarm and no thread: SwanLab sets signal handlers, which only the main thread may.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: FrameType | None) -> None:
        raise TimeUp(f"no answer after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _exit_despite_its_threads(code: int) -> None:
    """End this process some seconds after its main thread: an upload that hangs would keep it for ever."""

    def wait() -> None:
        threading.main_thread().join()
        time.sleep(EXIT_SECONDS)
        os._exit(code)

    threading.Thread(target=wait, daemon=True).start()


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


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


def public_config(config: Config) -> dict[str, Any]:
    """The run's keys without secrets, and the three that the reference script records under these names."""
    return {
        "model": config.model_name_or_path,
        "prompt": config.system_prompt,
        "data_max_length": config.max_length,
        **without_secrets(config.to_dict()),
    }


def without_secrets(value: Any) -> Any:
    """The value without the keys of mappings, at any depth, whose name says secret."""
    if isinstance(value, Mapping):
        return {k: without_secrets(v) for k, v in value.items() if not SECRET.search(str(k))}
    return [without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value


def chart_name(name: str) -> str:
    """Trainer's name -> what its integrations call it: eval_loss -> eval/loss, loss -> train/loss."""
    if name in SINGLE_VALUES:
        return f"single_value/{name}"
    for split in ("eval", "test"):
        if name.startswith(f"{split}_"):
            return f"{split}/{name.removeprefix(f'{split}_')}"
    return f"train/{name}"


class TrackerCallback(TrainerCallback):
    """Hands what Trainer logs on rank 0 to the tracker, and before that what is otherwise than at the checkpoint."""

    def __init__(self, tracker: Tracker | None, changed: Mapping[str, tuple[Any, Any]] | None = None) -> None:
        self.tracker, self.changed = tracker, changed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tracker is not None and self.changed:
            self.tracker.log_changes(self.changed, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.tracker is not None and logs:
            self.tracker.log(logs, state.global_step)


@contextmanager
def open_tracker(
    config: Config, launch: Launch, metrics_bytes: int | None = None, earlier: Path | None = None
) -> Iterator[Tracker | None]:
    """A tracker on rank 0, None elsewhere; closed as success, aborted (asked to stop) or crashed."""
    if not launch.is_main:
        yield None
        return
    tracker = Tracker(config, metrics_bytes, earlier)
    tracker.start()
    try:
        yield tracker
    except BaseException as error:
        aborted = not isinstance(error, Exception)  # asked to stop
        tracker.finish("aborted" if aborted else "crashed", f"{type(error).__name__}: {error}")
        raise
    tracker.finish("success")
