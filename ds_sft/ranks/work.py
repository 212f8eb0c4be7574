"""Work in pieces for several ranks: each takes the next piece when it is done with one, and rank 0 hears of all.

Through a store that all ranks reach, without a process group: pieces differ in what they last, so nobody meets anybody
before the end. What is found does not depend on who found it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.network import Unreachable, connect, patience

POLL_SECONDS = 0.1


class Work:
    """The ranks of a launch, or this process alone."""

    def __init__(self, launch: Launch, store: Any = None) -> None:
        """`store`: torch.distributed's, None for one rank."""
        self.launch, self.store = launch, store

    def share(self, name: str, pieces: int, do: Callable[[int], Any], hear: Callable[[int, Any], None]) -> None:
        """Do pieces 0, 1, ... between the ranks; every rank calls it, with the same name and number.

        Args:
            name: used once.
            do: a piece, on any rank; what it returns must be JSON.
            hear: what it returned, on rank 0 alone, in any order.
        """
        if self.store is None:
            for piece in range(pieces):
                hear(piece, do(piece))
            return
        heard = 0
        while (piece := self.store.add(f"{name}-taken", 1) - 1) < pieces:
            found = json.dumps([piece, do(piece)])
            self.store.set(f"{name}-{self.store.add(f'{name}-done', 1)}", found)
            heard = self._hear(name, heard, hear)
        while self.launch.is_main and heard < pieces:
            time.sleep(POLL_SECONDS)
            heard = self._hear(name, heard, hear)

    def _hear(self, name: str, heard: int, hear: Callable[[int, Any], None]) -> int:
        """Hear what has been done since; how many pieces are heard then. Nothing but on rank 0."""
        while self.launch.is_main and self.store.check([f"{name}-{heard + 1}"]):
            heard += 1
            hear(*json.loads(self.store.get(f"{name}-{heard}")))
            self.store.delete_key(f"{name}-{heard}")
        return heard

    def end(self) -> None:
        """Wait until rank 0 has heard everything; it goes last, for it may keep the store."""
        if self.store is None:
            return
        if not self.launch.is_main:
            while not self.store.check(["end"]):
                time.sleep(POLL_SECONDS)
            self.store.add("gone", 1)
            return
        self.store.set("end", "1")
        deadline = time.monotonic() + patience()
        while self.store.add("gone", 0) < self.launch.world_size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def open_work(launch: Launch, purpose: str) -> Work:
    """The work of a launch; all ranks must call it.

    Raises:
        UserError: ranks do not reach each other.
    """
    if launch.world_size == 1:
        return Work(launch)
    try:
        # torchrun's store outlives ranks that it starts again, with what the first ones took of the pieces.
        return Work(launch, connect(launch, f"{purpose}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}").store)
    except Unreachable as error:
        raise UserError(f"{error}: {error.remedy}") from None
