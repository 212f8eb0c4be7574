"""SwanLab may fail in any way: the run goes on, and metrics.jsonl has everything."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.config.keys import Config
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import Stopped
from ds_sft.tracking import integrations, swanlab_run, tracker
from ds_sft.tracking.public import public_config, without_secrets
from ds_sft.tracking.swanlab_run import SwanLab, chart_name, take_environment
from ds_sft.tracking.tracker import TrackerCallback, open_tracker, trackers_of
from tests.own_code import importable

ALONE = Launch(launcher="python")


def make(folder: Path, **keys: Any) -> Config:
    training = {"output_dir": str(folder), "hub_token": "hf_secret", "run_name": "first"}
    return Config(model_name_or_path="m", train_file="t", training=training, **keys)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class FakeSwanlab(types.ModuleType):
    """Records calls; fails where told to."""

    def __init__(self, *failing: str, modes: tuple[str, ...] = swanlab_run.MODES) -> None:
        super().__init__("swanlab")
        self.__spec__ = ModuleSpec("swanlab", None)  # transformers asks whether it is installed
        self.failing, self.modes, self.calls = failing, modes, []

    def _call(self, name: str, /, **given: Any) -> None:
        self.calls.append((name, given))
        if name in self.failing:
            raise ConnectionError(f"{name}: no network")

    def init(self, **given: Any) -> Any:
        if given["mode"] not in self.modes:
            raise SystemExit("no key")
        self._call("init", **given)
        return types.SimpleNamespace(id="abc", dir=Path(given["log_dir"]) / "run-1")

    @staticmethod
    def Settings(**given: Any) -> Any:
        return given

    def log(self, values: dict[str, Any], step: int) -> None:
        self._call("log", values=values, step=step)

    def finish(self, state: str, error: str | None) -> None:
        self._call("finish", state=state)

    @staticmethod
    def Text(text: str) -> str:
        return f"Text({text})"


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*failing: str, **options: Any) -> FakeSwanlab:
        module = FakeSwanlab(*failing, **options)
        monkeypatch.setitem(sys.modules, "swanlab", module)
        return module

    return install


@pytest.mark.parametrize(
    ("keys", "environment", "expected"),
    [
        ({}, {}, ("ds_sft", "online")),
        ({}, {"MODE": "cloud", "PROJECT": "qwen3-sft-dialog"}, ("qwen3-sft-dialog", "online")),
        ({}, {"PROJ_NAME": '"quoted"', "MODE": "local"}, ("quoted", "local")),
        ({}, {"PROJECT": "old", "PROJ_NAME": "new", "MODE": "disabled"}, ("old", "disabled")),
        ({"swanlab_project": "a", "swanlab_mode": "offline"}, {"PROJECT": "b", "MODE": "online"}, ("a", "offline")),
        ({"swanlab_project": "my project/对话"}, {}, ("my-project---", "online")),
        ({}, {"MODE": "dryrun"}, ("ds_sft", "offline")),
    ],
)  # fmt: skip
def test_project_and_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: Any, environment: Any, expected: tuple[str, str]
) -> None:
    monkeypatch.delenv("SWANLAB_MODE")
    for name, value in environment.items():
        monkeypatch.setenv(f"SWANLAB_{name}", value)
    assert take_environment(make(tmp_path, **keys)) == expected
    assert not {"SWANLAB_PROJECT", "SWANLAB_PROJ_NAME", "SWANLAB_MODE"} & os.environ.keys()


def test_secrets_stay_here(tmp_path: Path) -> None:
    keys = public_config(make(tmp_path, max_length=7))
    assert "hf_secret" not in repr(keys)
    assert (keys["model"], keys["prompt"][:4], keys["data_max_length"]) == ("m", "你是一个", 7)
    assert keys["predict_max_new_tokens"] is None


def test_secrets_are_found_at_any_depth() -> None:
    keys = {"deepspeed": {"comet": {"api_key": "s", "on": 1}}, "list": [{"password": "s", "a": 2}], "hub_token": "s"}
    assert without_secrets(keys) == {"deepspeed": {"comet": {"on": 1}}, "list": [{"a": 2}]}


@pytest.mark.parametrize(
    ("words", "recorded"),
    [(["--config", "a"], True), (["--hub_token", "s"], False), (["--hub_token=s"], False), (["--hub-token=s"], False)],
)
def test_a_command_line_with_a_secret_is_not_recorded(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], recorded: bool
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    module = fake()
    with open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE):
        pass
    assert module.calls[0][1]["settings"] == {"probe": {"runtime": recorded, "git": False}}


def test_names_of_charts() -> None:
    names = ["loss", "eval_loss", "learning_rate", "train_runtime", "test_loss"]
    charts = ["train/loss", "eval/loss", "train/learning_rate", "single_value/train_runtime", "test/loss"]
    assert [chart_name(name) for name in names] == charts


def test_what_is_sent(tmp_path: Path, fake: Any) -> None:
    module = fake()
    with open_tracker(make(tmp_path, swanlab_mode="offline", swanlab_project="p"), ALONE) as tracker:
        assert tracker is not None
        TrackerCallback(tracker).on_log(
            TrainingArguments(str(tmp_path), use_cpu=True), TrainerState(global_step=3), TrainerControl(),
            logs={"loss": 2.5, "grad_norm": float("nan")},
        )  # fmt: skip
        tracker.log_predictions(["a", "b"], step=3)
    assert lines(tmp_path) == [{"step": 3, "loss": 2.5, "grad_norm": None}]
    (_, init), *rest = module.calls
    assert {k: init[k] for k in ("mode", "project", "name", "log_dir")} == {
        "mode": "offline", "project": "p", "name": "first", "log_dir": str(tmp_path / "swanlog")}  # fmt: skip
    assert rest == [
        ("log", {"values": {"train/loss": 2.5}, "step": 3}),
        ("log", {"values": {"Prediction": ["Text(a)", "Text(b)"]}, "step": 3}),
        ("finish", {"state": "success"}),
    ]


def test_no_key_goes_on_offline(tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    module = fake(modes=("offline",))
    with open_tracker(make(tmp_path, swanlab_mode="online"), ALONE):
        pass
    assert module.calls[0][1]["mode"] == "offline"
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"SwanLab: online mode failed \(SystemExit: no key .*\); going on offline\.", said[0])
    assert said[1:] == [
        "SwanLab: offline. `report_to: none` turns it off.",
        f"SwanLab: upload the curves with `swanlab sync {tmp_path / 'swanlog' / 'run-1'}`.",
    ]


@pytest.mark.parametrize("ends", [None, RuntimeError(), Stopped("SIGTERM")])
def test_the_upload_is_said_however_a_run_ends(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str], ends: BaseException | None
) -> None:
    fake()
    with suppress(BaseException), open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE):
        if ends is not None:
            raise ends
    folder = tmp_path / "swanlog" / "run-1"
    assert capsys.readouterr().out.splitlines() == [
        "SwanLab: offline. `report_to: none` turns it off.",
        f"SwanLab: upload the curves with `swanlab sync {folder}`.",
    ]


@pytest.mark.parametrize("failing", [("init",), ("log",), ("finish",)])
def test_failures_are_said_once_and_nothing_is_lost(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str], failing: tuple[str, ...]
) -> None:
    fake(*failing)
    with open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE) as tracker:
        assert tracker is not None
        for step in range(3):
            tracker.log({"loss": 1.0}, step)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
    assert capsys.readouterr().out.count(f"{failing[0]}: no network") == 1


@pytest.mark.parametrize(("error", "state"), [(ValueError("x"), "crashed"), (KeyboardInterrupt(), "aborted")])
def test_how_a_run_ended(tmp_path: Path, fake: Any, error: BaseException, state: str) -> None:
    module = fake()
    with pytest.raises(type(error)), open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE):
        raise error
    assert module.calls[-1] == ("finish", {"state": state})


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_tracker(make(tmp_path, swanlab_mode="disabled"), ALONE) as tracker:
        assert tracker is not None
        monkeypatch.setattr(tracker, "metrics", Path("/dev/full"))
        tracker.log({"loss": 1.0}, 1)
        tracker.log({"loss": 1.0}, 2)
    assert capsys.readouterr().out.splitlines()[1:] == ["/dev/full is not complete: No space left on device"]


@pytest.mark.parametrize(
    ("report_to", "opened", "said"),
    [
        (None, True, "SwanLab: online, project ds_sft. `report_to: none` turns it off."),
        ("swanlab", True, "SwanLab: online, project ds_sft. `report_to: none` turns it off."),
        ("all", True, "SwanLab: online, project ds_sft. `report_to: none` turns it off."),
        (["swanlab", "tensorboard"], True, "SwanLab: online, project ds_sft. `report_to: none` turns it off."),
        ("none", False, "Curves go to {metrics}; SwanLab is off (report_to: none)."),
        ([], False, "Curves go to {metrics}; SwanLab is off (report_to: none)."),
        (["tensorboard"], False, "Curves go to tensorboard and {metrics}; SwanLab is off (report_to: tensorboard)."),
    ],
)
def test_one_switch_for_all_trackers(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], report_to: Any,
    opened: bool, said: str,
) -> None:  # fmt: skip
    """Whatever the mode is: it says how SwanLab is used, not whether."""
    monkeypatch.delenv("SWANLAB_MODE")
    config = make(tmp_path, swanlab_mode="online")
    config = replace(config, training={**config.training, "report_to": report_to})
    module = fake()
    with open_tracker(config, ALONE) as tracker:
        tracker.log({"loss": 1.0}, 1)
    assert capsys.readouterr().out.splitlines() == [said.format(metrics=tmp_path / "metrics.jsonl")]
    assert bool(module.calls) == opened
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


def test_a_disabled_swanlab_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_tracker(make(tmp_path), ALONE):  # by the environment
        pass
    metrics = tmp_path / "metrics.jsonl"
    assert capsys.readouterr().out == (
        f"Curves go to {metrics}; SwanLab is off (swanlab_mode or SWANLAB_MODE: disabled).\n"
    )


def test_local_mode_needs_the_dashboard(tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake()
    with open_tracker(make(tmp_path, swanlab_mode="local"), ALONE):
        pass
    said = capsys.readouterr().out
    assert said.startswith("SwanLab: local mode failed (pip install 'swanlab[dashboard]' for it); going on offline.\n")


# SwanLab as it may be without a network: what hangs is tried in a process of its own, which must end by itself.
HANGING = """
import sys, threading, time, types
from pathlib import Path
from ds_sft.config.keys import Config
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import Stopped
from ds_sft.tracking import swanlab_run as tracking
from ds_sft.tracking.tracker import open_tracker

class Fake(types.ModuleType):
    def __getattr__(self, name):
        def call(**given):
            if name in HANGS:
                try:
                    time.sleep(600)
                except Exception:  # as SwanLab's own decorators do
                    time.sleep(600)
            return types.SimpleNamespace(id="abc", dir=given.get("log_dir"))
        return call
    def log(self, values, step):
        threading.Thread(target=time.sleep, args=(600,)).start()  # an upload that never ends

HANGS, folder = sys.argv[1].split(","), sys.argv[2]
sys.modules["swanlab"] = Fake("swanlab")
if "init" in HANGS:  # what answers has its time, on a busy machine too
    tracking.START_SECONDS = 0.2
else:
    tracking.FINISH_SECONDS = 0.2
tracking.EXIT_SECONDS = 0.1
config = Config(model_name_or_path="m", train_file="t", training={"output_dir": folder}, swanlab_mode="online")
with open_tracker(config, Launch(launcher="python")) as tracker:
    tracker.log({"loss": 1.0}, 1)
print("the run is done")
"""


@pytest.mark.parametrize(
    ("hangs", "said"),
    [
        ("finish", "SwanLab may lack the last points; complete it with `swanlab sync "),
        ("init", "SwanLab is off (TimeUp: no answer after 0.2 s); "),
    ],
)
def test_a_hanging_swanlab_does_not_hold_the_run(tmp_path: Path, hangs: str, said: str) -> None:
    command = [sys.executable, "-c", HANGING, hangs, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    assert done.stdout.endswith("the run is done\n")
    assert len(lines(tmp_path)) == 1


def test_a_swanlab_that_hangs_holds_training_up_once(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = fake()
    monkeypatch.setattr(swanlab_run, "LOG_SECONDS", 1)
    monkeypatch.setattr(module, "log", lambda values, step: (module.calls.append(("log", step)), time.sleep(300)))
    with open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE) as tracker:
        assert tracker is not None
        for step in range(3):
            tracker.log({"loss": 1.0}, step)
    assert module.calls[1:] == [("log", 0), ("finish", {"state": "success"})]
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(("error", "code"), [(ValueError("x"), 1), (KeyboardInterrupt(), 0)])
def test_a_failed_finish_keeps_the_exit_code(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    fake("finish")
    codes: list[int] = []
    monkeypatch.setattr(swanlab_run, "_exit_despite_its_threads", codes.append)
    with pytest.raises(type(error)), open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE):
        raise error
    assert codes == [code]


def test_other_ranks_have_no_tracker(tmp_path: Path) -> None:
    with open_tracker(make(tmp_path), Launch(launcher="torchrun", rank=1, world_size=2)) as tracker:
        assert tracker is None
    TrackerCallback(None).on_log(None, None, None, logs={"loss": 1.0})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_real_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installed swanlab, asked for online mode without a key, with an old variable it fails on."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no saved key
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    monkeypatch.setenv("SWANLAB_MODE", "cloud")
    monkeypatch.setenv("SWANLAB_PROJECT", "old-name")
    handler, hook = signal.getsignal(signal.SIGINT), sys.excepthook
    out = tmp_path / "out"
    out.mkdir()
    with open_tracker(make(out), ALONE) as tracker:
        assert tracker is not None
        (swanlab,) = tracker.trackers
        assert isinstance(swanlab, SwanLab)
        assert swanlab.mode == "offline"
        assert (signal.getsignal(signal.SIGINT), sys.excepthook) == (handler, hook)
        tracker.log({"loss": 1.5}, 1)
        tracker.log_predictions(["Question: q\n\nLLM: a"], 1)
    assert (signal.getsignal(signal.SIGINT), sys.excepthook) == (handler, hook)
    said = capsys.readouterr().out
    assert said.startswith(
        "SwanLab: nobody is logged in here (`swanlab login`, or SWANLAB_API_KEY); going on offline.\n"
    )
    assert said.count("swanlab sync") == 1  # the library itself would say it at the start and at the end
    command = next(line for line in said.splitlines() if line.startswith("SwanLab: upload the curves with "))
    folder = Path(command.split("`")[1].split()[2])
    assert folder.parent == out / "swanlog"
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) > 500
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "home") == ["out"]  # nothing in the working directory


def test_a_resumed_run_is_the_same_experiment(
    tmp_path: Path, fake: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The id is kept in the output folder; points behind the checkpoint come again, the others are there once."""
    monkeypatch.delenv("SWANLAB_MODE")
    config = make(tmp_path, swanlab_mode="offline")
    swanlab = fake()
    with open_tracker(config, ALONE) as tracker:
        tracker.log({"loss": 3.0}, 1)
        at_checkpoint = (tmp_path / "metrics.jsonl").stat().st_size
        tracker.log({"loss": 2.0}, 2)
    assert "resume" not in swanlab.calls[0][1]
    with open_tracker(config, ALONE, at_checkpoint) as tracker:
        tracker.log({"loss": 2.0}, 2)
        tracker.log({"loss": 1.0}, 3)
    resumed = swanlab.calls[-4][1]
    assert (resumed["id"], resumed["resume"]) == ("abc", "allow")
    assert lines(tmp_path) == [{"step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
    folder = tmp_path / "swanlog" / "run-1"
    assert json.loads((tmp_path / "swanlab.json").read_text()) == {"id": "abc", "folders": [str(folder)] * 2}
    command = f"swanlab sync {folder} --id abc"
    assert f"SwanLab: upload the curves with `{command} && {command}`.\n" in capsys.readouterr().out
    with open_tracker(config, ALONE) as tracker:  # another run in the same folder
        pass
    assert "id" not in swanlab.calls[-2][1]
    assert lines(tmp_path) == []


def test_a_run_that_goes_on_from_another_folder_has_its_points(
    tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out, earlier = tmp_path / "out", tmp_path / "earlier"
    for folder, loss in ((out, 9.0), (earlier, 3.0)):
        folder.mkdir()
        with open_tracker(make(folder, swanlab_mode="offline"), ALONE) as tracker:
            tracker.log({"loss": loss}, 1)
            at_checkpoint = (folder / "metrics.jsonl").stat().st_size
            tracker.log({"loss": loss}, 2)
    swanlab = fake()
    with open_tracker(make(out, swanlab_mode="offline"), ALONE, at_checkpoint, earlier):
        pass
    assert lines(out) == [{"step": 1, "loss": 3.0}]
    assert len(lines(earlier)) == 2
    assert "id" not in swanlab.calls[0][1]  # neither folder's experiment
    with open_tracker(make(out, swanlab_mode="offline"), ALONE, at_checkpoint, tmp_path / "gone"):
        pass
    assert lines(out) == []
    assert "gone/metrics.jsonl: No such file or directory; " in capsys.readouterr().out


def test_a_record_that_cannot_be_read_is_a_new_experiment(tmp_path: Path, fake: Any) -> None:
    (tmp_path / "swanlab.json").write_text("{")
    swanlab = fake()
    with open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE, 0):
        pass
    assert "id" not in swanlab.calls[0][1]


def test_what_changed_on_a_resume_is_shown_before_its_first_step(tmp_path: Path, fake: Any) -> None:
    changed = {"learning_rate": (1e-4, 5e-5), "weight_decay": (0.0, 0.1)}
    swanlab = fake()
    with open_tracker(make(tmp_path, swanlab_mode="offline"), ALONE, 0) as tracker:
        args, state = TrainingArguments(output_dir=str(tmp_path)), TrainerState(global_step=4)
        for given in ({}, changed):
            TrackerCallback(tracker, given).on_train_begin(args, state, TrainerControl())
    assert lines(tmp_path) == [{"step": 4, "changed": {"learning_rate": [1e-4, 5e-5], "weight_decay": [0.0, 0.1]}}]
    (entry,) = [given for name, given in swanlab.calls if name == "log"]
    text = "Text(learning_rate: 0.0001 -> 5e-05\nweight_decay: 0.0 -> 0.1)"
    assert entry == {"values": {"Changed on resume": text}, "step": 4}


# ---- Trackers of transformers' and of the user's


class FakeIntegration(TrainerCallback):
    """One of transformers' own trackers: records what it is asked, and fails where told to."""

    calls: ClassVar[list[Any]] = []
    failing: ClassVar[set[str]] = set()

    def _call(self, event: str, given: Any = None) -> None:
        self.calls.append((event, given))
        if event in self.failing:
            raise ConnectionError("no network")

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        self._call("on_init_end")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._call("on_train_begin", model)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        control.should_training_stop = True  # of a copy
        self._call("on_log", (state.global_step, logs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._call("on_save")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._call("on_train_end")


@pytest.fixture
def integration(monkeypatch: pytest.MonkeyPatch) -> type[FakeIntegration]:
    """wandb, comet_ml and mlflow are installed."""
    installed = ["wandb", "comet_ml", "mlflow"]
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: installed)
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [FakeIntegration])
    monkeypatch.setattr(FakeIntegration, "calls", [])
    monkeypatch.setattr(FakeIntegration, "failing", set())
    return FakeIntegration


def reported(folder: Path, *names: str) -> Config:
    config = make(folder)
    return replace(config, training={**config.training, "report_to": list(names)})


def trained(config: Config, *, resumed: bool = False) -> None:
    """What a run does with its trackers."""
    with open_tracker(config, ALONE, 0 if resumed else None) as log:
        assert log is not None
        callback, control = TrackerCallback(log), TrainerControl()
        args, state = TrainingArguments(str(config.output_dir), use_cpu=True), TrainerState(global_step=1)
        callback.on_train_begin(args, state, control, model="the model")
        callback.on_log(args, state, control, logs={"loss": 2.0, "grad_norm": float("inf")})
        callback.on_save(args, state, control)
        assert control.should_training_stop is False
        state.global_step = 2
        log.log_predictions(["Question: q\n\nLLM: a"], 2)
        log.log({"eval_chrf": 50.0}, 2)


def test_a_tracker_of_transformers_is_told_all_until_the_answers(
    tmp_path: Path, integration: type[FakeIntegration], capsys: pytest.CaptureFixture[str]
) -> None:
    trained(reported(tmp_path, "comet_ml"))
    assert integration.calls == [
        ("on_init_end", None), ("on_train_begin", "the model"), ("on_log", (1, {"loss": 2.0})), ("on_save", None),
        ("on_log", (2, {"eval_chrf": 50.0})), ("on_train_end", None),
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines() == [
        f"Curves go to comet_ml and {tmp_path / 'metrics.jsonl'}; SwanLab is off (report_to: comet_ml).",
        "comet_ml: no place for texts; predictions.jsonl has the answers.",
    ]


@pytest.mark.parametrize(
    ("failing", "left"),
    [("on_train_begin", ["on_init_end", "on_train_begin"]), ("on_log", None), ("on_train_end", None)],
)
def test_a_tracker_of_transformers_that_fails_is_said_once(
    tmp_path: Path,
    integration: type[FakeIntegration],
    capsys: pytest.CaptureFixture[str],
    failing: str,
    left: list[str] | None,
) -> None:
    integration.failing.add(failing)
    trained(reported(tmp_path, "comet_ml"))
    said = capsys.readouterr().out
    assert said.count("comet_ml failed (ConnectionError: no network") == 1
    assert left is None or [name for name, _ in integration.calls] == left
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


def test_wandb_without_a_key_goes_on_offline(
    tmp_path: Path,
    integration: type[FakeIntegration],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb: Any = types.ModuleType("wandb")
    ended: list[int] = []
    wandb.teardown = integration.failing.clear  # it looks at the variable again, and works
    wandb.finish = lambda exit_code: ended.append(exit_code)
    wandb.Table, wandb.log = (lambda columns, data: data), lambda values: integration.calls.append(("text", values))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    integration.failing.add("on_train_begin")
    trained(reported(tmp_path, "wandb"))
    assert os.environ["WANDB_MODE"] == "offline"
    assert "wandb: going on offline (WANDB_MODE=offline)" in capsys.readouterr().out
    assert ("text", {"Prediction": [[2, "Question: q\n\nLLM: a"]]}) in integration.calls
    assert ended == [0]


def test_wandb_that_answers_too_late_is_told_all_offline(
    tmp_path: Path, integration: type[FakeIntegration], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network it waits for 90 s by itself."""
    wandb: Any = types.ModuleType("wandb")
    wandb.teardown, wandb.finish = lambda: None, lambda exit_code: None
    wandb.Table, wandb.log = (lambda columns, data: data), lambda values: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr(integrations, "START_SECONDS", 0.2)
    monkeypatch.setattr(
        integration, "on_init_end", lambda *args, **kwargs: None if "WANDB_MODE" in os.environ else time.sleep(600)
    )
    trained(reported(tmp_path, "wandb"))
    assert [name for name, _ in integration.calls] == ["on_train_begin", "on_log", "on_save", "on_log", "on_train_end"]


def test_files_of_wandb_lie_in_the_output_folder_or_where_its_variable_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    for folder in (tmp_path / "one", tmp_path / "other"):
        integrations.keep_files_in(folder, "wandb")
        assert os.environ["WANDB_DIR"] == str(tmp_path / "one")


@pytest.mark.parametrize("chosen", [False, True])
def test_files_of_mlflow_lie_in_the_output_folder_or_where_its_variable_says(
    tmp_path: Path, integration: type[FakeIntegration], monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    """Its numbers, and in an experiment with a folder the answers."""
    asked: list[Any] = []
    mlflow: Any = types.ModuleType("mlflow")
    mlflow.is_tracking_uri_set = lambda: chosen
    mlflow.set_tracking_uri = asked.append
    there = types.SimpleNamespace(artifact_location=(tmp_path / "mlruns").as_uri())
    mlflow.get_experiment_by_name = lambda name: None if len(asked) == 1 else there
    mlflow.create_experiment = lambda name, artifact_location: asked.append((name, artifact_location))
    mlflow.set_experiment = asked.append
    mlflow.log_text = mlflow.end_run = lambda *args: None
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    store, place = f"sqlite:///{tmp_path / 'mlflow.db'}", (tmp_path / "mlruns").as_uri()
    trained(reported(tmp_path, "mlflow"))
    assert asked == ([] if chosen else [store, ("ds_sft", place), "ds_sft"])
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    trained(reported(tmp_path, "mlflow"))
    assert asked[3:] == ([] if chosen else [store, "mine"])  # which is there


def test_runs_of_mlflow_have_their_files_where_the_output_folder_was_moved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the old folder came again, and a copy wrote over the files of the original."""
    then, now = "file:///old/out/mlruns", (tmp_path / "mlruns").as_uri()
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute("CREATE TABLE experiments (artifact_location TEXT)")
        database.execute("CREATE TABLE runs (artifact_uri TEXT)")
        database.executemany("INSERT INTO experiments VALUES (?)", [(then,), (f"{then}2",)])
        database.executemany("INSERT INTO runs VALUES (?)", [(f"{then}/a/artifacts",), ("s3://b/mlruns/a",)])
    mlflow: Any = types.ModuleType("mlflow")
    mlflow.is_tracking_uri_set, mlflow.set_tracking_uri = lambda: False, lambda uri: None
    mlflow.get_experiment_by_name = lambda name: types.SimpleNamespace(artifact_location=then)
    mlflow.set_experiment = lambda name: None
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    integrations.keep_files_in(tmp_path, "mlflow")
    read = sqlite3.connect(tmp_path / "mlflow.db").execute
    assert read("SELECT * FROM experiments").fetchall() == [(now,), (f"{then}2",)]
    assert read("SELECT * FROM runs").fetchall() == [(f"{now}/a/artifacts",), ("s3://b/mlruns/a",)]


def test_a_wandb_that_cannot_be_told_to_go_on_offline_ends_nothing(
    tmp_path: Path,
    integration: type[FakeIntegration],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wandb: Any = types.ModuleType("wandb")

    def teardown() -> None:
        raise BrokenPipeError("its service is gone")

    wandb.teardown = teardown
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    integration.failing.add("on_train_begin")
    trained(reported(tmp_path, "wandb"))
    said = capsys.readouterr().out
    assert "wandb failed (BrokenPipeError: its service is gone" in said
    assert "wandb is off.\n" in said
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


class NamedRuns(FakeIntegration):
    """A tracker that opens the run that the environment names, if it has that, and else a new one."""

    runs: ClassVar[list[str]] = []
    opened: ClassVar[list[dict[str, str]]] = []  # with which variables

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        named = {name: value for name, value in os.environ.items() if name.startswith(("WANDB_R", "MLFLOW_"))}
        self.opened.append(named)
        run = named.get("WANDB_RUN_ID") or os.environ.pop("MLFLOW_RUN_ID", None)  # as MLflow does
        if run == "gone":
            raise ValueError("Run 'gone' not found")
        self.runs.append(run or f"run-{len(self.runs)}")
        sys.modules["wandb"].run = types.SimpleNamespace(id=self.runs[-1])  # type: ignore[attr-defined]


@pytest.fixture
def named_runs(integration: type[FakeIntegration], monkeypatch: pytest.MonkeyPatch) -> type[NamedRuns]:
    """wandb and mlflow, of which either keeps runs."""
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "MLFLOW_RUN_ID", "MLFLOW_MAX_LOG_PARAMS"):
        monkeypatch.delenv(name, raising=False)
    wandb: Any = types.ModuleType("wandb")
    mlflow: Any = types.ModuleType("mlflow")
    wandb.Table, wandb.log, wandb.finish = (lambda columns, data: data), lambda values: None, lambda exit_code: None
    wandb.teardown = lambda: None
    mlflow.active_run = lambda: types.SimpleNamespace(info=types.SimpleNamespace(run_id=NamedRuns.runs[-1]))
    mlflow.log_text, mlflow.end_run = lambda text, file: None, lambda state: None
    mlflow.is_tracking_uri_set = lambda: True
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(integrations, "get_reporting_integration_callbacks", lambda names: [NamedRuns])
    monkeypatch.setattr(NamedRuns, "runs", [])
    monkeypatch.setattr(NamedRuns, "opened", [])
    return NamedRuns


GOES_ON = {
    "wandb": {"WANDB_RUN_ID": "run-0", "WANDB_RESUME": "allow"},
    "mlflow": {"MLFLOW_RUN_ID": "run-0", "MLFLOW_MAX_LOG_PARAMS": "0"},
}


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_goes_on_in_the_trackers_own_run(tmp_path: Path, named_runs: type[NamedRuns], name: str) -> None:
    config, record = reported(tmp_path, name), tmp_path / f"{name}.json"
    trained(config)
    assert json.loads(record.read_text()) == {"id": "run-0"}
    trained(config, resumed=True)
    assert named_runs.opened == [{}, GOES_ON[name]]
    assert GOES_ON[name].keys() & os.environ.keys() == set()
    assert json.loads(record.read_text()) == {"id": "run-0"}
    trained(config)  # anew, in the same folder
    assert named_runs.runs == ["run-0", "run-0", "run-2"]
    record.write_text("{")
    trained(config, resumed=True)
    assert named_runs.runs[3:] == ["run-3"]
    record.unlink()
    record.mkdir()
    trained(config, resumed=True)
    assert (named_runs.runs[4:], named_runs.failing) == (["run-4"], set())


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_resumed_run_does_not_go_on_in_that_of_an_earlier_one_in_its_folder(
    tmp_path: Path, named_runs: type[NamedRuns], name: str
) -> None:
    trained(reported(tmp_path, name))
    (tmp_path / "swanlab.json").write_text("{}")
    trained(reported(tmp_path, "none"))  # anew, with resume: never
    assert not (tmp_path / "swanlab.json").exists()
    trained(reported(tmp_path, name), resumed=True)
    assert named_runs.opened == [{}, {}]


@pytest.mark.parametrize("named", [{"WANDB_RUN_ID": "mine"}, {"WANDB_RESUME": "never"}, {"MLFLOW_RUN_ID": "mine"}])
def test_the_run_that_a_user_names_is_the_trackers(
    tmp_path: Path, named_runs: type[NamedRuns], monkeypatch: pytest.MonkeyPatch, named: dict[str, str]
) -> None:
    name = "mlflow" if "MLFLOW_RUN_ID" in named else "wandb"
    (tmp_path / f"{name}.json").write_text('{"id": "run-0"}')
    for variable, value in named.items():
        monkeypatch.setenv(variable, value)
    trained(reported(tmp_path, name), resumed=True)
    assert named_runs.opened == [named]


def test_a_variable_of_another_tracker_says_nothing_of_this_ones_run(
    tmp_path: Path, named_runs: type[NamedRuns], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wandb.json").write_text('{"id": "run-0"}')
    monkeypatch.setenv("MLFLOW_RUN_ID", "mine")
    trained(reported(tmp_path, "wandb"), resumed=True)
    assert named_runs.opened == [{**GOES_ON["wandb"], "MLFLOW_RUN_ID": "mine"}]


def test_a_run_that_the_tracker_has_no_more_begins_anew(
    tmp_path: Path, named_runs: type[NamedRuns], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.json").write_text('{"id": "gone"}')
    trained(reported(tmp_path, "mlflow"), resumed=True)
    said = capsys.readouterr().out.splitlines()[1:]
    assert said[0].startswith("mlflow failed (ValueError: Run 'gone' not found")
    assert said[1:] == ["mlflow: beginning a new run."]
    assert json.loads((tmp_path / "mlflow.json").read_text()) == {"id": "run-0"}


def test_all_is_what_is_installed(tmp_path: Path, integration: type[FakeIntegration], fake: Any) -> None:
    names = [getattr(tracker, "name", "swanlab") for tracker in trackers_of(reported(tmp_path, "all"))]
    assert names == ["swanlab", "comet_ml", "mlflow", "wandb"]


OWN = """
class Mine:
    def start(self, keys, *, resumed): print("start", keys["model_name_or_path"], "hub_token" in keys, resumed)
    def log(self, metrics, step): print("log", metrics, step)
    def log_predictions(self, texts, step): print("texts", texts, step)
    def finish(self, state, error): print("finish", state, error)

class Short:
    def start(self, keys, *, resumed): pass
    def log(self, metrics, step): raise ValueError(f"full at {step}")
    def finish(self, state, error): pass

class Wrong(Mine):
    def start(self, keys): pass

class Greedy(Mine):
    def log(self, metrics, step): metrics.clear()

class Slow(Mine):
    def log(self, metrics, step):
        import time
        print("asked")
        time.sleep(600)
"""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[None]:
    (tmp_path / "own.py").write_text(OWN)
    with importable(tmp_path):
        yield


@pytest.mark.usefixtures("own")
def test_a_tracker_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(reported(tmp_path, "own:Mine"))
    assert capsys.readouterr().out.splitlines() == [
        "start m False False",
        f"Curves go to own:Mine and {tmp_path / 'metrics.jsonl'}; SwanLab is off (report_to: own:Mine).",
        "log {'loss': 2.0} 1",
        "texts ['Question: q\\n\\nLLM: a'] 2",
        "log {'eval_chrf': 50.0} 2",
        "finish success None",
    ]
    with pytest.raises(Stopped), open_tracker(reported(tmp_path, "own:Mine"), ALONE, 0):
        raise Stopped("SIGTERM")
    said = capsys.readouterr().out.splitlines()
    assert (said[0], said[-1]) == ("start m False True", "finish aborted Stopped: SIGTERM")


@pytest.mark.usefixtures("own")
def test_curves_go_to_no_tracker_that_could_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(reported(tmp_path, "own:Wrong"))
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith("own:Wrong failed (TypeError: Wrong.start() got an unexpected keyword argument 'resumed'")
    assert second == f"Curves go to {tmp_path / 'metrics.jsonl'}; SwanLab is off (report_to: own:Wrong)."


@pytest.mark.usefixtures("own")
def test_a_tracker_that_takes_numbers_out_leaves_them_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(reported(tmp_path, "own:Greedy", "own:Mine"))
    assert "log {'loss': 2.0} 1" in capsys.readouterr().out


@pytest.mark.usefixtures("own")
def test_a_tracker_of_the_users_that_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(reported(tmp_path, "own:Short"))
    metrics = tmp_path / "metrics.jsonl"
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"own:Short failed (ValueError: full at 1 (own.py:10)); {metrics} has every metric.",
        "own:Short has no log_predictions: predictions.jsonl has the answers.",
    ]
    assert len(lines(tmp_path)) == 2


@pytest.mark.usefixtures("own")
def test_a_tracker_of_the_users_that_hangs_is_asked_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "LOG_SECONDS", 0.2)
    trained(reported(tmp_path, "own:Slow"))
    said = capsys.readouterr().out
    assert said.count("asked") == 1
    assert "own:Slow failed (TimeUp: no answer after 0.2 s (own.py:" in said
