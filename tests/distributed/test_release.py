"""After training the engine's memory is given back, on every rank, whatever the engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.harness import read_lines, run_forked, script, write_yaml
from tests.distributed.test_trajectory import settings

pytestmark = pytest.mark.distributed
# Bytes a parameter while training in bfloat16 on two ranks, at least: weights, gradients where they are kept, masters
# and two states of Adam, whole or by half.
AT_LEAST = {"none": 12, "zero1": 2 + 6, "zero2": 2 + 6, "zero3": 1 + 6, "zero2_offload": 2 + 6, "zero3_offload": 1 + 6,
            "zero2-lora": 2, "zero3-lora": 1}  # fmt: skip


def counted(model_dir: Path, folder: Path, names: list[str], ranks: int | None) -> dict[str, list[float]]:
    """For each engine the bytes a parameter before and after, and the models left, of the rank that has most."""
    for name in names:
        adapter = {"adapter": "lora", "merge": "no"} if name.endswith("-lora") else {}
        keys = settings(model_dir, folder, name.removesuffix("-lora"), 2, 2, max_steps=2, bf16=True,
                        output_dir=f"out-{name}", **adapter)  # fmt: skip
        if "deepspeed" in keys:
            keys["deepspeed"] = str((folder / "engine.json").rename(folder / f"{name}.json"))
        write_yaml(folder / f"{name}.yaml", keys)
    files = [f"{name}.yaml" for name in names]
    done = run_forked([script("freed"), *files], ranks, cwd=folder, env={"FOUND": str(folder / "found")})
    assert done.code == 0, done.output[-6000:]
    found: dict[str, list[float]] = {}
    for rank in range(ranks or 1):
        for row in read_lines(folder / f"found.{rank}"):
            figures = [row["trained"] / row["parameters"], row["left"] / row["parameters"], row["models"]]
            found[row["run"]] = [max(pair) for pair in zip(found.get(row["run"], figures), figures, strict=True)]
    return found


def test_every_engine_gives_its_memory_back(model_dir: Path, tmp_path: Path) -> None:
    """Less than a byte a parameter stays, and no model. All runs are of one process, where leftovers would add up."""
    found = counted(model_dir, tmp_path, list(AT_LEAST), 2)
    assert found.keys() == AT_LEAST.keys()
    for name, (trained, left, models) in found.items():
        assert trained >= AT_LEAST[name], name  # all of it was counted
        assert left < 1, name
        assert models == 0, name


def test_without_a_launcher_too(model_dir: Path, tmp_path: Path) -> None:
    """With the working copy of the weights."""
    ((trained, left, models),) = counted(model_dir, tmp_path, ["none"], None).values()
    assert (trained >= 12, left < 1, models) == (True, True, 0)
