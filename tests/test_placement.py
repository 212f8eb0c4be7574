"""Where a model goes that one process asks: one GPU where it fits, several only where it does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from ds_sft.export.placement import GIB, cache_size, choose_devices, logits_size, place, weights_size


@pytest.mark.parametrize(
    ("needed", "free", "expected"),
    [
        (10, {0: 80, 1: 80}, [0]),  # its own, though another has as much
        (10, {3: 10, 0: 80}, [3]),
        (60, {0: 20, 1: 30, 2: 70}, [2]),  # one that holds it all before several
        (100, {0: 60, 1: 30, 2: 70}, [0, 2]),  # the fewest: its own and the emptiest
        (150, {0: 60, 1: 60, 2: 60}, [0, 1, 2]),
        (170, {0: 60, 1: 60, 2: 60}, []),  # 180 would do if layers could be cut
        (10, {0: 5}, []),
        (0, {0: 0}, [0]),
    ],
)
def test_which_devices(needed: int, free: dict[int, int], expected: list[int]) -> None:
    assert choose_devices(needed, free) == expected


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that there are GPUs; which of them were looked at, in order."""

    def pretend(*free_gib: float, own: int = 0) -> list[int]:
        looked: list[int] = []

        def free(number: int) -> tuple[int, int]:
            looked.append(number)
            return int(free_gib[number] * GIB), 80 * GIB

        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.current_device", lambda: own)
        monkeypatch.setattr("torch.cuda.device_count", lambda: len(free_gib))
        monkeypatch.setattr("torch.cuda.mem_get_info", free)
        return looked

    return pretend


def weights(folder: Path, gib: float) -> str:
    """A folder with files of weights of this size, all hole."""
    folder.mkdir()
    for part in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        with (folder / part).open("wb") as file:
            file.truncate(int(gib * GIB / 2))
    return str(folder)


def test_it_goes_on_the_ranks_own_gpu_and_no_other_is_touched(tmp_path: Path, gpus: Any) -> None:
    looked = gpus(70, 70, 70, own=1)
    found = place(weights(tmp_path / "m", 60), working=8 * GIB, use_cpu=False)
    assert (found.options, found.remark) == ({"device_map": {"": 1}}, None)
    assert looked == [1]


def test_what_does_not_fit_goes_on_several_and_a_line_says_so(tmp_path: Path, gpus: Any) -> None:
    gpus(40, 10, 75)
    name = weights(tmp_path / "m", 80)
    found = place(name, use_cpu=False)
    assert found.options == {"device_map": "auto", "max_memory": {0: 39 * GIB, 2: 74 * GIB}}
    assert found.remark == f"{name} needs 81.0 GiB, cuda:0 has 40.0 GiB free: it is put on cuda:0 and cuda:2."


def test_another_gpu_that_holds_it_alone(tmp_path: Path, gpus: Any) -> None:
    gpus(3, 30)
    name = weights(tmp_path / "m", 8)
    found = place(name, use_cpu=False)
    assert found.options == {"device_map": {"": 1}}
    assert found.remark == f"{name} needs 9.0 GiB, cuda:0 has 3.0 GiB free: it is put on cuda:1."


def test_the_cpu_where_all_together_are_too_small(tmp_path: Path, gpus: Any) -> None:
    name = weights(tmp_path / "m", 80)
    gpus(40, 10)
    found = place(name, use_cpu=False)
    assert found.options == {"device_map": None}
    assert found.remark == (
        f"{name} needs 81.0 GiB, cuda:0 has 40.0 GiB free, all 2 GPUs 50.0 GiB: it runs on the CPU, which is slow."
    )
    gpus(40)
    assert place(name, use_cpu=False).remark == (
        f"{name} needs 81.0 GiB, cuda:0 has 40.0 GiB free: it runs on the CPU, which is slow."
    )


def test_use_cpu_is_obeyed(tmp_path: Path, gpus: Any) -> None:
    looked = gpus(70)
    found = place(weights(tmp_path / "m", 1), use_cpu=True)
    assert (found.options, found.remark, looked) == ({"device_map": None}, None, [])


def test_sizes(model_dir: Path, tmp_path: Path) -> None:
    """2 layers, 2 key heads of 16, 400 tokens; 99,712 parameters in bfloat16."""
    config = AutoConfig.from_pretrained(model_dir)
    assert cache_size(config, tokens=10) == 10 * 2 * 2 * (2 * 16) * 2
    assert logits_size(config, tokens=10) == 10 * 400 * (2 + 4 + 4)
    assert 2 * 99_712 < weights_size(str(model_dir)) < 2 * 99_712 + 10_000
    assert weights_size("nobody/nothing") == 0
    alone = weights_size(str(model_dir))
    both = Path(shutil.copytree(model_dir, tmp_path / "both"))
    shutil.copy(both / "model.safetensors", both / "consolidated.safetensors")  # the same weights for another program
    assert weights_size(str(both)) == alone


def test_one_device_is_what_transformers_understands(model_dir: Path) -> None:
    """The same options, for the one device that is here."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, device_map={"": "cpu"})
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}
