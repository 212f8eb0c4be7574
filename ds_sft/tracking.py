"""SwanLab on rank 0, which can never end a run, and every metric in OUTPUT_DIR/metrics.jsonl."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.config import Config
from ds_sft.runtime.distributed import Launch

MODES = ("online", "offline", "local", "disabled")
FINISH_SECONDS = 120.0  # the last points may need the network; after that the run ends without them
SECRET = re.compile(r"(^|_)(token|api_key|secret|password)$")


class Tracker:
    """metrics.jsonl, and a SwanLab run beside it while SwanLab works."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.log_dir = config.output_dir / "swanlog"
        self.metrics: IO[str] = (config.output_dir / "metrics.jsonl").open("w", encoding="utf-8")
        self.swanlab: Any = None  # the module, while a run of it is open
        self.mode = "disabled"

    def start(self) -> None:
        """Open a SwanLab run; say once in which mode, and why if not the one asked for."""
        project, mode = take_environment(self.config)
        if mode == "disabled":
            return
        trouble = self._try(mode, project)
        if trouble and mode != "offline":
            print(f"SwanLab: {mode} mode failed ({trouble}); going on offline.", flush=True)
            trouble = self._try("offline", project)
        if trouble:
            print(f"SwanLab is off ({trouble}); metrics.jsonl has every metric.", flush=True)
        elif self.mode == "offline":
            print(f"SwanLab: offline; upload later with `{self._sync_command()}`.", flush=True)

    def _try(self, mode: str, project: str) -> str | None:
        """Open a run in `mode`; None, or what went wrong."""
        handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
        try:
            import swanlab

            swanlab.init(
                mode=mode, project=project, name=self.config.training.get("run_name"), log_dir=str(self.log_dir),
                config=public_config(self.config),
            )  # fmt: skip
        except (Exception, SystemExit) as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        finally:
            # Ctrl-C and errors are this package's to handle: it closes the tracker itself.
            sys.excepthook = hook
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
        self.swanlab, self.mode = swanlab, mode
        return None

    def _sync_command(self) -> str:
        runs = sorted(self.log_dir.glob("run-*"), key=lambda path: path.stat().st_mtime)
        return f"swanlab sync {runs[-1] if runs else self.log_dir}"

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Record Trainer's metrics under Trainer's names; SwanLab gets them as `train/loss`, `eval/loss`, ..."""
        # JSON has no NaN.
        finite = {k: v if isinstance(v, (int, float)) and math.isfinite(v) else None for k, v in metrics.items()}
        self.metrics.write(json.dumps({"step": step, **finite}) + "\n")
        self.metrics.flush()
        self._send({chart_name(k): v for k, v in finite.items() if v is not None}, step)

    def log_predictions(self, texts: Sequence[str], step: int) -> None:
        """Show predictions under the name the reference script uses."""
        if texts and self.swanlab is not None:
            self._send({"Prediction": [self.swanlab.Text(text) for text in texts]}, step)

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        if self.swanlab is not None:
            self._guard(lambda: self.swanlab.log(dict(values), step=step))

    def finish(self, state: str, error: str | None = None) -> None:
        """Close both. `state` is SwanLab's: success, crashed or aborted."""
        self.metrics.close()
        if self.swanlab is None:
            return
        module, self.swanlab = self.swanlab, None
        thread = threading.Thread(
            target=lambda: self._guard(lambda: module.finish(state=state, error=error)), daemon=True
        )
        if self.mode != "online":  # nothing to wait for
            self._guard(lambda: module.finish(state=state, error=error))
            return
        thread.start()
        thread.join(FINISH_SECONDS)
        if thread.is_alive():
            print(
                f"SwanLab has not uploaded everything after {FINISH_SECONDS:.0f} s; "
                f"complete it with `{self._sync_command()}`.",
                flush=True,
            )

    def _guard(self, action: Callable[[], Any]) -> None:
        """Do something with SwanLab; if it fails, go on without SwanLab and say so once."""
        try:
            action()
        except (Exception, SystemExit) as error:
            self.swanlab = None
            print(f"SwanLab stopped ({type(error).__name__}: {error}); metrics.jsonl goes on.", flush=True)


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
        print(f"SwanLab: SWANLAB_MODE={mode} is none of {', '.join(MODES)}; going on offline.", flush=True)
        mode = "offline"
    project = config.swanlab_project or taken["PROJECT"] or taken["PROJ_NAME"] or "ds_sft"
    # SwanLab's own rule for names.
    return re.sub(r"[^0-9a-zA-Z_\-+.]", "-", project.strip("\"'"))[:100] or "ds_sft", mode


def public_config(config: Config) -> dict[str, Any]:
    """The run's keys without secrets, and the three that the reference script records under these names."""
    keys = {name: value for name, value in config.to_dict().items() if not SECRET.search(name)}
    return {
        "model": config.model_name_or_path,
        "prompt": config.system_prompt,
        "data_max_length": config.max_length,
        **keys,
    }


def chart_name(name: str) -> str:
    """Trainer's name -> what its integrations call it: eval_loss -> eval/loss, loss -> train/loss."""
    for split in ("eval", "test"):
        if name.startswith(f"{split}_"):
            return f"{split}/{name.removeprefix(f'{split}_')}"
    return f"train/{name}"


class TrackerCallback(TrainerCallback):
    """Hands what Trainer logs on rank 0 to the tracker."""

    def __init__(self, tracker: Tracker | None) -> None:
        self.tracker = tracker

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
def open_tracker(config: Config, launch: Launch) -> Iterator[Tracker | None]:
    """A tracker on rank 0, None elsewhere; closed as success, aborted (Ctrl-C) or crashed."""
    if not launch.is_main:
        yield None
        return
    tracker = Tracker(config)
    tracker.start()
    try:
        yield tracker
    except BaseException as error:
        aborted = isinstance(error, (KeyboardInterrupt, SystemExit))
        tracker.finish("aborted" if aborted else "crashed", f"{type(error).__name__}: {error}")
        raise
    tracker.finish("success")
