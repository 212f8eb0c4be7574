"""`ds-sft preview CONFIG`: the exact tokens a model will see, and which of them are learned.

In the terminal learned tokens are green, special tokens bold. `--html FILE` writes a page that needs nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ds_sft.commands.prepare import read_run_config
from ds_sft.commands.preview_tokens import Shown, Token, left_out_in_words, sequence_title, sequences_of, shown_of
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from rich.text import Text

USAGE = """usage: ds-sft preview CONFIG.yaml [--rows 1-3,10] [--split eval] [--batch] [--html FILE] [--key value ...]

Shows rows as the model will see them: every token, learned ones green, special ones bold; without colors ⟦learned⟧.
With an adapter or train_only also which weights are trained, and the size of a checkpoint.

  --rows 1-3,10   numbers of rows in the data set, from 1 [1-5]
  --split eval    rows of the validation set [train]
  --batch         the batch that these rows make: end to end, padded or packed; several where tokens fill them
  --html FILE     write a page instead: tokens with their ids, lengths, what was dropped and why

Any key of the configuration may follow: --max_length 1024 shows what it would cost."""
OPEN, CLOSE = "⟦", "⟧"
COUNTS = ("limit", "n", "num", "num_rows", "head")  # how other commands would ask for the first rows
OPTIONS = {"rows": "1-5", "split": "train", "html": None}


def main(argv: Sequence[str]) -> int:
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE)
        raise SystemExit(0)
    options, words = take_options(argv)
    config, launch = read_run_config(words, "preview", [*OPTIONS, "batch"]), Launch(launcher="python")
    from ds_sft.data.dataset import load_data
    from ds_sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config, launch)
    data = load_data(config, tokenizer, launch)
    split = str(options["split"])
    if split not in data.rows:
        raise UserError(f"--split {split}: expected one of {', '.join(data.rows)}")
    rows = data.train if split == "train" or data.eval is None else data.eval
    numbers = row_numbers(str(options["rows"]), len(rows))
    titles = [data.where(split, number) for number in numbers]
    if options["batch"]:
        shown = batch_of(rows.select(numbers), config, tokenizer, launch)
    else:
        shown = [
            shown_of(f"row {n + 1} · {title}", rows[n]["input_ids"], rows[n]["labels"], tokenizer)
            for n, title in zip(numbers, titles, strict=True)
        ]
    if options["html"]:
        from ds_sft.commands.page import write_page
        from ds_sft.commands.preview_page import preview_html

        path = Path(str(options["html"]))
        write_page(path, preview_html(config, data.report, data.rows, shown), "--html")
        print(f"Wrote {path}: open it in a browser.")
    else:
        print_sequences(shown, launch, data.report)
    if config.adapter != "none" or config.train_only:
        say_trained(config, tokenizer, launch)
    return 0


def say_trained(config: Config, tokenizer: Any, launch: Launch) -> None:
    """What a run would train, chosen in the model itself, without its weights, and the size of a checkpoint.

    Raises:
        UserError: a key names nothing in this model.
    """
    from ds_sft.checkpoints.space import export_size, predict_size
    from ds_sft.checkpoints.storage import Site
    from ds_sft.engine.zero import configured_engine, stage
    from ds_sft.model.adapters import choose_weights
    from ds_sft.model.embeddings import make_room
    from ds_sft.model.parts import Parts
    from ds_sft.model.quantized import skeleton
    from ds_sft.plan.optimizer import state_bytes
    from ds_sft.plan.size import in_units

    engine, site = configured_engine(config), Site(launch, shared=True)
    model = skeleton(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    make_room(model, tokenizer, config)
    adapter, trained = choose_weights(model, config, _arguments(config, engine), launch)
    launch.say(str(Parts(adapter=adapter, trained=trained)))
    wanted = config if config.merge == "no" else replace(config, merge="yes")
    sizes = predict_size(model, stage(engine), site, kept=state_bytes(wanted)), export_size(model, wanted, site)
    under = "without DeepSpeed" if engine is None else f"under ZeRO-{stage(engine)}"
    launch.say(f"A checkpoint takes about {in_units(sizes[0])} {under}, the final weights {in_units(sizes[1])}.")


def _arguments(config: Config, engine: dict[str, Any] | None) -> Any:
    """What the choice of weights reads of TrainingArguments, which would look for devices."""
    training = config.training
    return SimpleNamespace(
        seed=training.get("seed", 42),
        deepspeed=engine,
        bf16=bool(training.get("bf16")),
        fp16=bool(training.get("fp16")),
        activation_checkpointing_kwargs=training.get("activation_checkpointing_kwargs"),
    )


def take_options(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Our own options, and the words that are left for the configuration."""
    options: dict[str, Any] = {**OPTIONS, "batch": False}
    left: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if word == "--batch":
            options["batch"] = True
        elif word.startswith("--") and name in OPTIONS:
            if not equals and not words:
                raise UserError(f"--{name}: expected a value after it")
            options[name] = value if equals else words.pop(0)
        elif word.startswith("--") and name in COUNTS:
            raise UserError(f"--{name}: preview shows rows by their numbers: write --rows 1-3 for the first three")
        else:
            left.append(word)
    return options, left


def row_numbers(text: str, num_rows: int) -> list[int]:
    """`1-3,10` -> [0, 1, 2, 9], as far as there are rows.

    Raises:
        UserError: not numbers, or none of them is there.
    """
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or int(first) < 1:
            raise UserError(f"--rows {text}: expected numbers from 1, such as 1-3,10")
        numbers += range(int(first) - 1, min(int(last or first), num_rows))
    if not (numbers := [number for number in numbers if number < num_rows]):
        raise UserError(f"--rows {text}: there are {num_rows:,} rows")
    return numbers


def batch_of(rows: Any, config: Config, tokenizer: Any, launch: Launch) -> list[Shown]:
    """The batch that a rank would make of these rows, whatever their number; several where tokens fill them."""
    from ds_sft.data.loader import dataset_and_collator
    from ds_sft.data.micro_batches import Batching
    from ds_sft.data.rows import lengths_of
    from ds_sft.model.padding_free_support import uses_padding

    padded = uses_padding(config, launch)
    in_batches, collate = dataset_and_collator(rows, config, tokenizer, launch, padded=padded)
    batching = Batching(lengths=lengths_of(in_batches), micro_batch=None if config.fills_batches else len(in_batches),
                        accumulation=1, ranks=1, padded=padded, seed=int(config.training.get("seed", 42)),
                        order="sequential", max_tokens=config.max_tokens_per_batch)  # fmt: skip
    batching.check(1)
    epoch = batching.epoch(0)
    batches = [epoch.micro_batch(number) for number in range(len(epoch.computed))]
    return [
        shown
        for number, batch in enumerate(batches)
        for shown in sequences_of(
            collate([in_batches[i] for i in batch]), tokenizer, f" {number + 1}" if len(batches) > 1 else ""
        )
    ]


def print_sequences(sequences: Sequence[Shown], launch: Launch, report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from ds_sft.data.report import print_report

    console = Console(highlight=False)
    if console.color_system is None:  # a pipe, a file, NO_COLOR
        console.print(f"Learned tokens are between {OPEN} and {CLOSE}.")
    else:
        console.print(
            "Learned tokens are [bold green]green[/], special tokens [bold magenta]bold[/], padding is [dim]dim[/]."
        )
    for sequence in sequences:
        console.print(Text(f"\n── {sequence_title(sequence)}", style="bold cyan"), soft_wrap=True)
        console.print(_as_text(sequence, plain=console.color_system is None), soft_wrap=True)
    print_report(report, launch)


def _as_text(sequence: Shown, *, plain: bool) -> Text:
    """Tokens in their styles; `plain`: with marks around what is learned, where no style is seen."""
    from rich.text import Text

    text, before = Text(), False
    for token in sequence.tokens:
        if plain and before and (token.starts_row or not token.learned):
            text.append(CLOSE)
            before = False
        if token.left_out:
            text.append(f"\n{left_out_in_words(token)}\n", style="dim")
        if token.starts_row and text:
            text.append("\n⎯⎯ next row, position 0 ⎯⎯\n", style="dim")
        if plain and token.learned and not before:
            text.append(OPEN)
        text.append(_shown(token), style=_style(token))
        before = token.learned
    return text.append(CLOSE) if plain and before else text


def _shown(token: Token) -> str:
    return visible(token.text if token.special else token.text.replace("\n", "↵\n"))


def visible(text: str) -> str:
    """Characters that would command the terminal, or turn the direction of a line, by their codes; joiners stay."""
    return "".join(c if c.isprintable() or c in "\n\t\u200c\u200d" else repr(c)[1:-1] for c in text)


def _style(token: Token) -> str:
    if token.padding:
        return "dim"
    color = "green" if token.learned else "default"
    return f"bold {'green reverse' if token.learned else 'magenta'}" if token.special else color
