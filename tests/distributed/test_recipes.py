"""Each recipe trains, as it is: only the model, the rows and the folder are others, and a CPU takes a GPU's place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import make_model, write_rows
from tests.distributed.harness import ROOT, TRAIN, read_lines, run_forked
from tests.families import QWEN

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def given(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that has a chat template, and 150 rows of 117 tokens."""
    folder = tmp_path_factory.mktemp("recipes")
    make_model(folder / "model", tokenizer_dir)
    (folder / "model" / "chat_template.jinja").write_text(QWEN, encoding="utf-8")
    answer = "The capital of France is Paris. " * 8
    write_rows(folder / "rows.jsonl", [{"question": f"What is {i}?", "answer": answer} for i in range(150)])
    return folder


@pytest.mark.parametrize(
    ("name", "ranks", "stage", "steps", "adapter"),
    [
        ("one_gpu_24gb", None, None, 2, "lora"),  # an epoch of 17,000 tokens is one step, and there are two
        ("eight_gpus_80gb", 2, 2, 2, None),
        ("two_nodes_slurm", 2, 3, 4, None),
        ("laptop_lora", None, None, 5, "lora"),
    ],
)
def test_a_recipe_trains_as_it_is(
    name: str, ranks: int | None, stage: int | None, steps: int, adapter: str | None, given: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    others = {"model_name_or_path": given / "model", "train_file": given / "rows.jsonl", "output_dir": output}
    flags = [word for key, value in others.items() for word in (f"--{key}", str(value))]
    recipe = f"ds_configs/recipes/{name}.yaml"
    done = run_forked([TRAIN, "--config", recipe, *flags, "--use_cpu", "yes"], ranks, cwd=ROOT)
    assert done.code == 0, done.output
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (run["zero_stage"], run["steps"], run["export"]["verified"]) == (stage, steps, True)
    assert (run["adapter"] or {}).get("kind") == adapter
    assert 0 < run["eval_loss"] <= run["eval_loss_first"]
    assert len(read_lines(output / "predictions.jsonl")) == 3
