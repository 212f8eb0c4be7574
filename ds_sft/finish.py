"""What a run does with its trained model: export, merge, verify, answer, be scored, be pushed; also when started anew.

Rank 0 alone works behind the export, on what is on the disk, while the other ranks wait.
"""

from __future__ import annotations

import copy
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ds_sft.checkpoints.manifest import newest_complete
from ds_sft.checkpoints.start import Start
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.ranks.collectives import others_wait
from ds_sft.ranks.launch import Launch, print_line
from ds_sft.ranks.stop import PREEMPTED, Stopped, StopRequests
from ds_sft.results import EXPORTED, RESULTS, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ds_sft.data.dataset import Data
    from ds_sft.data.serving import Serving
    from ds_sft.tracking.tracker import Log
    from ds_sft.training.expectation import Expectation
    from ds_sft.training.trainer import SFTTrainer


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
    from ds_sft.training.report import best_checkpoint, run_results

    with trainer.saved_if_stopped():
        stop.check()
        planned = compare_with_plan(expected, launch)
        if best_checkpoint(trainer):
            launch.say(f"Exporting the best model: {best_checkpoint(trainer)}.")
        rows = rows_to_verify(data.eval or data.train)
        trained_loss = trainer.token_mean(trainer.get_eval_dataloader(rows)) if config.verify_export else None
        run_identity = trainer.run.identity
        export_model(trainer, tokenizer, config, launch, end_ids=served.end_ids, chat_template=served.chat_template)
        results = run_results(trainer, config, launch, seconds=time.monotonic() - started) | {"plan": planned}
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


def let_it_answer(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerBase, tracker: Log, results: dict[str, Any]
) -> None:
    """Show what the exported model answers; a run whose weights are written does not fail for want of memory here."""
    from ds_sft.export.predict import predict, prediction_as_text, print_predictions, write_predictions

    file = config.output_dir / "predictions.jsonl"
    file.unlink(missing_ok=True)  # an earlier run's
    if (results["export"] or {}).get("out_of_memory"):
        print_line("No predictions: they would need the same memory.")
        return
    with done_without("predictions"):
        predictions = predict(config, data.samples, tokenizer)
        write_predictions(predictions, file)
        print_predictions(predictions)
        tracker.log_predictions([prediction_as_text(row) for row in predictions], step=results["steps"])


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


# ---- A run that was started again when its model was trained


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
