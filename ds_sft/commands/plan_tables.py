"""What `ds-sft plan` prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from ds_sft.plan.optimizer import OPTIMIZERS
from ds_sft.plan.size import in_units

GB, GIB = 1e9, 2**30  # of links, as they are sold; of memory, disks and what is sent
PARTS = ("parameters", "frozen weights", "gradients", "master weights", "optimizer states", "working copy",
         "activations", "logits", "buckets", "gathered parameters", "reduction", "step buffers", "flat copy",
         "allocator margin")  # fmt: skip


def show_plan(plan: dict[str, Any], given: argparse.Namespace) -> None:
    """Print the plan's tables and lines."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 130)
    model = plan["model"]
    tied = ", tied embeddings" if model["tied"] else ""
    if plan["on_cpu"]:
        here = "" if plan["host_memory"] is None else f" with {in_units(plan['host_memory'])} of memory"
        console.print(f"{model['family']}, {model['parameters']:,} parameters{tied}; one process on a CPU{here}.")
        for line in (*trained_lines(plan), *cpu_lines(plan), *position_lines(plan), *disk_lines(plan),
                     *time_lines(plan, given)):  # fmt: skip
            console.print(line)
        return
    gpus = f"{given.nodes} x {given.gpus_per_node} GPUs of {in_units(given.gpu_memory)}"
    active = f", {model['active']:,} of them active" if model["active"] < model["parameters"] else ""
    number = f"{model['parameters']:,} parameters{active}"
    console.print(f"{model['family']}, {number}{tied}; {gpus} (--nodes, --gpus-per-node, --gpu-memory).")
    for line in (*expert_lines(plan), *trained_lines(plan)):
        console.print(line)
    console.print(memory_table(plan))
    console.print(
        "Each column is the fullest moment of a step for the fullest rank. The margin is for CUDA, NCCL and fragments: "
        "an assumption, everything else is counted."
    )
    console.print(cost_table(plan))
    console.print(reach_table(plan))
    for line in (
        recommendation(plan, host_checked=given.host_memory is not None),
        *position_lines(plan),
        *autocast_lines(plan),
        *optimizer_lines(plan),
        *disk_lines(plan),
        *time_lines(plan, given),
    ):
        console.print(line)


def expert_lines(plan: dict[str, Any]) -> list[str]:
    experts = plan["model"]["experts"]
    if experts is None:
        return []
    met = f"a token meets {experts['chosen']} of {experts['number']} in each of {experts['layers']} layers"
    return [f"Experts: {met}. Memory and traffic are those of all, FLOP of the active ones; activations are the same "
            "wherever tokens go."]  # fmt: skip


def trained_lines(plan: dict[str, Any]) -> list[str]:
    model, adapter = plan["model"], plan["adapter"]
    if adapter == "none" and model["trained"] == model["parameters"]:
        return []
    base = "" if plan["quantization"] == "none" else f", in {plan['quantization']}"
    whole = model["parameters"] + (0 if adapter == "none" else model["trained"])  # as a run says it
    how = "train_only" if adapter == "none" else adapter
    share = f"{model['trained'] / whole:.2%}"
    return [f"Trained ({how}): {model['trained']:,} of {whole:,} parameters ({share}); the others are frozen{base}."]


def memory_table(plan: dict[str, Any]) -> Table:
    """Memory of a GPU by part, a column for each layout."""
    table = _table("GiB of a GPU, by part")
    table.add_column("", min_width=len("checkpointing"))
    for option in plan["options"]:
        mark = " *" if option["name"] == plan["configured"] else ""
        table.add_column(option["name"] + mark, justify="right")
    for part in PARTS:
        sizes = [option["gpu"].get(part, 0) for option in plan["options"]]
        if any(sizes):
            table.add_row(part, *(f"{size / GIB:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("GPU", *(f"{option['gpu_total'] / GIB:.1f}" for option in plan["options"]))
    table.add_row("fullest at", *(option["fullest_moment"] for option in plan["options"]))
    table.add_row("host memory of a node", *(f"{option['node_total'] / GIB:.1f}" for option in plan["options"]))
    table.add_row("fits", *("yes" if option["fits"] else "no" for option in plan["options"]))
    table.add_section()
    for way, title in (("checkpointing", "activations with checkpointing"), ("without", "activations without")):
        table.add_row(title, *(f"{option['activations'][way] / GIB:.2f}" for option in plan["options"]))
    first = plan["options"][0]
    table.caption = (f"* as configured: micro batch {_micro(first, plan)} x accumulation {first['accumulation']}, "
                     f"{_kept(first)}")  # fmt: skip
    return table


def _table(title: str) -> Table:
    """Without lines between its columns: those of six layouts have room in 80 signs."""
    return Table(title=title, box=SIMPLE, padding=0, pad_edge=False, show_edge=False)


def cost_table(plan: dict[str, Any]) -> Table:
    """Traffic and time of a step."""
    table = _table(f"A step; links reached: {plan['ring_bandwidth'] / GB:.0f} GB/s sent by each GPU of a ring")
    for name in ("", "sent by a GPU", "hides behind computation above, GB/s", "computes", "lasts"):
        table.add_column(name, justify="left" if not name else "right")
    for option in plan["options"]:
        step = option["step_seconds"]
        table.add_row(option["name"], in_units(option["sent_per_step"]), f"{option['hiding_bandwidth'] / GB:.2f}",
                      in_seconds(step["compute"]), in_seconds(step["total"]))  # fmt: skip
    return table


def reach_table(plan: dict[str, Any]) -> Table:
    """The longest row and the largest model that fit: a row for each layout, a column for each way."""
    reaches = plan["reaches"]
    columns = [*dict.fromkeys(map(_way, reaches))]
    table = _table(f"The longest row that fits, k of 1,024 tokens; the largest Qwen3 at {plan['max_length']:,}")
    for name in ("", *(f"{word} x {group}" if group > 1 else word for word, group in columns)):
        table.add_column(name, justify="right" if name else "left")
    rows: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for found in reaches:
        rows.setdefault((found["name"], found["optimizer_dtype"]), {})[_way(found)] = _reached(found)
    for (name, dtype), cells in rows.items():
        shown = (cells[way] for way in columns)
        table.add_row(name if dtype == "float32" else f"{name}, {dtype}", *shown)
    unchecked = "" if plan["host_memory"] else " The host's memory is not checked: --host-memory."
    table.caption = ("Columns: activation_checkpointing; x N: sequence_parallel: N. bfloat16: optimizer_dtype. "
                     f"One row in a micro batch.{unchecked}")  # fmt: skip
    return table


def _way(found: dict[str, Any]) -> tuple[str, int]:
    return found["activation_checkpointing"], found["sequence_parallel"]


def _reached(found: dict[str, Any]) -> str:
    row = f"{found['longest_row'] // 1024:,}k" if found["longest_row"] else "-"
    return f"{row} {found['largest_model'] or '-':>4}"


def nothing_fits(plan: dict[str, Any]) -> str:
    """What is missing, and what would fit."""
    least = min(plan["options"], key=lambda option: option["gpu_total"])
    line = (f"Nothing fits: even {least['name']} needs {in_units(least['gpu_total'])} of a GPU at micro batch "
            f"{_micro(least, plan)} and {in_units(least['node_total'])} of a node.")  # fmt: skip
    would = [" with ".join(found["write"]) for found in plan["remedies"]]
    longest = max(plan["reaches"], key=lambda found: found["longest_row"])
    if 0 < longest["longest_row"] < plan["max_length"]:
        shared = f", sequence_parallel: {longest['sequence_parallel']}" if longest["sequence_parallel"] > 1 else ""
        narrow = ", optimizer_dtype: bfloat16" if longest["optimizer_dtype"] == "bfloat16" else ""
        would.append(f"max_length: {longest['longest_row']} with {longest['name']}, activation_checkpointing: "
                     f"{longest['activation_checkpointing']}{shared}{narrow}")  # fmt: skip
    if not would:
        return f"{line} Take a smaller model."
    return f"{line} This would: {'; or '.join(would)}."


def recommendation(plan: dict[str, Any], *, host_checked: bool) -> str:
    best = plan["recommended"]
    if best is None:
        return nothing_fits(plan)
    parts = best["accumulation"] * best["groups"]
    if plan["filled"]:
        batch = f"{best['tokens_per_micro_batch'] * parts:,} tokens a step (max_tokens_per_batch: "
        batch += f"{best['tokens_per_micro_batch']})"
    else:
        at_once = f"{best['tokens_per_micro_batch']:,} tokens a {'GPU' if best['sequence_parallel'] == 1 else 'group'}"
        batch = f"{best['micro_batch'] * parts} rows a step, {at_once} at once"
    return (
        f"Recommended: {best['name']}, micro batch {_micro(best, plan)} x accumulation {best['accumulation']} x "
        f"{_who(best)} = {batch}, {_kept(best)}: "
        f"{in_units(best['gpu_total'])} of a GPU, {in_seconds(best['step_seconds']['total'])} a step."
        + (
            f" Each node needs {in_units(best['node_total'])} of memory, which is not checked: give --host-memory."
            if best["host"] and not host_checked
            else ""
        )
    )


def _who(best: dict[str, Any]) -> str:
    """Who has rows of its own."""
    group = best["sequence_parallel"]
    if group == 1:
        return f"{best['groups']} GPU{'s' if best['groups'] > 1 else ''}"
    return f"{best['groups']} group{'s' if best['groups'] > 1 else ''} of {group} GPUs"


def _kept(best: dict[str, Any]) -> str:
    """In keys, where they are more than a switch."""
    shared = f", sequence_parallel: {best['sequence_parallel']}" if best["sequence_parallel"] > 1 else ""
    way = best["activation_checkpointing"]
    words = {"no": "checkpointing off", "yes": "checkpointing on"}
    return words.get(way, f"activation_checkpointing: {way}") + shared


def cpu_lines(plan: dict[str, Any]) -> list[str]:
    """Memory of a process on a CPU: as configured, in the words of a run, and what is recommended."""
    (asked,), best = plan["options"], plan["recommended"]
    parts = ", ".join(f"{part} {in_units(size)}" for part, size in asked["gpu"].items())
    fits = "" if plan["host_memory"] is None else " It fits." if asked["fits"] else " It does not fit."
    lines = [f"As configured ({_on_cpu(asked, plan)}): {in_units(asked['node_total'])} of memory, at the "
             f"{asked['fullest_moment']}: {parts}.{fits}"]  # fmt: skip
    if best is None:
        lines.append("Nothing fits: take a smaller max_length, a smaller model, or adapter: lora.")
    elif best != asked:
        lines.append(f"Recommended: {_on_cpu(best, plan)}: {in_units(best['node_total'])} of memory.")
    return lines


def _on_cpu(option: dict[str, Any], plan: dict[str, Any]) -> str:
    checkpointing = "on" if option["checkpointing"] else "off"
    return (f"micro batch {_micro(option, plan)} x accumulation {option['accumulation']}, checkpointing "
            f"{checkpointing}, {option['tokens_per_micro_batch']:,} tokens at once")  # fmt: skip


def position_lines(plan: dict[str, Any]) -> list[str]:
    positions, longest = plan["model"]["positions"], plan["max_length"]
    if positions is None or longest <= positions:
        return []
    scaling = plan["longer_rows"]
    remedy = f"; for such rows write {scaling} (--write does not: it changes the model)" if scaling else ""
    return [f"max_length: {longest:,} is above the {positions:,} positions that the model was made for "
            f"(max_position_embeddings): a run warns if a row is{remedy}."]  # fmt: skip


def autocast_lines(plan: dict[str, Any]) -> list[str]:
    if not plan["autocast"]:
        return []
    return [
        "Without DeepSpeed fp16 and torch_compile run under autocast, which takes 5 to 14 % more than planned here."
    ]


def optimizer_lines(plan: dict[str, Any]) -> list[str]:
    known = plan["optim"] in OPTIMIZERS
    return [] if known else [f"optim: {plan['optim']}: planned as AdamW, with two float32 states of each parameter."]


def _micro(option: dict[str, Any], plan: dict[str, Any]) -> str:
    """A micro batch in what it is counted in."""
    return f"{option['tokens_per_micro_batch']:,} tokens" if plan["filled"] else str(option["micro_batch"])


def _of(plan: dict[str, Any]) -> str:
    """Which of the layouts what is below the tables is of."""
    best = plan["recommended"]
    return f"recommended, {best['name']}" if best else f"as configured, {plan['configured']}"


def disk_lines(plan: dict[str, Any]) -> list[str]:
    disk = plan["disk"]
    one = f"Disk ({_of(plan)}): {in_units(disk['checkpoint'])} a checkpoint"
    if disk["total"] is None:
        return [f"{one}, final model {in_units(disk['final_model'])}; "
                f"{in_units(disk['free'])} free. How many checkpoints there will be depends on the rows of "
                "train_file, which cannot be counted from here; give --rows, or set save_total_limit."]  # fmt: skip
    line = (f"{one} x {disk['checkpoints_at_once']} + final model "
            f"{in_units(disk['final_model'])} = {in_units(disk['total'])}; "
            f"{in_units(disk['free'])} free.")  # fmt: skip
    if disk["total"] <= disk["free"]:
        return [line]
    if "disk" not in plan["short"]:
        return [line, "This machine's disk is too small for it: see that the one of the GPUs is not."]
    fewer = "set save_total_limit, save less often, or " if disk["checkpoints_at_once"] > 1 else ""
    return [line, f"The disk is too small: {fewer}choose another output_dir."]


def time_lines(plan: dict[str, Any], given: argparse.Namespace) -> list[str]:
    times = plan["schedule"]
    if times["steps"] is None:
        return ["Time: the rows of train_file cannot be counted from here; give --rows."]
    length = "" if times["tokens_known"] else " (every row taken to be max_length long; --mean-tokens)"
    work = (f"Time ({_of(plan)}): {times['steps']:,} steps, {times['tokens']:,.0f} tokens{length}, "
            f"{times['flops']:.2e} FLOP")  # fmt: skip
    if times["rate"] is None:
        return [f"{work}: how long that takes on this CPU, a first run says; --flops or --tokens-per-second."]
    each = "" if plan["on_cpu"] else " a GPU"
    rate = "measured" if times["rate_measured"] else f"estimated at {plan['flops'] / 1e12:.3g} TFLOP/s{each}"
    lines = [f"{work}: {duration(times['seconds'])} at {times['rate']:,.0f} tokens/s, {rate}."]
    limit = plan["time_limit"] or None  # Slurm's 0 is no limit
    if "time" in plan["short"] and limit is not None:
        lines.append(f"Longer than the time limit of {duration(limit)}: {-(-times['seconds'] // limit):.0f} jobs, "
                     "each resuming the one before; or raise the limit.")  # fmt: skip
    elif limit is not None:
        lines.append(f"Within the time limit of {duration(limit)}.")
    return lines


def in_seconds(seconds: float) -> str:
    """Of a step: 1.25 s, 43.1 ms."""
    return f"{seconds:.2f} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"


def duration(seconds: float) -> str:
    """2 d 03 h, 5 h 07 min, 12 min, 40 s."""
    if seconds < 1:
        return in_seconds(seconds)
    minutes = round(seconds / 60) if seconds >= 59.5 else 0
    if minutes >= 1440:
        return f"{minutes // 1440} d {minutes % 1440 // 60:02} h"
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
