"""The Trainer that saves complete checkpoints: synced and hashed beside the steps that follow, or not there at all.

A write that fails must not keep a rank from its place among the others: all learn of it, and go on or end together.
Trainer's own rotation deletes old checkpoints before the new one is complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_model
from transformers import Trainer, TrainerControl
from transformers.trainer import TRAINING_ARGS_NAME

from ds_sft.checkpoints.manifest import complete, newest_complete, sync_and_hash
from ds_sft.checkpoints.rotate import remove, rotate
from ds_sft.checkpoints.space import no_room
from ds_sft.checkpoints.trained import expect_trained_only, save_trained, trained_weights
from ds_sft.errors import UserError, error_in_words
from ds_sft.export.weights import end_answers_at
from ds_sft.ranks.collectives import barrier, gather
from ds_sft.training.continuity import Continuity

# What torch says, as a RuntimeError, when it cannot write a file; any other one (memory, a collective) is a failure.
TORCH_WRITE_ERROR = re.compile(r"PytorchStreamWriter|inline_container|unexpected pos \d|Parent directory .* not exist")


@dataclass(frozen=True)
class Unfinished:
    """A checkpoint whose files are written. A thread syncs and hashes them; then it can be completed."""

    folder: Path
    facts: dict[str, Any]
    hashed: Future[dict[str, tuple[int, str]]]


class SavingTrainer(Trainer):
    """See the module; what a manifest says beside its files is its subclass's to know."""

    control: TrainerControl

    def __init__(self, *args: Any, run: Continuity, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = run
        # Rotation is ours: Trainer's looks at names only, and with a limit of 1 deletes the newest for the best.
        self.keep_checkpoints, self.args.save_total_limit = self.args.save_total_limit, None
        self.write_troubles: list[str] = []
        self.unfinished: Unfinished | None = None  # a checkpoint that is written, synced beside the next step
        self.facts_at_end: dict[str, Any] | None = None  # of the last step, once the run's summary has changed them
        if run.freezes:
            expect_trained_only(self.model)

    def facts(self) -> dict[str, Any]:
        """What the manifest says beside its files; all ranks must call it."""
        raise NotImplementedError

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint. It is complete some steps later, or at once where no step follows."""
        self.finish_save()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        full = next(filter(None, gather(no_room(folder.parent, self.run.size))), None)
        if full:
            self._give_up(folder, full)
            return
        if self.run.site.leader:
            remove(folder)  # what an earlier start left of it
        barrier()
        self.write_troubles.clear()
        self._record(lambda: super(SavingTrainer, self)._save_checkpoint(model, trial))
        self._record(lambda: self._complete_on_each_node(folder))
        facts = self.facts_at_end or self.facts()
        trouble = next((known[0] for known in gather(self.write_troubles) if known), None)  # also: all have written
        if trouble is not None:
            self._discard(folder, trouble)
            barrier()
            return
        pool = ThreadPoolExecutor(1)
        self.unfinished = Unfinished(folder, facts, pool.submit(sync_and_hash, folder, self.run.site))
        pool.shutdown(wait=False)
        if self.control.should_training_stop:
            self.finish_save()

    @property
    def lacks_last_step(self) -> bool:
        """Whether no checkpoint has the last step; all ranks must ask."""
        newest = newest_complete(Path(self.args.output_dir))
        return gather(newest is None or newest.step != self.state.global_step)[0]

    def save_last_step(self) -> None:
        """Save the last step, unless it is saved; all ranks must call it."""
        if self.lacks_last_step:
            # The summary is made again after the resume.
            self.state.log_history = [entry for entry in self.state.log_history if "train_runtime" not in entry]
            self._save_checkpoint(self.model, None)
            self.finish_save()

    def finish_save(self) -> None:
        """Complete the checkpoint that waits for it, if any; all ranks must call it."""
        if self.unfinished is None:
            return
        saved, self.unfinished = self.unfinished, None
        trouble = complete(saved.folder, saved.facts, self.run.site, hashed=saved.hashed)
        if trouble is not None:
            self._discard(saved.folder, trouble)
        elif self.run.site.leader:
            best = self.state.best_model_checkpoint
            rotate(saved.folder.parent, self.keep_checkpoints, Path(best) if best else None)
        barrier()

    def _discard(self, folder: Path, trouble: str) -> None:
        """Remove what was written of a checkpoint that cannot be completed; all ranks must call it."""
        if self.run.site.leader:
            remove(folder)
        self._give_up(folder, trouble)

    def _record(self, write: Callable[[], Any]) -> None:
        """Let a write fail without leaving this rank's place among the others; `complete` tells them."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            self.write_troubles.append(error_in_words(error))
        except RuntimeError as error:
            if not TORCH_WRITE_ERROR.search(str(error)):
                raise
            self.write_troubles.append(error_in_words(error))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer's; of a model with frozen weights those that are trained, see `checkpoints/trained.py`."""
        if not self.run.freezes:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        weights = trained_weights(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._record(lambda: self._save_trained(weights, Path(output_dir or self.args.output_dir)))

    def _save_trained(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        save_trained(self.model, weights, folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._record(lambda: self._save_with_ends(Path(output_dir or self.args.output_dir), state_dict))

    def _save_with_ends(self, folder: Path, state_dict: dict[str, Any] | None) -> None:
        """As Trainer's; who takes a checkpoint for a model finds where its answers end."""
        super()._save(str(folder), state_dict)
        if self.args.should_save:  # Trainer calls this on every rank, and others have no folder yet
            end_answers_at(self.run.end_ids, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            self._record(lambda: super(SavingTrainer, self)._save_optimizer_and_scheduler(output_dir))
            return
        self._save_engine(output_dir)
        if self.args.should_save:
            self._record(lambda: torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt"))

    def _save_engine(self, output_dir: str) -> None:
        """DeepSpeed's part: a write that fails must not keep this rank from the barriers that follow it."""
        engine = self.model_wrapped
        writers = [(engine.checkpoint_engine, "save"), (engine.checkpoint_engine, "makedirs"),
                   (engine, "_copy_recovery_script")]  # fmt: skip
        for owner, name in writers:
            setattr(owner, name, self._recorded(getattr(owner, name)))
        if self.run.freezes:  # its scripts would make a model of the trained weights alone, under names nobody knows
            engine._copy_recovery_script = lambda folder: None
        try:
            engine.save_checkpoint(output_dir, save_latest=False, exclude_frozen_parameters=self.run.freezes)
        finally:
            for owner, name in writers:
                delattr(owner, name)

    def _recorded(self, write: Callable[..., Any]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._record(lambda: write(*args, **kwargs))

    def _complete_on_each_node(self, folder: Path) -> None:
        """What a file system of its own needs to resume and upstream leaves on rank 0's only."""
        if not self.run.site.leader:
            return
        if self.is_deepspeed_enabled:
            if not self.args.save_only_model:  # else there is no state that it could name
                (folder / "latest").write_text(f"global_step{self.model_wrapped.global_steps}", encoding="utf-8")
        elif not (self.run.site.launch.is_main or self.run.freezes):
            save_model(self.model, str(folder / "model.safetensors"))

    def _give_up(self, folder: Path, trouble: str) -> None:
        """End the run or go on without this checkpoint, as `on_save_error` says; on all ranks."""
        older = newest_complete(folder.parent)
        message = f"{folder} could not be saved: {trouble}; " + (
            f"the newest complete one is {older.path}" if older else "there is no older one"
        )
        last = folder.name == f"checkpoint-{self.state.global_step}" and self.run.stop.decided  # none comes after it
        if self.run.on_save_error == "stop" or last:
            raise UserError(f"{message} (on_save_error: continue would train on)")
        self.run.site.launch.say(f"Warning: {message}. Training on (on_save_error: continue).")
