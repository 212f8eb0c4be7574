"""What a run has left in its output folder, whether it has finished, was stopped, or is still going on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from ds_sft.checkpoints.folder_lock import RUNNING, holder_in_words, parse
from ds_sft.errors import UserError
from ds_sft.ranks.stop import PREEMPTED
from ds_sft.results import RESULTS

METRICS, CONFIG, DATA, PREDICTIONS = "metrics.jsonl", "config.yaml", "data_report.json", "predictions.jsonl"
SCORES = {"exact_match": "exact match", "chrf": "chrF", "rouge_l": "ROUGE-L"}  # of an evaluation -> their names
OF_ALL = ("waiting_share", "padding_share")  # shares that are no part of the time


@dataclass(frozen=True)
class ReportedRun:
    """One run; what it has not left is empty, and named in `missing`."""

    name: str
    entries: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, in the order of the steps
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # split -> what happened to its rows
    predictions: list[dict[str, Any]] = field(default_factory=list)
    state: str = "finished"
    missing: list[str] = field(default_factory=list)  # a line each

    @property
    def step(self) -> int:
        return max((int(entry["step"]) for entry in self.entries), default=self.results.get("steps", 0))

    def values(self, name: str) -> list[float]:
        """What was logged under a name and is a number."""
        return [entry[name] for entry in self.entries if is_number(entry.get(name))]

    def last(self, name: str) -> float | None:
        return next(reversed(self.values(name)), None)

    @property
    def eval_loss(self) -> float | None:
        """Of the model that was exported; of a run that has not finished, the last."""
        best = self.results.get("eval_loss")
        return best if is_number(best) else self.last("eval_loss")

    @property
    def scores(self) -> dict[str, float | None]:
        """What `evaluate_rows` has found of the answers of the model that was exported."""
        found = (self.results.get("evaluation") or {}).get("sources", {}).get("all", {}).get("models", {})
        last = found.get("after", {})
        return {label: (last.get(name) or {}).get("value") for name, label in SCORES.items()}

    @cached_property
    def places(self) -> list[dict[str, float | None]]:
        """Where each entry is on every axis; tokens and hours are those of training, in all starts."""
        tokens, hours, epoch, places = 0.0, 0.0, None, []
        for entry in self.entries:
            if is_number(seconds := entry.get("interval_seconds")):
                tokens += (entry.get("tokens_per_second") or 0.0) * seconds
                hours += seconds / 3600
            epoch = entry.get("epoch", epoch)
            places.append({"step": entry["step"], "epoch": epoch, "tokens": round(tokens), "hours": round(hours, 6)})
        return places

    @cached_property
    def speed(self) -> dict[str, float]:
        """Seconds of training, and rates and shares over them.

        Of all starts of the run, as far as they were logged; of a run of one start `run.json` knows more: what came
        after its last entry.
        """
        told = {name: value for name, value in (self.results.get("speed") or {}).items() if is_number(value)}
        one_start = "tokens" in told and told["tokens"] == self.results.get("tokens")  # of the last, and of all
        return told if one_start else mean_speed(self.entries) or told

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part of training."""
        speed = self.speed
        shares = {name: share for name, share in speed.items() if name.endswith("_share") and name not in OF_ALL}
        return {name.removesuffix("_share"): share * speed["seconds"] for name, share in shares.items()}

    @property
    def memory_gib(self) -> float | None:
        """The most that a rank has had: on a GPU what torch allocated there, else what was resident."""
        peaks = [peak.get("gpu_gib", peak.get("host_gib")) for peak in self.results.get("peak_memory") or []]
        return max([*filter(is_number, peaks), *self.values("peak_memory_gib")], default=None)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether JSON has a number here that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def mean_speed(entries: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Rates and shares over all logged intervals, each as long as it lasted; `seconds` is their sum."""
    timed = [entry for entry in entries if is_number(entry.get("interval_seconds"))]
    seconds = sum(entry["interval_seconds"] for entry in timed)
    names = dict.fromkeys(name for entry in timed for name in entry if name.endswith(("_share", "_per_second", "mfu")))
    if not seconds:
        return {}
    means = {
        name: sum(entry[name] * entry["interval_seconds"] for entry in timed if is_number(entry.get(name))) / seconds
        for name in names
    }
    return {**means, "seconds": seconds}


def read_runs(folders: Sequence[Path]) -> list[ReportedRun]:
    """The runs in these folders, each once; their names are as short as they can be told apart by.

    A name's bytes that are no UTF-8 are replaced, for nothing could show them.

    Raises:
        UserError: a folder has no run in it.
    """
    different = list({folder.resolve(): folder for folder in folders}.items())
    names = short_names([Path(os.fsencode(path).decode(errors="replace")) for path, _ in different])
    return [read_run(folder, name) for (_, folder), name in zip(different, names, strict=True)]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, of all of them one more until no two are alike."""
    for count in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-count:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def read_run(folder: Path, name: str) -> ReportedRun:
    """What is in one output folder.

    Raises:
        UserError: it has no run in it.
    """
    require_run(folder)
    missing: list[str] = []
    results = _read(folder / RESULTS, json.loads, missing)
    run = ReportedRun(
        name,
        entries=sorted(_read_lines(folder / METRICS, missing), key=lambda entry: entry["step"]),
        results=results,
        config=_read(folder / CONFIG, yaml.safe_load, missing),
        data={
            split: told for split, told in _read(folder / DATA, json.loads, missing).items() if isinstance(told, dict)
        },
        predictions=list(_read_lines(folder / PREDICTIONS, missing, needs="question")),
        missing=missing,
    )
    if run.eval_loss is None:
        missing.append("no validation loss was logged (keys eval_file or val_size, and eval_strategy)")
    if (
        run.predictions and not (folder / RESULTS).is_file()
    ):  # a run that goes on takes run.json away, and answers again at its end
        missing.append(f"{PREDICTIONS} has answers of an earlier end of this run")
    if results and not results.get("plan"):
        missing.append(f"{RESULTS} has no plan of the memory")
    return replace(run, state=state_of(folder, results, run.step))


def require_run(folder: Path) -> None:
    """See that a folder is one that a run has written into.

    Raises:
        UserError: it is not; where runs are in folders of it, how to name them.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the output_dir of a run")
    if (folder / METRICS).is_file() or (folder / RESULTS).is_file():
        return
    below = {file.parent.name for name in (METRICS, RESULTS) for file in folder.glob(f"*/{name}")}
    remedy = (
        f"there are {len(below)} in folders of it: write {folder}/*/" if below else "expected the output_dir of one"
    )
    raise UserError(f"{folder}: no run in it ({METRICS} or {RESULTS}); {remedy}")


def state_of(folder: Path, results: Mapping[str, Any], step: int) -> str:
    """How far a run has come, in words."""
    if "identity" in results:  # written last
        return "finished"
    if stopped := parse(_text(folder / PREEMPTED)):
        return f"stopped after step {stopped.get('step', step):,} ({stopped.get('reason')})"
    if (folder / RUNNING).is_file():
        return f"running or killed, after step {step:,} ({holder_in_words(parse(_text(folder / RUNNING)))})"
    if results:
        return f"trained {step:,} steps; not finished: export, verification or predictions did not end well"
    return f"not finished, after step {step:,}"


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _read(file: Path, load: Callable[[str], Any], missing: list[str]) -> dict[str, Any]:
    """A file of keys and values; nothing, and why, where it is not there or is none."""
    if not file.is_file():
        missing.append(f"{file.name} is not there")
        return {}
    try:
        found = load(_text(file))
    except (ValueError, yaml.YAMLError) as error:
        missing.append(f"{file.name} cannot be read: {' '.join(str(error).split())[:120]}")
        return {}
    return found if isinstance(found, dict) else {}


def _read_lines(file: Path, missing: list[str], needs: str = "step") -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file that have a key; a last line that is half written is none yet."""
    if not file.is_file():
        missing.append(f"{file.name} is not there")
        return
    lines = _text(file).split("\n")
    wrong: list[int] = []
    for number, line in enumerate(lines, 1):
        found = parse(line)
        if needs in found and (needs != "step" or is_number(found["step"])):
            yield found
        elif line.strip() and number < len(lines):
            wrong.append(number)
    if wrong:
        missing.append(f"{file.name}:{wrong[0]}: no JSON object with {needs!r}; lines left out: {len(wrong):,}")
