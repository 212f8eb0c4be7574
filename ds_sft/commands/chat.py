r"""`ds-sft chat FOLDER`: talk to a model in the terminal, with the prompts that training taught it.

    ds-sft chat output                                   # a run's output folder, its adapter, or a checkpoint
    ds-sft chat output --beside                          # beside the model that training started from
    ds-sft chat output --once "What is ZeRO?"            # one answer
    git diff | ds-sft chat output                        # all that comes by a pipe is one question
    ds-sft chat output --predict_max_new_tokens 200 --generation '{do_sample: true, temperature: 0.7}'

FOLDER: the output folder of a run, its folder adapter, one of its checkpoints of any ZeRO stage (exported on the way,
into a folder that is removed afterwards), a folder of `ds-sft export`, or any other model's folder or hub id. What a
run trained is asked with its keys, template, system prompt and end of turn; another model with its own chat template.
The keys of a run are flags that win over those of the run. With --once or a pipe, standard output has the answer alone,
without reasoning; all else is on standard error.

In the terminal: /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the conversation.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, TextIO

from ds_sft.commands.flags import FlagParser
from ds_sft.commands.opened import keys_alone
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from ds_sft.commands.chat_answer import Speaker
    from ds_sft.commands.opened import Opened

FIRST = "Ctrl-C again, or Ctrl-D, ends the conversation."


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    parser = FlagParser("chat", __doc__)
    parser.add_argument("folder", metavar="FOLDER", help="what to talk to")
    parser.add_argument("--beside", nargs="?", const="", metavar="MODEL",
                        help="also ask this model; without a name: the one that training started from")  # fmt: skip
    parser.add_argument("--once", metavar="QUESTION", help="print one answer and end")
    given, words = parser.parse_known_args(argv)
    keys_alone(words, parser.flags)  # a mistake is said before anybody types, or a pipe is read
    question = _question(given.once)
    with ExitStack() as stack:
        with redirect_stdout(sys.stderr):
            speakers = _load(stack, given.folder, given.beside, words, parser.flags)
        if question is None:
            return _talk(speakers)
        return _answer(speakers, question)


def _question(once: str | None) -> str | None:
    """The one question to answer; None where there is somebody to talk to.

    Raises:
        UserError: nothing is asked, and nobody is there.
    """
    if once is not None and not once.strip():
        raise UserError("--once: expected a question")
    stdin: TextIO | None = sys.stdin  # None where it is closed
    if once is not None or (stdin and stdin.isatty()):
        return once
    try:
        text = stdin.read().strip() if stdin else ""
    except UnicodeDecodeError:
        raise UserError("not asked: the question is not UTF-8 text") from None
    if not text:
        raise UserError("standard input is no terminal, and has no question: give --once QUESTION, or a pipe with one")
    return text


# ---- Models


def _load(
    stack: ExitStack, folder: str, beside: str | None, words: Sequence[str], flags: Sequence[str]
) -> list[Speaker]:
    from ds_sft.commands.opened import open_model

    launch = Launch(launcher="python")
    with _loading(folder):
        opened = stack.enter_context(open_model(folder, words, launch, flags=flags))
        first = _speaker(folder, opened)
    if beside is None:
        return [first]
    name = beside or _base(opened)
    with _loading(name):
        other = stack.enter_context(open_model(name, words, launch, flags=flags))
        return [first, _beside(name, opened, other, launch)]


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Say what is loaded, on a terminal, and nothing else: libraries have bars and remarks of their own."""
    from rich.console import Console

    with Console(stderr=True).status(f"Loading {name} ..."), warnings.catch_warnings():
        from transformers.utils import logging

        had_bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            if had_bars:
                logging.enable_progress_bar()


def _speaker(label: str, opened: Opened) -> Speaker:
    """As its run taught it; another model reasons where its template lets it, as with any server."""
    from ds_sft.commands.chat_answer import Speaker

    return Speaker(label, opened, opened.path, reasoning=None if opened.trained else True)


def _base(opened: Opened) -> str:
    """What training started from.

    Raises:
        UserError: nothing says it.
    """
    from pathlib import Path

    from ds_sft.model.adapter_files import find_base
    from ds_sft.plan.adapter import is_adapter

    if is_adapter(Path(opened.path)):
        return find_base(Path(opened.path))
    if not opened.trained:
        raise UserError(f"--beside: {opened.name} is no run's, so nothing says what it was trained from: name a model")
    return opened.config.model_name_or_path


def _beside(name: str, first: Opened, other: Opened, launch: Launch) -> Speaker:
    """The second model, with the first one's prompts unless a run taught it its own, or its tokens are others."""
    from ds_sft.commands.chat_answer import Speaker

    label = name if name != first.name else f"{name} (again)"
    if other.trained:
        launch.say(f"{name} is asked as its own run taught it.")
    elif other.tokenizer.get_vocab() == first.tokenizer.get_vocab():
        return Speaker(label, first, other.path, reasoning=None if first.trained else True)
    else:
        launch.say(f"{name} has other tokens than {first.name}: it is asked with its own chat template.")
    return _speaker(label, other)


# ---- Talking


def _answer(speakers: Sequence[Speaker], question: str) -> int:
    """One answer on standard output; whoever reads it may leave before its end."""
    from ds_sft.commands.chat_screen import Alone
    from ds_sft.commands.chat_session import Chat

    chat = Chat(speakers, Alone(sys.stdout, labelled=len(speakers) > 1))
    try:
        answers = chat.ask(question)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python would flush what is left
        return 0
    if any(answer.ended == "stopped" for answer in answers):
        raise KeyboardInterrupt
    return 0


def _talk(speakers: Sequence[Speaker]) -> int:
    """Until Ctrl-D, or Ctrl-C twice at the prompt."""
    from rich.console import Console

    from ds_sft.commands.chat_screen import edit_lines, read_line, screen_for
    from ds_sft.commands.chat_session import Chat

    screen = screen_for(Console(highlight=False, markup=False, emoji=False), labelled=len(speakers) > 1)
    chat = Chat(speakers, screen)
    edit_lines()
    screen.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends the conversation.")
    interrupted = False
    while not chat.ended:
        try:
            line = read_line()
            interrupted = False
            chat.do(line)
        except UserError as error:
            screen.say(str(error))
        except EOFError:
            print()
            chat.exit()
        except KeyboardInterrupt:
            print()
            if interrupted:
                chat.exit()
            else:
                screen.say(FIRST)
            interrupted = True
    return 0
