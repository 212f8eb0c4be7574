"""Whatever the ZeRO stage, the ranks and the accumulation: the training that bare PyTorch does, step by step.

The reference knows nothing of Trainer, accelerate or DeepSpeed: a model, a sum of cross-entropies over the supervised
tokens of the global batch divided by their number, `torch.optim.AdamW`, clipping, a linear schedule.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.cpp_extension import _get_build_directory
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_sft.commands.export import main as export
from ds_sft.data.batch import collate_padded
from tests.conftest import write_rows
from tests.distributed.harness import ROOT, read_lines, run_forked, script, step_losses, train, write_yaml
from tests.test_encode import reference_row

pytestmark = pytest.mark.distributed

SYSTEM, GLOBAL_BATCH, STEPS, LEARNING_RATE, CLIP = "Answer.", 8, 4, 1e-3, 0.5
# Very different numbers of supervised tokens in neighbouring rows, so that a mean of means would be far off.
ANSWERS = [
    "Paris.",
    "今天天气很好。" * 20,
    "",
    "Привет, хорошо! " * 6,
    "x",
    "The capital of France is Paris, " * 12,
    "no",
    "да",
]
ROWS = [{"question": f"What is {i}?", "answer": ANSWERS[i % 8] + str(i)[: i % 3]} for i in range(GLOBAL_BATCH * STEPS)]
EVAL = [
    {"question": "Что?", "answer": "Ничего. " * 9},
    {"question": "q", "answer": "a"},
    {"question": "什么", "answer": "好"},
]

# Small models are never partitioned again after their first use unless told so; then a missing rank would not show.
STRICT = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
}


@dataclass(frozen=True)
class Reference:
    losses: list[float]  # of each step, before it
    eval_loss: float  # of the final model
    weights: dict[str, torch.Tensor]
    start: dict[str, torch.Tensor]  # the weights before the first step


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return bare_pytorch(model_dir)


def bare_pytorch(
    model_dir: Path,
    muted: frozenset[int] = frozenset(),
    left_out: int | None = None,
    *,
    choose: Callable[[Any], Any] = lambda model: model,
    dtype: torch.dtype = torch.float32,
) -> Reference:
    """Train on ROWS; those in `muted` teach nothing. One step may be left out: the schedule does not count it.

    `choose` decides what is trained of a model that was loaded in `dtype`; all is computed in float32.
    """
    model = choose(AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)).float().train()
    start = {name: value.clone() for name, value in weights_of(model).items()}
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    losses: list[float] = []
    for step in range(STEPS):
        if step == left_out:
            continue
        numbers = range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        total, count = loss_and_count(model, tokenizer, [ROWS[i] for i in numbers if i not in muted])
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (STEPS - len(losses)) / STEPS
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item() / count)
    with torch.no_grad():
        total, count = loss_and_count(model.eval(), tokenizer, EVAL)
    return Reference(losses, total.item() / count, weights_of(model), start)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """A model's; of one with an adapter what peft would write, DoRA's magnitudes by their whole names."""
    if not isinstance(model, PeftModel):
        found: dict[str, torch.Tensor] = model.state_dict()
        return found
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        found = load_file(Path(folder) / "adapter_model.safetensors")
    return {re.sub("lora_magnitude_vector$", r"\g<0>.weight", name): value for name, value in found.items()}


# What is trained of the tied model: keys of a run, and the same by peft itself, as its documentation has it.
LORA: dict[str, Any] = {"adapter": "lora", "lora_rank": 4, "lora_alpha": 16, "merge": "no"}
PARTS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "dora": {**LORA, "adapter": "dora", "lora_targets": ["q_proj", "v_proj", "down_proj"]},
    "head": {**LORA, "lora_modules_to_save": ["lm_head"]},
    "train_only": {"train_only": ["layers.1.", "model.norm"], "export_dtype": "float32"},
}


def choose_part(part: str, model: Any) -> Any:
    if part == "train_only":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".layers.1." in name or name == "model.norm.weight")
        return model
    torch.manual_seed(42)  # the run's `seed`
    dora = part == "dora"
    asked = LoraConfig(r=4, lora_alpha=16, use_dora=dora, task_type="CAUSAL_LM",
                       target_modules=["q_proj", "v_proj", "down_proj"] if dora else "all-linear",
                       modules_to_save=["lm_head"] if part == "head" else None,
                       ensure_weight_tying=part == "head")  # fmt: skip
    return get_peft_model(model, asked)


@cache
def reference_of(model_dir: Path, part: str, dtype: torch.dtype) -> Reference:
    """In bfloat16 adapters begin with rounded values."""
    return bare_pytorch(model_dir, choose=partial(choose_part, part), dtype=dtype)


def parts_trained(model_dir: Path, folder: Path, name: str, ranks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs that train a part: all parts on two ranks, LoRA on any number; in float32 and, but for stage 0, bfloat16."""
    for part, given in PARTS.items():
        for bf16 in (False, True):
            if (part == "lora" or ranks == 2) and not (bf16 and name == "zero0"):
                out = f"{part}-{'bf16' if bf16 else 'float32'}"
                yield (
                    part,
                    settings(model_dir, folder, name, 2, 4 // ranks, output_dir=out, bf16=bf16, **given),
                )


def loss_and_count(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> tuple[torch.Tensor, int]:
    """Sum of the cross-entropies of supervised tokens, and their number; one row at a time, no padding."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids, labels = reference_row(tokenizer, row["question"], row["answer"], SYSTEM, 512)
        logits = model(torch.tensor([ids])).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(labels[1:]), ignore_index=-100, reduction="sum")
        count += sum(label != -100 for label in labels)
    return total, count


def engine(name: str, folder: Path) -> str | None:
    """The file of a DeepSpeed configuration: a shipped one, one of another stage made from it, or an empty one,
    which is stage 0."""
    if name == "none":
        return None
    source = name if "offload" in name else "zero3" if name == "zero3" else "zero2"
    content = json.loads((ROOT / "ds_configs" / f"{source}.json").read_text(encoding="utf-8"))
    zero = content["zero_optimization"]
    if name == "zero0":
        content = {}
    elif name == "zero1":
        zero["stage"] = 1
    elif zero["stage"] == 3:
        zero |= STRICT
    (folder / "engine.json").write_text(json.dumps(content), encoding="utf-8")
    return "engine.json"


def settings(model_dir: Path, folder: Path, name: str, micro: int, accumulation: int, **changes: Any) -> dict[str, Any]:
    write_rows(folder / "train.jsonl", ROWS)
    write_rows(folder / "eval.jsonl", EVAL)
    return {
        "model_name_or_path": str(model_dir),
        "train_file": "train.jsonl",
        "eval_file": "eval.jsonl",
        "output_dir": "out",
        "system_prompt": SYSTEM,
        "max_length": 512,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "per_device_eval_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "num_train_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": CLIP,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "num_predictions": 0,
        "verify_export": False,
        "report_to": "none",  # SwanLab takes half a second of each run
        **({"deepspeed": engine(name, folder)} if name != "none" else {}),
        **changes,
    }


ENGINES = ["none", "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
SPLITS = [(1, 8), (2, 4), (4, 2), (8, 1)]  # micro batch x accumulation over all ranks: always 8 rows a step

# How far a bfloat16 run may be from the float32 reference. Losses: bfloat16 keeps 8 bits, one rounding is up to
# 2^-9, and the mean over many tokens averages the roundings of their logits, so it stays within one (measured:
# 6e-4). Weights: the length of (trained - reference) over that of (reference - start). Adam gives every weight an
# update of the learning rate's size, so it magnifies the relative error of small gradients. Measured: 0.030, in one
# process without DeepSpeed as under every stage and number of ranks: it is the number format's, not the engine's.
# Twice that is a fault.
BF16_LOSS, BF16_UPDATE = 2**-9, 0.06


@pytest.mark.timeout(1500)  # the first offload case compiles DeepSpeed's CPU Adam
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ENGINES)
def test_one_trajectory(
    model_dir: Path, tmp_path: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, name: str, ranks: int
) -> None:
    """Every split of the batch in float32, one in bfloat16; the last checkpoint exports to the weights of the run.

    Rows are laid end to end; with two in a micro batch padded, with four no more than so many tokens.
    """
    splits = [(micro, rest // ranks) for micro, rest in SPLITS if rest >= ranks]
    layouts: dict[int, dict[str, Any]] = {2: {"batching": "padded"}, 4: {"max_tokens_per_batch": 1000}}
    runs = [settings(model_dir, tmp_path, name, *split, output_dir="{}x{}".format(*split), **layouts.get(split[0], {}))
            for split in splits]  # fmt: skip
    bf16 = name != "zero0"  # which is refused: DeepSpeed keeps no float32 weights there
    last = {
        "bf16": bf16,
        "output_dir": "last",
        "batching": "padding_free",
        "export_dtype": "float32",
        "save_strategy": "epoch",
    }
    runs.append({**runs[-1], **last})
    parts = list(parts_trained(model_dir, tmp_path, name, ranks))
    every = [*runs, *(keys for _, keys in parts)]
    files = [str(write_yaml(tmp_path / f"{number}.yaml", keys)) for number, keys in enumerate(every)]
    stale = (name, ranks) == ("zero2_offload", 2)
    env = {"TORCH_EXTENSIONS_DIR": str(leave_a_lock(tmp_path / "extensions"))} if stale else {}
    launched = None if (name, ranks) == ("none", 1) else ranks
    done = run_forked([script("splits"), *files], launched, cwd=tmp_path, timeout=1400, env=env)
    assert done.code == 0, done.output[-6000:]
    assert ("a build that was killed left it" in done.output) == stale
    for keys in runs[:-1]:
        check(tmp_path / keys["output_dir"], reference, rel=1e-5)
    if bf16:
        check_bf16(tmp_path / "last", reference)
    else:
        check(tmp_path / "last", reference, rel=1e-5)
    for part, keys in parts:
        wanted = reference_of(model_dir, part, torch.bfloat16 if keys["bf16"] else torch.float32)
        (check_bf16 if keys["bf16"] else check)(tmp_path / keys["output_dir"], wanted)
    monkeypatch.chdir(tmp_path)
    assert export(["last/checkpoint-4", "exported"]) == 0
    exported, final = (load_file(tmp_path / folder / "model.safetensors") for folder in ("exported", "last"))
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[key], value) for key, value in final.items())


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
def test_micro_batches_that_tokens_fill(model_dir: Path, tmp_path: Path, name: str) -> None:
    """A long and a short row fill each: the steps are those of two rows a micro batch, padded or not."""
    rows = [{"question": f"What is {10 + i}?", "answer": "x " * (5 if i % 2 else 40 + i)} for i in range(16)]
    changes: list[dict[str, Any]] = [
        {"batching": "padded"},
        {"batching": "padding_free"},
        {"max_tokens_per_batch": 200},
        {"max_tokens_per_batch": 300, "batching": "padded"},
    ]
    files = []
    for number, change in enumerate(changes):
        keys = settings(model_dir, tmp_path, name, 2, 2, output_dir=f"out{number}", **change)
        if number > 1:
            del keys["per_device_train_batch_size"]
        files.append(str(write_yaml(tmp_path / f"{number}.yaml", keys)))
    write_rows(tmp_path / "train.jsonl", rows)
    done = run_forked([script("splits"), *files], 2, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    said = re.findall(r"Batch: .*", done.output)
    assert (
        said[1]
        == "Batch: 2 rows x 2 accumulated x 2 ranks = 8 rows a step; 16 rows => 2 steps an epoch, 2 steps in all."
    )
    assert said[2] == (
        "Batch: at most 200 tokens x 2 accumulated x 2 ranks = 800 tokens a step; 16 rows in 8 micro batches => "
        "2 steps an epoch, 2 steps in all."
    )
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path / "out0", dtype=torch.float32).state_dict()
    for number in range(1, len(changes)):
        assert step_losses(tmp_path / f"out{number}") == pytest.approx(step_losses(tmp_path / "out0"), rel=1e-5)
        weights = AutoModelForCausalLM.from_pretrained(tmp_path / f"out{number}", dtype=torch.float32).state_dict()
        for key, value in wanted.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=LEARNING_RATE * 2e-2, msg=key)


MIXTURE = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
           "num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 1.0}  # fmt: skip


def test_a_mixture_of_experts_has_one_loss_however_it_is_started(model_dir: Path, tmp_path: Path) -> None:
    """That of all rows of a step in one batch, load balancing included, however they are split, under any engine."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", vocab_size=400, **MIXTURE)).train()
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [reference_row(tokenizer, row["question"], row["answer"], SYSTEM, 512) for row in ROWS[: 2 * GLOBAL_BATCH]]
    made = [{"input_ids": ids, "labels": labels} for ids, labels in rows]
    wanted = []
    for start in (0, GLOBAL_BATCH):
        batch = collate_padded(made[start : start + GLOBAL_BATCH], pad_token_id=0)
        del batch["metadata"]
        whole = model(**batch)
        assert whole.aux_loss.item() > 2
        wanted.append(whole.loss.item())
    splits = [("none", 4, 1), ("none", 1, 4), ("zero2", 2, 2), ("zero3", 1, 4)]
    files = []
    for number, (name, micro, accumulation) in enumerate(splits):
        keys = settings(tmp_path / "model", tmp_path, "none", micro, accumulation, output_dir=f"out{number}",
                        learning_rate=0, eval_strategy="no", export_dtype="float32")  # fmt: skip
        keys |= {"deepspeed": str(ROOT / "ds_configs" / f"{name}.json")} if name != "none" else {}
        files.append(str(write_yaml(tmp_path / f"{number}.yaml", keys)))
    write_rows(tmp_path / "train.jsonl", ROWS[: 2 * GLOBAL_BATCH])
    done = run_forked([script("splits"), *files], 2, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    for number in range(len(splits)):
        assert step_losses(tmp_path / f"out{number}") == pytest.approx(wanted, rel=1e-5)


def leave_a_lock(folder: Path) -> Path:
    """As a killed build of DeepSpeed's CPU Adam does; without help the run would wait for it forever.

    In a copy of the folder of builds: from that of all any other run may take the lock away.
    """
    built, locks = _get_build_directory("cpu_adam", verbose=False), shutil.ignore_patterns("lock", ".ninja_lock")
    shutil.copytree(built, folder / "cpu_adam", ignore=locks)
    (folder / "cpu_adam" / "lock").touch()
    return folder


def check_bf16(out: Path, reference: Reference, *, bound: float = BF16_UPDATE) -> None:
    assert step_losses(out) == pytest.approx(reference.losses, rel=BF16_LOSS)
    error = update_error(out, reference)
    print(f"bf16 update of {out.name}: {error:.3f}")
    assert error < bound


def update_error(out: Path, reference: Reference) -> float:
    """How far the weights are from the reference's, of how far these went."""
    start, weights = reference.start, trained_weights(out)
    error = sum((weights[key] - value).square().sum().item() for key, value in reference.weights.items()) ** 0.5
    update = sum((start[key] - value).square().sum().item() for key, value in reference.weights.items()) ** 0.5
    return float(error / update)


def trained_weights(out: Path) -> dict[str, torch.Tensor]:
    """What a run leaves: its adapter, or all weights."""
    if (out / "adapter").is_dir():
        return load_file(out / "adapter" / "adapter_model.safetensors")
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    return weights


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
def test_micro_batches_without_a_supervised_token(model_dir: Path, tmp_path: Path, name: str) -> None:
    """One row a micro batch: rank 1 has nothing to learn in the first step, and neither rank in half of the second."""
    muted = frozenset({1, 3, 5, 7, 8, 9, 10, 11})
    keys = settings(model_dir, tmp_path, name, 1, 4)
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    done = run_forked([script("muted_rows"), *flags], 2, cwd=tmp_path, env={"MUTED": " ".join(map(str, muted))})
    assert done.code == 0, done.output[-6000:]
    check(tmp_path / "out", bare_pytorch(model_dir, muted), rel=1e-5)


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_checkpointing_changes_nothing(
    model_dir: Path, untied_dir: Path, tmp_path: Path, name: str, tied: bool
) -> None:
    """Its own reference for the untied model: the same run without checkpointing."""
    source = model_dir if tied else untied_dir
    outputs = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        folder.mkdir()
        keys = settings(source, folder, name, 2, 2, gradient_checkpointing=checkpointing, max_steps=2)
        done = train("forked", 2, keys, cwd=folder)
        assert done.code == 0, done.output[-6000:]
        outputs.append(folder / "out")
    assert step_losses(outputs[1]) == pytest.approx(step_losses(outputs[0]), rel=1e-6)
    plain, other = (AutoModelForCausalLM.from_pretrained(out).state_dict() for out in outputs)
    for key, value in plain.items():
        torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-6, msg=key)


@pytest.fixture(scope="module")
def untied_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tied model's twin with an output matrix of its own."""
    folder = tmp_path_factory.mktemp("untied")
    model = AutoModelForCausalLM.from_pretrained(model_dir, tie_word_embeddings=False)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def check(out: Path, reference: Reference, *, rel: float = 1e-5) -> None:
    """Losses, weights and validation loss of a run against the reference's."""
    assert step_losses(out) == pytest.approx(reference.losses, rel=rel)
    evaluated = [row["eval_loss"] for row in read_lines(out / "metrics.jsonl") if "eval_loss" in row]
    assert evaluated[-1] == pytest.approx(reference.eval_loss, rel=rel)
    weights = trained_weights(out)
    assert weights.keys() == reference.weights.keys()
    for key, value in reference.weights.items():
        # Adam divides by the root of a squared gradient: where that is almost nothing, rounding is magnified.
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=LEARNING_RATE * 2e-2, msg=key)
