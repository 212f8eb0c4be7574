"""What fails in a save is recorded where it is a write; a save is complete when it is hashed."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DefaultFlowCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ds_sft.checkpoints.manifest import FACTS, Checkpoint
from ds_sft.checkpoints.start import Start
from ds_sft.checkpoints.storage import Site
from ds_sft.data.micro_batches import Batching
from ds_sft.errors import UserError
from ds_sft.ranks import stop as stop_module
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import Stopped, StopRequests
from ds_sft.train import require_steps_left
from ds_sft.training import resumable as resumable_module
from ds_sft.training.resumable import ResumableTrainer, StepBoundary
from ds_sft.training.saving import sync_and_hash


def trainer(**attributes: Any) -> Any:
    """One without a model: only what the test needs."""
    made = ResumableTrainer.__new__(ResumableTrainer)
    made.__dict__ |= {"write_troubles": [], **attributes}
    return made


WRITES = [
    OSError(28, "No space left on device", "optimizer.pt"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
]


@pytest.mark.parametrize("error", WRITES, ids=str)
def test_a_write_that_fails_is_recorded(error: Exception) -> None:
    made = trainer()
    made._record(lambda: (_ for _ in ()).throw(error))
    assert len(made.write_troubles) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446]")],
    ids=str,
)
def test_another_failure_is_none_of_a_write(error: Exception) -> None:
    made = trainer()
    with pytest.raises(type(error)):
        made._record(lambda: (_ for _ in ()).throw(error))
    assert made.write_troubles == []


class Engine:
    """DeepSpeed's order: the recovery scripts come before a barrier."""

    def __init__(self) -> None:
        self.checkpoint_engine = SimpleNamespace(save=self.full, makedirs=self.full)
        self.met_the_others, self.left_out, self.scripts = False, False, 0

    def full(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "zero_to_fp32.py")

    def _copy_recovery_script(self, folder: str) -> None:
        self.scripts += 1
        self.full()

    def save_checkpoint(self, folder: str, save_latest: bool, exclude_frozen_parameters: bool) -> None:
        self.checkpoint_engine.makedirs(folder, exist_ok=True)
        self.checkpoint_engine.save({}, folder)
        self._copy_recovery_script(folder)
        self.met_the_others, self.left_out = True, exclude_frozen_parameters


def test_no_write_keeps_a_rank_from_the_engines_barriers() -> None:
    engine = Engine()
    made = trainer(model_wrapped=engine, run=SimpleNamespace(freezes=False))
    made._save_engine("out/checkpoint-4")
    assert engine.met_the_others
    assert made.write_troubles == ["zero_to_fp32.py: No space left on device"] * 3
    with pytest.raises(OSError, match="No space"):  # as it was
        engine._copy_recovery_script("out")


@pytest.mark.parametrize(
    ("step", "drop_last", "samples"), [(3, False, 12), (4, False, 13), (4, True, 16), (6, True, 24)]
)
def test_samples_of_a_manifest(step: int, drop_last: bool, samples: int) -> None:
    """13 rows, 4 a step: four steps an epoch, or three whole ones."""
    made = trainer()
    made.__dict__ |= {
        "args": SimpleNamespace(train_sampling_strategy="random"),
        "state": SimpleNamespace(global_step=step),
        "batching": Batching(lengths=np.full(13, 5), micro_batch=1, accumulation=2, ranks=2, padded=False, seed=0,
                             drop_last=drop_last),
    }  # fmt: skip
    assert made._samples_seen() == samples


def test_a_resumed_run_has_the_cadence_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no best model that other validation rows have chosen."""

    def load(self: Any, *args: Any) -> tuple[int, int]:
        self.state = TrainerState(global_step=5, logging_steps=7, save_steps=7, best_metric=1.0, best_global_step=4)
        return (9, 9)

    monkeypatch.setattr(Trainer, "_init_training_state", load)
    args = TrainingArguments(logging_steps=0.25, save_steps=3, gradient_accumulation_steps=2)
    batching = Batching(lengths=np.full(13, 5), micro_batch=2, accumulation=2, ranks=1, padded=False, seed=0)
    for changed, best in (({}, 1.0), ({"eval_data": ("a", "b")}, None)):
        made = trainer(args=args, batching=batching, run=SimpleNamespace(changed=changed),
                       callback_handler=SimpleNamespace(callbacks=[]))  # fmt: skip
        assert made._init_training_state(8, 99, 99, None, None) == (1, 2)  # four steps an epoch, not 99
        assert (made.state.logging_steps, made.state.save_steps, made.state.best_metric) == (2, 3, best)


def test_a_run_that_is_asked_to_end_before_its_checkpoint(tmp_path: Path) -> None:
    start = Start(Checkpoint(tmp_path / "checkpoint-8", {"step": 8}))
    require_steps_left(start, 8)
    with pytest.raises(UserError, match=r"checkpoint-8 is after step 8, this run ends after 4 \(max_steps, num_train"):
        require_steps_left(start, 4)


class Saving(ResumableTrainer):
    """Writes one file as its checkpoint."""

    step_boundary: Any = None

    def _samples_seen(self) -> int:
        return 0

    def restate_epoch(self) -> None:
        """No rows are dealt here."""

    def position(self, step: int) -> tuple[int, int]:
        return divmod(step, 100)

    def facts(self) -> dict[str, Any]:
        return {**dict.fromkeys(FACTS - {"save_id"}, 0), "step": self.state.global_step}


def saving(output_dir: Path, monkeypatch: pytest.MonkeyPatch, *, stopping: bool = False) -> Any:
    def write(self: Any, model: Any, trial: Any) -> None:
        folder = output_dir / f"checkpoint-{self.state.global_step}"
        folder.mkdir()
        (folder / "weights").write_text("w")

    monkeypatch.setattr(Trainer, "_save_checkpoint", write)
    made: Any = Saving.__new__(Saving)
    site = Site(Launch(launcher="python"), shared=True)
    stop = StopRequests(site.launch)  # without its thread: nobody asks
    made.__dict__ |= {
        "args": SimpleNamespace(output_dir=str(output_dir), save_only_model=True, train_sampling_strategy="random"),
        "run": SimpleNamespace(site=site, size=0, stop=stop, on_save_error="stop"),
        "state": SimpleNamespace(global_step=4, best_model_checkpoint=None, best_global_step=None, max_steps=9),
        "control": SimpleNamespace(should_training_stop=stopping),
        "accelerator": None, "is_deepspeed_enabled": True, "keep_checkpoints": 1, "write_troubles": [],
        "unfinished": None, "facts_at_end": None, "ended_before_stop": None, "patience": None,
    }  # fmt: skip
    return made


def complete_ones(output_dir: Path) -> list[str]:
    return sorted(path.parent.name for path in output_dir.glob("checkpoint-*/manifest.json"))


def test_a_save_is_complete_at_the_end_of_the_step_in_which_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only then are older ones deleted."""
    made = saving(tmp_path, monkeypatch)
    made._save_checkpoint(None, None)
    made.finish_save()
    made.state.global_step = 5
    made._save_checkpoint(None, None)
    assert complete_ones(tmp_path) == ["checkpoint-4"]
    assert made.unfinished is not None
    made.unfinished.hashed.result(60)
    made.batching = Batching(lengths=np.full(100, 5), micro_batch=1, accumulation=1, ranks=1, padded=False, seed=0)
    StepBoundary(made).on_step_end(made.args, made.state, TrainerControl())
    assert complete_ones(tmp_path) == ["checkpoint-5"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]


def test_steps_go_on_while_a_save_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is completed when all ranks are done, not before."""
    made, go_on = saving(tmp_path, monkeypatch), Event()
    hash_files = sync_and_hash
    monkeypatch.setattr("ds_sft.training.saving.sync_and_hash", lambda *args: go_on.wait(60) and hash_files(*args))
    made._save_checkpoint(None, None)
    saved = made.unfinished
    assert saved is not None
    talks: list[tuple[bool, ...]] = []  # what this rank tells the others

    def end_step(*others: bool) -> None:
        monkeypatch.setattr(stop_module, "any_rank", lambda *mine: (talks.append(mine), list(others or mine))[1])
        boundary.on_step_end(made.args, made.state, TrainerControl())

    boundary = StepBoundary(made)
    boundary.steps_an_epoch = 100
    with monkeypatch.context() as patch:
        for way in ("resumable.gather", "saving.gather", "saving.barrier"):
            patch.setattr(f"ds_sft.training.{way}", lambda *value: pytest.fail("a second collective in a step"))
        end_step()
        go_on.set()
        saved.hashed.result(60)
        end_step(False, True, *NOTHING)  # another rank is not done
        assert complete_ones(tmp_path) == []
    end_step()
    assert complete_ones(tmp_path) == ["checkpoint-4"]
    end_step()
    assert talks == [(False, hashes, *NOTHING) for hashes in (True, False, False, False)]  # one a step


NOTHING = (False,) * 5  # is wanted by callbacks


def test_what_a_callback_wants_on_another_rank_is_wanted_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the collective of the step; in the middle of one an end waits for that."""
    made = saving(tmp_path, monkeypatch)
    made.batching = Batching(lengths=np.full(100, 5), micro_batch=1, accumulation=1, ranks=1, padded=False, seed=0)
    boundary, control = StepBoundary(made), TrainerControl(should_training_stop=True)
    boundary.on_substep_end(made.args, made.state, control)
    assert control == TrainerControl()
    boundary.on_optimizer_step(made.args, made.state, control)
    assert control == TrainerControl(should_training_stop=True)
    talks: list[tuple[bool, ...]] = []
    other = (False, False, False, True, False, True, False)  # wants to end the epoch and to measure
    monkeypatch.setattr(
        stop_module,
        "any_rank",
        lambda *mine: [a or b for a, b in zip(mine, (talks.append(mine), other)[1], strict=True)],
    )
    for _ in range(2):
        boundary.on_step_end(made.args, made.state, control)
        assert control == TrainerControl(should_training_stop=True, should_epoch_stop=True, should_evaluate=True)
    assert talks == [(False, False, True, *NOTHING[1:]), (False, False, True, True, False, True, False)]


class Quiet(TrainerCallback):
    """A callback of the user's."""


@pytest.mark.parametrize("event", ["on_epoch_begin", "on_log", "on_evaluate", "on_save"])
def test_between_two_steps_ranks_agree_where_there_are_callbacks_of_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    made = saving(tmp_path, monkeypatch)
    talks: list[tuple[bool, ...]] = []
    monkeypatch.setattr("ds_sft.training.resumable.any_rank", lambda *mine: (talks.append(mine), [True] * 5)[1])
    for callbacks, ends in (([DefaultFlowCallback()], False), ([DefaultFlowCallback(), Quiet()], True)):
        boundary, control = StepBoundary(made), TrainerControl()
        made.callback_handler = SimpleNamespace(callbacks=[*callbacks, boundary])
        getattr(boundary, event)(made.args, made.state, control)
        assert control.should_training_stop is ends
    assert talks == [NOTHING]


def test_no_step_follows_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = saving(tmp_path, monkeypatch, stopping=True)
    made._save_checkpoint(None, None)
    assert complete_ones(tmp_path) == ["checkpoint-4"]


def test_the_next_save_and_the_end_of_training_complete_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = saving(tmp_path, monkeypatch)
    monkeypatch.setattr(Trainer, "_finalize_training", lambda *args: complete_ones(tmp_path))
    made._save_checkpoint(None, None)
    made.state.global_step = 6
    made._save_checkpoint(None, None)
    assert complete_ones(tmp_path) == ["checkpoint-4"]
    assert made._finalize_training(None, 0, 0.0) == ["checkpoint-6"]


@pytest.mark.parametrize(("saved", "best"), [
    (None, None),
    (6, None),
    (9, None),  # once
    (9, "out/checkpoint-6"),
])  # fmt: skip
def test_a_stop_after_training_saves_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: int | None, best: str | None
) -> None:
    """As it was before the summary of the run."""
    made = saving(tmp_path, monkeypatch)
    if saved:
        made.state.global_step = saved
        made._save_checkpoint(None, None)
        made.finish_save()
    before = (tmp_path / f"checkpoint-{saved}" / "manifest.json").read_text() if saved else ""
    made.args.load_best_model_at_end, made.model, made.state.global_step = True, None, 9
    made.state.best_model_checkpoint, made.state.log_history = best, [{"loss": 2.0}, {"train_runtime": 1.0}]
    made.facts_at_end = made.facts() | {"loss_total": 7.5}
    made.run.stop.reason = "SIGINT"
    with pytest.raises(Stopped), made.saved_if_stopped():
        made.run.stop.check()
    assert complete_ones(tmp_path) == ["checkpoint-9"]
    manifest = (tmp_path / "checkpoint-9" / "manifest.json").read_text()
    if saved == 9:
        assert manifest == before
    else:
        assert (json.loads(manifest)["step"], json.loads(manifest)["loss_total"]) == (9, 7.5)
        assert made.state.log_history == [{"loss": 2.0}]


def test_a_stop_waits_for_the_export_of_a_best_model_that_the_last_step_is_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop there would have the same command train again what came after the best checkpoint."""
    made = saving(tmp_path, monkeypatch)
    made._save_checkpoint(None, None)
    made.finish_save()
    made.args.load_best_model_at_end, made.state.global_step = True, 9
    made.state.best_model_checkpoint = "out/checkpoint-4"
    made.run.stop.reason = "SIGINT"
    with made.saved_if_stopped():
        made.run.stop.check()
    assert complete_ones(tmp_path) == ["checkpoint-4"]
    with pytest.raises(Stopped):
        made.run.stop.check()


def test_rank_0_says_whether_the_model_is_the_best_one_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has not seen the best one's folder must not leave the others alone in what follows."""
    made = saving(tmp_path, monkeypatch)
    made.args.load_best_model_at_end = True
    for others in (True, False):
        monkeypatch.setattr(resumable_module, "gather", lambda mine, others=others: [others, mine])
        assert made.is_best is others


@pytest.mark.parametrize("later", [0, 1])
def test_a_stop_ends_with_the_failure_of_its_own_checkpoint_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], later: int
) -> None:
    """One that was being hashed when the run was asked to stop is done without: that of the stop comes after it."""
    made = saving(tmp_path, monkeypatch)
    made.run.on_save_error, made.run.stop.decided = "continue", "SIGTERM"
    made.state.global_step += later
    if later:
        made._give_up(tmp_path / "checkpoint-4", "full")
        assert "Training on (on_save_error: continue)." in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="checkpoint-4 could not be saved: full"):
            made._give_up(tmp_path / "checkpoint-4", "full")


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_failure_beside_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_save_error: str
) -> None:
    def full(folder: Path, site: Site) -> None:
        raise OSError(28, "No space left on device", "weights")

    made = saving(tmp_path, monkeypatch)
    made.run.on_save_error = on_save_error
    made._save_checkpoint(None, None)
    made.finish_save()
    monkeypatch.setattr("ds_sft.training.saving.sync_and_hash", full)
    made.state.global_step = 5
    made._save_checkpoint(None, None)
    if on_save_error == "stop":
        with pytest.raises(
            UserError, match=r"checkpoint-5 could not be saved: weights: No space left on device; the new"
        ):
            made.finish_save()
    else:
        made.finish_save()
        assert "Training on (on_save_error: continue)." in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
    made.finish_save()  # it is settled


def test_beside_frozen_weights_no_script_makes_a_model_of_the_others() -> None:
    """DeepSpeed's own would: of an adapter, under names that nothing loads."""
    engine = Engine()
    trainer(model_wrapped=engine, run=SimpleNamespace(freezes=True))._save_engine("out/checkpoint-4")
    assert engine.left_out is True
    assert engine.scripts == 0


@pytest.mark.parametrize("rank", [0, 1])
def test_each_node_has_the_adapter_and_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Two nodes with a disk each, without DeepSpeed: `should_save` is true on both."""
    monkeypatch.setattr("ds_sft.training.saving.trained_weights", lambda model, keep: {"kept": keep})
    monkeypatch.setattr(
        "ds_sft.training.saving.save_trained", lambda model, weights, to: (to / "adapter").write_text(str(weights))
    )
    site = Site(Launch(launcher="torchrun", rank=rank, world_size=2), shared=False)
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: (folder / "tokenizer").write_text("t"))
    made = trainer(model=None, args=SimpleNamespace(should_save=True, output_dir="elsewhere"),
                   is_deepspeed_enabled=False, processing_class=tokenizer,
                   run=SimpleNamespace(freezes=True, site=site))  # fmt: skip
    made.save_model(str(tmp_path), _internal_call=True)
    made._complete_on_each_node(tmp_path)
    assert made.write_troubles == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "tokenizer", "training_args.bin"]
    assert (tmp_path / "adapter").read_text() == "{'kept': True}"


def test_a_rank_that_saves_nothing_still_gathers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    monkeypatch.setattr("ds_sft.training.saving.trained_weights", lambda model, keep: gathered.append(keep))
    made = trainer(model=None, args=SimpleNamespace(should_save=False, output_dir=str(tmp_path)),
                   run=SimpleNamespace(freezes=True))  # fmt: skip
    made.save_model(_internal_call=True)
    assert (gathered, list(tmp_path.iterdir())) == ([False], [])


def test_a_rank_that_saves_nothing_makes_no_file_of_a_whole_model(tmp_path: Path) -> None:
    """Trainer calls `_save` on every rank, and the folder is there when rank 0 has made it."""
    made = trainer(args=SimpleNamespace(should_save=False, output_dir=str(tmp_path / "checkpoint-1")),
                   is_distributed_loading_by_transformers=False, run=SimpleNamespace(end_ids=[2]))  # fmt: skip
    made._save()
    assert (made.write_troubles, list(tmp_path.iterdir())) == ([], [])
