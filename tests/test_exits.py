"""An error is said once for all ranks, and by the one that knows."""

from __future__ import annotations

import pytest

from ds_sft.ranks import exits
from ds_sft.ranks.exits import LOST_PEER, exit_after, exit_with
from ds_sft.ranks.launch import Launch


def test_rank_0_says_an_error_and_others_only_when_it_did_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(exits.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as first:
        exit_with("no such file", Launch(launcher="torchrun", world_size=2))
    assert (first.value.code, slept, capsys.readouterr().err) == (2, [], "ds_sft: error: no such file\n")
    with pytest.raises(SystemExit) as second:
        exit_with("no such file", Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2))
    assert (second.value.code, slept) == (2, [exits.ERROR_GRACE])
    assert capsys.readouterr().err.startswith("ds_sft: error: [rank 1 on ")
    with pytest.raises(SystemExit) as third:  # the launcher was faster
        exit_with("no such file", Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2), told_to_end=True)
    assert (third.value.code, len(slept), capsys.readouterr().err) == (2, 1, "")


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.1]:4821", True),
        ("Timed out waiting 15000ms for recv operation to complete", True),
        ("store->get('0') got error: Connection was likely closed. Did the remote server shutdown or crash?", True),
        ("NCCL error in: x.cpp:94, remote process exited or there was a network error", True),
        ("wait timeout after 15000ms, keys: /default_pg/0//worker_count", True),
        ("NCCL error in: x.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for details)", False),
        ("The server socket has failed to bind to [::]:29500 (errno: 98 - Address already in use).", False),
        ("websocket is not installed", False),
        ("Default process group has not been initialized", False),
    ],
)
def test_what_tells_that_a_peer_is_gone(message: str, lost: bool) -> None:
    assert (LOST_PEER.search(message) is not None) is lost


def test_a_rank_that_lost_the_others_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended: list[int] = []
    waited: list[float] = []
    monkeypatch.setattr(exits.os, "_exit", ended.append)
    monkeypatch.setattr(exits.time, "sleep", waited.append)
    launch = Launch(launcher="torchrun", rank=1, world_size=2)
    exit_after(RuntimeError("Connection closed by peer"), launch)
    said = capsys.readouterr().err
    assert said.endswith("lost the other ranks (Connection closed by peer); the rank that failed first says why\n")
    assert "RuntimeError: Connection closed by peer\n" in said
    assert (ended, waited) == ([1], [exits.LOST_PEER_GRACE])
    exit_after(RuntimeError("Connection closed by peer"), launch, told_to_end=True)  # the launcher was faster
    assert (ended, waited, capsys.readouterr().err) == ([1, 1], [exits.LOST_PEER_GRACE], "")
    exit_after(RuntimeError("a fault"), launch, told_to_end=True)
    assert "RuntimeError: a fault\n" in capsys.readouterr().err
