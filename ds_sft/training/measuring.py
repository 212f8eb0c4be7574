"""Tells the clock of a rank where Trainer is in a step."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.engine.zero import stage
from ds_sft.model.dtype import computing_dtype
from ds_sft.ranks.collectives import barrier
from ds_sft.ranks.launch import Launch
from ds_sft.training.metrics import Throughput
from ds_sft.training.peak import device_peak
from ds_sft.training.timers import Timers


class Measuring(TrainerCallback):
    """Starts the clock with training, divides steps with it, and gives back what was timed at the end."""

    def __init__(self, throughput: Throughput, timers: Timers, launch: Launch) -> None:
        self.throughput, self.timers, self.clock, self.launch = throughput, timers, throughput.clock, launch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        barrier()
        peak = device_peak(args.device, computing_dtype(args))
        self.launch.say(f"Peak for MFU: {peak.flops / 1e12:,.3g} TFLOP/s a rank ({peak.source}).")
        self.throughput.start(peak)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.begin("optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.clock.end()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (stage(args.deepspeed) or 0) >= 2:  # ranks meet after each micro batch, to reduce its gradients
            self.clock.lap()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.clock.lap()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.timers.restore()
