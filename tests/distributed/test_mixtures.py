"""Mixtures of experts leave the files that they were published in, whoever writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ds_sft.commands.export import main as export
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import run_forked, script, write_yaml
from tests.distributed.test_trajectory import settings
from tests.mixtures import FAMILIES, make_mixture

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1500)]

ENGINES = ["none", "zero2", "zero3"]


@pytest.fixture(scope="module")
def folder(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each family under each engine that learns nothing: out-FAMILY-ENGINE."""
    folder = tmp_path_factory.mktemp("mixtures")
    files = []
    for family in FAMILIES:
        model = make_mixture(folder / family, family, tokenizer_dir)
        for name in ENGINES:
            (folder / name).mkdir(exist_ok=True)
            nothing = {"learning_rate": 0, "max_steps": 1, "eval_strategy": "no", "export_dtype": "bfloat16"}
            saved = {"output_dir": f"out-{family}-{name}", "save_strategy": "steps", "save_steps": 1}
            keys = settings(model, folder, name, 1, 1, **nothing, **saved)
            keys |= {"deepspeed": engine_of(folder, name)} if name != "none" else {}
            files.append(str(write_yaml(folder / f"{family}-{name}.yaml", keys)))
    write_rows(folder / "train.jsonl", questions_and_answers(8))
    done = run_forked([script("splits"), *files], 2, cwd=folder)
    assert done.code == 0, done.output[-6000:]
    return folder


def engine_of(folder: Path, name: str) -> str:
    """`settings` writes every engine into one file."""
    (folder / "engine.json").rename(folder / f"{name}.json")
    return f"{name}.json"


def assert_as_published(out: Path, published: Path) -> None:
    found, wanted = (load_file(path / "model.safetensors") for path in (out, published))
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in wanted.items()}
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_learns_nothing_is_as_published(folder: Path, tmp_path: Path, family: str, name: str) -> None:
    """The model at the end of a run, and what `ds-sft export` makes of its checkpoint."""
    run = folder / f"out-{family}-{name}"
    assert_as_published(run, folder / family)
    assert export([str(run / "checkpoint-1"), str(tmp_path / "out")]) == 0
    assert_as_published(tmp_path / "out", folder / family)
