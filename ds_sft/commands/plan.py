"""`ds-sft plan [CONFIG]`: what a run will need, before it is queued.

ds-sft plan ds_configs/qwen3_dialog.yaml --nodes 2 --gpus-per-node 8 --gpu-memory 80GB
ds-sft plan ds_configs/qwen3_dialog.yaml --max_length 8192 --json        # keys of the run are flags here too
ds-sft plan ds_configs/qwen3_dialog.yaml --write planned.yaml            # the recommended configuration
ds-sft plan ds_configs/demo.yaml --gpus-per-node 0                       # this machine's CPU, one process
ds-sft plan ds_configs/qwen3_dialog.yaml --sweep nodes=1..128 --plot sweep.png

The exit code is 1 if nothing fits, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from ds_sft.checkpoints.storage import nearest_folder
from ds_sft.commands.flags import FlagParser
from ds_sft.commands.rows import count_quickly, rows_of_epoch
from ds_sft.config.change import with_changes
from ds_sft.config.keys import MUON, TORCH_ADAMW, Config
from ds_sft.config.read import config_file, load_config
from ds_sft.config.rules import AGAINST_ADAPTERS
from ds_sft.config.upstream_keys import ALIASES
from ds_sft.engine.zero import configured_engine
from ds_sft.errors import UserError
from ds_sft.plan.activations import activations
from ds_sft.plan.cost import Hardware, hiding_bandwidth, traffic
from ds_sft.plan.disk import checkpoint_bytes, export_bytes, final_bytes, trained_checkpoint_bytes
from ds_sft.plan.fits import Card, Reach, reaches
from ds_sft.plan.layouts import (
    LAYOUTS,
    NAMED,
    Option,
    engine_of,
    name_of,
    options,
    run_of,
    shipped_engine,
)
from ds_sft.plan.optimizer import state_bytes
from ds_sft.plan.recommend import Remedy, Way, group_sizes, recommend, remedies, way_of, ways
from ds_sft.plan.rope import how_to_scale, scaled
from ds_sft.plan.run import Engine
from ds_sft.plan.schedule import Schedule, measured_rate, schedule, slurm_seconds
from ds_sft.plan.shape import Shape, positions_of, read_config_json, shape_of_run
from ds_sft.ranks.host import memory_here

UNITS = {
    "": 1.0,
    "K": 1e3,
    "M": 1e6,
    "G": 1e9,
    "T": 1e12,
    "P": 1e15,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
TOO_LITTLE = 1  # exit code
ANOTHER_MACHINE = {"--nodes", "--gpus-per-node", "--gpu-memory"}  # flags that describe one; its disk is not here
RATE = 150e12  # floating-point operations a second that a GPU reaches, where nobody says it


def main(argv: Sequence[str]) -> int:
    """Plan a run; `TOO_LITTLE` where nothing fits, or the disk or the time limit are short, 2 (raised) for a mistake.

    Raises:
        UserError: a mistake in the configuration or a flag, or a model that cannot be planned.
    """
    flags = parser()
    given, rest = flags.parse_known_args(list(argv))
    if given.plot and not given.sweep:
        raise UserError("--plot: draws a sweep: give --sweep nodes=1..128 as well")
    if given.write and given.sweep:
        raise UserError("--write: a sweep recommends nothing: leave out --sweep or --write")
    if not given.gpus_per_node and (given.sweep or given.nodes > 1):
        flag = "--sweep" if given.sweep else "--nodes"
        raise UserError(f"--gpus-per-node 0: a plan for a CPU is of one process: leave out {flag}")
    config = load_config(rest, prog="ds-sft plan CONFIG", flags=flags.flags)
    given.elsewhere = given.gpus_per_node > 0 and bool(ANOTHER_MACHINE & {word.partition("=")[0] for word in argv})
    plan = Plan(config, given)
    if given.sweep:
        from ds_sft.commands.sweep import show_sweep

        return show_sweep(plan.base, plan.hardware, given.sweep, given.plot, as_json=given.json)
    found = plan.to_dict()
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        from ds_sft.commands.plan_tables import show_plan

        show_plan(found, given)
    if given.write and plan.best:
        write_recommended(plan, rest, given.write)
    elif given.write:
        print(f"--write {given.write}: nothing is written, as nothing fits", file=sys.stderr)
    if not found["short"]:
        return 0
    print(f"ds-sft plan: too little {' and '.join(found['short'])} for this run", file=sys.stderr)
    return TOO_LITTLE


def parser() -> FlagParser:
    made = FlagParser("plan", __doc__)  # CONFIG is `load_config`'s: argparse would take the value of a key for it
    made.add_argument("--nodes", type=count, default=1, help="[%(default)s]")
    made.add_argument("--gpus-per-node", type=count_or_none, default=8, help="0: one process on a CPU [%(default)s]")
    made.add_argument("--gpu-memory", type=with_unit, default=size("80GB"), metavar="80GB", help="of one GPU [80GB]")
    made.add_argument(
        "--host-memory", type=with_unit, metavar="512GB", help="of one node [not checked; of a CPU: what is here]"
    )
    made.add_argument("--interconnect", type=with_unit, default=25e9, metavar="25GB",
                      help="bytes a second and GPU between nodes, reached: its card's, or its part of a shared one's; "
                           "what `ds-sft doctor` measures, divided by a node's GPUs [25GB: 200 Gbit/s]")  # fmt: skip
    made.add_argument("--nvlink", type=with_unit, default=200e9, metavar="200GB",
                      help="bytes a second and GPU inside a node, reached [200GB]")  # fmt: skip
    made.add_argument("--host-link", type=with_unit, default=20e9, metavar="20GB",
                      help="bytes a second and GPU to host memory [20GB]")  # fmt: skip
    made.add_argument("--flops", type=flops, metavar="150T",
                      help="floating-point operations a second that a GPU or this CPU reaches [GPU: 150T]")  # fmt: skip
    made.add_argument(
        "--tokens-per-second", type=size, help="of all GPUs, measured [run.json of output_dir, else --flops]"
    )
    made.add_argument("--rows", type=count, help="of training [counted in train_file]")
    made.add_argument("--mean-tokens", type=size, help="of a row [data_report.json of output_dir, else max_length]")
    made.add_argument("--time-limit", type=slurm_seconds, metavar="D-HH:MM:SS", help="of the job, as Slurm writes it")
    made.add_argument("--write", type=Path, metavar="FILE.yaml", help="save the recommended configuration")
    made.add_argument("--json", action="store_true", help="everything as JSON, in bytes and seconds")
    made.add_argument("--sweep", metavar="nodes=1..128", help="scaling instead: memory, time, efficiency by nodes")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the sweep (pip install matplotlib)")
    return made


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number above 0")
    return int(text)


def count_or_none(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number")
    return int(text)


def size(text: str) -> float:
    """A number with a unit: 80GB and 80GiB differ as they should."""
    found = re.fullmatch(r"([\d.]+)\s*([KMGTP]?I?)B?(?:/S)?", text.strip().upper())
    if not found or found[1].count(".") > 1 or float(found[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0 such as 80GB, 24GiB or 150T")
    return float(found[1]) * UNITS[found[2]]


def with_unit(text: str, unit: str = "GB") -> float:
    """A size or a rate: 80 alone would be 80 bytes."""
    if text.strip()[-1:].isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number with its unit, such as {text.strip()}{unit}")
    return size(text)


def flops(text: str) -> float:
    """400TFLOP/s, 400 TFLOPS, 400T and 4e14 are one rate; 400 alone would be nobody's."""
    rate = re.sub(r"FLOPS?(/S)?$", "", text.strip().upper()).strip()
    plain = re.fullmatch(r"\d+(\.\d+)?(E\+?\d+)?", rate)
    if plain and float(rate) >= UNITS["G"]:
        return float(rate)
    if plain:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number with its unit, such as {rate}T")
    return size(rate)


class Plan:
    """The answers for one configuration on one cluster."""

    def __init__(self, config: Config, given: argparse.Namespace) -> None:
        self.config, self.given = config, given
        self.shape = shape_of_run(config)
        self.on_cpu = given.gpus_per_node == 0
        self.host_memory = given.host_memory or (memory_here() if self.on_cpu else None)
        self.hardware = Hardware(nodes=given.nodes, gpus_per_node=given.gpus_per_node or 1, flops=given.flops or RATE,
                                 inside=given.nvlink, between=given.interconnect, host=given.host_link)  # fmt: skip
        self.configured, self.base = (
            on_cpu(config, self.shape) if self.on_cpu else layouts(config, self.shape, self.hardware.ranks)
        )
        limits = (self.hardware, given.gpu_memory, self.host_memory)
        self.options = options(self.base, *limits)
        self.groups = group_sizes(config, self.base[self.configured], self.hardware.gpus_per_node)
        self.best = recommend(self.base, *limits, groups=self.groups, filled=config.fills_batches)

    @property
    def chosen(self) -> Option:
        """The recommended option, else the configured one."""
        return self.best or next(o for o in self.options if o.name == self.configured)

    @cached_property
    def rows(self) -> int | None:
        """Of an epoch; None where they cannot be counted from here, or are not there yet."""
        try:
            return rows_of_epoch(self.config, count_quickly)
        except UserError:
            return None

    def reaches(self) -> list[Reach]:
        """The longest row and the largest model of each layout in each way; none for a CPU."""
        if self.on_cpu:
            return []
        card = Card(self.hardware.gpus_per_node, self.given.gpu_memory, self.host_memory)
        every = [way for equals in ways(self.groups) for way in equals]
        asked = every if self.given.json else [way for way in every if self._is_shown(way)]
        return [*reaches(lambda shape: layouts(self.config, shape, self.hardware.ranks)[1], self.shape, asked, card,
                         narrow_too=may_be_narrow(self.config))]  # fmt: skip

    def _is_shown(self, way: Way) -> bool:
        """Whether the table has a column for it: of larger groups for what takes least memory alone."""
        return way.sequence == self.config.sequence_parallel or way.inputs_on_host

    def remedies(self) -> list[Remedy]:
        """What would fit where nothing does."""
        if self.best is not None or self.on_cpu:
            return []
        found = [*remedies(lambda ranks: layouts(self.config, self.shape, ranks)[1], self.hardware,
                           self.given.gpu_memory, self.host_memory, groups=self.groups,
                           filled=self.config.fills_batches, narrow_too=may_be_narrow(self.config))]  # fmt: skip
        return [*found, *islice(self._adapters(), 1)]

    def _adapters(self) -> Iterator[Remedy]:
        """What would fit of an adapter, as it is and beside weights in 4 bits."""
        config = self.config
        optim = config.training.get("optim", TORCH_ADAMW[0])
        if config.adapter != "none" or optim == MUON or any(getattr(config, name) for name in AGAINST_ADAPTERS):
            return
        for quantization in (config.quantization, "nf4"):
            other = replace(config, adapter="lora", quantization=quantization, optimizer_dtype="float32")
            configured, base = layouts(other, self.shape, self.hardware.ranks)
            groups = group_sizes(other, base[configured], self.hardware.gpus_per_node)
            best = recommend(base, self.hardware, self.given.gpu_memory, self.host_memory, groups=groups,
                             filled=other.fills_batches)  # fmt: skip
            if best is not None:
                yield Remedy(("adapter: lora" + (", quantization: nf4" if quantization == "nf4" else ""),), best)

    def schedule(self) -> Schedule:
        given, best = self.given, self.chosen
        rate = given.tokens_per_second or measured_rate(self.config, self.hardware.ranks)
        found = schedule(self.config, best.run, self.hardware, rows=given.rows or self.rows,
                         mean_tokens=given.mean_tokens, rate=rate)  # fmt: skip
        return found if rate or self._knows_speed else replace(found, seconds=None, rate=None)

    @property
    def _knows_speed(self) -> bool:
        """Of a CPU nothing tells it but --flops; GPUs have a usual one."""
        return not self.on_cpu or self.given.flops is not None

    def disk(self) -> dict[str, int | None]:
        """Bytes that the run writes, and what is free; None where only its rows would tell."""
        training, run, times = self.config.training, self.chosen.run, self.schedule()
        kept = state_bytes(self.config)
        stage, trained, twice = run.engine.stage, run.weights.number_trained, run.weights.twice
        final = export_bytes(self.shape, 4 if self.config.export_dtype == "float32" or not run.half else 2)
        if run.choice.whole:
            one = checkpoint_bytes(self.shape, stage=stage, weight_bytes=run.weight, kept=kept)
        else:
            one = trained_checkpoint_bytes(trained, twice, stage=stage, weight_bytes=run.weight,
                                           kept=kept)  # fmt: skip
            final = final_bytes(final, trained, twice, self.config)
        number = times.checkpoints
        if number != 0 and training.get("save_total_limit"):
            kept = training["save_total_limit"] + 1  # the new one is written before the oldest goes
            number = kept if number is None else min(number, kept)
        return {"checkpoint": one, "checkpoints_at_once": number, "final_model": final,
                "total": None if number is None else one * number + final,
                "free": shutil.disk_usage(nearest_folder(self.config.output_dir)).free}  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Everything, for --json: bytes, seconds, bytes a second."""
        times, disk, positions = self.schedule(), self.disk(), positions_of_run(self.config, self.shape)
        return {
            "model": {
                "parameters": self.shape.parameters,
                "active": self.shape.active,
                "experts": self._experts(),
                "trained": self.chosen.run.weights.number_trained,
                "tied": self.shape.tied,
                "family": self.shape.family,
                "positions": positions,
            },
            "longer_rows": scaling_of_run(self.config, positions),
            "adapter": self.config.adapter,
            "quantization": self.config.quantization,
            "optim": self.config.training.get("optim", TORCH_ADAMW[0]),
            "max_length": self.config.max_length,
            "ranks": self.hardware.ranks,
            "on_cpu": self.on_cpu,
            "flops": self.hardware.flops if self._knows_speed else None,
            "host_memory": self.host_memory,
            "ring_bandwidth": self.hardware.ring if self.hardware.nodes > 1 else self.hardware.inside,
            "configured": self.configured,
            "options": [self._row(o) for o in self.options],
            "filled": self.config.fills_batches,
            "autocast": bool(self.config.training.get("fp16") or self.config.training.get("torch_compile")),
            "recommended": self._row(self.best) if self.best else None,
            "reaches": [_reach(found) for found in self.reaches()],
            "remedies": [
                {"write": [*found.words, keys_of(found.best)], **self._row(found.best)} for found in self.remedies()
            ],
            "disk": disk,
            "schedule": vars(times),
            "time_limit": self.given.time_limit,
            "short": self._short(disk, times),
        }

    def _experts(self) -> dict[str, int] | None:
        """Of a mixture: how many a layer has, how many a token chooses, and how many layers have them."""
        found = self.shape.experts
        if found is None:
            return None
        return {"number": found.number, "chosen": found.chosen, "layers": len(found.layers)}

    def _short(self, disk: dict[str, int | None], times: Schedule) -> list[str]:
        """What there is too little of, as far as it is known: memory, disk, time."""
        limit = self.given.time_limit or None  # Slurm's 0 is no limit
        lacks = {
            "memory": self.best is None,
            "disk": (disk["total"] or 0) > (disk["free"] or 0) and not self.given.elsewhere,
            "time": limit is not None and times.seconds is not None and times.seconds > limit,
        }
        return [name for name, lack in lacks.items() if lack]

    def _row(self, o: Option) -> dict[str, Any]:
        sent = traffic(o.run, self.hardware.gpus_per_node)
        return {
            "name": o.name,
            "micro_batch": o.run.micro_batch,
            "accumulation": o.run.accumulation,
            "checkpointing": o.run.checkpointing,
            "activation_checkpointing": way_of(o.run).word,
            "sequence_parallel": o.run.sequence,
            "groups": o.run.groups,
            "fullest_moment": o.memory.moment,
            "gpu": {**o.memory.device, "Python and its libraries" if self.on_cpu else "allocator margin": o.margin},
            "gpu_total": o.gpu_bytes,
            "activations": {
                "checkpointing": activations(o.run, checkpointing=True),
                "without": activations(o.run, checkpointing=False),
            },
            "tokens_per_micro_batch": o.run.batch_tokens,
            "host": o.memory.host,
            "node_total": o.node_bytes,
            "fits": o.fits,
            "sent_per_step": sent.total,
            "hiding_bandwidth": hiding_bandwidth(o.run, self.hardware),
            "step_seconds": vars(o.step) if self._knows_speed else None,
        }


def positions_of_run(config: Config, shape: Shape) -> int | None:
    """Positions that the model has in this run: with `rope_scaling` those that it reaches.

    Raises:
        UserError: that key is not for this model.
    """
    return shape.positions if config.rope_scaling is None else positions_of(config_in_run(config))


def config_in_run(config: Config) -> dict[str, Any]:
    """The model's `config.json`, with `rope_scaling` in it."""
    found, _ = read_config_json(config.model_name_or_path)
    if config.rope_scaling is None:
        return found
    own = {name: value for name, value in found.items() if name != "rope_scaling"}  # else it replaces the new one
    return own | scaled(found, config.rope_scaling)


def scaling_of_run(config: Config, positions: int | None) -> str | None:
    """What to write for rows of `max_length`; None where they are within the positions, or nothing reaches them."""
    beyond = positions is not None and config.max_length > positions
    return how_to_scale(config_in_run(config), config.max_length) if beyond else None


def keys_of(best: Option) -> str:
    """The layout and the way of an option, as keys of a run."""
    engine = f"deepspeed: {NAMED[best.name]}, " if best.name in NAMED else ""
    return engine + way_of(best.run).keys


def _reach(found: Reach) -> dict[str, Any]:
    """With the keys to write."""
    return {
        "name": found.layout,
        "optimizer_dtype": "bfloat16" if found.narrow else "float32",
        "activation_checkpointing": found.way.word,
        "sequence_parallel": found.way.sequence,
        "longest_row": found.longest,
        "largest_model": found.largest,
    }


def may_be_narrow(config: Config) -> bool:
    """Whether the states of its optimizer could be bfloat16."""
    optim = config.training.get("optim", TORCH_ADAMW[0])
    return bool(config.training.get("bf16")) and config.adapter == "none" and optim in TORCH_ADAMW


def layouts(config: Config, shape: Shape, ranks: int) -> tuple[str, dict[str, Any]]:
    """The configured layout's name, and each layout's memory question; the configured one has its own options."""
    engines = {name: shipped_engine(name, shape) for name in LAYOUTS}
    configured = "no DeepSpeed"
    if (found := configured_engine(config)) is not None:
        engine = engine_of(found.get("zero_optimization") or {}, shape)
        configured = name_of(engine)
        engines[configured] = engine
    runs = {name: run_of(config, shape, engine, ranks) for name, engine in engines.items()}
    return configured, {name: run for name, run in runs.items() if name == configured or not run.refused}


def on_cpu(config: Config, shape: Shape) -> tuple[str, dict[str, Any]]:
    """As `layouts`, for one process on a CPU, which no launcher starts and DeepSpeed has no part in."""
    name = "no DeepSpeed"
    return name, {name: run_of(config, shape, Engine(stage=None), 1, lazy=True)}


def write_recommended(plan: Plan, words: Sequence[str], path: Path) -> None:
    """Save the recommended configuration: the user's file, in which only changes what is recommended or was a flag.

    Raises:
        UserError: the file cannot be written.
    """
    wanted = recommended(plan)
    then, now = plan.config.to_dict(), wanted.to_dict()
    flags = {ALIASES.get(name, name) for name in (word[2:].partition("=")[0] for word in words if word[:2] == "--")}
    changes = {name: now.get(name) for name in then | now if name in flags or then.get(name) != now.get(name)}
    file = file_among(words)
    text = "{}" if file is None else file.read_text(encoding="utf-8")
    try:
        path.write_text(with_changes(text, changes), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write: {path}: cannot be written: {error.strerror}") from None
    print(f"Saved the recommended configuration: {path}", file=sys.stderr)


def file_among(words: Sequence[str]) -> Path | None:
    """The run's YAML in a command line that was read before; None where all keys are flags."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.partition("=")[0] == "--config":
            return config_file(word.partition("=")[2] or after)
    return config_file(words[0]) if words and not words[0].startswith("--") else None


def recommended(plan: Plan) -> Config:
    """The configuration with the recommended layout, micro batch, accumulation and checkpointing."""
    best, config = plan.chosen, plan.config
    run, training = best.run, dict(config.training)
    engine = training.get("deepspeed") if best.name == plan.configured else None
    if engine is None and best.name in NAMED:
        engine = NAMED[best.name]
    checkpointing = "offload" if run.inputs_on_host else run.checkpointing
    training |= {"gradient_accumulation_steps": run.accumulation, "activation_checkpointing": checkpointing,
                 "deepspeed": engine}  # fmt: skip
    most = run.max_tokens
    if config.fills_batches:
        most = run.batch_tokens
    else:
        training["per_device_train_batch_size"] = run.micro_batch
    return replace(config, max_tokens_per_batch=most, sequence_parallel=run.sequence, training=training)
