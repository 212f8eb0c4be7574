"""A user's own code in real runs: everything that docs/extend.md shows at once, and callbacks that end a run."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import Done, listing, run_forked, script, train, write_yaml
from tests.distributed.test_resume import assert_bit_equal, metrics
from tests.own_code import TICKETS, keys_of_page, write_modules

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


def keys_of(model_dir: Path, **changes: Any) -> dict[str, Any]:
    common = {"model_name_or_path": str(model_dir), "output_dir": "out", "max_length": 128, "val_size": 6, "bf16": True,
              "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1,
              "num_predictions": 2, "predict_max_new_tokens": 4, "report_to": "none", "train_file": "rows.jsonl",
              "learning_rate": 3e-3}  # fmt: skip
    return common | changes


ALONE = """
from transformers import TrainerCallback

class Alone(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        control.should_evaluate |= args.process_index == 0 and state.global_step == 1 and "loss" in logs

    def on_step_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= args.process_index == 0 and state.global_step == 3

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save |= args.process_index == 1 and state.global_step == 3
"""


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_everything_on_the_page_at_once(model_dir: Path, tmp_path: Path, deepspeed: str) -> None:
    """And what a callback wants on one rank alone: to measure after step 1, to save after 3, to end after 4."""
    write_modules(tmp_path)
    (tmp_path / "alone.py").write_text(ALONE, encoding="utf-8")
    write_rows(tmp_path / "tickets.jsonl", TICKETS)
    page = keys_of_page() | {"deepspeed": deepspeed, "train_file": "tickets.jsonl", "batching": "padding_free"}
    page["callbacks"].append("alone:Alone")
    keys = keys_of(model_dir, **page, max_steps=6, eval_steps=2, save_steps=2, gradient_accumulation_steps=2)
    done = train("forked", 2, keys, cwd=tmp_path)
    assert done.code == 0, done.output
    assert "A callback has ended training, after step 4 of 6.\n" in done.output
    assert "mismatch" not in done.output  # of accumulation, which accelerate finds where there is none
    assert [name for name in listing(tmp_path / "out") if name.startswith("checkpoint")] == [
        f"checkpoint-{step}" for step in (2, 3, 4)
    ]
    assert [entry["step"] for entry in metrics(tmp_path / "out") if "eval_loss" in entry] == [1, 2, 4]
    assert re.search(r"^  Attention +my_attention:by_rows \(as attn_implementation says\)$", done.output, re.MULTILINE)
    assert done.output.count("Optimizer: my_optimizer:SignSGD.\n") == 1
    assert "Curves go to my_tracker:Lines and out/metrics.jsonl; SwanLab is off" in done.output
    lines = list(csv.reader((tmp_path / "out" / "lines.csv").open(encoding="utf-8")))
    assert [step for step, name, _ in lines if name == "loss"] == ["1", "2", "3", "4"]
    answers = [text for step, name, text in lines if name == "prediction"]
    assert [text.splitlines()[0] for text in answers] == ["Question: Order 1", "Question: Order 4"]
    assert lines[-1] == ["", "state", "success"]
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["stateful_callbacks"]["EarlyStoppingCallback"]["attributes"] == {"early_stopping_patience_counter": 0}
    (tmp_path / "my_optimizer.py").open("a", encoding="utf-8").write("\n# another\n")
    again = train("forked", 2, keys, cwd=tmp_path)
    assert set(again.codes) == {2}
    assert "code of my_optimizer:SignSGD, which has changed" in again.output


DISTURBED = {"FILE_LIMIT": "0", "POISON": "{}"}
BOUND = {"my_callbacks:StopBelow": {"bound": 100.0, "times": 4}}  # every loss is below it: it counts to 4
PATIENCE = {"transformers:EarlyStoppingCallback": {"early_stopping_patience": 2, "early_stopping_threshold": 100.0}}


@pytest.mark.parametrize(
    ("callback", "changes", "ends"),
    [
        (BOUND, {"eval_strategy": "no"}, 4),
        # The first evaluation is the best so far, no later one is better by 100: 2, 4 and 6.
        (PATIENCE, {"eval_steps": 2, "metric_for_best_model": "loss", "load_best_model_at_end": True}, 6),
    ],
    ids=["own", "early stopping"],
)
def test_a_run_that_a_callback_ends_resumes_exactly(
    model_dir: Path, tmp_path: Path, callback: dict[str, Any], changes: dict[str, Any], ends: int
) -> None:
    write_modules(tmp_path)
    write_rows(tmp_path / "rows.jsonl", questions_and_answers(40))
    keys = keys_of(model_dir, callbacks=[callback], max_steps=12, save_steps=2, **changes)

    def run(output_dir: str, **more: Any) -> Done:
        done = train("forked", None, {**keys, "output_dir": output_dir, **more}, cwd=tmp_path)
        assert done.code == 0, done.output
        return done

    run("whole")
    assert json.loads((tmp_path / "whole" / "run.json").read_text(encoding="utf-8"))["steps"] == ends
    assert [name for name in listing(tmp_path / "whole") if name.startswith("checkpoint")] == [
        f"checkpoint-{step}" for step in range(2, ends + 1, 2)
    ]
    # From the middle, where the callback has counted half way; and from its end, where no step is left.
    run("middle", resume=f"whole/checkpoint-{ends - 2}")
    assert_bit_equal(tmp_path / "middle", tmp_path / "whole")
    assert metrics(tmp_path / "middle") == metrics(tmp_path / "whole")
    said = run("end", resume=f"whole/checkpoint-{ends}").output
    assert "Step " not in said
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "end")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    # Stopped at its last step, before that is evaluated, it still takes no other.
    write_yaml(tmp_path / "run.yaml", {**keys, "output_dir": "stopped"})
    for at in (f"step {ends} SIGTERM 0", ""):
        done = run_forked([script("disturbed"), "--config", "run.yaml"], None, cwd=tmp_path, env=DISTURBED | {"AT": at})
        assert done.code == 0, done.output
    assert_bit_equal(tmp_path / "stopped", tmp_path / "whole")
    # With other callbacks it goes on.
    run("longer", resume=f"whole/checkpoint-{ends}", callbacks=[], resume_anyway=True)
    assert json.loads((tmp_path / "longer" / "run.json").read_text(encoding="utf-8"))["steps"] == 12
