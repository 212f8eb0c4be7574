"""An evaluation from models to numbers: the same rows for all of them, and every answer on the disk as it comes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from ds_sft.config.keys import Config
from ds_sft.data.dataset import Data, Measured
from ds_sft.errors import UserError
from ds_sft.evaluation.measure import Item, Place, Subject, asked_alike, measure, places_of, read_items, sample_places
from ds_sft.evaluation.report import answer_line, evaluation_numbers, write_answers
from ds_sft.model.adapter_files import exported, find_base
from ds_sft.model.limits import check_limits
from ds_sft.plan.adapter import is_adapter
from ds_sft.ranks.launch import Launch, print_line
from ds_sft.ranks.work import Work

ANSWERS = "evaluation.jsonl"  # of a run


@dataclass(frozen=True)
class Prepared:
    """A model, and the rows it is measured on."""

    subject: Subject
    measured: Measured


def prepare(subject: Subject, measured: Measured, launch: Launch) -> Prepared:
    """See that the model has room for the rows.

    Raises:
        UserError: it has not.
    """
    path = Path(subject.path)
    name = find_base(path) if is_adapter(path) else subject.path
    data = Data(measured.data, None, measured.report, [], {"train": measured.rows}, {"train": measured.files})
    check_limits(replace(subject.config, model_name_or_path=name), subject.tokenizer, data, launch)
    return Prepared(subject, measured)


def common_places(prepared: Sequence[Prepared], limit: int | None, launch: Launch) -> list[Place]:
    """The dialogues that all models have rows of, or `limit` of them.

    Raises:
        UserError: there is none.
    """
    known = [places_of(one.measured) for one in prepared]
    common = [place for place in known[0] if all(place in others for others in known)]
    left_out = len(set().union(*known)) - len(common)
    if not common:
        raise UserError("--data: no row that both models have room for (max_length)")
    if left_out:
        launch.say(f"{left_out:,} rows are left out: not all models have room for them (max_length).")
    return sample_places(common, limit, seed_of(prepared[0].subject.config))


def seed_of(config: Config) -> int:
    return int(config.training.get("seed", 42))


def evaluate(
    prepared: Sequence[Prepared], chosen: Sequence[Place], work: Work, *, loss_only: bool, answers: Path | None
) -> dict[str, Any] | None:
    """Measure the models one after the other, the last first; `evaluation_numbers`, on rank 0. All ranks must call it.

    Args:
        chosen: the dialogues, see `common_places`.
        loss_only: nobody is asked for answers.
        answers: the file of the answers, written while they come and in the end in the order of the data. None: they
            are scored, and kept nowhere.
    """
    items = asked_alike({one.subject.name: read_items(one.subject, one.measured, chosen) for one in prepared})
    _say_unanswered(items[prepared[0].subject.name], work.launch)
    found = {}
    with open_answers(answers if work.launch.is_main else None) as file:
        for one in reversed(prepared):
            name = one.subject.name
            if not loss_only and (one.subject.config.generation or {}).get("do_sample"):
                work.launch.say(f"{name}: greedy answers, so that numbers come again; generation says do_sample.")

            def keep(item: Item, answer: dict[str, Any], name: str = name) -> None:
                if file is not None:
                    file.write(answer_line(name, item, answer))
                    file.flush()

            found[name] = measure(one.subject, items[name], one.measured, work, answers=not loss_only, hear=keep)
    work.end()
    if not work.launch.is_main:
        return None
    subjects = [one.subject for one in prepared]
    if answers is not None:
        write_answers(answers, subjects, items, found)
    return evaluation_numbers(subjects, items[subjects[0].name], found, seed_of(subjects[0].config))


def evaluate_run(config: Config, data: Data, tokenizer: Any) -> dict[str, Any] | None:
    """`evaluation_numbers` of a run's exported model and, under `predict_before`, of the one it began with.

    By this process alone, on `evaluate_rows` of the validation rows; None where the run has none.
    """
    if data.eval is None:
        return None
    measured = Measured(data.eval, data.rows["eval"], data.files["eval"], data.report)
    paths = {"before": config.model_name_or_path} if config.predict_before else {}
    paths["after"] = str(exported(config.output_dir))
    prepared = [Prepared(Subject(name, path, config, tokenizer), measured) for name, path in paths.items()]
    chosen = sample_places(list(places_of(measured)), config.evaluate_rows, seed_of(config))
    return evaluate(
        prepared, chosen, Work(Launch(launcher="python")), loss_only=False, answers=config.output_dir / ANSWERS
    )


def _say_unanswered(items: Sequence[Item], launch: Launch) -> None:
    places = [item.place for item in items if not item.prompt]
    if places:
        file, line = places[0]
        why = "the template cannot render their prompt"
        launch.say(f"{len(places):,} rows are not asked: {why}; the first is {file}:{line}.")


def has_answers(path: Path) -> bool:
    """Whether a file begins with an answer of an evaluation, or has nothing that could be lost."""
    try:
        with path.open(encoding="utf-8") as file:
            line = file.readline()
        return not line or {"model", "source", "prediction"} <= set(json.loads(line))
    except (OSError, ValueError, TypeError):
        return False


@contextmanager
def open_answers(path: Path | None) -> Iterator[TextIO | None]:
    """The file of the answers; one that is interrupted keeps those it has, and says so.

    Raises:
        UserError: it cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: {path}: cannot be written: {error.strerror}") from None
    with file:
        try:
            yield file
        except KeyboardInterrupt:
            print_line(f"\n{path} has the answers so far.")
            raise
