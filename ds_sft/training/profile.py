"""`profile_steps: A-B`: a torch profiler trace of some steps, for Perfetto (ui.perfetto.dev) or chrome://tracing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, supported_activities
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.config.keys import Config
from ds_sft.config.values import step_range
from ds_sft.ranks.launch import Launch, print_line

TOP = 10  # operators in the table
FOLDER = "profile"


def profiling(config: Config, launch: Launch) -> list[TrainerCallback]:
    """The callback that profiles, where the run asks for one."""
    steps = step_range(config.profile_steps) if config.profile_steps else None
    return [Profiling(steps, config.output_dir / FOLDER, launch)] if steps else []


class Profiling(TrainerCallback):
    """Profiles the ranks of the first node, a file each, and shows on rank 0 which operators took the time."""

    def __init__(self, steps: tuple[int, int], folder: Path, launch: Launch) -> None:
        self.first, self.last = steps
        self.folder, self.launch = folder, launch
        self.profiler: profile | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.global_step < self.first <= state.max_steps:
            where = f"this start has steps {state.global_step + 1:,} to {state.max_steps:,}"
            self.launch.say(f"Warning: profile_steps: {self.first}-{self.last}: no trace is written, {where}.")
        self._start_before(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.profiler is not None and state.global_step >= self.last:
            self._finish()
        self._start_before(state.global_step + 1)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.profiler is not None:  # stopped before the last of the steps
            self._finish()

    def _start_before(self, step: int) -> None:
        if step == self.first and self.launch.rank == self.launch.local_rank:
            wanted = {ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()  # type: ignore[no-untyped-call]
            self.profiler = profile(activities=wanted)
            self.profiler.start()

    def _finish(self) -> None:
        """Write the trace; a full disk is said, and no reason to end the run."""
        profiler, self.profiler = self.profiler, None
        assert profiler is not None
        profiler.stop()
        path = self.folder / f"steps-{self.first}-{self.last}-rank{self.launch.rank}.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            print_line(f"profile_steps: {path} is not written: {error}")
            return
        self.launch.say(
            f"Profile: {path}, for https://ui.perfetto.dev. Operators by their own time:\n{operator_table(profiler)}"
        )


def operator_table(profiler: profile) -> str:
    """The operators that took most time by themselves, on the device where there is one."""
    on_gpu = ProfilerActivity.CUDA in supported_activities()  # type: ignore[no-untyped-call]
    rows = [
        (average.self_device_time_total if on_gpu else average.self_cpu_time_total, average.count, average.key)
        for average in profiler.key_averages()
    ]
    total = sum(microseconds for microseconds, _, _ in rows) or 1
    lines = [f"{microseconds / total:7.1%} {microseconds / 1e3:10,.1f} ms {count:8,} x  {key}"
             for microseconds, count, key in sorted(rows, reverse=True)[:TOP]]  # fmt: skip
    return "\n".join(lines)
