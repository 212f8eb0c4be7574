"""The Trainer that stops when asked, and continues as if it had never stopped.

Trainer's own restart loses what is between two log entries, measures again what was measured, and trains a step too
many from a checkpoint of the last step. `saving.py` has the checkpoints themselves.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput, set_seed

from ds_sft.checkpoints.identity import EVAL_DATA
from ds_sft.checkpoints.trained import is_converted, load_converted, load_trained
from ds_sft.config.keys import OUR_ORDERS
from ds_sft.data.micro_batches import Batching
from ds_sft.model.parts import parts_of
from ds_sft.model.quantized import elements
from ds_sft.plan.weights import met_by_token
from ds_sft.ranks.collectives import gather, sum_over_ranks
from ds_sft.ranks.stop import Stopped, any_rank
from ds_sft.training.callbacks import ENDS, has_own, restore_states, want, wants
from ds_sft.training.continuity import Continuity
from ds_sft.training.flops import factors, share_of_experts
from ds_sft.training.hyperparameters import Asked
from ds_sft.training.saving import SavingTrainer


@contextmanager
def quiet_logger(logger: str) -> Iterator[None]:
    """Let a library's logger keep its warnings to itself."""
    theirs = logging.getLogger(logger)
    before = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(before)


class ResumableTrainer(SavingTrainer):
    """See the module; `StepBoundary` must be its last callback."""

    def __init__(
        self, *args: Any, run: Continuity, batching: Batching, patience: int | None = None, **kwargs: Any
    ) -> None:
        """`patience`: validations without a new best one, in a row, after which training ends; None: it does not."""
        super().__init__(*args, run=run, **kwargs)
        self.batching, self.patience, self.parts = batching, patience, parts_of(self.model)
        self.tokens_seen = 0  # this rank's, without padding
        self.evaluation_due = False  # the run stopped where an evaluation was to come
        self.ended_before_stop: bool | None = None  # by a callback, when the run was asked to stop; None: it was not
        self.flops_per_token = 0.0  # of all parameters but embeddings, once counted
        self.skipped_steps = 0  # whose update was left out (training/nonfinite.py)
        self.skipped_unlogged = 0  # of them since the last log entry
        self.frozen: list[tuple[str, torch.nn.Parameter]] = []  # those that no optimizer has, once there is one
        if run.resumed is not None:
            self.evaluation_due = self.args.eval_on_start = bool(run.resumed.manifest["evaluation_due"])

    # ---- Continuing

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """As Trainer's, but a tied weight is not missing: checkpoints have it once."""
        tied = set(self.model.all_tied_weights_keys)
        missing = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self._load_ourselves(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_ourselves(self, folder: Path) -> bool:
        """Load weights that Trainer would not find in a checkpoint; False: it would."""
        if self.run.freezes:
            load_trained(self.model, folder)
        elif is_converted(self.model):
            load_converted(self.model, folder)
        else:
            return False
        return True

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        if self.is_deepspeed_enabled or not self._load_ourselves(best):
            super()._load_best_model()

    def begin_training(self) -> None:
        """Called once, when there is an engine and an optimizer, and before the first step."""
        self.frozen = [(name, p) for name, p in self.model.named_parameters() if not p.requires_grad]
        self.restore_progress()

    def require_frozen(self) -> None:
        """See that no weight was unfrozen since then: the optimizer does not have it, and it would never move."""
        unfrozen = [name for name, parameter in self.frozen if parameter.requires_grad]
        assert not unfrozen, f"unfrozen after the optimizer was made, so it would not learn: {', '.join(unfrozen[:3])}"

    def restore_progress(self) -> None:
        """Take up what Trainer forgets: the loss since the last log entry, the sums over the run."""
        if self.run.resumed is None:
            return
        known = self.run.resumed.manifest
        pending = known["loss_pending"]  # of each rank
        same = len(pending) == self.args.world_size
        self._tr_loss.fill_(pending[self.args.process_index] if same else sum(pending) / len(pending))
        self._globalstep_last_logged = known["last_logged_step"]
        self._total_loss_scalar = known["loss_total"]
        self.skipped_steps, self.skipped_unlogged = known.get("skipped_steps", (0, 0))
        self.tokens_seen = known["tokens"] if self.args.process_index == 0 else 0
        routing = self.parts.routing
        if routing is not None and known.get("routing"):
            routing.restore(known["routing"], is_main=self.args.process_index == 0)

    @property
    def other_world_size(self) -> bool:
        """Whether the checkpoint to continue from is of another number of ranks."""
        return self.run.resumed is not None and self.run.resumed.manifest["world_size"] != self.args.world_size

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled and isinstance(self.optimizer, AcceleratedOptimizer):
            # What transformers' schedules with an end of their own (lr_end, min_lr) read, and ZeRO's optimizers lack.
            made = self.optimizer.optimizer
            made.defaults = getattr(made, "defaults", {"lr": self.args.learning_rate})
        scheduler = super().create_scheduler(*args, **kwargs)
        # For a DeepSpeed file's own optimizer a copy of this trainer is asked first, with that as an argument.
        if not (args[1:] or kwargs.get("optimizer")):
            self.asked = Asked.of(self.optimizer, scheduler)  # the optimizer is complete, and nothing is loaded yet
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # DeepSpeed has loaded its part by now
        if checkpoint is None:
            return
        if self.other_world_size and self.is_deepspeed_enabled:
            self._mend_universal_load(self.model_wrapped.optimizer.optimizer)
        self.asked.apply(self.optimizer, self.lr_scheduler)

    def _mend_universal_load(self, optimizer: torch.optim.Optimizer) -> None:
        """Undo an error of DeepSpeed 0.19.8 in loading a universal checkpoint under ZeRO-3.

        All parameter groups got one and the same `step` tensor, which Adam then advances once for every group. (They
        also got the options of the first group, biases and norms its weight decay: `Asked.apply` sets them.)
        """
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.other_world_size:
            super()._load_rng_state(checkpoint)
        else:  # another number of ranks: the saved states are of others
            set_seed(self.args.seed + self.state.global_step)

    @property
    def deals_rows(self) -> bool:
        """Whether `batching` says which rows make which step, and not a sampler of Trainer's own."""
        return self.args.train_sampling_strategy in OUR_ORDERS

    def position(self, step: int) -> tuple[int, int]:
        """The epoch under way after a step of the run, and the steps of it that are done."""
        return self.batching.position(step) if self.deals_rows else divmod(step, self.step_boundary.steps_an_epoch)

    def restate_epoch(self) -> None:
        """Trainer's share of an epoch is one of its steps; where these are of two sizes, rows tell it."""
        epoch, steps = self.position(self.state.global_step)
        if self.deals_rows and steps and self.batching.seam.rows and epoch == self.batching.seam.epoch:
            self.state.epoch = epoch + self.batching.seam_at(self.state.global_step).rows / len(self.batching.lengths)

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> tuple[Any, ...]:
        """As Trainer's, but epochs need not have equally many steps."""
        epochs, *between, steps = super().set_initial_training_values(args, dataloader)
        if self.deals_rows:
            steps = args.max_steps if args.max_steps > 0 else self.batching.steps(args.num_train_epochs)
            epochs = self.batching.position(steps - 1)[0] + 1
        return epochs, *between, steps

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        with quiet_logger("transformers.trainer_utils"):  # a warning that the checkpoint's cadence would hold
            begin: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        restore_states(self.callback_handler.callbacks, self.state.stateful_callbacks)
        if EVAL_DATA in self.run.changed:  # other rows measured the best until now
            self.state.best_metric = self.state.best_global_step = self.state.best_model_checkpoint = None
        if self.deals_rows:
            epoch, steps = self.position(self.state.global_step)
            return epoch, steps * self.args.gradient_accumulation_steps
        return begin

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        # Resumed from the last step: Trainer would take one more.
        if self.state.global_step >= self.state.max_steps or self.is_past_best():
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # a callback has stopped it at the step that it was resumed from
            return
        if self.deals_rows:
            kwargs["num_update_steps_per_epoch"] = self.batching.steps_of(epoch)
            kwargs["steps_in_epoch"] = len(self.batching.epoch(epoch).computed) // self.batching.ranks
        super()._run_epoch(epoch=epoch, **kwargs)

    def is_past_best(self) -> bool:
        """Whether so many validations as `patience` says have come since the best one; the history has them all."""
        best = self.state.best_global_step
        if self.patience is None or best is None:
            return False
        measured = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry}
        return len([step for step in measured if step > best]) >= self.patience

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best: bool = super()._determine_best_metric(metrics, trial)
        if self.is_past_best() and self.state.global_step < self.state.max_steps:
            self.control.should_training_stop = True
            self.run.site.launch.say(
                f"Training ends early, after step {self.state.global_step:,} of {self.state.max_steps:,}: no "
                f"validation was better than that after step {self.state.best_global_step:,} "
                f"(early_stopping_patience: {self.patience})."
            )
        return is_best

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        if self.evaluation_due:  # at the start, for the step that the run stopped at
            self.evaluation_due = False
            self._determine_best_metric(metrics, None)
            if self.state.best_global_step == self.state.global_step and self.run.resumed is not None:
                self.state.best_model_checkpoint = str(self.run.resumed.path)
        return metrics

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate; its own counts the parameters that ZeRO-3 has gathered at the moment."""
        if not self.flops_per_token:
            embeddings = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
            met = share_of_experts(self.model) or 1.0
            counted = (found for found in factors(self.model) if id(found[1]) not in embeddings)
            self.flops_per_token = sum(factor * elements(p) * met_by_token(name, met) for name, p, factor in counted)
        return int(inputs["input_ids"].numel() * self.flops_per_token)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs:  # of the run, not of this start
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self.skipped_steps, 1)
        super().log(logs, start_time)

    # ---- Stopping

    def meet(self, control: TrainerControl) -> tuple[str | None, bool]:
        """Why to stop here, if any rank was asked to, and whether a checkpoint waits that all have synced and hashed.

        What a callback wants of `control` on one rank is from here on wanted on all. All ranks must ask, and all get
        the same answer.
        """
        saved = self.unfinished
        hashes = saved is not None and not saved.hashed.done()
        reason, (someone_hashes, *wanted) = self.run.stop.meet(hashes, *wants(control))
        want(control, wanted)
        return reason, saved is not None and not someone_hashes

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Stopped:  # in the middle of an evaluation, on all ranks: it is made again after the resume
            self.evaluation_due = True
            self.stop_training(self.control)
            self.control.should_log = self.control.should_evaluate = False
            self.control.should_save = True
            self.step_boundary.save_at_epoch_end(self.state, self.control)
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def stop_training(self, control: TrainerControl) -> None:
        """End training because the run was asked to stop, not because it has come to its end."""
        if self.ended_before_stop is None:
            self.ended_before_stop = control.should_training_stop
        control.should_training_stop = True

    @property
    def step_boundary(self) -> StepBoundary:
        return next(c for c in self.callback_handler.callbacks if isinstance(c, StepBoundary))

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        self.finish_save()
        if self.run.stop.decided is None:
            self.facts_at_end = self.facts()
            if self.ended_early:
                self.run.site.launch.say(
                    f"A callback has ended training, after step {self.state.global_step:,} of {self.state.max_steps:,}."
                )
            return super()._finalize_training(trial, self._samples_seen(), start_time)
        # No summary of half a run, and no best model to go back to yet.
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        self.is_in_train = False
        return TrainOutput(self.state.global_step, 0.0, {})

    @contextmanager
    def saved_if_stopped(self) -> Iterator[None]:
        """A block after training, up to the export, which all ranks leave together where they stop: then a checkpoint
        has the last step. With it the same command exports, and trains nothing again.

        Where it cannot be had any more, as the model is the best one again, a stop waits for the export.
        """
        if self.is_best and self.lacks_last_step:
            with self.run.stop.later():
                yield
            return
        try:
            yield
        except Stopped:
            self.save_last_step()
            raise

    @property
    def is_best(self) -> bool:
        """Whether training is over, and the model that of the best checkpoint again; all ranks must ask.

        Each rank looks by itself for the folder of the best: the answer is rank 0's.
        """
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return bool(gather(best is not None and self.run.stop.decided is None)[0])

    # ---- What a checkpoint says of the run

    def facts(self) -> dict[str, Any]:
        """What the manifest says beside its files; all ranks must call it."""
        args, state = self.args, self.state
        a_step = self.batching.slots  # micro batches
        metrics = Path(args.output_dir) / "metrics.jsonl"
        (tokens,) = sum_over_ranks(self.tokens_seen, device=args.device)
        routing = self.parts.routing
        return {
            "step": state.global_step,
            "epoch": state.epoch,
            "samples": self._samples_seen(),
            "rows_a_step": self.batching.micro_batch and self.batching.micro_batch * a_step,  # None: as many as fit
            "micro_batches_a_step": a_step,
            "per_device_train_batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "world_size": args.world_size,
            "sequence_parallel": self.batching.group,
            "model_only": args.save_only_model,
            "evaluation_due": self.evaluation_due,
            "ended_early": self.ended_early,
            "loss_pending": gather(self._tr_loss.item()),
            "last_logged_step": self._globalstep_last_logged,
            "loss_total": self._total_loss_scalar,
            "skipped_steps": [self.skipped_steps, self.skipped_unlogged],
            "tokens": int(tokens),
            "routing": routing.state() if routing is not None else None,
            # Where rows were dealt anew, and where they could be now; see `micro_batches.Seam`.
            "seam": asdict(self.batching.seam),
            "here": asdict(self.batching.seam_at(state.global_step)) if self.deals_rows else None,
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            **self.run.identity,
        }

    @property
    def ended_early(self) -> bool:
        """Whether a callback, and neither patience nor who asked the run to stop, has ended it before its last step."""
        before = self.ended_before_stop
        ended = self.control.should_training_stop if before is None else before
        return ended and not self.is_past_best() and self.state.global_step < self.state.max_steps

    def _samples_seen(self) -> int:
        """Rows learned from so far; the last step of an epoch has what is left."""
        return self.batching.samples(*self.position(self.state.global_step))


class StepBoundary(TrainerCallback):
    """Between two steps: agree on stopping, and see to it that a checkpoint comes after all else of its step.

    Ranks agree on what callbacks want of `control` as well, for a rank that saves, measures or ends alone would wait
    for the others until `ddp_timeout`.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self.held: set[str] = set()  # an end that was wanted in the middle of a step, and waits for that of the step
        self.save_due = False  # a checkpoint that waits for the end of the epoch
        self.at_epoch_end = False
        self.steps_an_epoch = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.begin_training()
        # A run that a callback has ended stays ended, unless the callbacks are others. One of them may know it as well.
        resumed, changed = self.trainer.run.resumed, self.trainer.run.changed
        ended = resumed is not None and resumed.manifest.get("ended_early", False)
        control.should_training_stop |= ended and "callbacks" not in changed
        self._agree(control)
        self.steps_an_epoch = -(-len(kwargs["train_dataloader"]) // args.gradient_accumulation_steps)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._agree(control)  # an epoch that is to end is not begun

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.require_frozen()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.held |= {name for name in ENDS if getattr(control, name)}
        vars(control).update(dict.fromkeys(ENDS, False))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        vars(control).update(dict.fromkeys(self.held, True))  # before `EvaluateAtEnd` is asked
        self.held.clear()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.at_epoch_end = False
        self.trainer.restate_epoch()
        stopping, hashed = self.trainer.meet(control)
        if hashed:
            self.trainer.finish_save()
        if stopping:
            self.trainer.stop_training(control)
            control.should_save = True
            self._postpone_evaluation(control)
        self.save_at_epoch_end(state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.at_epoch_end = True
        if self.trainer.run.stop.decided and not self._ends_epoch(state):  # Trainer leaves an epoch only this way
            control.should_log = control.should_evaluate = control.should_save = False
            return
        stopping, _ = self.trainer.meet(control)
        if stopping:
            self.trainer.stop_training(control)
            self.save_due = True
            self._postpone_evaluation(control)
        control.should_save, self.save_due = control.should_save or self.save_due, False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree(control)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree(control)

    def _agree(self, control: TrainerControl) -> None:
        """Where callbacks are asked between two meetings; without any of the user's no rank differs."""
        if has_own(self.trainer.callback_handler.callbacks):
            want(control, any_rank(*wants(control)))

    def save_at_epoch_end(self, state: TrainerState, control: TrainerControl) -> None:
        """The last step of an epoch is not over before the epoch's own evaluation and log entry."""
        if self._ends_epoch(state) and control.should_save and not self.at_epoch_end:
            self.save_due, control.should_save = True, False

    def _ends_epoch(self, state: TrainerState) -> bool:
        return bool(state.global_step >= state.max_steps or self.trainer.position(state.global_step)[1] == 0)

    def _postpone_evaluation(self, control: TrainerControl) -> None:
        self.trainer.evaluation_due |= control.should_evaluate
        control.should_evaluate = False
