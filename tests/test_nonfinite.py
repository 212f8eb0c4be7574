"""What is said of a step that is no number, when the host reads it, and what a validation loss of NaN does."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer

from ds_sft.checkpoints.identity import changes, identity
from ds_sft.checkpoints.storage import Site
from ds_sft.config.keys import TRAINING_DEFAULTS, Config
from ds_sft.data.batch import collate_share
from ds_sft.data.loader import single_rows
from ds_sft.data.micro_batches import Batching
from ds_sft.data.packing import PackedRows, Packing
from ds_sft.engine.zero import engine_config
from ds_sft.errors import RunError, UserError
from ds_sft.ranks.launch import Launch
from ds_sft.results import write_json
from ds_sft.training.arguments import training_arguments
from ds_sft.training.nonfinite import FiniteTrainer, StepValues, spread, trouble_in_words

NAN, INF = math.nan, math.inf
ALONE, LAUNCHED = Launch(launcher="python"), Launch(launcher="torchrun")


@pytest.mark.parametrize(("added", "gradient"), [(0.0, 3.0), (NAN, NAN), (INF, NAN), (-INF, NAN)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(added: float, gradient: float, dtype: torch.dtype) -> None:
    """An infinite one would have: all ranks see it in the norm of what is reduced."""
    weight = torch.tensor(0.1, dtype=dtype, requires_grad=True)
    loss = weight * 3 + added
    kept = spread(loss)
    kept.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert (kept.dtype, weight.grad.item()) == (dtype, pytest.approx(gradient, nan_ok=True))
    if added == 0:
        assert torch.equal(kept, loss)


FEW = ["a:1", "a:2"]
SAID = [
    ([], "step 1,207: all losses are finite, the norm of the gradients is inf"),
    ([(0, NAN, FEW)], "step 1,207: the loss is nan on rank 0 (a:1, a:2)"),
    ([(3, INF, [])], "step 1,207: the loss is inf on rank 3"),
    ([(1, NAN, [f"a:{i}" for i in range(6)])], "step 1,207: the loss is nan on rank 1 (a:0, a:1, a:2, a:3 and 2 more)"),
    ([(0, NAN, FEW), (1, -INF, ["b:7"])], "step 1,207: the loss is nan on rank 0 (a:1, a:2); -inf on rank 1 (b:7)"),
    (
        [(rank, NAN, ["a:1"]) for rank in range(6)],
        "step 1,207: the loss is nan on rank 0 (a:1); nan on rank 1 (a:1); nan on rank 2 (a:1); nan on rank 3 (a:1); "
        "and in 2 more micro batches",
    ),
]


@pytest.mark.parametrize(("bad", "said"), SAID)
def test_what_is_said(bad: list[tuple[int, float, list[str]]], said: str) -> None:
    assert trouble_in_words(StepValues.begin(1207, torch.tensor(INF), [torch.tensor(1.0)]), bad) == said


def test_rows_of_packed_sequences() -> None:
    packed = PackedRows([], Packing([[4, 0], [2], [3, 1]], tokens=9, max_length=9))
    assert single_rows(packed, [2, 0]) == [3, 1, 4, 0]
    assert single_rows([], [2, 0]) == [2, 0]


class Watching(FiniteTrainer):
    """Two rows a micro batch, two micro batches a step, four steps an epoch, one rank; `norm` is that of every step."""

    is_deepspeed_enabled: Any = False

    def finish_save(self, *, wait: bool = True) -> None:
        self.finished = True


@pytest.fixture
def watching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    made: Any = Watching.__new__(Watching)
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm=None: self.norm)
    monkeypatch.setattr(Trainer, "compute_loss", lambda self, model, inputs, loss: loss)
    batching = Batching(lengths=np.full(16, 5), micro_batch=2, accumulation=2, ranks=1, padded=False, seed=0,
                        order="sequential")  # fmt: skip
    made.__dict__ |= {
        "args": SimpleNamespace(fp16=False, output_dir=str(tmp_path), train_sampling_strategy="sequential",
                                metric_for_best_model="eval_loss",
                                greater_is_better=True, save_strategy="steps"),
        "state": SimpleNamespace(global_step=5, best_metric=None, best_global_step=None),
        "control": SimpleNamespace(should_log=False, should_evaluate=False, should_save=False),
        "run": SimpleNamespace(site=Site(ALONE, shared=True)), "batching": batching, "train_dataset": range(16),
        "where": lambda row: f"rows.jsonl:{row + 1}", "on_nonfinite": "stop", "norm": torch.tensor(1.0),
        "_tr_loss": torch.tensor(0.0), "_globalstep_last_logged": 4, "skipped_steps": 0, "skipped_unlogged": 0,
        "micro_losses": [], "reading": None, "unclipped_norm": None, "evaluation_due": False, "finished": False,
        "patience": None, "own_code": {},
    }  # fmt: skip
    return made


def take_step(made: Any, losses: list[float], norm: Any) -> None:
    """As Trainer does, up to the optimizer's step."""
    made.norm = norm
    for loss in losses:
        made._tr_loss += made.compute_loss(None, {"labels": torch.ones(1, 3)}, torch.tensor(loss))
    made._get_grad_norm(None)


# Step 6 is the second of the second epoch: rows 5 to 8 of the file in two micro batches.
WRONG = "step 6: the loss is nan on rank 0 (rows.jsonl:6, rows.jsonl:8). Nothing of this step is kept; no checkpoint "


def test_the_norm_is_read_when_the_next_one_is_due(watching: Any) -> None:
    """The host need not wait for the device; a checkpoint that was being completed is completed first."""
    take_step(watching, [1.0, NAN], torch.tensor(NAN))
    assert watching.reading.step == 6
    watching.state.global_step = 6
    with pytest.raises(RunError) as ended:
        take_step(watching, [1.0, 1.0], torch.tensor(1.0))
    assert str(ended.value).startswith(WRONG)
    assert watching.finished


@pytest.mark.parametrize(
    ("losses", "norm", "own_code", "said"),
    [
        ([1.0, NAN], NAN, {},
         "before it. Look at its rows, and at learning_rate; on_nonfinite: skip would leave the step out"),
        ([1.0, 1.0], INF, {"own:Fast": "optim", "own:Cb": "callbacks"},
         "before it. Look at its rows, and at learning_rate, and at optim: own:Fast, and at callbacks: own:Cb; "
         "on_nonfinite: skip would leave the step out"),
        ([NAN, NAN], NAN, {"own:Fast": "optim"},
         "before it. All losses of the step are none: the weights were no numbers before it, as a rule. Look at "
         "learning_rate, and at optim: own:Fast; on_nonfinite: skip would leave out every step"),
    ],
    ids=["a row", "own code", "weights"],
)  # fmt: skip
def test_where_to_look(watching: Any, losses: list[float], norm: float, own_code: dict[str, str], said: str) -> None:
    """An optimizer, a rate or a callback shows in the step after it, in all of whose losses the weights are."""
    watching.own_code = own_code
    take_step(watching, losses, torch.tensor(norm))
    with pytest.raises(RunError) as ended:
        watching.settle()
    assert str(ended.value).endswith(said)


def test_ranks_that_share_a_row_have_one_loss(watching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is no sign of weights that are no numbers."""
    watching.batching = dataclasses.replace(watching.batching, accumulation=1, ranks=1, group=2)
    monkeypatch.setattr("ds_sft.training.nonfinite.gather", lambda bad: [bad, bad])
    take_step(watching, [NAN], torch.tensor(NAN))
    with pytest.raises(RunError, match="Look at its rows, and"):
        watching.settle()


def test_rows_of_a_step_that_has_another_size_since_a_resume(watching: Any) -> None:
    """Four rows of the second epoch were learned in a step of two micro batches; since then a step is one."""
    before = watching.batching
    watching.batching = dataclasses.replace(before, accumulation=1, seam=before.seam_at(5))
    assert [watching._rows(step, 0, 0) for step in (6, 7)] == [
        ["rows.jsonl:5", "rows.jsonl:6"],
        ["rows.jsonl:7", "rows.jsonl:8"],
    ]


@pytest.mark.parametrize("due", ["should_log", "should_evaluate", "should_save"])
def test_or_before_anything_is_made_of_the_step(watching: Any, monkeypatch: pytest.MonkeyPatch, due: str) -> None:
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", lambda *args: pytest.fail("something was made of it"))
    take_step(watching, [1.0, NAN], torch.tensor(NAN))
    setattr(watching.control, due, True)
    with pytest.raises(RunError):
        watching._maybe_log_save_evaluate()


def test_or_at_the_end(watching: Any) -> None:
    take_step(watching, [1.0, NAN], torch.tensor(NAN))
    with pytest.raises(RunError):
        watching._finalize_training(None, 16, 0.0)


def test_at_once_where_deepspeed_has_read_it(watching: Any) -> None:
    with pytest.raises(RunError, match="step 6: all losses are finite, the norm of the gradients is inf"):
        take_step(watching, [1.0, 1.0], INF)


def test_a_sound_step_is_kept(watching: Any) -> None:
    for _ in range(3):
        take_step(watching, [1.0, 1.0], torch.tensor(3.0))
        watching.state.global_step += 1
    watching.settle()
    assert watching._tr_loss == 6.0


def test_a_scaler_of_float16_is_left_alone(watching: Any) -> None:
    watching.args.fp16 = True
    take_step(watching, [1.0, NAN], torch.tensor(INF))
    watching.settle()


def test_a_loss_of_nan_is_not_carried_into_the_next_entry(watching: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainer resets the sum by taking it from itself, which leaves NaN NaN; of float16, where NaN may come here."""

    def log(self: Any) -> None:
        self._tr_loss -= self._tr_loss
        self._globalstep_last_logged = self.state.global_step

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", log)
    watching._tr_loss += NAN
    watching.control.should_log = True
    watching._maybe_log_save_evaluate()
    assert watching._tr_loss == 0


def test_the_rows_of_ranks_that_share_them(watching: Any) -> None:
    """Ranks 0 and 1 have the parts of one micro batch, 2 and 3 those of another."""
    watching.batching = dataclasses.replace(watching.batching, accumulation=1, ranks=2, group=2)
    assert [watching._rows(1, rank, 0) for rank in range(4)] == [
        ["rows.jsonl:1", "rows.jsonl:3"],
        ["rows.jsonl:1", "rows.jsonl:3"],
        ["rows.jsonl:2", "rows.jsonl:4"],
        ["rows.jsonl:2", "rows.jsonl:4"],
    ]


def test_a_part_of_a_row_that_predicts_the_next_part(watching: Any) -> None:
    """It supervises a token that is not among its labels; a loss that is no number is no loss over nothing there."""
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, -100]}]
    for place, kept in ((0, NAN), (1, 0.0)):
        watching.micro_losses = []
        batch = collate_share(rows, place=place, size=2)
        assert batch["labels"][..., 1:].tolist() == [[-100]]
        loss = watching.compute_loss(None, batch, torch.tensor(NAN))
        assert loss.item() == pytest.approx(kept, nan_ok=True)


@pytest.mark.parametrize(
    ("labels", "kept"), [([-100, -100, -100], 0.0), ([7, -100, -100], 0.0), ([-100, 7, -100], NAN)]
)
def test_a_micro_batch_that_teaches_nothing_has_a_loss(watching: Any, labels: list[int], kept: float) -> None:
    """A model that keeps its own loss divides 0 by 0 there; the first token of a row is no target."""
    weight = torch.tensor(1.0, requires_grad=True)
    logits = weight * torch.ones(3, 9)
    inputs = {"labels": torch.tensor([labels])}
    wrong = torch.nn.functional.cross_entropy(logits, torch.full((3,), -100))  # the mean over none
    loss = watching.compute_loss(None, inputs, wrong)
    assert loss.item() == pytest.approx(kept, nan_ok=True)
    loss.backward()
    assert math.isfinite(watching.micro_losses[0].item()) is (kept == 0)
    assert weight.grad == 0 or kept != 0


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_validation_loss_that_is_no_number(
    watching: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    """It is said, and it is the best in neither direction; the first that is a number is."""
    monkeypatch.setattr(Trainer, "evaluate", lambda *args, **kwargs: {"eval_loss": value})
    metrics = watching.evaluate()
    assert capsys.readouterr().out == f"Warning: the validation loss after step 5 is {value}.\n"
    for watching.args.greater_is_better in (True, False):
        assert watching._determine_best_metric(metrics, None) is False
    assert (watching.state.best_metric, watching.state.best_global_step) == (None, None)
    assert watching._determine_best_metric({"eval_loss": 9.0}, None) is True
    assert (watching.state.best_metric, watching.state.best_global_step) == (9.0, 5)


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"eval_loss": NAN, "ranks": [{"a": INF}, 1.5], "step": 3})
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {"eval_loss": None, "ranks": [{"a": None}, 1.5], "step": 3}


# ---- Keys


def make(folder: Path, **keys: Any) -> Config:
    ours = {name: keys.pop(name) for name in ("on_nonfinite",) if name in keys}
    training = {**TRAINING_DEFAULTS, "output_dir": str(folder), **keys}
    return Config(model_name_or_path="m", train_file="t", training=training, **ours)


def test_trainers_filter_is_off(tmp_path: Path) -> None:
    """It logs 0.0 for NaN."""
    assert training_arguments(make(tmp_path), None, ALONE).logging_nan_inf_filter is False


def test_the_key_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    then, now = (identity(make(tmp_path, on_nonfinite=value), None, "rows") for value in ("stop", "skip"))
    assert changes(then, now) == {}


UNSOUND = [
    ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True, "check_grad_overflow": False}}, "stop",
     "bf16.check_grad_overflow: false: gradients that are not finite would be applied; delete it"),
    ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, "stop",
     "zero_optimization.compute_grad_norm: false: gradients that are not finite would be applied; delete it"),
    ({"zero_optimization": {"stage": 0}}, "skip",
     "zero_optimization.stage: 0: it cannot leave out a step (on_nonfinite: skip); write 1, or delete the deepspeed "
     "key: DDP needs the same memory"),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "on_nonfinite", "said"), UNSOUND)
def test_engines_that_would_apply_it_are_refused(
    tmp_path: Path, engine: dict[str, Any], on_nonfinite: str, said: str
) -> None:
    bf16 = engine["zero_optimization"]["stage"] != 0
    with pytest.raises(UserError) as refused:
        engine_config(make(tmp_path, deepspeed=engine, bf16=bf16, on_nonfinite=on_nonfinite), LAUNCHED)
    assert str(refused.value) == f"deepspeed: {said}"
