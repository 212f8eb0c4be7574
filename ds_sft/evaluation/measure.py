"""Measure a model on dialogues: its loss on each, its answer to each, and how good that is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any, TypeVar

import numpy as np

from ds_sft.config.keys import Config
from ds_sft.config.values import SAMPLING
from ds_sft.data.bad_row import BadRow
from ds_sft.data.dataset import Measured, read_rows
from ds_sft.data.encode import Encoder
from ds_sft.data.rows import views_of
from ds_sft.errors import UserError
from ds_sft.evaluation.bootstrap import Floats
from ds_sft.evaluation.loss import loss_batches, row_losses
from ds_sft.evaluation.progress import progress
from ds_sft.evaluation.scores import THOUGHT, score
from ds_sft.export.placement import is_out_of_memory
from ds_sft.export.predict import answer_batch, load_to_answer
from ds_sft.model.limits import positions_left
from ds_sft.ranks.work import Work

MAX_ROWS = 32  # answered together
MAX_TOKENS = 32_768  # of prompts and answers together, unless one row has more
MIN_BATCHES = 8  # where there are as many rows: for the ranks, and for the bar
PROMPT_END = 16  # tokens of a prompt that may have `<think>` and white space at its end
CHRF_STATISTICS = 18
R = TypeVar("R")
Place = tuple[str, int]  # FILE, line


@dataclass(frozen=True)
class Subject:
    """A model that is measured, and how it is asked: as it was taught."""

    name: str  # in tables and files
    path: str  # of its files: a folder, of an adapter's too, or a hub id
    config: Config
    tokenizer: Any


@dataclass(frozen=True)
class Item:
    """A dialogue of the data, as a subject sees it."""

    place: Place
    question: str
    reference: str
    prompt: list[int]  # empty where it is not asked: a template cannot render what is before the last answer
    rows: list[int]  # numbers of its rows in the data; several where it was cut between turns


@dataclass
class Result:
    """What was found of one dialogue."""

    loss: float = 0.0  # sum of the cross-entropy
    tokens: int = 0  # supervised
    answer: dict[str, Any] | None = None  # text, tokens, cut, exact_match, rouge_l, chrf, statistics

    def numbers(self) -> list[float]:
        """The columns of `bootstrap.metric`."""
        found = self.answer
        if found is None:
            return [self.loss, self.tokens, 0, 0, 0, *[0] * CHRF_STATISTICS]
        return [self.loss, self.tokens, 1, found["exact_match"], found["rouge_l"], *found["statistics"]]


def numbers_of(results: Sequence[Result]) -> Floats:
    """[dialogues, columns]"""
    return np.array([result.numbers() for result in results])


# ---- What is asked


def places_of(measured: Measured) -> dict[Place, list[int]]:
    """FILE and line of each dialogue, in order, and the numbers of its rows."""
    found: dict[Place, list[int]] = {}
    for number, row in enumerate(measured.rows):
        found.setdefault((measured.files[row["file"]].name, int(row["row"])), []).append(number)
    return found


def sample_places(places: Sequence[Place], limit: int | None, seed: int) -> list[Place]:
    """All, or so many of them drawn from everywhere, in order; a seed's draw is the same."""
    if limit is None or limit >= len(places):
        return list(places)
    drawn = np.random.default_rng(seed).choice(len(places), limit, replace=False)
    return [places[i] for i in sorted(drawn.tolist())]


def read_items(subject: Subject, measured: Measured, chosen: Sequence[Place]) -> list[Item]:
    """The chosen dialogues, read again from their files; `measured`: of the subject."""
    places, encoder = places_of(measured), Encoder(subject.tokenizer, subject.config)
    first = measured.rows[[places[place][0] for place in chosen]]
    dialogues = read_rows(first, measured.files, subject.config, len(first))
    if len(dialogues) < len(chosen):
        raise UserError("the data have changed since they were encoded, or cannot be read now: start again")
    return [
        Item(place, dialogue.question, dialogue.answer, _prompt(encoder, dialogue), places[place])
        for place, dialogue in zip(chosen, dialogues, strict=True)
    ]


def asked_alike(items: dict[str, list[Item]]) -> dict[str, list[Item]]:
    """Items of several subjects, without the prompts of those that not all of them can be asked: answers are compared
    row by row."""
    asked = [all(item.prompt for item in same) for same in zip(*items.values(), strict=True)]
    return {
        name: [item if ask else replace(item, prompt=[]) for ask, item in zip(asked, own, strict=True)]
        for name, own in items.items()
    }


def _prompt(encoder: Encoder, dialogue: Any) -> list[int]:
    try:
        return encoder.prompt(dialogue)
    except BadRow:  # an answer that the template rewrites, and that nobody learned
        return []


# ---- Measuring


def measure(
    subject: Subject,
    items: Sequence[Item],
    measured: Measured,
    work: Work,
    *,
    answers: bool,
    hear: Callable[[Item, dict[str, Any]], None] = lambda item, answer: None,
) -> list[Result]:
    """What the subject's loss and answers are, on rank 0, item by item; elsewhere nothing. All ranks must call it.

    Args:
        measured: the rows that the items count.
        hear: gets every answer on rank 0 as soon as it is there.

    Raises:
        UserError: a single row finds no memory.
    """
    subject = replace(subject, config=greedy(subject.config))
    longest = max((len(item.prompt) for item in items), default=1)
    model = load_to_answer(subject.path, subject.tokenizer, subject.config, prompt=max(1, longest))
    results = [Result() for _ in items]
    _measure_losses(model, subject, items, measured, work, results)
    if answers:
        _ask(model, subject, items, work, results, hear)
    del model
    _free_memory()
    return results


def greedy(config: Config) -> Config:
    """The configuration without sampling, so that the numbers come again, on any number of ranks."""
    kept = {k: v for k, v in (config.generation or {}).items() if k not in (*SAMPLING, "do_sample")}
    return replace(config, generation=kept or None)


def _measure_losses(
    model: Any, subject: Subject, items: Sequence[Item], measured: Measured, work: Work, results: list[Result]
) -> None:
    rows, owners = views_of(measured.data), [i for i, item in enumerate(items) for _ in item.rows]
    numbers = [number for item in items for number in item.rows]
    stats = measured.rows[numbers]
    vocab = model.config.get_text_config().vocab_size
    losses: dict[int, Sequence[float]] = {}  # row -> sum of its loss, supervised tokens
    batches = loss_batches(stats["tokens"].tolist(), stats["supervised"].tolist(), vocab)

    def compute(batch: Sequence[int]) -> list[tuple[float, int]]:
        return row_losses(model, [rows[numbers[i]] for i in batch], subject.tokenizer.pad_token_id)

    def refuse(row: int) -> str:
        file, line = items[owners[row]].place
        return f"{file}:{line}: no memory for the loss of its {stats['tokens'][row]:,} tokens: write a lower max_length"

    with progress(f"Loss ({subject.name})", len(numbers), work.launch) as shown:

        def hear(batch: int, found: list[Sequence[float]]) -> None:
            losses.update(zip(batches[batch], found, strict=True))
            shown.advance(len(found))

        work.share(f"loss {subject.name}", len(batches), lambda n: in_parts(compute, batches[n], refuse), hear)
    for row in sorted(losses):  # in one order, whoever was first: sums of floats are not the same in another
        results[owners[row]].loss += losses[row][0]
        results[owners[row]].tokens += int(losses[row][1])


def _ask(
    model: Any,
    subject: Subject,
    items: Sequence[Item],
    work: Work,
    results: list[Result],
    told: Callable[[Item, dict[str, Any]], None],
) -> None:
    """Let the model answer every item that has a prompt."""
    config = subject.config
    most, left = config.predict_max_new_tokens or config.max_length, positions_left(model)
    prompts = [item.prompt for item in items]
    batches = answer_batches([len(p) for p in prompts], most, left, alike=counts_padding(model, config))

    def answer(batch: Sequence[int]) -> list[dict[str, Any]]:
        found = answer_batch(model, [prompts[i] for i in batch], subject.tokenizer, config)
        opened = [opens_reasoning(prompts[i], subject.tokenizer) for i in batch]
        scores = [score(one.text, items[i].reference, opened=o) for i, o, one in zip(batch, opened, found, strict=True)]
        return [asdict(one) | asdict(scored) for one, scored in zip(found, scores, strict=True)]

    def refuse(item: int) -> str:
        file, line = items[item].place
        return (
            f"{file}:{line}: no memory to answer its {len(prompts[item]):,} tokens with up to {most:,} more: write a "
            "lower predict_max_new_tokens"
        )

    with progress(f"Answers ({subject.name})", sum(map(len, batches)), work.launch) as shown:

        def hear(batch: int, found: list[dict[str, Any]]) -> None:
            for i, one in zip(batches[batch], found, strict=True):
                results[i].answer = one
                told(items[i], one)
            shown.advance(len(found))

        work.share(f"answers {subject.name}", len(batches), lambda n: in_parts(answer, batches[n], refuse), hear)


def opens_reasoning(prompt: Sequence[int], tokenizer: Any) -> bool:
    """Whether an answer to this prompt begins within reasoning; marks that are special tokens are in no answer."""
    text: str = tokenizer.decode(prompt[-PROMPT_END:], skip_special_tokens=True)
    return text.rstrip().endswith(THOUGHT)


def counts_padding(model: Any, config: Config) -> bool:
    """Whether how much a prompt is padded decides its answer: to this processor padding is a part of the prompt.

    (In transformers 5.23; `repetition_penalty` there leaves padding out.)
    """
    own = model.generation_config.no_repeat_ngram_size
    return bool((config.generation or {}).get("no_repeat_ngram_size", own))


def answer_batches(lengths: Sequence[int], most: int, left: int | None, *, alike: bool) -> list[list[int]]:
    """Which prompts are answered together: of about one length, the longest first; the same on any number of ranks.

    Those of a batch have room for equally many tokens, so no answer depends on the others of its batch.

    Args:
        lengths: tokens of each prompt; one of none is not answered.
        most: tokens of an answer.
        left: tokens that a prompt and its answer may have together.
        alike: prompts of a batch have one length.
    """
    order = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    size = min(MAX_ROWS, ceil(len(order) / MIN_BATCHES))
    batches: list[list[int]] = []
    kind: tuple[int, int] = (0, 0)
    most_rows = 0
    for i in order:
        length = lengths[i] if left is None else min(lengths[i], left - 1)
        room = most if left is None else min(most, left - length)
        own = (room, length if alike else 0)
        if not batches or own != kind or len(batches[-1]) == most_rows:
            batches.append([])
            kind, most_rows = own, max(1, min(size, MAX_TOKENS // (length + room)))
        batches[-1].append(i)
    return batches


def in_parts(do: Callable[[Sequence[int]], list[R]], items: Sequence[int], refuse: Callable[[int], str]) -> list[R]:
    """`do(items)`; in halves where memory is too small for all.

    Args:
        refuse: what is said where it is too small for one.

    Raises:
        UserError: it is.
    """
    try:
        return do(items)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        if len(items) == 1:
            raise UserError(refuse(items[0])) from error
    _free_memory()  # what the error held is gone with it
    middle = len(items) // 2
    return [*in_parts(do, items[:middle], refuse), *in_parts(do, items[middle:], refuse)]


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
