"""Mixtures of experts: the training that bare PyTorch does, under each engine; ranks that use other experts never wait.

The reference knows nothing of how we compute experts: transformers' own loop over them, in float32, and the load
balancing loss of all tokens of a step at once.
"""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import tests.distributed.listed  # noqa: F401, it registers its model
from ds_sft.model.experts import experts_of
from tests.distributed.harness import run_forked, script, step_losses, write_yaml
from tests.distributed.routed import send_elsewhere
from tests.distributed.test_trajectory import (
    CLIP,
    GLOBAL_BATCH,
    LEARNING_RATE,
    ROWS,
    SYSTEM,
    loss_and_count,
    settings,
)
from tests.test_encode import reference_row

pytestmark = pytest.mark.distributed

STEPS = 2
SMALL = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32,
         "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
         "num_experts_per_tok": 2, "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
          "head_dim": 8}  # fmt: skip
# One layer dense, one of experts: groups of them, and one that every token meets.
GROUPED = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "n_shared_experts": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, **BALANCED},
    "mixtral": {"num_local_experts": 4, **BALANCED, "sliding_window": None},
    "gpt_oss": {"num_local_experts": 4, **BALANCED, "sliding_window": 16},
    "glm4_moe": {"n_routed_experts": 4, **GROUPED},
    "deepseek_v3": {"n_routed_experts": 4, **GROUPED, **LATENT},
}
LISTED: dict[str, Any] = {"listed": {}}  # see listed.py


def make_mixture(family: str, folder: Path, model_dir: Path) -> Path:
    """A tiny model of a family, whose routers have preferences, and its tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **{**SMALL, **{**FAMILIES, **LISTED}[family]})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate.weight" in name or ".router.weight" in name:
                parameter.normal_(std=0.5)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def bare_pytorch(folder: Path, *, elsewhere: bool = False) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of the steps, and the weights after them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").train()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for experts in experts_of(model) if elsewhere else []:
        experts.register_forward_pre_hook(send_elsewhere)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        rows = ROWS[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        total, count = loss_and_count(model, tokenizer, rows)
        loss = total / count + balancing(model, tokenizer, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (STEPS - step) / STEPS
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict()


def balancing(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> Any:
    """The load balancing loss as the model's file defines it, of all tokens at once; 0 where it has none."""
    if not getattr(model.config, "output_router_logits", False):
        return 0
    ids = [reference_row(tokenizer, row["question"], row["answer"], SYSTEM, 512)[0] for row in rows]
    of_rows = [model(torch.tensor([row])).router_logits for row in ids]
    of_layers = tuple(torch.cat([logits.flatten(0, -2) for logits in layer]) for layer in zip(*of_rows, strict=True))
    function = importlib.import_module(type(model).__module__).load_balancing_loss_func
    return model.router_aux_loss_coef * function(of_layers, model.num_experts, model.num_experts_per_tok)


def run_of(source: Path, folder: Path, name: str, micro: int, accumulation: int, **changes: Any) -> dict[str, Any]:
    keys = settings(source, folder, name, micro, accumulation, max_steps=STEPS, eval_strategy="no",
                    export_dtype="float32", **changes)  # fmt: skip
    if name != "none":  # each engine a file of its own, for `settings` writes all to one
        keys["deepspeed"] = f"{name}.json"
        shutil.copy(folder / "engine.json", folder / f"{name}.json")
    return keys


def check(out: Path, losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    seen = step_losses(out)
    found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert found.keys() == weights.keys()
    apart = max(abs(loss / wanted - 1) for loss, wanted in zip(seen, losses, strict=True))
    furthest = max((found[key] - value).abs().max().item() for key, value in weights.items())
    print(f"{out.name}: losses {apart:.1e}, weights {furthest:.1e}")  # pytest -rP shows it
    assert seen == pytest.approx(losses, rel=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=LEARNING_RATE * 2e-2, msg=f"{out}: {key}")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("ranks", [None, 2])
def test_one_trajectory(model_dir: Path, tmp_path: Path, ranks: int | None) -> None:
    """Every family under every engine, with gradient checkpointing and without; one resumed under each engine.

    A step has one micro batch on each rank where there is a load balancing loss, whose gradient is then exact.
    """
    engines = (
        [("none", True)] if ranks is None else [("none", False), ("zero2", True), ("zero3", False), ("zero3", True)]
    )
    sources = {family: make_mixture(family, tmp_path / family, model_dir) for family in FAMILIES}
    wanted = {family: bare_pytorch(source) for family, source in sources.items()}
    runs: dict[str, dict[str, Any]] = {}
    for name, checkpointing in engines:  # those without DeepSpeed first: it leaves its mark on a process
        for family, source in sources.items():
            micro = GLOBAL_BATCH // (ranks or 1) // (1 if "router_aux_loss_coef" in FAMILIES[family] else 2)
            out = f"{family}-{name}-{checkpointing}"
            runs[out] = run_of(source, tmp_path, name, micro, GLOBAL_BATCH // (ranks or 1) // micro, output_dir=out,
                               gradient_checkpointing=checkpointing)  # fmt: skip
        first = f"qwen3_moe-{name}-{checkpointing}"
        runs[first] |= {"save_strategy": "steps", "save_steps": 1}
        runs[f"{first}-resumed"] = runs[first] | {"output_dir": f"{first}-resumed", "resume": f"{first}/checkpoint-1"}
    files = [str(write_yaml(tmp_path / f"{out}.yaml", keys)) for out, keys in runs.items()]
    done = run_forked([script("routed"), *files], ranks, cwd=tmp_path, timeout=1400)
    assert done.code == 0, done.output[-6000:]
    for out in runs:
        check(tmp_path / out, *wanted[out.split("-")[0]])


def test_ranks_that_use_other_experts_never_wait(model_dir: Path, tmp_path: Path) -> None:
    """Each micro batch is a row, which has two experts to itself; the ranks' rows have others in all but a few."""
    tokenizer, rows = AutoTokenizer.from_pretrained(model_dir), ROWS[: STEPS * GLOBAL_BATCH]
    lengths = [len(reference_row(tokenizer, row["question"], row["answer"], SYSTEM, 512)[0]) for row in rows]
    assert sum(one % 4 != other % 4 for one, other in zip(lengths[::2], lengths[1::2], strict=True)) >= 4
    assert all({length % 4 for length in lengths[step * 8 : step * 8 + 8]} == {0, 1, 2, 3} for step in range(STEPS))
    runs, wanted = {}, {}
    for family in ("glm4_moe", "listed"):
        make_mixture(family, tmp_path / family, model_dir)
        wanted[family] = bare_pytorch(tmp_path / family, elsewhere=True)
    for name in ("none", "zero2", "zero3"):  # without DeepSpeed first: it leaves its mark on a process
        for family in wanted:
            source = tmp_path / family
            out = f"elsewhere-{family}-{name}"
            runs[out] = run_of(source, tmp_path, name, 1, 4, output_dir=out, gradient_checkpointing=name != "none")
    files = [str(write_yaml(tmp_path / f"{out}.yaml", keys)) for out, keys in runs.items()]
    done = run_forked([script("routed"), *files], 2, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    assert "ListedBlock is gathered whole (under ZeRO-3 ranks whose tokens choose other" in done.output
    assert done.output.count("Listed experts  those of ListedBlock without tokens have gradients of zeros") == 2
    for out in runs:
        check(tmp_path / out, *wanted[out.split("-")[1]])
