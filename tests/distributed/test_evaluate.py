"""A run that scores its own answers, and the same numbers from `ds-sft evaluate`, on one rank and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import ROOT, Done, listing, read_lines, run_forked, train

pytestmark = pytest.mark.distributed

SCORES = ["exact_match", "chrf", "rouge_l"]


def evaluate(*words: str, ranks: int | None, cwd: Path) -> Done:
    return run_forked([str(ROOT / "ds_sft" / "__main__.py"), "evaluate", *words], ranks, cwd=cwd)


def numbers(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in float32, whose validation rows are of two files."""
    folder = tmp_path_factory.mktemp("finished")
    rows = questions_and_answers(27)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "one.jsonl", rows[:7])
    write_rows(folder / "two.jsonl", rows[20:])
    keys: dict[str, Any] = {
        "model_name_or_path": str(model_dir), "train_file": "train.jsonl", "eval_file": ["one.jsonl", "two.jsonl"],
        "output_dir": "out", "max_length": 128, "bf16": False, "learning_rate": 1e-2, "num_train_epochs": 20,
        "save_strategy": "no", "eval_strategy": "epoch", "num_predictions": 0, "predict_max_new_tokens": 40,
        "evaluate_rows": 14, "predict_before": True,
    }  # fmt: skip
    done = train("forked", None, keys, cwd=folder)
    assert done.code == 0, done.output[-6000:]
    (folder / "said.txt").write_text(done.output, encoding="utf-8")
    return folder


def test_a_run_scores_its_own_answers(finished: Path) -> None:
    """The loss of the rows is the run's validation loss, and training made the answers better."""
    out = finished / "out"
    record = numbers(out / "run.json")
    found = record["evaluation"]["sources"]["all"]
    before, after = found["models"]["before"], found["models"]["after"]
    assert (found["rows"], after["answered"]) == (14, 14)
    assert after["loss"]["value"] == pytest.approx(record["eval_loss"], rel=1e-5)
    assert after["chrf"]["value"] > before["chrf"]["value"]
    assert found["difference"]["chrf"]["low"] > 0
    assert found["difference"]["chrf"]["better"] == 1
    (logged,) = [row for row in read_lines(out / "metrics.jsonl") if "eval_chrf" in row]
    assert logged == {"step": record["steps"], **{f"eval_{name}": after[name]["value"] for name in SCORES}}
    answers = read_lines(out / "evaluation.jsonl")
    assert [row["model"] for row in answers] == ["before"] * 14 + ["after"] * 14
    said = (finished / "said.txt").read_text(encoding="utf-8").splitlines()
    assert said[-2].startswith(f"Evaluation of 14 validation rows: loss {after['loss']['value']:.3f} [")
    assert "evaluation.jsonl" in listing(out)


def test_one_rank_and_two_have_the_same_numbers(finished: Path) -> None:
    """And those of the run's end; answers and intervals to the last digit."""
    for ranks in (None, 2):
        (finished / str(ranks)).mkdir()
        done = evaluate("out", "--out", f"{ranks}/found.json", ranks=ranks, cwd=finished)
        assert done.code == 0, done.output[-6000:]
        assert done.output.count("Answers (after): 14 of 14 rows") == 1
        assert done.output.count("┃ better in ┃") == 3  # all, and each of the two files
    for name in ("found.json", "found.jsonl"):
        assert (finished / "None" / name).read_bytes() == (finished / "2" / name).read_bytes()
    record = numbers(finished / "out" / "run.json")["evaluation"]
    assert numbers(finished / "2" / "found.json")["sources"] == record["sources"]
    assert (finished / "2" / "found.jsonl").read_bytes() == (finished / "out" / "evaluation.jsonl").read_bytes()


def test_a_mistake_is_said_once(finished: Path) -> None:
    done = evaluate("out", "--data", "none.jsonl", ranks=2, cwd=finished)
    assert done.code == 2
    assert done.output.count("none.jsonl: no such file") == 1
    assert "Traceback" not in done.output
