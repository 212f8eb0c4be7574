"""Fine-tune a chat model on dialogues: config -> tokenizer -> data -> model -> Trainer -> final model -> predictions.

deepspeed ds_sft/train.py --config ds_configs/qwen3_dialog.yaml                      # one box, all its GPUs
torchrun --nproc_per_node 2 ds_sft/train.py --config ds_configs/qwen3_dialog.yaml
python ds_sft/train.py --config ds_configs/qwen3_dialog.yaml                         # one GPU, or a CPU
"""

from __future__ import annotations

import importlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if __name__ == "__main__":  # started as a file: Python put this folder on the path; the package is one up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.checkpoints.identity import identity
from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.checkpoints.other_run import exported_step
from ds_sft.checkpoints.start import Start, where_to_start
from ds_sft.checkpoints.storage import Site, require_no_model, require_writable, settle_storage
from ds_sft.config.extension import find_own_code, learned_with
from ds_sft.config.keys import OUR_ORDERS, RECORD, Config
from ds_sft.config.read import given_twice, load_config
from ds_sft.errors import RunError, UserError
from ds_sft.finish import done_before, finish
from ds_sft.plan.source import require_model
from ds_sft.quiet import quiet
from ds_sft.ranks.collectives import end_group
from ds_sft.ranks.devices import grow_segments, hide_gpus, share_cores, use_one_device
from ds_sft.ranks.exits import exit_after, exit_with
from ds_sft.ranks.launch import Launch, print_line, read_launch, require_groups
from ds_sft.ranks.stop import PREEMPTED, Stopped, StopRequests, watch_for_stop
from ds_sft.results import EXPORTED, KEPT, RESULTS, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from ds_sft.data.dataset import Data
    from ds_sft.data.micro_batches import Batching
    from ds_sft.data.serving import Serving
    from ds_sft.plan.steps import Steps
    from ds_sft.training.continuity import Continuity
    from ds_sft.training.trainer import SFTTrainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the training that the command line describes; 2 is the exit code of a mistake in it, 1 of a failure."""
    launch = Launch(launcher="python")
    stop: StopRequests | None = None
    try:
        launch = read_launch()
        with watch_for_stop(launch) as stop:
            config = read_words(*((sys.argv[1:], "train.py") if argv is None else (argv, "ds-sft train")), launch)
            with FolderLock(config.output_dir) as lock:
                try:
                    run(config, launch, stop, lock)
                except Stopped as stopped:
                    leave(config, launch, stop, str(stopped))
            end_group()
    except UserError as error:
        exit_with(str(error), launch, told_to_end=ended_by_launcher(stop))
    except RunError as error:
        exit_with(str(error), launch, told_to_end=ended_by_launcher(stop), code=1)
    except Exception as error:
        exit_after(error, launch, told_to_end=ended_by_launcher(stop))
    return 0


def read_words(words: Sequence[str], program: str, launch: Launch) -> Config:
    """The config that a command line describes, and what is to be said of it."""
    config = load_config(words, program)
    for remark in given_twice(words):
        launch.say(remark)
    return config


def ended_by_launcher(stop: StopRequests | None) -> bool:
    """Whether a launcher ends this rank because another one has failed: not where all ranks agreed to stop."""
    return stop is not None and stop.reason == "SIGTERM" and stop.decided is None


def run(config: Config, launch: Launch, stop: StopRequests, lock: FolderLock) -> None:
    """The whole run, on every rank."""
    started = time.monotonic()
    stop.use_output_dir(config.output_dir)
    require_groups(config.sequence_parallel, launch)
    settle_devices(config, launch)
    take_places(config, launch, lock)
    find_own_code(config)
    # Heavy imports stand here and in the steps: a typo in the config is answered without them.
    from ds_sft.engine.zero import engine_config
    from ds_sft.export.weights import with_template
    from ds_sft.tracking.tracker import TrackerCallback, open_tracker
    from ds_sft.training.expectation import expect_memory
    from ds_sft.training.profile import profiling

    require_libraries()
    engine = engine_config(config, launch)
    callbacks = prepare_own_code(config, launch)
    with stop.until_ranks_meet():
        tokenizer, served, data, base = prepare_data(config, launch)
    args, site = start_group(config, engine, launch, stop, lock)
    require_hub(config, launch)
    this_run = identify(config, engine, data, launch, base=base)
    start = where_to_start(config, this_run, site)
    if done_before(start, config, data, tokenizer, launch, stop):
        return
    get_ready_to_resume(start, args, site, stop)
    batches = make_batches(config, args, data, tokenizer, launch, seam=start.seam)
    batching, padded = batches.batching, batches.padded
    steps = plan_steps(args, batching, data, engine, start, launch)
    expected = expect_memory(config, engine, longest=batching.longest, largest=batching.largest, padded=padded,
                             ranks=args.world_size, on_gpu=args.device.type != "cpu", launch=launch)  # fmt: skip
    model = load_model_to_train(config, args, tokenizer, launch, padded=padded, largest=batching.largest_part)
    size = find_room(config, engine, model, steps, start, site)
    begin_output(config, data.report, launch)
    with open_tracker(config, launch, start.metrics_bytes, start.folder) as tracker:
        continued = continuity(config, start, site, stop, this_run, size=size, end_ids=served.end_ids)
        watching = [TrackerCallback(tracker, start.changed), *profiling(config, launch), *callbacks]
        saved = with_template(tokenizer, served.chat_template)  # in checkpoints
        trainer = make_trainer(model, config, args, batches, data, saved, launch, callbacks=watching, run=continued)
        del model  # the trainer's alone, so that `release` can give it back
        stop.check()
        trainer.train(resume_from_checkpoint=str(start.checkpoint.path) if start.checkpoint else None)
        finish(trainer, tokenizer, tracker, data, served, config, launch, stop, expected=expected, started=started)


def take_places(config: Config, launch: Launch, lock: FolderLock) -> None:
    """See that the model can be had and the output folder be written, and take that for this run."""
    if remark := require_model(config.model_name_or_path):
        launch.say(remark)
    require_writable(config.output_dir)
    require_no_model(config.output_dir, config.model_name_or_path)
    if launch.is_main:
        lock.take()


def settle_devices(config: Config, launch: Launch) -> None:
    """Which devices and cores this process sees, and what libraries say of them, before torch is imported."""
    quiet(bars=launch.is_main and sys.stderr.isatty() and not config.training.get("disable_tqdm"))
    if config.training.get("use_cpu"):
        hide_gpus(os.environ)
    elif not launch.distributed:
        use_one_device(os.environ)
    share_cores(launch, os.environ)
    grow_segments(os.environ)


def require_libraries() -> None:
    """See that the libraries of a run have what it takes of them, before data are read."""
    from ds_sft.upstream.check import require_names

    importlib.import_module("ds_sft.training.trainer")  # what is not imported is not looked at, Trainer's methods too
    require_names()


def prepare_own_code(config: Config, launch: Launch) -> list[TrainerCallback]:
    """See that what the user has written himself can be called as it will be, and register it; his callbacks."""
    from ds_sft.config.extension import is_dotted
    from ds_sft.data.records import reading_of
    from ds_sft.model.own_attention import register_attention, try_attention
    from ds_sft.tracking.tracker import require_trackers
    from ds_sft.training.callbacks import make_callbacks
    from ds_sft.training.optimizer import own_optimizer

    reading_of(config)
    require_trackers(config)
    register_attention(config)
    if is_dotted(config.training.get("optim")):
        own_optimizer(config)
    made = make_callbacks(config)
    try_attention(config, launch)
    return made


def prepare_data(config: Config, launch: Launch) -> tuple[PreTrainedTokenizerBase, Serving, Data, str]:
    """The tokenizer, what a server will be told, the encoded rows, which the model has room for, and `hash_base`."""
    from ds_sft.checkpoints.base import begin_to_hash_base
    from ds_sft.data.dataset import load_data, print_report
    from ds_sft.data.serving import serving
    from ds_sft.evaluation.scores import require_metrics
    from ds_sft.model.limits import check_limits
    from ds_sft.model.load import read_ahead
    from ds_sft.model.sequence_support import require_shareable
    from ds_sft.model.tokenizer import load_tokenizer

    if config.evaluate_rows:
        require_metrics("evaluate_rows: 0")
    base = begin_to_hash_base(config, launch)
    tokenizer = load_tokenizer(config, launch)
    require_shareable(config)
    read_ahead(config, launch)
    served = serving(config, tokenizer)
    served.say(launch)
    data = load_data(config, tokenizer, launch)
    print_report(data.report, launch)
    check_limits(config, tokenizer, data, launch)
    return tokenizer, served, data, base.result()


def start_group(
    config: Config, engine: dict[str, Any] | None, launch: Launch, stop: StopRequests, lock: FolderLock
) -> tuple[TrainingArguments, Site]:
    """Start the process group; what Trainer is told, and where this rank writes."""
    from ds_sft.export.kernels import avoid_plans
    from ds_sft.training.arguments import training_arguments

    args = training_arguments(config, engine, launch)
    avoid_plans()
    site = Site(launch, shared=settle_storage(args, launch, lock))
    stop.use_group(args.ddp_timeout)
    stop.check()
    return args, site


def require_hub(config: Config, launch: Launch) -> None:
    """See that a run that is to push its model can, for at its end nobody may be there to log in.

    All ranks must call it.
    """
    from ds_sft.export.hub import why_not
    from ds_sft.ranks.collectives import gather

    if config.training.get("push_to_hub"):
        trouble = gather(why_not(config) if launch.is_main else None)[0]
        if trouble:
            raise UserError(trouble)


def identify(config: Config, engine: dict[str, Any] | None, data: Data, launch: Launch, *, base: str) -> dict[str, Any]:
    """What decides the result, to know the run again; rank 0 alone reads files for it."""
    from ds_sft.data.rows import fingerprint

    rows, eval_rows = (fingerprint(rows) if rows and launch.is_main else "" for rows in (data.train, data.eval))
    return identity(config, engine, rows, eval_rows, base, reads=launch.is_main)


class Batches(NamedTuple):
    """What micro batches are made of, how, and which rows are in each."""

    rows: Any  # or packed sequences of them
    collate: Callable[..., dict[str, Any]]
    batching: Batching
    padded: bool


def make_batches(
    config: Config,
    args: TrainingArguments,
    data: Data,
    tokenizer: Any,
    launch: Launch,
    *,
    seam: Mapping[str, int] | None,
) -> Batches:
    """Rows become micro batches as `batching` says, or padded where the model would mix rows laid end to end."""
    from ds_sft.data.loader import dataset_and_collator
    from ds_sft.model.padding_free_support import uses_padding
    from ds_sft.training.arguments import batching_of

    padded = uses_padding(config, launch)
    rows, collate = dataset_and_collator(data.train, config, tokenizer, launch, padded=padded)
    return Batches(rows, collate, batching_of(args, config, rows, padded=padded, seam=seam), padded)


def plan_steps(
    args: TrainingArguments, batching: Batching, data: Data, engine: dict[str, Any] | None, start: Start, launch: Launch
) -> Steps:
    """How rows become steps, checked and said."""
    from ds_sft.engine.zero import stage
    from ds_sft.training.arguments import run_steps

    steps = run_steps(args, batching)
    batching.check(batching.position(steps.steps - 1)[0] + 1, partial(data.where, "train"))
    require_steps_left(start, steps.steps)
    launch.say(steps.in_words())
    if args.train_sampling_strategy in OUR_ORDERS:
        launch.say(batching.padding_and_waiting(each_micro_batch=(stage(engine) or 0) >= 2))
    return steps


def require_steps_left(start: Start, steps: int) -> None:
    """See that the checkpoint is not beyond the end of the run, which may have been asked to end earlier."""
    if start.checkpoint is not None and steps < start.checkpoint.step:
        raise UserError(
            f"{start.checkpoint.path} is after step {start.checkpoint.step:,}, this run ends after {steps:,} "
            "(max_steps, num_train_epochs): write more, or --resume PATH of an earlier checkpoint"
        )


def get_ready_to_resume(start: Start, args: TrainingArguments, site: Site, stop: StopRequests) -> None:
    """What loading a checkpoint needs: the one to go on from, before the model is loaded, and the best at the end."""
    from ds_sft.checkpoints.universal import load_data_only, make_universal
    from ds_sft.training.arguments import continue_from

    if args.deepspeed is not None:
        load_data_only()
    if start.checkpoint is None:
        return
    if start.universal:
        make_universal(start.checkpoint, site, stop)
    continue_from(args, start.accumulation, universal=start.universal)


def load_model_to_train(
    config: Config, args: TrainingArguments, tokenizer: Any, launch: Launch, *, padded: bool, largest: int
) -> PreTrainedModel:
    """The model, with all that ds_sft puts into it (model/parts.py), which is said.

    `largest`: tokens of the largest micro batch that a rank computes, for what is kept of it and where.
    """
    from ds_sft.model.embeddings import make_room
    from ds_sft.model.fused import require_kernels
    from ds_sft.model.load import load_model, say_not_loaded
    from ds_sft.model.parts import put_in_parts

    require_kernels(config.fused_kernels, on_gpu=args.device.type == "cuda", compiled=args.torch_compile)
    model = load_model(config, args)
    say_not_loaded(model, config.model_name_or_path, launch)
    make_room(model, tokenizer, config)
    parts = put_in_parts(model, config, args, launch, padded=padded, largest=largest)
    launch.say(f"{type(model).__name__}:\n{textwrap.indent(str(parts), '  ')}")
    return model


def make_trainer(
    model: PreTrainedModel,
    config: Config,
    args: TrainingArguments,
    batches: Batches,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    launch: Launch,
    *,
    callbacks: list[TrainerCallback],
    run: Continuity,
) -> SFTTrainer:
    """What learns from the batches; `tokenizer` is the one that checkpoints have."""
    from ds_sft.training.optimizer import optimizer_of
    from ds_sft.training.trainer import SFTTrainer

    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=batches.rows,
        eval_dataset=data.eval,
        data_collator=batches.collate,
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=optimizer_of(config, args, launch),
        batching=batches.batching,
        on_nonfinite=config.on_nonfinite,
        patience=config.early_stopping_patience,
        where=partial(data.where, "train"),
        own_code=learned_with(config),
        callbacks=callbacks,
        run=run,
    )


def continuity(
    config: Config,
    start: Start,
    site: Site,
    stop: StopRequests,
    this_run: dict[str, Any],
    *,
    size: int,
    end_ids: Sequence[int],
) -> Continuity:
    """How the run goes on from a checkpoint, is saved and stops."""
    from ds_sft.training.continuity import Continuity

    return Continuity(
        stop=stop,
        site=site,
        resumed=start.checkpoint,
        changed=start.changed,
        on_save_error=config.on_save_error,
        size=size,
        identity=this_run,
        freezes=config.freezes,
        end_ids=end_ids,
    )


def find_room(
    config: Config, engine: dict[str, Any] | None, model: PreTrainedModel, steps: Steps, start: Start, site: Site
) -> int:
    """See that what the run will write fits on the disk; bytes of a checkpoint on this rank's file system."""
    from ds_sft.checkpoints.space import check_space, export_size, predict_size
    from ds_sft.engine.zero import stage
    from ds_sft.plan.optimizer import state_bytes

    size = predict_size(model, stage(engine), site, kept=state_bytes(config))
    done = start.checkpoint.step if start.checkpoint else 0
    check_space(config, size, steps, site, done=done, export=export_size(model, config, site))
    return size


def leave(config: Config, launch: Launch, stop: StopRequests, reason: str) -> None:
    """Say where a stopped run can go on; OUTPUT_DIR/PREEMPTED.json says it to programs."""
    if not launch.is_main:
        return
    checkpoint, exported = newest_complete(config.output_dir, resumable=True), exported_step(config.output_dir)
    step = exported or (checkpoint.step if checkpoint else 0)
    stop.leave(config.output_dir, checkpoint.path.name if checkpoint and not exported else None, step)
    where = f"after step {checkpoint.step:,}; {checkpoint.path} is complete" if checkpoint else "before the first save"
    if exported:
        where = f"after step {step:,}, the last; {config.output_dir} has the weights, verification or answers are left"
    goes_on = config.resume == "auto" and (exported or not config.training.get("save_only_model"))
    how = "goes" if goes_on else "with --resume auto goes" if checkpoint or exported else None
    print_line(f"Stopped ({reason}) {where}. The same command {f'{how} on from there' if how else 'starts anew'}.")


def begin_output(config: Config, report: dict[str, Any], launch: Launch) -> None:
    """Leave what the run was asked to do and what it found in the output folder, before it starts."""
    if launch.is_main:
        for old in (PREEMPTED, RESULTS, EXPORTED, KEPT):
            (config.output_dir / old).unlink(missing_ok=True)
        config.save(config.output_dir / RECORD)
        write_json(config.output_dir / "data_report.json", report)


if __name__ == "__main__":
    sys.exit(main())
