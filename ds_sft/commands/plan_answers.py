"""What `ds-sft plan` answers for one configuration on one cluster."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

from ds_sft.checkpoints.storage import nearest_folder
from ds_sft.commands.rows import count_quickly, rows_of_epoch
from ds_sft.config.keys import MUON, TORCH_ADAMW, Config
from ds_sft.config.rules import AGAINST_ADAPTERS
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
from ds_sft.plan.schedule import Schedule, measured_rate, schedule
from ds_sft.plan.shape import Shape, positions_of, read_config_json, shape_of_run
from ds_sft.ranks.host import memory_here

RATE = 150e12  # floating-point operations a second that a GPU reaches, where nobody says it


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
