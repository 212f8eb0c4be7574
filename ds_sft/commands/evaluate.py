"""`ds-sft evaluate FOLDER --data FILE...`: how good a model's answers are, and how much better than before.

    ds-sft evaluate output                                       # the run's own validation rows
    ds-sft evaluate output --data test.jsonl --limit 200
    ds-sft evaluate --compare output-a output-b --data test.jsonl
    torchrun --nproc_per_node 8 -m ds_sft evaluate output --data test.jsonl     # the same numbers, sooner

FOLDER is a run's output folder, one of its checkpoints, an adapter, or any other model.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.commands.flags import FlagParser
from ds_sft.config.keys import RECORD
from ds_sft.config.read import given_twice
from ds_sft.errors import RunError, UserError
from ds_sft.ranks.devices import grow_segments, hide_gpus, share_cores
from ds_sft.ranks.exits import exit_after, exit_with
from ds_sft.ranks.launch import Launch, print_line, read_launch

if TYPE_CHECKING:
    from ds_sft.commands.opened import Opened
    from ds_sft.evaluation.session import Prepared

FILE = "evaluate.json"  # in a run's folder; the answers beside it, which are not those of `evaluate_rows`
INSTEAD = "--loss-only for the loss alone"


def main(argv: Sequence[str]) -> int:
    """Evaluate, as one process or as one of several ranks."""
    launch = Launch(launcher="python")
    try:
        launch = read_launch()
        evaluate_command(argv, launch)
    except UserError as error:
        exit_with(str(error), launch)
    except RunError as error:
        exit_with(str(error), launch, code=1)
    except Exception as error:
        if not launch.distributed:
            raise
        exit_after(error, launch)
    return 0


def evaluate_command(argv: Sequence[str], launch: Launch) -> None:
    """Find the models and the rows, measure, and show."""
    given, words = flags_and_keys(argv)
    for remark in given_twice(argv):
        launch.say(remark)
    share_cores(launch, os.environ)
    grow_segments(os.environ)
    from transformers.utils.logging import disable_progress_bar

    from ds_sft.evaluation.report import print_tables
    from ds_sft.evaluation.scores import require_metrics
    from ds_sft.evaluation.session import common_places, evaluate
    from ds_sft.ranks.work import open_work
    from ds_sft.results import versions, write_json

    disable_progress_bar()  # of loading: every rank would show one
    if not given.loss_only:
        require_metrics(INSTEAD)
    answers = None if given.loss_only or given.out is None else given.out.with_suffix(".jsonl")
    if given.out is None:
        launch.say("Nothing will be written: --out FILE.json keeps the numbers, and the answers beside it.")
    work = open_work(launch, "evaluate")  # at once: what follows takes one rank longer than another
    with open_subjects(given, words, launch) as prepared:
        require_own_files(given.out, answers, [file.name for one in prepared for file in one.measured.files])
        places = common_places(prepared, given.limit, launch)
        described = evaluate(prepared, places, work, loss_only=given.loss_only, answers=answers)
    if described is None:
        return
    print_tables(described)
    if given.out is not None:
        write_json(given.out, described | {"versions": versions()})
        print_line(f"Wrote {given.out}{f' and {answers}' if answers else ''}.")


# ---- Flags


def flags_and_keys(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our own flags, and the keys that are left for the configuration.

    Raises:
        UserError: a mistake in one.
    """
    words = list(argv)
    folder = words.pop(0) if words and not words[0].startswith("-") else None
    given, keys = make_parser().parse_known_args(words)
    given.folder = folder
    if (folder is None) == (given.compare is None):
        raise UserError("expected ds-sft evaluate FOLDER, or --compare A B; --help says more")
    if given.compare and given.compare[0] == given.compare[1]:
        raise UserError(f"--compare: {given.compare[0]} is given twice: there is nothing to compare")
    if given.limit is not None and given.limit < 1:
        raise UserError(f"--limit: expected a number of rows, 1 or more, found {given.limit}")
    given.out = given.out or place_in_run(folder)
    if given.out is not None and (given.out.suffix != ".json" or not os.access(given.out.parent, os.W_OK)):
        raise UserError(f"--out: expected FILE.json in a folder that can be written, found {given.out}")
    if given.out is not None and not given.loss_only:
        require_answers(given.out.with_suffix(".jsonl"))
    return given, [*keys, *(data_words(given.data) if given.data else [])]


def place_in_run(name: str | None) -> Path | None:
    """Where the numbers go without --out: into what a run of ours has left, be it a checkpoint; else nowhere."""
    if name is None or not (folder := Path(name).expanduser()).is_dir():
        return None
    left_by_run = any((place / RECORD).is_file() for place in (folder, folder.resolve().parent))
    return folder / FILE if left_by_run else None


def require_answers(path: Path) -> None:
    """See that what is at the place of the answers, which nobody has named, is an earlier evaluation's.

    Raises:
        UserError: it is not, and would be lost.
    """
    from ds_sft.evaluation.session import has_answers

    if path.exists() and not has_answers(path):
        raise UserError(f"--out: the answers would replace {path}, which has none of ours: name another FILE.json")


def require_own_files(out: Path | None, answers: Path | None, measured: Sequence[str]) -> None:
    """See that the numbers and the answers are not written over the rows.

    Raises:
        UserError: they would be.
    """
    for path in filter(None, (out, answers)):
        if any(Path(name).exists() and path.exists() and path.samefile(name) for name in measured):
            raise UserError(f"--out: {path} has the rows that are measured: name another FILE.json")


def make_parser() -> FlagParser:
    parser = FlagParser(
        "evaluate",
        "Measure a model on rows of data: loss and perplexity, and of its answers exact match, chrF and ROUGE-L,\n"
        "with the model that training began with beside it.",
        "Any key of a run may follow: --predict_max_new_tokens 200, --system_prompt TEXT, --use_cpu yes.\n"
        "On several ranks: torchrun --nproc_per_node 8 -m ds_sft evaluate FOLDER ...",
    )
    parser.usage = "ds-sft evaluate FOLDER | --compare A B [--data FILE ...] [--limit N] [--out FILE.json] [...]"
    parser.add_argument("--data", nargs="+", metavar="FILE", help="rows, as for train_file [the run's validation rows]")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="two models, on the same rows")
    parser.add_argument("--limit", type=int, metavar="N", help="so many rows, drawn from all of them")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="where numbers go, and answers beside it as "
                        f"FILE.jsonl [of a run {FILE} in FOLDER, else nowhere]")  # fmt: skip
    parser.add_argument("--no-before", action="store_true", help="not the model that training began with")
    parser.add_argument("--loss-only", action="store_true", help="ask for no answers")
    return parser


def data_words(files: Sequence[Any]) -> list[str]:
    """Files as the key of a run that names what is measured."""
    value = str(files[0]) if len(files) == 1 and isinstance(files[0], str) else f"[ {json.dumps(list(files))[1:]}"
    return ["--eval_file", value, "--val_size", "0"]


# ---- Models


@contextmanager
def open_subjects(given: argparse.Namespace, words: Sequence[str], launch: Launch) -> Iterator[list[Prepared]]:
    """The models in the order in which they are shown, with their rows.

    Raises:
        UserError: a model is not there, or there are no rows.
    """
    from ds_sft.commands.opened import open_model
    from ds_sft.evaluation.measure import Subject

    flags = make_parser().flags
    with ExitStack() as stack:
        if given.compare is None:
            refuse_checkpoint(given.folder, launch)
            opened = stack.enter_context(open_model(given.folder, words, launch, flags=flags))
            use_device(opened, launch)
            yield with_base(opened, base_name(opened, launch) if not given.no_before else None, launch)
            return
        prepared: list[Prepared] = []
        for name in given.compare:
            refuse_checkpoint(name, launch)
            opened = stack.enter_context(open_model(name, words, launch, flags=flags))
            use_device(opened, launch)
            if not given.data and opened.config.eval_file is None:
                raise UserError(f"--compare: {name} has no eval_file: name rows with --data FILE that neither learned")
            if not given.data and not prepared:
                known = opened.config.eval_file
                words = [*words, *data_words(known if isinstance(known, list) else [known])]
            prepared.append(prepare_opened(opened, Subject(name, opened.path, opened.config, opened.tokenizer), launch))
        say_differences(prepared, launch)
        yield prepared


def refuse_checkpoint(name: str, launch: Launch) -> None:
    """Of a checkpoint every rank would export a copy of its own."""
    from ds_sft.commands.opened import STATE

    if launch.world_size > 1 and (Path(name).expanduser() / STATE).is_file():
        raise UserError(f"{name} is a checkpoint: on several ranks export it first: ds-sft export {name} FOLDER")


def use_device(opened: Opened, launch: Launch) -> None:
    """This rank's GPU, or none."""
    if opened.config.training.get("use_cpu"):
        hide_gpus(os.environ)
        return
    import torch

    if launch.distributed and torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank % torch.cuda.device_count())


def base_name(opened: Opened, launch: Launch) -> str | None:
    """The model that training began with; None where nobody tells, or where it is gone, which is said."""
    from ds_sft.model.adapter_files import find_base
    from ds_sft.plan.adapter import is_adapter
    from ds_sft.plan.source import require_model

    adapter = is_adapter(Path(opened.path))
    name = find_base(Path(opened.path)) if adapter else opened.config.model_name_or_path if opened.trained else None
    if name is None or name == opened.path:
        return None
    try:
        require_model(name)
    except UserError as error:
        launch.say(f"Without the model before training: {error}")
        return None
    return name


def with_base(opened: Opened, base: str | None, launch: Launch) -> list[Prepared]:
    """A model alone, or its base and it, asked the same questions."""
    from ds_sft.evaluation.measure import Subject

    name = opened.name if base is None else "after"
    after = prepare_opened(opened, Subject(name, opened.path, opened.config, opened.tokenizer), launch)
    if base is None:
        return [after]
    return [replace(after, subject=replace(after.subject, name="before", path=base)), after]


def prepare_opened(opened: Opened, subject: Any, launch: Launch) -> Prepared:
    """A model and its rows, and what is said of them.

    Raises:
        UserError: no rows are named, or they cannot be used.
    """
    from ds_sft.data.dataset import load_measured, print_report
    from ds_sft.evaluation.session import prepare

    measured = load_measured(opened.config, opened.tokenizer, launch, key="--data")
    if measured is None:
        raise UserError(f"{opened.name}: no validation rows are known of it (eval_file, val_size): write --data FILE")
    print_report(measured.report, launch)
    if opened.config.eval_file is None:
        say_other_rows(opened, measured.data, launch)
    if any(file.weight != 1 for file in measured.files):
        launch.say("Weights are for learning: every row is measured once.")
    return prepare(subject, measured, launch)


def say_other_rows(opened: Opened, rows: Any, launch: Launch) -> None:
    """Whether what `val_size` sets aside now is what the run has set aside: else the run may have learned of it."""
    from ds_sft.checkpoints.identity import EVAL_DATA
    from ds_sft.data.rows import fingerprint
    from ds_sft.plan.adapter import read_json
    from ds_sft.results import RESULTS

    folder = Path(opened.name).expanduser()
    record = next((path for path in (folder / RESULTS, folder.resolve().parent / RESULTS) if path.is_file()), None)
    known = read_json(record).get("identity", {}).get(EVAL_DATA) if record and launch.is_main else None
    if known and known != fingerprint(rows):
        launch.say(
            f"{opened.name} has set other validation rows aside: train_file or a key has changed since, and it may "
            "have learned rows that are measured. --data FILE names others."
        )


def say_differences(prepared: Sequence[Prepared], launch: Launch) -> None:
    """What two models are asked with where it is not the same."""
    first, second = (one.subject.config for one in prepared)
    keys = ("template", "system_prompt", "thinking", "max_length")
    apart = [key for key in keys if getattr(first, key) != getattr(second, key)]
    if prepared[0].subject.tokenizer.get_vocab() != prepared[1].subject.tokenizer.get_vocab():
        apart.append("tokenizer")
    if apart:
        launch.say(f"Each is asked as it was taught: {', '.join(apart)} differ.")
