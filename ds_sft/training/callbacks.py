"""The user's callbacks: `callbacks: [my.module:Thing]`, each a `TrainerCallback`, made with the arguments it is given.

A callback that is an `ExportableState` as well goes on where the checkpoint left it: `restore_states`. The arguments
are always the run's own, so that a resumed run can have others.

What one wants of `control` on one rank, all ranks do: `StepBoundary` in resumable.py lets them agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl
from transformers.trainer_callback import ExportableState

from ds_sft.config.extension import callbacks_of, load, require_call, require_method, said
from ds_sft.config.keys import Config
from ds_sft.errors import UserError

KEY = "callbacks"
# What a callback may want: Trainer then has collectives, or none of them on this rank alone.
WANTED = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")
ENDS = WANTED[:2]  # what Trainer obeys in the middle of a step, too
EVENTS = [name for name in vars(TrainerCallback) if name.startswith("on_")]
# What Trainer hands to each of them by name, and to some beside: a method takes what it wants, and **kwargs.
HANDED = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
BESIDE = {"on_log": ("logs",), "on_evaluate": ("metrics",), "on_predict": ("metrics",)}


def make_callbacks(config: Config) -> list[TrainerCallback]:
    """The callbacks of a run, in order.

    Raises:
        UserError: one cannot be had or made, is none, or lacks keys that it needs.
    """
    made = [_make(name, options, config) for name, options in callbacks_of(config)]
    several = Counter(type(callback).__name__ for callback in made if isinstance(callback, ExportableState))
    for name, number in several.items():
        if number > 1:  # checkpoints know them by the names of their classes
            raise UserError(f"{KEY}: {number} with a state are called {name}: a checkpoint knows one of a name")
    return made


def _make(name: str, options: Mapping[str, Any], config: Config) -> TrainerCallback:
    kind = load(name, KEY)
    require_call(kind, name, KEY, keywords=options)
    try:
        made = kind(**options)
    except Exception as error:
        raise UserError(f"{KEY}: {name}: making it ends in {said(error)}") from error
    if not isinstance(made, TrainerCallback):
        raise UserError(f"{KEY}: {name}: expected a transformers.TrainerCallback, found {type(made).__name__}")
    for event in EVENTS:
        handed = dict.fromkeys((*HANDED, *BESIDE.get(event, ())))
        require_method(made, f"{name}.{event}", KEY, "args", "state", "control", keywords=handed)
    if isinstance(made, ExportableState):
        _require_state(name, made)
    if isinstance(made, EarlyStoppingCallback):
        _require_measure(name, config)
    return made


def _require_state(name: str, made: ExportableState) -> None:
    """A checkpoint keeps the state of a callback: what this is shows at the first save, which may be hours away."""
    try:
        state = made.state()
    except Exception as error:
        raise UserError(f"{KEY}: {name}.state() ends in {said(error)}") from error
    if not (isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in ("args", "attributes"))):
        expected = 'expected {"args": {...}, "attributes": {...}}'
        raise UserError(f"{KEY}: {name}.state() returned {' '.join(repr(state).split())[:80]}: {expected}")


def _require_measure(name: str, config: Config) -> None:
    """What stops early has to be measured."""
    keys = config.training
    if keys.get("eval_strategy", "no") == "no":
        raise UserError(f"{KEY}: {name}: nothing is evaluated: write eval_file (or val_size)")
    if not (keys.get("metric_for_best_model") or keys.get("load_best_model_at_end")):
        raise UserError(f"{KEY}: {name}: by which number? write metric_for_best_model: loss too")


def restore_states(callbacks: Iterable[Any], saved: dict[str, Any]) -> None:
    """Give the callbacks with a state what a checkpoint has of them, and let `saved`, by name, have that of all.

    Trainer's own way (`restore_callback_states_from_checkpoint`) makes each anew with the old arguments, behind all
    others; and a callback that the checkpoint does not know ends its next save in a KeyError.
    """
    for callback in callbacks:
        if isinstance(callback, ExportableState):
            name = type(callback).__name__
            vars(callback).update(saved.get(name, {}).get("attributes", {}))
            saved[name] = callback.state()


def has_own(callbacks: Iterable[Any]) -> bool:
    """Whether any is of the user's: who knows whether it wants the same on all ranks."""
    return any(not type(callback).__module__.startswith(("ds_sft.", "transformers.")) for callback in callbacks)


def wants(control: TrainerControl) -> list[bool]:
    return [getattr(control, name) for name in WANTED]


def want(control: TrainerControl, wanted: Sequence[bool]) -> None:
    vars(control).update(zip(WANTED, wanted, strict=True))
