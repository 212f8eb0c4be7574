"""Files become cached data sets, and the report accounts for every row."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from ds_sft.config import Config
from ds_sft.data import cache
from ds_sft.data.dataset import load_data, print_report
from ds_sft.errors import UserError
from ds_sft.runtime.distributed import Launch
from tests.conftest import questions_and_answers, write_rows
from tests.test_encode import SYSTEM, reference_row

ALONE = Launch(launcher="python")


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """A configuration over these rows, with a cache of its own."""

    def build(rows: list[Any], **keys: Any) -> Config:
        file = write_rows(tmp_path / "train.jsonl", rows)
        defaults = {"model_name_or_path": "m", "train_file": str(file), "cache_dir": str(tmp_path / "cache")}
        return Config(
            **{**defaults, "system_prompt": SYSTEM, "training": {"output_dir": str(tmp_path / "out")}, **keys}
        )

    return build


def test_rows_and_report(make: Any, tokenizer: Any) -> None:
    rows = questions_and_answers(8)
    data = load_data(make(rows), tokenizer, ALONE)
    expected = [reference_row(tokenizer, row["question"], row["answer"], SYSTEM, 2048) for row in rows]
    assert [(row["input_ids"], row["labels"]) for row in data.train] == expected
    assert data.train.column_names == ["input_ids", "labels"]
    lengths = sorted(len(ids) for ids, _ in expected)
    assert data.report["train"] == {
        "file": data.report["train"]["file"],
        "rows_read": 8,
        "rows_kept": 8,
        "rows_dropped": {},
        "rows_truncated": 0,
        "rows_split": 0,
        "rows_set_aside": 0,
        "rows_per_epoch": 8,
        "duplicates": 0,
        "rows_with_special_tokens": 0,
        "tokens": sum(lengths),
        "tokens_cut": 0,
        "supervised_tokens": sum(label != -100 for _, labels in expected for label in labels),
        "supervised_tokens_cut": 0,
        "answers_cut": 0,
        "tokens_dropped": 0,
        "supervised_tokens_dropped": 0,
        "length_percentiles": {"p50": lengths[3], **dict.fromkeys(("p90", "p95", "p99", "max"), lengths[-1])},
        "recommended_max_length": -(-lengths[-1] // 64) * 64,
        "longest": data.report["train"]["longest"],
        "dropped_examples": [],
        "files": {},
    }
    file = data.report["train"]["file"]
    assert data.report["train"]["longest"] == [
        [f"{file}:{index + 1}", len(expected[index][0])]
        for index in sorted(range(8), key=lambda index: -len(expected[index][0]))
    ]


def test_cut_and_dropped_rows_are_counted(make: Any, tokenizer: Any) -> None:
    rows = [
        {"question": "Q", "answer": "A"},
        {"question": "Q", "answer": "long " * 50},
        {"question": "Q " * 90, "answer": "A"},
    ]
    limit = len(reference_row(tokenizer, "Q", "A", SYSTEM, 2048)[0])
    report = load_data(make(rows, max_length=limit), tokenizer, ALONE).report["train"]
    assert (report["rows_read"], report["rows_kept"], report["rows_truncated"]) == (3, 2, 1)
    assert report["rows_dropped"] == {"the prompt alone fills max_length": 1}
    assert report["tokens"] == 2 * limit
    assert report["supervised_tokens"] == 2 * 2  # of the long answer too two tokens are left
    assert report["tokens_cut"] == len(reference_row(tokenizer, "Q", "long " * 50, SYSTEM, 2048)[0]) - limit


def test_bad_rows_stop_the_run_or_are_counted(make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*questions_and_answers(2), "{", {"question": "only"}, *["{"] * 30]
    config = make(rows)
    with pytest.raises(UserError, match=r"train\.jsonl:3: not JSON: .*\(on_bad_row: skip leaves such rows out\)$"):
        load_data(config, tokenizer, ALONE)
    assert not list(Path(config.cache_dir).glob("encoded-*[!k]"))  # nothing half made, the lock file aside
    capsys.readouterr()
    report = load_data(make(rows, on_bad_row="skip"), tokenizer, ALONE).report["train"]
    assert report["rows_read"] == 34
    assert report["rows_dropped"] == {"not JSON": 31, "no field 'answer'": 1}
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("skipped ") for line in said) == 20
    assert any(line.endswith("12 more rows skipped") for line in said)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file has no rows"),
        (["", "  "], "the file has no rows"),
        (["{", "{"], "none of the 2 rows can be used (not JSON: 2)"),
        (
            [{"question": "Q " * 3000, "answer": "A"}],
            "none of the 1 rows can be used (the prompt alone fills max_length: 1)",
        ),
    ],
)
def test_nothing_to_learn_from(make: Any, tokenizer: Any, rows: list[Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        load_data(make(rows, on_bad_row="skip"), tokenizer, ALONE)
    assert message in str(raised.value)


def test_cache_is_keyed_by_content(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = questions_and_answers(4)

    def encodes(config: Config) -> bool:
        load_data(config, tokenizer, ALONE)
        return "reading and encoding" in capsys.readouterr().out

    assert encodes(make(rows))
    assert not encodes(make(rows))
    write_rows(tmp_path / "copy.jsonl", rows)
    assert not encodes(make(rows, train_file=str(tmp_path / "copy.jsonl")))  # the same bytes
    assert encodes(make(rows, max_length=128))
    assert encodes(make(rows, system_prompt="Another."))
    assert encodes(make(rows[:3]))
    assert not encodes(make(rows))


def test_a_build_that_was_killed_is_not_taken_for_finished(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = make(questions_and_answers(4))
    load_data(config, tokenizer, ALONE)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    building = folder.rename(folder.with_name(folder.name + ".building"))  # as if killed before the last step
    (building / "part-000000.json").write_text("{")
    assert len(load_data(config, tokenizer, ALONE).train) == 4


def test_other_ranks_wait_for_the_first(make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, waiting, results = make(questions_and_answers(4)), threading.Event(), []
    monkeypatch.setattr(cache.time, "sleep", lambda _: waiting.set())
    second = Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2)
    thread = threading.Thread(target=lambda: results.append(load_data(config, tokenizer, second)))
    thread.start()
    assert waiting.wait(20)  # it looks for the folder and does not build
    load_data(config, tokenizer, ALONE)
    thread.join(20)
    assert len(results[0].train) == 4


def test_many_rows_in_several_processes_keep_their_order(make: Any, tokenizer: Any) -> None:
    rows = questions_and_answers(4100)
    config = make(rows, preprocessing_num_workers=2)
    data = load_data(config, tokenizer, ALONE)
    assert len(data.train) == 4100
    for index in (0, 2049, 2051, 4099):
        question, answer = rows[index]["question"], rows[index]["answer"]
        assert data.train[index]["input_ids"] == reference_row(tokenizer, question, answer, SYSTEM, 2048)[0]


def test_validation_file_and_samples(
    make: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = questions_and_answers(5)
    evaluation = write_rows(tmp_path / "eval.jsonl", ["{", *rows[:4]])
    data = load_data(make(rows, eval_file=str(evaluation), on_bad_row="skip"), tokenizer, ALONE)
    assert data.eval is not None
    assert len(data.eval) == 4
    assert [sample.question for sample in data.samples] == ["What is 0?", "What is 1?", "What is 2?"]
    print_report(data.report, ALONE)
    table = capsys.readouterr().out
    assert "rows dropped: not JSON" in table
    assert json.loads(json.dumps(data.report)) == data.report
