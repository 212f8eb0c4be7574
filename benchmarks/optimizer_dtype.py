"""What an optimizer keeps of each parameter, and what it costs in loss and time. After `ds-sft demo`:

    python benchmarks/optimizer_dtype.py                                  # a small model with the demo's tokens
    python benchmarks/optimizer_dtype.py --model demo/model --only plain  # the demo's own, minutes a line

Each line of the table, which docs/optimizer.md has, is a run of train.py on the CPU, on the same rows in the same
order: alone, as two ranks of DistributedDataParallel, and under ZeRO-2 and 3. Two are not a run's to choose: `nearest`
is what bfloat16 weights would learn rounded to the nearest, `compensated` with Kahan's sums in two bytes more.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BFLOAT16 = ["--optimizer_dtype", "bfloat16"]
VARIANTS = {
    "float32": [],
    "bfloat16": BFLOAT16,
    "nearest": BFLOAT16,
    "compensated": BFLOAT16,
    "adamw_8bit": ["--optim", "adamw_8bit"],
    "muon": ["--optim", "muon", "--max_grad_norm", "0"],  # under ZeRO the update would be clipped
}
ENGINES = {"plain": None, "DDP": None, "ZeRO-2": "zero2", "ZeRO-3": "zero3"}
BUCKET = 100_000  # elements: DeepSpeed's buffers have one size for every model, many times that of a small one
# Calls of the optimizer at which bytes are counted, and after which seconds are: DeepSpeed calls it for each group.
MEASURED = range(3, 9)
LAST = 20  # steps whose mean is the loss at the end


# ---- A rank of a run


def rank(variant: str, report: Path, flags: Sequence[str]) -> None:
    """Train as the flags say; rank 0 writes what the tensors take at an optimizer step, and the CPU seconds of most."""
    from ds_sft.ranks.launch import read_launch
    from ds_sft.train import main as train
    from ds_sft.training import optimizer

    if variant in ("nearest", "compensated"):
        made = {"nearest": torch.optim.AdamW, "compensated": Compensated}[variant]
        optimizer.optimizer_of = partial(in_bfloat16, made)  # type: ignore[assignment]
    steps: list[tuple[float, int]] = []  # CPU seconds and bytes

    def before(*_: Any) -> None:
        steps.append((time.process_time(), kept() if len(steps) in MEASURED else 0))

    register_optimizer_step_pre_hook(before)
    train(flags)
    if read_launch().is_main:
        timed = [seconds for seconds, _ in steps[MEASURED.stop :]]
        most = max(size for _, size in steps)
        report.write_text(json.dumps({"bytes": most, "seconds": timed[-1] - timed[0]}), encoding="utf-8")


def kept() -> int:
    """Bytes of all tensors there are: between backward and update these are weights, gradients, states and buffers."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of objects that do not like to be looked at
        found = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and not item.is_meta]
    for tensor in [*found, *(tensor.grad for tensor in found if tensor.is_leaf and tensor.grad is not None)]:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def in_bfloat16(kind: type, config: Any, args: Any, launch: Any) -> tuple[type, dict[str, Any]]:
    betas = (args.adam_beta1, args.adam_beta2)
    return kind, {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}


class Compensated(torch.optim.Optimizer):
    """AdamW on bfloat16 weights, moments rounded to nearest; what rounding takes from a weight is kept, and added."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group, weight in ((each, weight) for each in self.param_groups for weight in each["params"]):
            if weight.grad is None:
                continue
            (beta1, beta2), lr, state = group["betas"], group["lr"], self.state[weight]
            if not state:
                state.update(step=0, **{name: torch.zeros_like(weight) for name in ("lost", "mean", "square")})
            state["step"] += 1
            gradient = weight.grad.float()
            mean = state["mean"].float().lerp_(gradient, 1 - beta1)
            square = state["square"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
            state["mean"].copy_(mean)
            state["square"].copy_(square)
            exact = weight.float().add_(state["lost"]).mul_(1 - lr * group["weight_decay"])
            exact.addcdiv_(mean, root, value=-lr / (1 - beta1 ** state["step"]))
            weight.copy_(exact)
            state["lost"].copy_(exact.sub_(weight))


# ---- All of them


def measure(variant: str, engine: str, keys: Sequence[str], folder: Path, rows: int) -> dict[str, Any]:
    """Train once; bytes and seconds of rank 0, the mean loss of the last steps and `eval_loss`."""
    ranks = 1 if engine == "plain" else 2
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    report = folder / "report.json"
    flags = [*keys, *VARIANTS[variant], *engine_of(engine), "--output_dir", str(folder / "output"),
             "--per_device_train_batch_size", str(rows // ranks)]  # fmt: skip
    done = subprocess.run(
        [*launcher, __file__, "rank", variant, str(report), *flags], capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        return {"refused": next(line for line in done.stderr.splitlines() if line.startswith("ds_sft: "))}
    assert not done.returncode, done.stderr
    logged = [json.loads(line) for line in (folder / "output/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    loss = fmean([row["loss"] for row in logged if "loss" in row][-LAST:])
    after = [row["eval_loss"] for row in logged if "eval_loss" in row][-1]
    return {**json.loads(report.read_text(encoding="utf-8")), "loss": loss, "eval_loss": after}


def engine_of(engine: str) -> list[str]:
    """The key `deepspeed`: what comes with the package, with small buffers."""
    name = ENGINES[engine]
    if name is None:
        return []
    options = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text(encoding="utf-8"))
    options["zero_optimization"]["reduce_bucket_size"] = BUCKET
    return ["--deepspeed", json.dumps(options)]


def table(args: argparse.Namespace, model: Path, parameters: int) -> Iterator[str]:
    yield "| learning rate | engine | variant | bytes a parameter | loss | | `eval_loss` | | time of a step |"
    yield "|--:|---|---|--:|--:|--:|--:|--:|--:|"
    for rate in args.rates:
        keys = [word for name, value in options(args, model, rate).items() for word in (f"--{name}", str(value))]
        for engine in args.only:
            first: dict[str, Any] | None = None
            for variant in args.variants:
                with TemporaryDirectory() as folder:
                    found = measure(variant, engine, keys, Path(folder), args.rows)
                if "refused" in found:
                    yield f"| {rate:g} | {engine} | {variant} | {found['refused']} | | | | | |"
                    continue
                first = first or found
                loss, after = (
                    f"{found[name]:.4f} | {found[name] / first[name] - 1:+.2%}" for name in ("loss", "eval_loss")
                )
                yield (f"| {rate:g} | {engine} | {variant} | {found['bytes'] / parameters:.2f} | {loss} | {after} | "
                       f"{found['seconds'] / first['seconds']:.2f} x |")  # fmt: skip


def options(args: argparse.Namespace, model: Path, rate: float) -> dict[str, Any]:
    return {
        "model_name_or_path": model, "train_file": args.demo / "train.jsonl", "eval_file": args.demo / "eval.jsonl",
        "system_prompt": "You are a helpful assistant. Answer briefly.", "max_length": 256, "max_steps": args.steps,
        "gradient_accumulation_steps": 1, "learning_rate": rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        "activation_checkpointing": "no", "logging_steps": 1, "eval_strategy": "steps", "eval_steps": args.steps,
        "per_device_eval_batch_size": 8, "save_strategy": "no", "resume": "never", "report_to": "none",
        "num_predictions": 0, "verify_export": "no", "use_cpu": "yes", "cache_dir": args.demo / "cache",
    }  # fmt: skip


def small_model(demo: Path, folder: Path) -> Path:
    """Four layers of the demo's family with its tokenizer, weights drawn at random."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(demo / "model")
    config.update({"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
                   "num_key_value_heads": 2, "head_dim": 16})  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo / "model").save_pretrained(folder)
    return folder


def main() -> None:
    if sys.argv[1:2] == ["rank"]:
        rank(sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("demo"), help="what `ds-sft demo` has made")
    parser.add_argument("--model", type=Path, help="default: a small one, made here")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3])
    parser.add_argument("--only", nargs="*", default=list(ENGINES), choices=list(ENGINES), metavar="ENGINE")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS), metavar="VARIANT")
    args = parser.parse_args()
    if args.steps < MEASURED.stop + 2:
        parser.error(
            f"--steps {args.steps}: seconds are those after {MEASURED.stop} steps: {MEASURED.stop + 2} at least"
        )
    with TemporaryDirectory() as folder:
        model = args.model or small_model(args.demo, Path(folder))
        from transformers import AutoModelForCausalLM

        parameters = AutoModelForCausalLM.from_pretrained(model).num_parameters()
        print(f"{parameters:,} parameters, {args.steps} steps of {args.rows} rows; beside the first line of an engine")
        for line in table(args, model, parameters):
            print(line, flush=True)


if __name__ == "__main__":
    main()
