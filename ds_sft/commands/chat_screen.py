"""What a conversation looks like: answers as they are written, two of them side by side where there is room."""

from __future__ import annotations

import re
import sys
from io import TextIOWrapper
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ds_sft.data.prompts import AnswerParts

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a model must not do to a terminal
WIDE = 100  # columns of a terminal from which on two answers stand side by side
QUOTES = '"""'


class Alone:
    """Answers alone on standard output, without their reasoning, for scripts; two of them with their names."""

    def __init__(self, out: TextIO, *, labelled: bool) -> None:
        self.out, self.labelled, self.shown = out, labelled, ""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def begin(self, label: str) -> None:
        if self.labelled:
            self._close()
            self.out.write(f"{label}:\n")
        self.shown = ""

    def hear(self, said: AnswerParts) -> None:
        if said.content.startswith(self.shown):
            self.out.write(said.content[len(self.shown) :])
            self.out.flush()
            self.shown = said.content

    def end(self) -> None:
        self._close()
        self.out.flush()

    def _close(self) -> None:
        if self.shown and not self.shown.endswith("\n"):
            self.out.write("\n")


class Stream:
    """Answers on a terminal, one after the other, reasoning dimmed."""

    def __init__(self, console: Console, *, labelled: bool) -> None:
        self.console, self.labelled = console, labelled
        self.said = AnswerParts("", "")

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def begin(self, label: str) -> None:
        self._close()
        if self.labelled:
            self.console.print(Text(f"{label}:", style="bold"))
        self.said = AnswerParts("", "")

    def hear(self, said: AnswerParts) -> None:
        if said.content and not self.said.content and self.said.reasoning:
            self.console.print("\n")
        for style, new, old in (("dim", said.reasoning, self.said.reasoning), ("", said.content, self.said.content)):
            if new.startswith(old) and len(new) > len(old):
                self.console.print(Text(CONTROL.sub("", new[len(old) :]), style=style), end="", soft_wrap=True)
        self.said = said

    def end(self) -> None:
        self._close()
        self.said = AnswerParts("", "")

    def _close(self) -> None:
        if self.said != AnswerParts("", ""):
            self.console.print()


class Columns:
    """Two answers side by side; while they are written as much as the terminal holds."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said: dict[str, AnswerParts] = {}
        self.live: Live | None = None

    def say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"), soft_wrap=True)

    def begin(self, label: str) -> None:
        self.said[label] = AnswerParts("", "")
        if self.live is None:
            self.live = Live(console=self.console, transient=True, get_renderable=self._table)
            self.live.start()

    def hear(self, said: AnswerParts) -> None:
        self.said[list(self.said)[-1]] = said

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.console.print(self._table())
        self.live, self.said = None, {}

    def _table(self) -> Table:
        table = Table(show_lines=False, expand=True)
        for label in self.said:
            table.add_column(Text(label), ratio=1, overflow="fold")
        table.add_row(*map(_as_text, self.said.values()))
        return table


def _as_text(said: AnswerParts) -> Text:
    reasoning = f"{CONTROL.sub('', said.reasoning)}\n\n" if said.reasoning else ""
    return Text.assemble((reasoning, "dim"), CONTROL.sub("", said.content))


def screen_for(console: Console, *, labelled: bool) -> Stream | Columns:
    """How answers are shown on this terminal."""
    return Columns(console) if labelled and console.width >= WIDE else Stream(console, labelled=labelled)


def read_line() -> str:
    r"""What is typed at the prompt: a line, a paste of several, or all between two \"\"\".

    Raises:
        EOFError: Ctrl-D.
        KeyboardInterrupt: Ctrl-C.
    """
    line = input("> ")
    if not line.lstrip().startswith(QUOTES):
        return line
    text = line.lstrip()[len(QUOTES) :]
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + input("... ")
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def edit_lines() -> None:
    """Let lines be edited and called back, and a paste of several lines be one question, where Python has readline.

    Bytes that are not of the terminal's encoding become what `check_text` refuses: no line ends the conversation.
    """
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    try:
        import readline
    except ImportError:
        return
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
