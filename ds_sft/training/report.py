"""What a finished run says of itself: `run.json`, and the last lines a user reads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.engine.zero import stage
from ds_sft.model.adapter_files import adapter_of, from_anywhere
from ds_sft.model.adapters import count_parameters
from ds_sft.plan.size import in_units
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch
from ds_sft.results import git_commit, peak_memory, versions
from ds_sft.training.clock import PARTS

if TYPE_CHECKING:
    from transformers import Trainer

    from ds_sft.training.trainer import SFTTrainer

METRICS = {  # of an evaluation -> how they are called
    "loss": "loss",
    "perplexity": "perplexity",
    "exact_match": "exact match",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
}


def run_results(trainer: SFTTrainer, config: Config, launch: Launch, *, seconds: float) -> dict[str, Any]:
    """What `run.json` says; all ranks must call it."""
    history = trainer.state.log_history
    train_seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    eval_losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    best = best_loss(trainer)
    speed, resumed = trainer.throughput.summary(), trainer.run.resumed
    trained, parameters = count_parameters(trainer.model)
    return {
        "versions": versions(),
        "git_commit": git_commit(),
        "base_model": from_anywhere(config.model_name_or_path),
        "launcher": launch.launcher,
        "world_size": launch.world_size,
        "sequence_parallel": config.sequence_parallel,
        "zero_stage": stage(trainer.args.deepspeed),
        "device": str(trainer.args.device),
        "seed": trainer.args.seed,
        "parameters": parameters,
        "trained_parameters": trained,
        "adapter": adapter_settings(trainer.model, config),
        "steps": trainer.state.global_step,
        "skipped_steps": trainer.skipped_steps,
        "epochs": trainer.state.epoch,
        "eval_loss_first": eval_losses[0] if eval_losses else None,
        "eval_loss": best if best is not None else eval_losses[-1] if eval_losses else None,
        "best_checkpoint": best_checkpoint(trainer),
        "tokens": speed["tokens"] + (resumed.manifest["tokens"] if resumed else 0),
        # What follows is of this start.
        "tokens_per_second": round(speed["tokens_per_second"], 2) if speed["tokens"] else None,  # no evaluations
        "train_seconds": round(train_seconds, 2),  # with evaluations
        "seconds": round(seconds, 2),
        "speed": speed,
        "peak_memory": gather(peak_memory()),  # of each rank
    }


def adapter_settings(model: Any, config: Config) -> dict[str, Any] | None:
    """The adapter in the model, in peft's words; None where all weights are its own."""
    asked: Any = adapter_of(model)
    if asked is None:
        return None
    targets = asked.target_modules
    return {
        "kind": config.adapter,
        "base": asked.base_model_name_or_path,
        "quantization": config.quantization,
        "rank": asked.r,
        "alpha": asked.lora_alpha,
        "use_rslora": asked.use_rslora,
        "targets": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": asked.modules_to_save,
    }


def best_loss(trainer: Trainer) -> float | None:
    """The validation loss of that checkpoint; a step that was not saved may have had a better one."""
    measured = {f"checkpoint-{entry['step']}": entry["eval_loss"] for entry in trainer.state.log_history
                if "eval_loss" in entry}  # fmt: skip
    return measured.get(best_checkpoint(trainer) or "")


def best_checkpoint(trainer: Trainer) -> str | None:
    """The checkpoint that `load_best_model_at_end` went back to."""
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    return Path(best).name if best else None


def summary(results: dict[str, Any]) -> str:
    """The last lines a user reads."""
    all_tokens, now = results["tokens"], results["speed"]["tokens"]
    rate = f" in {results['speed']['seconds']:,.0f} s ({results['tokens_per_second']:,.0f} tokens/s)" if now else ""
    lines = [
        f"Trained {results['steps']:,} steps, {all_tokens:,} tokens"
        f"{'' if now == all_tokens else f'; {now:,} of them in this start'}{rate}.",
        memory_in_words(results["peak_memory"], results["plan"]),
        speed_in_words(results["speed"]),
    ]
    first, last = results["eval_loss_first"], results["eval_loss"]
    if last is not None:
        which = "of the best checkpoint" if results["best_checkpoint"] else "last"
        lines.append(f"Validation loss: {last:.4f}{'' if first == last else f' {which}, {first:.4f} first'}.")
    if results.get("evaluation"):
        lines.append(evaluation_in_words(results["evaluation"]))
    return "\n".join(lines)


def evaluation_in_words(found: dict[str, Any]) -> str:
    """The numbers of the last model with their intervals, and what they were of the first."""
    part, names = found["sources"]["all"], list(found["models"])
    last, first = part["models"][names[-1]], part["models"][names[0]]
    parts = []
    for metric in (name for name in METRICS if name in last and name != "perplexity"):
        value, low, high = (short_number(metric, last[metric][end]) for end in ("value", "low", "high"))
        before = f", {short_number(metric, first[metric]['value'])} {names[0]}" if len(names) == 2 else ""
        parts.append(f"{METRICS[metric]} {value} [{low}, {high}]{before}")
    return f"Evaluation of {part['rows']:,} validation rows: {'; '.join(parts)}."


def short_number(metric: str, value: float, sign: str = "") -> str:
    """A number of an evaluation as it is shown; `sign`: "+" shows it also above 0."""
    if not math.isfinite(value):
        return "-"
    if metric == "loss":
        return f"{value:{sign}.3f}"
    return f"{value:{sign}.1f}" if abs(value) < 1e5 else f"{value:{sign}.1e}"


def memory_in_words(peaks: list[dict[str, float]], planned: dict[str, Any] | None) -> str:
    """The fullest rank's memory, and on a CPU how much of it training took, which is what is planned."""
    on_gpu = any("gpu_gib" in peak for peak in peaks)
    most = max(peak.get("gpu_gib", peak["host_gib"]) for peak in peaks)
    line = f"{'GPU memory' if on_gpu else 'Memory'} of a rank: {in_units(most * 2**30)} at most"
    if planned is None:
        return f"{line}."
    training, plan, freed = (in_units(planned[f"{name}_gib"] * 2**30) for name in ("measured", "planned", "freed"))
    if on_gpu:
        return f"{line} ({plan} planned)."
    excess = planned["measured_gib"] - planned["planned_gib"]
    explained = excess > max(planned["planned_gib"] / 10, 0.1) and planned["freed_gib"] > excess / 4
    kept = f", up to {freed} are freed blocks that the C library keeps" if explained else ""
    return f"{line}: {training} for training ({plan} planned{kept}), the rest for Python and its libraries."


def speed_in_words(speed: dict[str, float]) -> str:
    """Where the time of training went."""
    rates = [f"{speed['supervised_tokens_per_second']:,.0f} supervised tokens/s"]
    rates += [f"MFU {speed['mfu']:.1%}"] if "mfu" in speed else []
    rates += [f"{name} {speed[f'{name}_share']:.1%}" for name in ("waiting", "padding")]
    times = [f"{part.replace('_', ' ')} {speed[f'{part}_share']:.1%}" for part in PARTS]
    return f"Speed: {', '.join(rates)}; time: {', '.join(times)}."
