"""What happened to the rows of a file: how many were read, left out and why, and which fields nobody reads."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MAX_BAD_ROWS_SHOWN = 20
MAX_FIELDS = 100  # names of fields that are counted; rows may bring names without end
OTHER_FIELDS = "(others)"


@dataclass
class Counts:
    """What happened to the rows of a block or a file."""

    rows_read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows
    dropped_tokens: int = 0  # of rows left out because of their length
    dropped_supervised: int = 0
    rows_split: int = 0
    bad_rows: int = 0  # of those dropped, the ones that were no usable dialogue
    messages: list[str] = field(default_factory=list)  # the first bad rows: "LINE: what is wrong"
    lost: list[str] = field(default_factory=list)  # the first rows left out because of their length, likewise
    unread: dict[str, list[int]] = field(default_factory=dict)  # field nobody reads -> rows that have it, the first
    left_out: dict[str, list[int]] = field(default_factory=dict)  # likewise: what the template leaves out

    def add(self, other: Counts) -> None:
        self.rows_read += other.rows_read
        self.dropped = dict(Counter(self.dropped) + Counter(other.dropped))
        self.dropped_tokens += other.dropped_tokens
        self.dropped_supervised += other.dropped_supervised
        self.rows_split += other.rows_split
        self.bad_rows += other.bad_rows
        self.messages = (self.messages + other.messages)[:MAX_BAD_ROWS_SHOWN]
        self.lost = (self.lost + other.lost)[:MAX_BAD_ROWS_SHOWN]
        for mine, others in ((self.unread, other.unread), (self.left_out, other.left_out)):
            for name, (rows, first) in others.items():
                count_field(mine, name, rows, first)


def count_field(counts: dict[str, list[int]], name: str, rows: int, first: int) -> None:
    """Add to the rows that a field was found in; of too many names the last ones are counted together."""
    if name not in counts and len(counts) >= MAX_FIELDS:
        name = OTHER_FIELDS
    known = counts.setdefault(name, [0, first])
    known[:] = known[0] + rows, min(known[1], first)
