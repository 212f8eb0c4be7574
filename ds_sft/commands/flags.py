"""The flags of a command: a mistake in one is one line, with the flag or key that was meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ds_sft.errors import UserError, nearest


class FlagParser(argparse.ArgumentParser):
    """argparse, with `UserError` for what it says in three lines and ends the process with."""

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        super().__init__(prog=f"ds-sft {command}", description=description, epilog=epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    @property
    def flags(self) -> list[str]:
        """Names of the flags, without dashes."""
        return [option[2:] for action in self._actions for option in action.option_strings if option.startswith("--")]

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The flags of a command that takes nothing else; one with a run's keys calls `parse_known_args`.

        Raises:
            UserError: a word that it does not know.
        """
        given, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(f"{unknown[0]}: {self._remedy(unknown[0])}")
        return given

    def _remedy(self, word: str) -> str:
        if not word.startswith("-"):
            return f"one argument too many: {self.format_usage().strip()}"
        near = nearest(word.lstrip("-").partition("=")[0], self.flags)
        return f"unknown flag: {f'did you mean --{near}?' if near else '--help lists all flags'}"

    def error(self, message: str) -> NoReturn:
        """Where argparse ends the process.

        Raises:
            UserError: always.
        """
        raise UserError(" ".join(message.removeprefix("argument ").split()))
