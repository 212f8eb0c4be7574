"""What is wrong with a row that cannot be used."""

from __future__ import annotations


class BadRow(ValueError):
    """A row that cannot be used. `reason` is a fixed phrase to count by, the text says what was found."""

    def __init__(self, reason: str, text: str) -> None:
        # What a row holds must not break the line, nor command the terminal.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.reason, str(self))  # rows travel between processes
