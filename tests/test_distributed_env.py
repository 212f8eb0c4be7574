"""Who a process is, from the launcher's variables."""

from __future__ import annotations

import pytest

from ds_sft.errors import UserError
from ds_sft.runtime import distributed
from ds_sft.runtime.distributed import Launch, exit_with, read_launch, use_one_device

TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}


def test_no_launcher() -> None:
    launch = read_launch({"WORLD": "7"})
    assert launch == Launch(launcher="python", rank=0, local_rank=0, world_size=1, local_world_size=1)
    assert not launch.distributed


def test_launchers() -> None:
    expected = {"rank": 3, "local_rank": 1, "world_size": 4, "local_world_size": 2}
    assert read_launch(TORCHRUN) == Launch(launcher="torchrun", **expected)
    deepspeed = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2", "CROSS_RANK": "1"}
    assert read_launch(deepspeed) == Launch(launcher="deepspeed", **expected)
    by_hand = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    assert read_launch(by_hand) == Launch(launcher="environment")
    assert read_launch(by_hand).distributed
    assert read_launch(by_hand | {"SLURM_PROCID": "0"}) == Launch(launcher="slurm")
    assert read_launch(by_hand | {"SLURM_JOB_ID": "7"}) == Launch(launcher="environment")  # in an allocation, no srun


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "four"}, "RANK='four'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not set"),
        ({"RANK": "4"}, "RANK=4 LOCAL_RANK=1 WORLD_SIZE=4: expected 0 <= LOCAL_RANK <= RANK < WORLD_SIZE"),
        ({"RANK": "0"}, "RANK=0 LOCAL_RANK=1 WORLD_SIZE=4"),
    ],
)
def test_variables_that_contradict(change: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_launch(TORCHRUN | change)


def test_one_gpu_without_a_launcher() -> None:
    for before, after in ((None, "0"), ("2,3", "2"), ("", "")):
        env = {} if before is None else {"CUDA_VISIBLE_DEVICES": before}
        use_one_device(env)
        assert env == {"CUDA_VISIBLE_DEVICES": after}


def test_rank_0_says_an_error_and_others_only_when_it_did_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(distributed.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as first:
        exit_with("no such file", Launch(launcher="torchrun", world_size=2))
    assert (first.value.code, slept, capsys.readouterr().err) == (2, [], "ds_sft: error: no such file\n")
    with pytest.raises(SystemExit) as second:
        exit_with("no such file", Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2))
    assert (second.value.code, slept) == (2, [distributed.ERROR_GRACE])
    assert capsys.readouterr().err.startswith("ds_sft: error: [rank 1 on ")
