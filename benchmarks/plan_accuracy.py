"""Is `ds-sft plan` right? Train real models through `train.py` and compare each rank's memory with the plan.

    python benchmarks/plan_accuracy.py                    # those of docs/plan.md and some more: half an hour, 13 GiB
    python benchmarks/plan_accuracy.py --full             # all models x layouts x ranks x checkpointing: a day, 56 GiB
    python benchmarks/plan_accuracy.py --only zero3 --only 2r --results results.jsonl   # cases with both words

On a machine with GPUs it measures `torch.cuda.max_memory_allocated` instead, with as many GPUs as a case has ranks
(not tried where this was written: there was no GPU). On a CPU it measures anonymous resident memory above what the
process had before the model was loaded, with glibc told to return freed blocks at once (plan_worker.py). Offloaded
memory counts as well there, for on a CPU it is the same memory. Under DistributedDataParallel glibc has one arena: each
of gloo's threads would keep what it freed, 20 to 110 MiB in all. (Under ZeRO-3 one arena is worse: the small partitions
then pin what loading freed, 370 MiB of 135 M parameters.)

Weights are random: what is measured depends on shapes alone. Every row is as long as max_length. Finished cases are
kept in --results and not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from ds_sft.config.keys import TRAINING_DEFAULTS, Config  # noqa: E402
from ds_sft.plan.layouts import run_of, shipped_engine  # noqa: E402
from ds_sft.plan.memory import model_states, peak  # noqa: E402
from ds_sft.plan.shape import read_shape  # noqa: E402

MIB = 2**20
# Modules imported and threads started after the baseline, the same for a model of any size: what the cases `nothing`
# take, a model of 70,000 parameters.
RUNTIME = {"none": 35 * MIB}
DEEPSPEED_RUNTIME = 18 * MIB
ADAPTER_RUNTIME = {"none": 9 * MIB}  # the same of adapters, on top
ADAPTER_DEEPSPEED_RUNTIME = 8 * MIB
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "head_dim", "vocab_size", "tie_word_embeddings")  # fmt: skip
MODELS: dict[str, tuple[str, tuple[int, ...]]] = {  # name -> family, SIZES
    "nothing": ("qwen3", (64, 128, 1, 2, 1, 32, 320, True)),
    "qwen3-10m": ("qwen3", (256, 768, 8, 8, 4, 32, 16384, True)),
    "llama-5m-wide": ("llama", (256, 2048, 2, 4, 2, 64, 2048, False)),
    "llama-30m": ("llama", (384, 1024, 6, 6, 2, 64, 32000, False)),
    "qwen3-50m-big-vocab": ("qwen3", (256, 1024, 10, 8, 2, 64, 151936, True)),
    "llama-90m-big-vocab": ("llama", (256, 1024, 10, 4, 2, 64, 151936, False)),
    "llama-135m": ("llama", (576, 1536, 30, 9, 3, 64, 49152, True)),
    "qwen3-200m": ("qwen3", (1024, 3072, 10, 16, 8, 128, 49152, True)),
    "qwen3-600m-big-vocab": ("qwen3", (1024, 3072, 28, 16, 8, 128, 151936, True)),
}
# Name -> family, SIZES, what a mixture of experts has beside them.
MIXTURES: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "qwen3-moe-60m": ("qwen3_moe", (384, 1024, 6, 6, 2, 64, 32000, False),
                      {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256}),
    "qwen2-moe-50m": ("qwen2_moe", (384, 1024, 6, 6, 2, 64, 32000, False),
                      {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
                       "shared_expert_intermediate_size": 512}),
    "mixtral-60m": ("mixtral", (384, 768, 6, 6, 2, 64, 32000, False),
                    {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "glm4-moe-50m": ("glm4_moe", (384, 1024, 6, 6, 2, 64, 32000, False),
                     {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 384}),
    "gpt-oss-50m": ("gpt_oss", (384, 512, 6, 6, 2, 64, 32000, False),
                    {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "deepseek-v3-60m": ("deepseek_v3", (384, 1024, 6, 6, 6, 64, 32000, False),
                        {"n_routed_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256,
                         "first_k_dense_replace": 2, "q_lora_rank": 192, "kv_lora_rank": 128, "qk_rope_head_dim": 32,
                         "qk_nope_head_dim": 64, "v_head_dim": 64, "n_group": 2, "topk_group": 1}),
}  # fmt: skip
LAYOUTS = {"none": "no DeepSpeed", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3",
           "zero2-offload": "ZeRO-2 offload", "zero3-offload": "ZeRO-3 offload"}  # fmt: skip
VALIDATED = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 16}
# Keys of a case, by the last word of its name: what it trains, of LoRA's rank 16 on all linear layers where nothing
# else is said, and how.
KEYS: dict[str, dict[str, Any]] = {
    "all": {},
    "lora": {"adapter": "lora"},
    "dropout": {"adapter": "lora", "lora_dropout": 0.1},
    "head": {"adapter": "lora", "lora_modules_to_save": ["lm_head"]},
    "dora": {"adapter": "dora"},
    "nf4": {"adapter": "lora", "quantization": "nf4"},
    "experts": {"adapter": "lora", "lora_targets": ["all-linear", "experts"]},
    "mlp": {"train_only": ["mlp"]},
    "upper": {"train_only": ["layers.4.", "layers.5.", "norm"]},
    "narrow": {"optimizer_dtype": "bfloat16"},
    "offload": {"training": {"activation_checkpointing": "offload"}},
    "8bit": {"training": {"optim": "adamw_8bit"}},
    "muon": {"training": {"optim": "muon", "max_grad_norm": 0}},
    "apart": {"training": {"optim": "adamw_torch"}},
    "smooth": {"training": {"label_smoothing_factor": 0.1}},
    "noise": {"training": {"neftune_noise_alpha": 5}},
    "float32": {"training": {"bf16": False}},
    "validated": {"training": VALIDATED},
    "float32-validated": {"training": VALIDATED | {"bf16": False}},
    "shared": {"sequence_parallel": 2},
    "tiled": {"tiled_mlp": "yes"},
    "whole-mlp": {"tiled_mlp": "no"},
}
STEPS = 4  # stage 3 records the order of modules in the second and fetches ahead from the third on


@dataclass(frozen=True)
class Case:
    """One training to measure."""

    model: str
    layout: str
    ranks: int
    checkpointing: bool
    micro_batch: int = 2
    length: int = 256  # tokens
    accumulation: int = 1
    keys: str = "all"

    @property
    def name(self) -> str:
        extra = f" x{self.accumulation}" if self.accumulation > 1 else ""
        extra += f" {self.length}" if self.length != 256 else ""
        extra += f" {self.keys}" if self.keys != "all" else ""
        return f"{self.model} {self.layout} {self.ranks}r {'ckpt' if self.checkpointing else 'whole'}{extra}"


def all_cases() -> Iterator[Case]:
    for model in MODELS:
        for layout in LAYOUTS:
            for ranks in (1, 2, 4):
                for checkpointing in (True, False):
                    yield Case(model, layout, ranks, checkpointing)


def subset() -> list[Case]:
    """Small models every way, larger ones where two ranks need less than 16 GiB; docs/plan.md has most of them."""
    every, main, offload = tuple(LAYOUTS), ("none", "zero2", "zero3"), ("zero2-offload", "zero3-offload")
    small, big, middle = "llama-30m", "qwen3-50m-big-vocab", "llama-135m"
    cases = [Case("nothing", layout, 1, True) for layout in main]
    cases += [Case(model, layout, 2, True) for model in ("qwen3-10m", small) for layout in every]
    cases += [Case("qwen3-10m", layout, 4, True) for layout in main]
    cases += [Case(small, layout, 2, True, accumulation=2) for layout in main]
    cases += [Case(small, "none", 1, False), *(Case(small, layout, 2, False) for layout in main)]
    cases += [Case(small, "zero2", 2, False, length=512)]
    for layout in ("zero2", "zero3"):
        cases += [Case(big, layout, 1, True), Case(big, layout, 2, True), Case(big, layout, 2, False)]
        cases += [Case("llama-90m-big-vocab", layout, 2, True), Case(middle, layout, 2, True)]
        cases += [Case(middle, layout, 2, False)]
    cases += [Case(middle, "none", 1, False), *(Case(middle, layout, 2, True) for layout in offload)]
    cases += [Case("qwen3-200m", layout, 2, True) for layout in main]
    cases += [Case("qwen3-600m-big-vocab", layout, 1, True) for layout in main]
    cases += [*adapter_cases(), *mixture_cases(), *long_cases(), *measuring_cases()]
    order = [*MODELS, *MIXTURES]
    return sorted(cases, key=lambda case: order.index(case.model))


def adapter_cases() -> Iterator[Case]:
    """What has frozen weights."""
    small, big, middle = "llama-30m", "qwen3-50m-big-vocab", "llama-135m"
    for layout in ("none", "zero2", "zero3"):
        yield Case("nothing", layout, 1, True, keys="lora")
        yield Case(small, layout, 2, True, keys="lora")
        yield Case(middle, layout, 2, False, keys="lora")
        yield Case(middle, layout, 2, True, keys="head")
    yield Case(small, "zero1", 2, True, keys="lora")
    yield Case(small, "zero2-offload", 2, True, keys="lora")
    yield Case(small, "zero3-offload", 2, True, keys="lora")
    for keys in ("dropout", "dora", "mlp", "upper", "nf4"):
        yield Case(small, "none", 1, False, keys=keys)
    yield Case(small, "zero2", 2, False, keys="upper")
    yield Case(small, "zero3", 2, True, keys="mlp")
    yield Case(big, "zero2", 1, False, keys="lora")
    yield Case(middle, "none", 1, False, keys="lora")
    yield Case(middle, "none", 1, True, keys="lora")
    yield Case(middle, "none", 1, False, keys="nf4")


def mixture_cases() -> Iterator[Case]:
    """What has experts."""
    main = "qwen3-moe-60m"
    for layout in ("none", "zero2", "zero3"):
        yield Case(main, layout, 2, True)
    yield Case(main, "none", 1, False)
    yield Case(main, "zero3", 2, False)
    yield Case(main, "zero2", 2, False, keys="lora")
    yield Case(main, "none", 1, False, keys="experts")
    yield Case(main, "zero3", 2, True, keys="experts")
    for model in MIXTURES:
        if model != main:
            yield Case(model, "none", 1, False)
    yield Case("mixtral-60m", "zero3", 2, True)
    yield Case("deepseek-v3-60m", "zero3", 2, True)
    yield Case("gpt-oss-50m", "zero2", 2, True)


def long_cases() -> Iterator[Case]:
    """Long rows and small states."""
    small, middle = "llama-30m", "llama-135m"
    for layout in ("none", "zero2", "zero3"):
        yield Case(small, layout, 2, False, micro_batch=1, length=4096, keys="shared")
        yield Case(small, layout, 2, True, keys="narrow")
    yield Case(small, "zero2", 2, False, micro_batch=1, length=4096)
    yield Case(small, "zero3", 2, True, micro_batch=1, length=8192, keys="shared")
    yield Case(small, "none", 1, True, keys="narrow")
    yield Case(small, "none", 1, True, keys="8bit")
    yield Case(small, "zero2", 2, True, keys="8bit")
    yield Case(small, "none", 2, True, keys="8bit")
    yield Case(small, "zero3", 2, True, keys="8bit")
    for layout in ("zero2-offload", "zero3-offload"):
        yield Case(small, layout, 2, True, accumulation=2)
    yield Case(middle, "none", 1, True, keys="narrow")
    yield Case(middle, "none", 2, True, keys="narrow")
    yield Case(middle, "zero2", 1, True, keys="narrow")
    for layout, ranks in (("none", 1), ("none", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)):
        yield Case(small, layout, ranks, True, keys="muon")
    yield Case(small, "zero2", 2, True, micro_batch=1, length=8192, keys="shared")
    for keys in ("tiled", "whole-mlp"):
        yield Case("llama-5m-wide", "none", 1, True, micro_batch=1, length=8192, keys=keys)
    for layout in ("none", "zero2", "zero3"):
        yield Case("llama-5m-wide", layout, 2, True, micro_batch=1, length=8192, keys="tiled")
    yield Case(small, "none", 1, True, micro_batch=1, length=2048, keys="offload")


def measuring_cases() -> Iterator[Case]:
    """What is done to the loss, to embeddings, and beside training."""
    small, big = "llama-30m", "qwen3-50m-big-vocab"
    yield Case(big, "none", 1, True, keys="smooth")
    yield Case(small, "none", 1, True, micro_batch=16, keys="noise")
    yield Case(small, "none", 1, True, micro_batch=16)
    for layout, ranks in (("none", 1), ("none", 2), ("zero2", 2), ("zero3", 2)):
        yield Case(small, layout, ranks, True, keys="validated")
    yield Case(big, "zero3", 2, True, keys="validated")
    yield Case("qwen3-moe-60m", "none", 1, True, keys="validated")
    yield Case(small, "zero2", 2, True, keys="apart")
    for keys in ("apart", "float32", "float32-validated"):
        yield Case(small, "none", 1, True, keys=keys)


def predicted(case: Case, model: Path, *, lazy: bool, learned: float = 1.0) -> tuple[int, int]:
    """Bytes of the fullest rank: the states when the optimizer is about to step, and the peak."""
    shape = read_shape(str(model))
    training = TRAINING_DEFAULTS | {
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "activation_checkpointing": case.checkpointing,
    }
    keys = KEYS[case.keys]
    keys = {**keys, "training": training | keys.get("training", {})}
    config = Config(model_name_or_path=str(model), train_file="", max_length=case.length, **keys)
    engine = shipped_engine(LAYOUTS[case.layout], shape)
    run = replace(run_of(config, shape, engine, case.ranks, lazy=lazy), learned=learned)
    memory, runtime = peak(run), RUNTIME.get(case.layout, DEEPSPEED_RUNTIME)
    if run.choice.adapter != "none":
        runtime += ADAPTER_RUNTIME.get(case.layout, ADAPTER_DEEPSPEED_RUNTIME)
    return model_states(run), memory.device_bytes + (memory.host_bytes + runtime if lazy else 0)


def run_folder(case: Case, folder: Path) -> Path:
    return folder / case.name.replace(" ", "-")


def measure(case: Case, model: Path, folder: Path) -> list[dict[str, Any]]:
    """What each rank measured. Ends the program where the training fails."""
    rows = folder / f"rows-{case.length}.jsonl"
    if not rows.exists():
        line = json.dumps({"question": "?", "answer": "abcdefgh " * case.length})
        rows.write_text((line + "\n") * 64, encoding="utf-8")
    out = run_folder(case, folder)
    keys: dict[str, Any] = {
        "model_name_or_path": model,
        "train_file": rows,
        "output_dir": out,
        "cache_dir": folder / "cache",
        "max_length": case.length,
        "per_device_train_batch_size": case.micro_batch,
        "gradient_accumulation_steps": case.accumulation,
        "activation_checkpointing": case.checkpointing,
        "max_steps": STEPS,
        "save_strategy": "no",
        "num_predictions": 0,
        "swanlab_mode": "disabled",
        **KEYS[case.keys],
    }
    keys |= keys.pop("training", {})
    if "eval_strategy" in keys:
        keys["eval_file"] = rows
    if case.layout != "none":
        keys["deepspeed"] = engine_file(case.layout, folder)
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    worker = str(ROOT / "benchmarks" / "plan_worker.py")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={case.ranks}"]
    alone = case.layout == "none" and case.ranks == 1
    command = [*([sys.executable] if alone else torchrun), worker, str(out), *flags]
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if case.layout == "none":
        env["MALLOC_ARENA_MAX"] = "1"
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    found = [json.loads(file.read_text()) for file in sorted(out.glob("rank-*.json"))]
    if len(found) != case.ranks:
        sys.exit(f"{case.name}: exit code {done.returncode}\n{done.stdout[-4000:]}")
    return found


def engine_file(layout: str, folder: Path) -> Path:
    """The shipped configuration of a layout; stage 1 is that of stage 2 with another number."""
    if layout != "zero1":
        return ROOT / "ds_configs" / f"{layout.replace('-', '_')}.json"
    engine = json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
    engine["zero_optimization"]["stage"] = 1
    file = folder / "zero1.json"
    file.write_text(json.dumps(engine))
    return file


def make_model(name: str, folder: Path) -> Path:
    """A model with random weights and a byte-level tokenizer."""
    path = folder / name
    if (path / "model.safetensors").exists():
        return path
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    family, keys = keys_of(name)
    config = AutoConfig.for_model(family, **keys, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator([], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2]).save_pretrained(path)
    return path


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Predict and measure one case."""
    model = make_model(case.model, folder)
    ranks = measure(case, model, folder)
    on_gpu = "reserved" in ranks[0]
    report = json.loads((run_folder(case, folder) / "data_report.json").read_text())["train"]
    learned = report["supervised_tokens"] / report["tokens"]
    states, whole = predicted(case, model, lazy=not on_gpu, learned=learned)
    return {
        "case": case.name,
        "learned": learned,
        "parameters": read_shape(str(model)).parameters,
        "states_predicted": states,
        "states_measured": max(rank["states"] for rank in ranks),
        "whole_predicted": whole,
        "whole_measured": max(rank["peak"] for rank in ranks),
        "gpu": on_gpu,
    }


def again(found: dict[str, Any], case: Case, folder: Path) -> dict[str, Any]:
    """A kept measurement beside the prediction of the code as it is now."""
    model = config_only(case.model, folder)
    states, whole = predicted(case, model, lazy=not found["gpu"], learned=found["learned"])
    return {**found, "states_predicted": states, "whole_predicted": whole}


def config_only(name: str, folder: Path) -> Path:
    family, keys = keys_of(name)
    path = folder / f"{name}-config"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"model_type": family, **keys}))
    return path


def keys_of(name: str) -> tuple[str, dict[str, Any]]:
    """The family of a model, and the keys of its configuration."""
    family, sizes, beside = MIXTURES[name] if name in MIXTURES else (*MODELS[name], {})
    keys = {**dict(zip(SIZES, sizes, strict=True)), **beside}
    if family == "deepseek_v3":
        del keys["head_dim"]  # its own name for the rotated part of a head
    return family, keys


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, MiB, errors of the prediction in per cent of what was measured."""
    lines = [
        "| case | states: predicted | measured | error | whole: predicted | measured | error |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        cells = [r["case"]]
        for kind in ("states", "whole"):
            guess, truth = r[f"{kind}_predicted"], r[f"{kind}_measured"]
            cells += [f"{guess / MIB:,.0f}", f"{truth / MIB:,.0f}", f"{guess / truth - 1:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(results: list[dict[str, Any]]) -> str:
    """Errors of the plans, without the cases that `RUNTIME` was taken from."""
    results = [r for r in results if not r["case"].startswith("nothing")]
    if not results:
        return ""

    def errors(kind: str) -> list[float]:
        return [r[f"{kind}_predicted"] / r[f"{kind}_measured"] - 1 for r in results]

    states, whole = errors("states"), errors("whole")
    return (
        f"{len(results)} cases. States: {min(states):+.1%} to {max(states):+.1%} (target 2 %). "
        f"Whole: {min(whole):+.1%} to {max(whole):+.1%}, {sum(abs(e) <= 0.1 for e in whole)} within 10 %, "
        f"{sum(e < -0.05 for e in whole)} more than 5 % too low."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every combination")
    parser.add_argument("--only", action="append", default=[], help="cases whose name has these words; all of several")
    parser.add_argument("--folder", type=Path, help="models and runs are kept here [a temporary folder]")
    parser.add_argument("--results", type=Path, help="finished cases, one JSON object a line [none are kept]")
    parser.add_argument("--gib", type=float, default=16, help="leave out cases that need more in all [%(default)s]")
    parser.add_argument("--table", action="store_true", help="no runs: the table of --results")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds_sft-plan-") as name:
        folder = given.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        every = all_cases() if given.full else subset()
        cases = [case for case in every if all(f" {words} " in f" {case.name} " for words in given.only)]
        lines = given.results.read_text().splitlines() if given.results and given.results.exists() else []
        kept = {found["case"]: found for found in map(json.loads, lines)}
        results = []
        for case in cases:
            needed = case.ranks * predicted(case, config_only(case.model, folder), lazy=True)[1] / 2**30
            if case.name in kept:
                results.append(again(kept[case.name], case, folder))
            elif not given.table and needed <= given.gib:
                results.append(compare(case, folder))
                print(table(results[-1:]).splitlines()[-1], flush=True)
                if given.results:
                    with given.results.open("a") as file:
                        file.write(json.dumps(results[-1]) + "\n")
        print(table(results), summary(results), sep="\n\n")


if __name__ == "__main__":
    main()
