"""The recipes: what their page says of memory and steps is what is planned for the models they name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ds_sft.cli import main
from ds_sft.config.read import load_config
from ds_sft.plan.size import in_units
from ds_sft.ranks.launch import Launch
from ds_sft.training.expectation import expect_memory

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
GIB = 2**30


def qwen3(hidden: int, intermediate: int, layers: int, heads: int, *, tied: bool = False) -> dict[str, Any]:
    """From the keys of the published `config.json`; kv heads, their width and the vocabulary are those of all sizes."""
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": tied,
            "max_position_embeddings": 40960}  # fmt: skip


SHAPES = {
    "Qwen/Qwen3-0.6B": qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen/Qwen3-4B": qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen/Qwen3-8B": qwen3(4096, 12288, 36, 32),
    "Qwen/Qwen3-32B": qwen3(5120, 25600, 64, 64),
}
CLUSTERS = {
    "one_gpu_24gb": ["--gpus-per-node", "1", "--gpu-memory", "24GB"],
    "eight_gpus_80gb": ["--gpus-per-node", "8", "--gpu-memory", "80GB"],
    "two_nodes_slurm": ["--nodes", "2", "--gpus-per-node", "8", "--gpu-memory", "80GB"],
}


def recipe(name: str) -> str:
    return str(ROOT / "ds_configs" / "recipes" / f"{name}.yaml")


def model_of(name: str, folder: Path) -> str:
    """A folder with the `config.json` of the model that a recipe names."""
    shape = SHAPES[load_config(["--config", recipe(name)]).model_name_or_path]
    (folder / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    return str(folder)


def plan(name: str, cluster: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What `ds-sft plan --json` says; whether this machine's disk has room for such checkpoints is not asked."""
    words = ["--model_name_or_path", model_of(name, folder), "--rows", "10000", "--mean-tokens", "400", "--json"]
    main(["plan", recipe(name), *cluster, *words])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert set(found["short"]) <= {"disk"}
    return found


def row(title: str, found: dict[str, Any], memory: str, tokens: int) -> str:
    """A row of the page's table."""
    model, disk = found["model"], found["disk"]
    anchor = title.lower().replace(" ", "-")
    number = f"{model['parameters']:,}"
    trained = f"all {number}" if found["adapter"] == "none" else f"{model['trained']:,} beside {number}"
    return (
        f"| [{title}](#{anchor}) | {trained} | {memory} | {tokens:,} "
        f"| {in_units(disk['checkpoint'])} | {in_units(disk['final_model'])} |"
    )


@pytest.mark.parametrize(
    ("name", "title", "gib", "micro_batches"),
    [
        ("one_gpu_24gb", "one GPU of 24 GB", "22.4", 4),
        ("eight_gpus_80gb", "8 x 80 GB", "74.5", 8),
        ("two_nodes_slurm", "two nodes on Slurm", "74.5", 16),
    ],
)
def test_a_recipe_fits_its_gpu_as_its_page_says(
    name: str, title: str, gib: str, micro_batches: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(name, CLUSTERS[name], tmp_path, capsys)
    asked = next(option for option in found["options"] if option["name"] == found["configured"])
    assert asked["fits"]
    memory = f"{asked['gpu_total'] / GIB:.1f} of {gib} GiB a GPU"
    assert row(title, found, memory, asked["tokens_per_micro_batch"] * micro_batches) in PAGE
    assert f"ds-sft plan ds_configs/recipes/{name}.yaml {' '.join(CLUSTERS[name])}\n" in PAGE


def test_the_laptops_memory_is_what_a_run_plans_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gib = [planned_on_a_cpu(tmp_path, checkpointing) for checkpointing in ("no", "yes")]
    capsys.readouterr()
    found = plan("laptop_lora", ["--gpus-per-node", "1"], tmp_path, capsys)
    assert row("LoRA on a laptop", found, f"{gib[0]:.1f} GiB of the laptop", 4 * 1024) in PAGE
    assert f"With `gradient_checkpointing: yes` it is {gib[1]:.1f} GiB." in PAGE


def planned_on_a_cpu(folder: Path, checkpointing: str) -> float:
    """GiB of a run of the laptop's recipe whose micro batches are full."""
    words = ["--config", recipe("laptop_lora"), "--model_name_or_path", model_of("laptop_lora", folder)]
    config = load_config([*words, "--gradient_checkpointing", checkpointing])
    found = expect_memory(config, None, longest=512, largest=1024, padded=False, ranks=1, on_gpu=False,
                          launch=Launch(launcher="python"))  # fmt: skip
    assert found is not None
    return found.gib


def test_every_recipe_is_on_the_page() -> None:
    names = sorted(path.stem for path in (ROOT / "ds_configs" / "recipes").iterdir())
    assert names == sorted([*CLUSTERS, "laptop_lora"])
    assert [name for name in names if f"](../ds_configs/recipes/{name}.yaml)" not in PAGE] == []


def test_adapters_learn_at_ten_to_twenty_times_the_rate_of_all_weights() -> None:
    """In files that lie side by side; docs/adapters.md has where the factor comes from."""
    configs = [load_config(["--config", recipe(name)]) for name in (*CLUSTERS, "laptop_lora")]
    rates = {kind: {c.training["learning_rate"] for c in configs if c.adapter == kind} for kind in ("none", "lora")}
    assert rates == {"none": {1e-5}, "lora": {2e-4}}
