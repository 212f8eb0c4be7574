"""Fine-tune a chat model on dialogues: config -> tokenizer -> data -> model -> Trainer -> final model -> predictions.

deepspeed ds_sft/train.py --config ds_configs/qwen3_dialog.yaml                      # one box, all its GPUs
torchrun --nproc_per_node 2 ds_sft/train.py --config ds_configs/qwen3_dialog.yaml
python ds_sft/train.py --config ds_configs/qwen3_dialog.yaml                         # one GPU, or a CPU
"""

from __future__ import annotations

import copy
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":  # started as a file: Python put this folder on the path; the package is one up
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from ds_sft.checkpoints.checkpoint import Site, Start, exported_step, newest_complete, where_to_start
from ds_sft.checkpoints.folder_lock import FolderLock
from ds_sft.checkpoints.identity import identity
from ds_sft.checkpoints.storage import require_no_model, require_writable, settle_storage
from ds_sft.config.keys import OUR_ORDERS, RECORD, Config
from ds_sft.config.read import given_twice, load_config
from ds_sft.errors import RunError, UserError
from ds_sft.plan.source import require_model
from ds_sft.quiet import quiet
from ds_sft.ranks.collectives import end_group, others_wait
from ds_sft.ranks.exits import exit_after, exit_with
from ds_sft.ranks.launch import (
    Launch,
    grow_segments,
    hide_gpus,
    print_line,
    read_launch,
    require_groups,
    share_cores,
    use_one_device,
)
from ds_sft.ranks.stop import PREEMPTED, Stopped, StopRequests, watch_for_stop
from ds_sft.results import EXPORTED, KEPT, RESULTS, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from ds_sft.data.dataset import Data
    from ds_sft.data.micro_batches import Batching
    from ds_sft.data.serving import Serving
    from ds_sft.plan.steps import Steps
    from ds_sft.tracking.tracker import Log
    from ds_sft.training.expectation import Expectation
    from ds_sft.training.resumable import Continuity
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
    # Heavy imports stand here: a typo in the config is answered without them.
    from ds_sft.data.batches import make_batches
    from ds_sft.engine.zero import engine_config
    from ds_sft.export.kernels import avoid_plans
    from ds_sft.export.weights import with_template
    from ds_sft.model.load import uses_padding
    from ds_sft.tracking.tracker import TrackerCallback, open_tracker
    from ds_sft.training.arguments import batching_of, training_arguments
    from ds_sft.training.expectation import expect_memory
    from ds_sft.training.optimizer import optimizer_of
    from ds_sft.training.profile import profiling
    from ds_sft.training.trainer import SFTTrainer
    from ds_sft.upstream import require_names

    require_names()
    engine = engine_config(config, launch)
    callbacks = prepare_own_code(config)
    with stop.until_ranks_meet():
        tokenizer, served, data, base = prepare_data(config, launch)
    args = training_arguments(config, engine, launch)  # starts the process group
    avoid_plans()
    site = Site(launch, shared=settle_storage(args, launch, lock))
    stop.use_group(args.ddp_timeout)
    stop.check()
    require_hub(config, launch)
    this_run = identify(config, engine, data, launch, base=base)
    start = where_to_start(config, this_run, site)
    if done_before(start, config, data, tokenizer, launch, stop):
        return
    get_ready_to_resume(start, args, site, stop)
    padded = uses_padding(config, launch)
    rows_in_batches, collate = make_batches(data.train, config, tokenizer, launch, padded=padded)
    batching = batching_of(args, config, rows_in_batches, padded=padded, seam=start.seam)
    steps = plan_steps(args, batching, data, engine, start, launch)
    expected = expect_memory(config, engine, longest=batching.longest, largest=batching.largest, padded=padded,
                             ranks=args.world_size, on_gpu=args.device.type != "cpu", launch=launch)  # fmt: skip
    model = load_model_to_train(config, args, tokenizer, launch, padded=padded, largest=batching.largest_part)
    size = find_room(config, engine, model, steps, start, site)
    begin_output(config, data.report, launch)
    with open_tracker(config, launch, start.metrics_bytes, start.folder) as tracker:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows_in_batches,
            eval_dataset=data.eval,
            data_collator=collate,
            processing_class=with_template(tokenizer, served.chat_template),  # checkpoints have it
            optimizer_cls_and_kwargs=optimizer_of(config, args, launch),
            batching=batching,
            on_nonfinite=config.on_nonfinite,
            where=partial(data.where, "train"),
            callbacks=[TrackerCallback(tracker, start.changed), *profiling(config, launch), *callbacks],
            run=continuity(config, start, site, stop, this_run, size=size, end_ids=served.end_ids),
        )
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


def prepare_own_code(config: Config) -> list[TrainerCallback]:
    """See that what the user has written himself can be had, and register it; his callbacks."""
    from ds_sft.config.extension import is_dotted
    from ds_sft.data.records import reading_of
    from ds_sft.model.own_attention import register_attention
    from ds_sft.tracking.tracker import require_trackers
    from ds_sft.training.callbacks import make_callbacks
    from ds_sft.training.optimizer import own_optimizer

    reading_of(config)
    require_trackers(config)
    register_attention(config)
    if is_dotted(config.training.get("optim")):
        own_optimizer(config)
    return make_callbacks(config)


def prepare_data(config: Config, launch: Launch) -> tuple[PreTrainedTokenizerBase, Serving, Data, str]:
    """The tokenizer, what a server will be told, the encoded rows, which the model has room for, and `hash_base`."""
    from ds_sft.checkpoints.base import begin_to_hash_base
    from ds_sft.data.dataset import load_data, print_report
    from ds_sft.data.serving import serving
    from ds_sft.evaluation.scores import require_metrics
    from ds_sft.model.limits import check_limits
    from ds_sft.model.load import load_tokenizer, read_ahead
    from ds_sft.model.shareable import require_shareable

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
    """What decides the result, to know the run again; rank 0 alone hashes the data and the base."""
    from ds_sft.data.batches import fingerprint

    rows, eval_rows = (fingerprint(rows) if rows and launch.is_main else "" for rows in (data.train, data.eval))
    return identity(config, engine, rows, eval_rows, base)


def plan_steps(
    args: TrainingArguments, batching: Batching, data: Data, engine: dict[str, Any] | None, start: Start, launch: Launch
) -> Steps:
    """How rows become steps, checked and said."""
    from ds_sft.engine.zero import stage
    from ds_sft.training.arguments import run_steps

    steps = run_steps(args, batching)
    batching.check(batching.position(steps.steps - 1)[0] + 1, partial(data.where, "train"))
    require_steps_left(start, steps.steps)
    launch.say(steps.describe())
    if args.train_sampling_strategy in OUR_ORDERS:
        launch.say(batching.describe(each_micro_batch=(stage(engine) or 0) >= 2))
    return steps


def require_steps_left(start: Start, steps: int) -> None:
    """See that the checkpoint is not beyond the end of the run, which may have been asked to end earlier."""
    if start.checkpoint is not None and steps < start.checkpoint.step:
        raise UserError(
            f"{start.checkpoint.path} is after step {start.checkpoint.step:,}, this run ends after {steps:,} "
            "(max_steps, num_train_epochs): write more, or --resume PATH of an earlier checkpoint"
        )


def done_before(
    start: Start,
    config: Config,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    launch: Launch,
    stop: StopRequests,
) -> bool:
    """Whether an earlier start has trained the model; does what is left to be done with it. All ranks must call it."""
    if start.exported:
        finish_later(config, data, tokenizer, launch, stop)
    elif start.finished:
        merge_later(config, data, launch, stop)
        push_later(config, launch, stop)
    return start.exported or start.finished


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
    """The model and what is trained of it, our attention where rows are not padded, fused kernels, experts, loss.

    `largest`: tokens of the largest micro batch that a rank computes, for what is kept of it and where.
    """
    from ds_sft.model.adapters import choose_weights
    from ds_sft.model.attention import keep_rows_apart
    from ds_sft.model.fused import fuse, require_kernels
    from ds_sft.model.load import computing_dtype, load_model, make_room, say_not_loaded
    from ds_sft.model.loss import supervise
    from ds_sft.model.offload import offload_inputs
    from ds_sft.model.padding import know_padding
    from ds_sft.model.routing import prepare_experts
    from ds_sft.model.sequence import join_group
    from ds_sft.model.shareable import require_shared
    from ds_sft.model.tiling import tile_mlps

    on_gpu = args.device.type == "cuda"
    require_kernels(config.fused_kernels, on_gpu=on_gpu, compiled=args.torch_compile)
    model = load_model(config, args)
    say_not_loaded(model, config.model_name_or_path, launch)
    make_room(model, tokenizer, config)
    choose_weights(model, config, args, launch)
    if not padded:
        group = join_group(config.sequence_parallel, launch, args.ddp_timeout)
        keep_rows_apart(model, config.attn_implementation, launch, device=args.device, dtype=computing_dtype(args),
                        group=group)  # fmt: skip
    elif not args.torch_compile:
        know_padding(model)
    fuse(model, config.fused_kernels, launch, on_gpu=on_gpu, compiled=args.torch_compile)
    tile_mlps(model, config, args, launch, largest=largest)
    reentrant = args.activation_checkpointing and (args.activation_checkpointing_kwargs or {}).get(
        "use_reentrant", True
    )
    prepare_experts(model, launch, device=args.device, aux_loss_coef=config.router_aux_loss_coef, reentrant=reentrant)
    supervise(model, launch, fp16=args.fp16, kernel=config.fused_kernels != "none")
    require_shared(model)
    offload_inputs(model, config, args, launch, largest=largest)
    return model


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
    from ds_sft.training.resumable import Continuity

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


def finish(
    trainer: SFTTrainer,
    tokenizer: PreTrainedTokenizerBase,
    tracker: Log | None,
    data: Data,
    served: Serving,
    config: Config,
    launch: Launch,
    stop: StopRequests,
    *,
    expected: Expectation | None,
    started: float,
) -> None:
    """Export the trained model and put it to use, unless the run was asked to stop; all ranks must call it."""
    from ds_sft.engine.release import release
    from ds_sft.export.weights import export_model, rows_to_verify
    from ds_sft.training.expectation import compare_with_plan
    from ds_sft.training.report import best_checkpoint, describe_run

    with trainer.saved_if_stopped():
        stop.check()
        planned = compare_with_plan(expected, launch)
        if best_checkpoint(trainer):
            launch.say(f"Exporting the best model: {best_checkpoint(trainer)}.")
        rows = rows_to_verify(data.eval or data.train)
        trained_loss = trainer.token_mean(trainer.get_eval_dataloader(rows)) if config.verify_export else None
        run_identity = trainer.run.identity
        export_model(trainer, tokenizer, config, launch, end_ids=served.end_ids, chat_template=served.chat_template)
        results = describe_run(trainer, config, launch, seconds=time.monotonic() - started) | {"plan": planned}
    release(trainer)  # of no use from here on
    exported = {"results": results, "loss_trained": trained_loss, "identity": run_identity}
    use_model(exported, config, data, tokenizer, tracker, stop)


def use_model(
    exported: dict[str, Any],
    config: Config,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    tracker: Log | None,
    stop: StopRequests,
) -> None:
    """Verify the exported model, let it answer, and write `run.json`; all ranks must call it.

    Where it is stopped, and no checkpoint has the last step, the same command goes on from `exported`.
    """
    from ds_sft.export.verify import ExportError
    from ds_sft.export.weights import rows_to_verify
    from ds_sft.training.report import summary

    results = copy.deepcopy(exported["results"])
    try:
        with others_wait(), stop.until_ranks_meet():
            if tracker is not None:  # rank 0
                merge_and_verify(config, rows_to_verify(data.eval or data.train), exported["loss_trained"], results)
                let_it_answer(config, data, tokenizer, tracker, results)
                score_its_answers(config, data, tokenizer, tracker, results)
                push(config, results)
        stop.check()
    except Stopped:
        checkpoint = newest_complete(config.output_dir, resumable=True)
        if tracker is not None and (checkpoint is None or checkpoint.step != results["steps"]):
            write_json(config.output_dir / EXPORTED, exported)
        raise
    except ExportError:  # not the trained model: nothing to go on with
        (config.output_dir / EXPORTED).unlink(missing_ok=True)
        raise
    if tracker is not None:
        write_json(config.output_dir / RESULTS, results | {"identity": exported["identity"]})
        (config.output_dir / EXPORTED).unlink(missing_ok=True)  # of an earlier start
        print_line(summary(results))
        print_line(f"All of it on one page: ds-sft report {shlex.quote(str(config.output_dir))}")


def finish_later(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, launch: Launch, stop: StopRequests
) -> None:
    """Use the model of a run that was stopped behind its export; all ranks must call it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from ds_sft.plan.adapter import read_json
    from ds_sft.ranks.collectives import gather
    from ds_sft.tracking.tracker import open_tracker

    unset_hf_deepspeed_config()  # no engine comes: under ZeRO-3 from_pretrained would wait for the other ranks
    exported = gather(read_json(config.output_dir / EXPORTED) if launch.is_main else {})[0]
    if launch.is_main:
        (config.output_dir / PREEMPTED).unlink(missing_ok=True)
    with open_tracker(config, launch, sys.maxsize, config.output_dir) as tracker:  # all points of it stay
        use_model(exported, config, data, tokenizer, tracker, stop)


def merge_and_verify(config: Config, rows: Any, trained_loss: float | None, results: dict[str, Any]) -> None:
    """Merge an adapter as asked, and ask a fresh process for the exported model's loss; says it in `run.json`."""
    from ds_sft.export.merge import merge_as_asked
    from ds_sft.export.verify import require_verified
    from ds_sft.export.weights import check_export

    if results["adapter"] is not None:
        results["adapter"]["not_merged"] = merge_as_asked(config)
    results["export"] = check_export(rows, trained_loss, config)
    write_json(config.output_dir / RESULTS, results)
    require_verified(results["export"], config.output_dir)


def merge_later(config: Config, data: Data, launch: Launch, stop: StopRequests) -> None:
    """Merge the adapter of a finished run that was not merged, and is asked for by now; all ranks must call it."""
    from ds_sft.export.weights import rows_to_verify
    from ds_sft.plan.adapter import read_json

    if config.merge != "yes":
        return
    with others_wait(), stop.until_ranks_meet():
        results = read_json(config.output_dir / RESULTS) if launch.is_main else {}
        # Not by its files: they may be of a start that was killed before they were verified.
        if (results.get("adapter") or {}).get("not_merged") is not None:
            rows = rows_to_verify(data.eval or data.train)
            merge_and_verify(config, rows, (results["export"] or {}).get("loss_trained"), results)


def let_it_answer(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, tracker: Log, results: dict[str, Any]
) -> None:
    """Show what the exported model answers; a run whose weights are written does not fail for want of memory here."""
    from ds_sft.export.predict import as_text, predict, print_predictions, write_predictions

    file = config.output_dir / "predictions.jsonl"
    file.unlink(missing_ok=True)  # an earlier run's
    if (results["export"] or {}).get("out_of_memory"):
        print_line("No predictions: they would need the same memory.")
        return
    with done_without("predictions"):
        predictions = predict(config, data.samples, tokenizer)
        write_predictions(predictions, file)
        print_predictions(predictions)
        tracker.log_predictions([as_text(row) for row in predictions], step=results["steps"])


def score_its_answers(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, tracker: Log, results: dict[str, Any]
) -> None:
    """Score the exported model's answers to `evaluate_rows` validation rows; `ds-sft evaluate` does it at any time."""
    from ds_sft.evaluation.report import print_tables
    from ds_sft.evaluation.session import ANSWERS, evaluate_run

    (config.output_dir / ANSWERS).unlink(missing_ok=True)  # an earlier run's
    if not config.evaluate_rows or (results["export"] or {}).get("out_of_memory"):
        return
    with done_without("scores"):
        found = results["evaluation"] = evaluate_run(config, data, tokenizer)
        if found is not None:
            print_tables(found)
            scores = found["sources"]["all"]["models"]["after"]
            metrics = {f"eval_{name}": scores[name]["value"] for name in ("exact_match", "chrf", "rouge_l")}
            tracker.log(metrics, step=results["steps"])


@contextmanager
def done_without(what: str) -> Iterator[None]:
    """What a run whose weights are written does not fail for: want of memory, and rows that are no longer there."""
    from ds_sft.export.placement import is_out_of_memory

    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            print_line(f"No {what}: no memory for them ({' '.join(str(error).split())[:150]}).")
        elif isinstance(error, UserError):
            print_line(f"No {what}: {error}")
        else:
            raise


def push(config: Config, results: dict[str, Any]) -> None:
    """Push the verified model, where the run is asked to; `run.json` says where to."""
    if config.training.get("push_to_hub"):
        from ds_sft.export.hub import push_as_asked

        results["pushed"] = push_as_asked(config)


def push_later(config: Config, launch: Launch, stop: StopRequests) -> None:
    """Push the model of a finished run that is not there yet, where it is asked for by now; all ranks must call it."""
    from ds_sft.export.hub import was_pushed
    from ds_sft.plan.adapter import read_json

    if not config.training.get("push_to_hub"):
        return
    with others_wait(), stop.until_ranks_meet():
        if launch.is_main and not was_pushed(config):
            results = read_json(config.output_dir / RESULTS)
            push(config, results)
            write_json(config.output_dir / RESULTS, results)


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
