"""Files become cached data sets, and the report accounts for every row."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from ds_sft.config.keys import Config
from ds_sft.data import build, counts, handover
from ds_sft.data.dataset import load_data, print_report
from ds_sft.data.encode import has_textless_answer
from ds_sft.data.records import Reading, to_dialogue
from ds_sft.data.sources import DataFile
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from tests.conftest import questions_and_answers, write_rows
from tests.distributed.harness import wait_until_gone
from tests.families import family
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
        "rows_with_empty_answers": 0,
        "first_empty_answer": None,
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
        "fields_not_read": {},
        "left_out_by_template": {},
        "files": {},
        "hub_datasets": [],
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


def test_an_end_that_is_the_next_turns_token_is_said(make: Any, capsys: pytest.CaptureFixture[str]) -> None:
    note = "template: it ends an answer with '<|user|>' of the next turn, which is added after a last answer"
    for name, said in (("glm", 1), ("harmony", 0)):
        load_data(make(questions_and_answers(3), template="tokenizer"), family(name), ALONE)
        assert capsys.readouterr().out.splitlines().count(note) == said


def test_bad_rows_stop_the_run_or_are_counted(make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*questions_and_answers(2), '{"question"', {"question": "only"}, *["{"] * 30]
    config = make(rows)
    with pytest.raises(
        UserError, match=r"train\.jsonl:3: not JSON: .*[^t] at column \d+; .*\(on_bad_row: skip leaves such rows out\)$"
    ):
        load_data(config, tokenizer, ALONE)
    assert not list(Path(config.cache_dir).glob("encoded-*[!k]"))  # nothing half made, the lock file aside
    capsys.readouterr()
    report = load_data(make(rows, on_bad_row="skip"), tokenizer, ALONE).report["train"]
    assert report["rows_read"] == 34
    assert report["rows_dropped"] == {"not JSON": 31, "no field 'answer'": 1}
    said = capsys.readouterr().out.splitlines()
    load_data(make(rows, on_bad_row="skip"), tokenizer, ALONE)  # from the cache: they are bad all the same
    again = capsys.readouterr().out.splitlines()
    assert [line for line in again if line.startswith("skipped ")] == [line for line in said if "skipped " in line[:8]]
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
    array = tmp_path / "one.json"  # as a table this is a line of names, as an array one row
    array.write_text(json.dumps(rows[:1]) + "\n")
    assert encodes(make(rows, train_file=str(array)))
    array.rename(tmp_path / "one.csv")
    with pytest.raises(UserError, match=r"one\.csv: the file has no rows"):
        load_data(make(rows, train_file=str(tmp_path / "one.csv")), tokenizer, ALONE)


def test_a_build_that_was_killed_is_not_taken_for_finished(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    config = make(questions_and_answers(4))
    load_data(config, tokenizer, ALONE)
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    building = folder.rename(folder.with_name(folder.name + ".building"))  # as if killed before the last step
    (building / "part-000000.json").write_text("{")
    assert len(load_data(config, tokenizer, ALONE).train) == 4


def test_other_ranks_wait_for_the_first(make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config, waiting, results = make(questions_and_answers(4)), threading.Event(), []
    monkeypatch.setattr(handover.time, "sleep", lambda _: waiting.set())
    second = Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2)
    thread = threading.Thread(target=lambda: results.append(load_data(config, tokenizer, second)))
    thread.start()
    assert waiting.wait(120)  # it looks for the folder and does not build
    load_data(config, tokenizer, ALONE)
    thread.join(120)
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


# ---- The cache


def folder_of(config: Config) -> Path:
    (folder,) = (path for path in Path(str(config.cache_dir)).iterdir() if path.is_dir())
    return folder


@pytest.mark.parametrize(
    "name", ["part-000000.arrow", "part-000000.npy", "part-000000.lost.npy", "part-000000.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_cache_is_noticed_and_built_again(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    config = make(questions_and_answers(4))
    before = load_data(config, tokenizer, ALONE)
    rows = before.train.to_dict()  # now: the file is mapped, and about to change
    file = folder_of(config) / name
    content = bytearray(file.read_bytes())
    if damage == "changed":
        content[len(content) // 2] ^= 255
    (
        file.unlink()
        if damage == "gone"
        else file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    )
    capsys.readouterr()
    after = load_data(config, tokenizer, ALONE)
    assert "is damaged: building it again" in capsys.readouterr().out
    assert after.train.to_dict() == rows
    assert after.report == before.report
    load_data(config, tokenizer, ALONE)
    assert "already encoded" in capsys.readouterr().out


def test_an_interrupted_build_is_continued(
    make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "FIRST_ROWS", 3)
    rows = questions_and_answers(10)
    whole = load_data(make(rows), tokenizer, ALONE)
    config = make(rows, cache_dir=str(Path(make(rows).cache_dir) / "second"), preprocessing_num_workers=1)
    encode, done = build.encode_block, []

    def two_only(builder: Any, folder: Path, name: str, block: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(name)
        return encode(builder, folder, name, block)

    monkeypatch.setattr(build, "encode_block", two_only)
    with pytest.raises(KeyboardInterrupt):
        load_data(config, tokenizer, ALONE)
    later: list[str] = []
    monkeypatch.setattr(build, "encode_block", lambda *given: (later.append(given[2]), encode(*given))[1])
    capsys.readouterr()
    data = load_data(config, tokenizer, ALONE)
    assert "continuing an interrupted build with 2 parts done" in capsys.readouterr().out
    assert done == ["part-000000", "part-000001"]
    assert later == ["part-000002", "part-000003"]
    assert data.train.to_dict() == whole.train.to_dict()


PREPARE = """
import os, sys
from pathlib import Path
from ds_sft.data import build
from ds_sft import cli
encode = build.encode_block
def slow(builder, folder, name, rows):
    if int(name[-6:]) >= 4:
        Path(folder, "reached").touch()
        while True: os.sched_yield()
    return encode(builder, folder, name, rows)
build.FIRST_ROWS, build.encode_block = 50, slow if sys.argv[1] == "slow" else encode
sys.exit(cli.main(sys.argv[2:]))
"""


def test_prepare_that_was_killed_leaves_nobody_and_goes_on(model_dir: Path, tmp_path: Path) -> None:
    """The real command, in two processes, ended by SIGKILL while they work."""
    write_rows(tmp_path / "train.jsonl", questions_and_answers(1000))
    flags = {"model_name_or_path": model_dir, "train_file": "train.jsonl", "output_dir": "out", "cache_dir": "cache",
             "preprocessing_num_workers": 2}  # fmt: skip
    words = ["prepare", *(str(word) for key, value in flags.items() for word in (f"--{key}", value))]
    first = subprocess.Popen([sys.executable, "-c", PREPARE, "slow", *words], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("cache/*/reached")) and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.05)
    children = psutil.Process(first.pid).children(recursive=True)
    assert len(children) == 2
    first.kill()
    first.wait()
    wait_until_gone(children, 120)
    second = subprocess.run(
        [sys.executable, "-c", PREPARE, "fast", *words], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert second.returncode == 0, second.stderr
    assert re.search(r"continuing an interrupted build with [34] parts done", second.stdout)
    assert "1,000 rows encoded in " in second.stdout


def test_prepared_data_is_found_by_training(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ds_sft.cli import main
    from ds_sft.config.read import load_config
    from ds_sft.model.tokenizer import load_tokenizer

    file = write_rows(tmp_path / "train.jsonl", questions_and_answers(8))
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {model_dir}\ntrain_file: {file}\noutput_dir: out\ncache_dir: {tmp_path}/c\n"
    )
    assert main(["prepare", str(tmp_path / "run.yaml")]) == 0
    assert "rows kept" in capsys.readouterr().out
    config = load_config(["--config", str(tmp_path / "run.yaml")])
    load_data(config, load_tokenizer(config, ALONE), Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2))
    assert main(["prepare"]) == 2
    assert "expected ds-sft prepare CONFIG.yaml" in capsys.readouterr().err


def test_the_other_ranks_neither_read_the_source_nor_check_the_folder(
    make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight ranks a node would read everything eight times."""
    config, read = make(questions_and_answers(4)), []
    digest, check = DataFile.digest, handover.intact
    monkeypatch.setattr(DataFile, "digest", lambda *given: (read.append("source"), digest(*given))[1])
    monkeypatch.setattr(handover, "intact", lambda *given: (read.append("folder"), check(*given))[1])
    first = Launch(launcher="torchrun", world_size=2, local_world_size=2)
    second = Launch(launcher="torchrun", rank=1, local_rank=1, world_size=2, local_world_size=2)
    load_data(config, tokenizer, first)
    assert sorted(set(read)) == ["folder", "source"]
    read.clear()
    assert len(load_data(config, tokenizer, second).train) == 4
    assert read == []
    by_hand = Launch(launcher="environment", rank=1, local_rank=1, world_size=2)
    load_data(config, tokenizer, by_hand)  # who belongs together is not known: it looks for itself
    assert sorted(set(read)) == ["folder", "source"]


def test_what_rank_0_says_is_for_this_start_alone(
    make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, first = make(questions_and_answers(4)), Launch(launcher="torchrun", world_size=2)
    load_data(config, tokenizer, first)
    (said,) = (tmp_path / "cache").glob("ready-*")
    monkeypatch.setattr(handover, "_start_time", lambda _: "another launcher, with the same number")
    load_data(config, tokenizer, first)
    assert len(list((tmp_path / "cache").glob("ready-*"))) == 2
    assert (tmp_path / "cache" / said.read_text()).is_dir()


def test_a_node_without_network_finds_what_was_prepared(
    make: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hub cannot be reached here: what its library answers is set by hand."""
    config = make([], train_file="hub:owner/name", val_size=1)
    rows = questions_and_answers(8)

    def offline(*given: Any, **keys: Any) -> Any:
        raise ConnectionError("offline mode is enabled")

    with monkeypatch.context() as online:
        online.setattr("huggingface_hub.HfApi.dataset_info", lambda *given: SimpleNamespace(sha="c0ffee"))
        online.setattr("datasets.load_dataset", lambda *given, **keys: iter(rows))
        before = load_data(config, tokenizer, ALONE)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    monkeypatch.setattr("datasets.load_dataset", offline)
    capsys.readouterr()
    after = load_data(config, tokenizer, ALONE)
    said = capsys.readouterr().out
    assert "already encoded" in said
    assert "its rows are not shown with the model's answers" in said
    assert after.train.to_dict() == before.train.to_dict()
    assert after.report["train"]["hub_datasets"] == ["owner/name"]
    assert (len(before.samples), len(after.samples)) == (1, 0)
    with pytest.raises(UserError, match="hub data set 'owner/other': ConnectionError: offline"):
        load_data(make([], train_file="hub:owner/other"), tokenizer, ALONE)


# ---- What is chosen of the rows


def test_validation_rows_are_set_aside_by_content(make: Any, tokenizer: Any) -> None:
    rows = questions_and_answers(40)
    doubled = [*rows, *rows[:10]]
    data = load_data(make(doubled, val_size=0.2), tokenizer, ALONE)
    assert data.eval is not None
    chosen = {tuple(ids) for ids in data.eval["input_ids"]}
    learned = {tuple(ids) for ids in data.train["input_ids"]}
    assert not chosen & learned  # equal rows go the same way
    assert len(data.train) + len(data.eval) == 50
    assert 10 <= len(data.eval) <= 12
    report = data.report
    assert (report["train"]["rows_set_aside"], report["eval"]["duplicates"]) == (len(data.eval), 0)
    assert report["eval"]["rows_read"] == report["eval"]["rows_kept"] == len(data.eval)
    assert len(data.samples) == 3
    again = load_data(make(doubled[::-1], val_size=0.2), tokenizer, ALONE)
    assert again.eval is not None
    assert {tuple(ids) for ids in again.eval["input_ids"]} == chosen  # whatever their order
    other = load_data(make(doubled, val_size=0.2, training={"output_dir": "o", "seed": 7}), tokenizer, ALONE)
    assert other.eval is not None
    assert {tuple(ids) for ids in other.eval["input_ids"]} != chosen
    five = load_data(make(rows, val_size=5), tokenizer, ALONE)
    assert five.eval is not None
    assert len(five.eval) == 5
    with pytest.raises(UserError, match="val_size: 40 leaves none of 40 rows to learn from"):
        load_data(make(rows, val_size=40), tokenizer, ALONE)


def test_duplicates_across_the_files_are_reported(
    make: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = questions_and_answers(8)
    evaluation = write_rows(tmp_path / "eval.jsonl", [rows[0], rows[3], {"question": "new", "answer": "row"}])
    data = load_data(make(rows, eval_file=str(evaluation)), tokenizer, ALONE)
    assert data.report["eval"]["duplicates"] == 2
    print_report(data.report, ALONE)
    assert "eval: 2 rows are also in train, token for token" in capsys.readouterr().out


def test_several_files_with_weights_and_limits(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    rows = questions_and_answers(100)
    for i, part in enumerate((rows[:10], rows[10:20], rows[20:100])):
        write_rows(tmp_path / f"{i}.jsonl", part)
    items = [
        str(tmp_path / "0.jsonl"),
        {"path": str(tmp_path / "1.jsonl"), "limit": 4, "weight": 2},
        {"path": str(tmp_path / "2.jsonl"), "weight": 0.5},
    ]
    data = load_data(make([], train_file=items), tokenizer, ALONE)
    found = Counter(data.where("train", i).rsplit("/", 1)[1].split(":")[0] for i in range(len(data.train)))
    assert (found["0.jsonl"], found["1.jsonl"]) == (10, 8)
    assert 25 <= found["2.jsonl"] <= 55
    assert max(Counter(map(tuple, data.train["input_ids"])).values()) == 2
    report = data.report["train"]
    assert (report["rows_read"], report["rows_kept"], report["rows_per_epoch"]) == (94, 94, len(data.train))
    assert [part["rows_read"] for part in report["files"].values()] == [10, 4, 80]
    again = load_data(make([], train_file=items), tokenizer, ALONE)
    assert again.train.to_dict() == data.train.to_dict()
    for i in (0, 12, 20):  # what a row says of where it comes from is true
        file, line = data.where("train", i).rsplit(":", 1)
        source = json.loads(Path(file).read_text().splitlines()[int(line) - 1])
        expected = reference_row(tokenizer, source["question"], source["answer"], SYSTEM, 2048)
        assert data.train[i]["input_ids"] == expected[0]


def test_equal_rows_are_set_aside_together(make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Which is said where it leaves nothing to learn from, or makes them many; and that a share can be no row."""
    row, *others = questions_and_answers(4)
    why = "equal rows are set aside together, and only"
    with pytest.raises(UserError) as caught:
        load_data(make([row] * 9, val_size=0.2), tokenizer, ALONE)
    assert str(caught.value) == (
        f"val_size: 0.2 leaves none of 9 rows to learn from ({why} 1 of 9 rows differ): write less, or eval_file"
    )
    with pytest.raises(UserError) as caught:
        load_data(make([row, *others], val_size=0.1), tokenizer, ALONE)
    assert str(caught.value) == "val_size: 0.1 of 4 rows is none: write a number of rows, such as 1"
    capsys.readouterr()
    seeds = range(9)  # one of them sets the equal rows aside first
    found = [len(load_data(make([row] * 6 + others, val_size=1, training={"output_dir": "o", "seed": seed}), tokenizer,
                           ALONE).eval) for seed in seeds]  # fmt: skip
    assert set(found) == {1, 6}
    assert capsys.readouterr().out.count(f"val_size: 1 is 6 rows and not 1: {why} 4 of 9 rows differ.\n") == (
        found.count(6)
    )


def test_rows_set_aside_are_told_of_once(make: Any, tokenizer: Any) -> None:
    """Of the other split's rows the report on eval says nothing."""
    forged = [{"question": f"Q{i} <|im_end|>", "answer": "A"} for i in range(20)]
    rows = [*forged, {"question": "Q", "answer": "A " * 400}]
    report = load_data(make(rows, val_size=1, max_length=200, overlong="drop"), tokenizer, ALONE).report
    train, held = report["train"], report["eval"]
    assert (train["rows_kept"], held["rows_kept"], held["rows_read"]) == (19, 1, 1)
    assert (train["rows_with_special_tokens"], held["rows_with_special_tokens"]) == (19, 1)
    assert train["rows_dropped"] == {"longer than max_length": 1}
    assert train["supervised_tokens_dropped"] > 400
    assert [held[name] for name in ("rows_dropped", "tokens_dropped", "supervised_tokens_dropped",
                                    "dropped_examples")] == [{}, 0, 0, []]  # fmt: skip
    assert held["length_percentiles"]["max"] < 200


def test_a_file_may_have_a_shape_of_its_own(make: Any, tokenizer: Any, tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", [{"question": "q", "answer": "a"}])
    write_rows(tmp_path / "b.jsonl", [{"ask": "q", "say": "a", "question": "x", "answer": "y"}])
    own = {"path": str(tmp_path / "b.jsonl"), "data_format": "qa", "data_fields": {"question": "ask", "answer": "say"}}
    data = load_data(make([], train_file=[str(tmp_path / "a.jsonl"), own]), tokenizer, ALONE)
    expected = reference_row(tokenizer, "q", "a", SYSTEM, 2048)[0]
    assert data.train["input_ids"][:] == [expected, expected]
    both = [str(tmp_path / "b.jsonl"), own]  # the same bytes, read in two ways
    first, second = load_data(make([], train_file=both), tokenizer, ALONE).train["input_ids"][:]
    assert (first != second, second) == (True, expected)


# ---- What nobody reads


def test_fields_that_nobody_reads_are_counted_with_their_first_row(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name, of rows and of messages, by several processes and from the cache; nothing of rows that are bad."""
    turns = [{"role": "user", "content": "q", "name": "Ann"}, {"role": "assistant", "content": "a", "date": "May"}]
    rows: list[Any] = [
        *questions_and_answers(2100),
        {"question": "Q", "answer": "A", "id": 0, "images": [], "note": None, "tag": ""},
        {"messages": turns, "id": "x"},
        {"question": 1, "answer": "A", "topic": "bad"},
        *[{"question": f"Q{i}", "answer": "A", "id": i, "weight": 0.5} for i in range(2100)],
    ]
    config = make(rows, preprocessing_num_workers=2, on_bad_row="skip")
    for _ in range(2):
        data = load_data(config, tokenizer, ALONE)
        file, report = config.train_file, data.report["train"]
        assert report["fields_not_read"] == {
            "id": [2102, f"{file}:2101"],
            "weight": [2100, f"{file}:2104"],
            "messages[].date": [1, f"{file}:2102"],
        }
        assert report["left_out_by_template"] == {"user name": [1, f"{file}:2102"]}
        capsys.readouterr()
        print_report(data.report, ALONE)
        said = capsys.readouterr().out.splitlines()
        assert f"train: fields not read: id (2,102 rows, first {file}:2101), weight (2,100 rows, first {file}:2104), " \
               f"messages[].date (1 rows, first {file}:2102)." in said  # fmt: skip
        assert f"train: left out or rewritten by the template: user name (1 rows, first {file}:2102)." in said


def test_names_without_end_are_counted_together(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counts, "MAX_FIELDS", 7)
    rows = [{"question": "Q", "answer": "A", f"n{i}": 1} for i in range(20)]
    data = load_data(make(rows), tokenizer, ALONE)
    file = data.report["train"]["file"]
    named = {f"n{i}": [1, f"{file}:{i + 1}"] for i in range(7)}
    assert data.report["train"]["fields_not_read"] == {"(others)": [13, f"{file}:8"], **named}
    print_report(data.report, ALONE)
    assert f"n3 (1 rows, first {file}:4) and 3 more in data_report.json." in capsys.readouterr().out


def test_what_a_template_leaves_out_of_turns_that_are_not_learned(make: Any, tmp_path: Path) -> None:
    """Reasoning of an earlier turn, as Qwen3's leaves it out; of a turn that is learned this is refused."""
    from tests.families import family

    first = {"role": "assistant", "content": "a", "reasoning": "Because of that."}
    talk = [{"role": "user", "content": "q"}, first, {"role": "user", "content": "r"},
            {"role": "assistant", "content": "b"}]  # fmt: skip
    config = make([{"messages": talk}], template="tokenizer", mask="last")
    report = load_data(config, family("qwen"), ALONE).report["train"]
    assert report["left_out_by_template"] == {"assistant reasoning_content": [1, f"{config.train_file}:1"]}
    with pytest.raises(
        UserError,
        match=r"train\.jsonl:1: the template renders the answer '<think>Because of that.</think>a' as 'a'; leave",
    ):
        load_data(make([{"messages": talk}], template="tokenizer"), family("qwen"), ALONE)


# ---- Long rows


def test_rows_left_out_count_in_what_is_recommended(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*questions_and_answers(21)[::4], *[{"question": "Q", "answer": "long " * 100}] * 30]
    whole = len(reference_row(tokenizer, "Q", "long " * 100, SYSTEM, 10_000)[0])
    data = load_data(make(rows, max_length=128, overlong="drop"), tokenizer, ALONE)
    report = data.report["train"]
    assert (report["rows_kept"], report["rows_dropped"]) == (6, {"longer than max_length": 30})
    assert report["length_percentiles"]["p50"] == report["length_percentiles"]["max"] == whole
    assert report["recommended_max_length"] == -(-whole // 64) * 64
    assert report["longest"][0] == [f"{report['file']}:7", whole]
    print_report(data.report, ALONE)
    said = capsys.readouterr().out
    assert f"30 rows are left out because of their length. max_length: {-(-whole // 64) * 64} holds 99 %" in said


LONG = {"question": "Q", "answer": "long " * 50}


def test_what_each_policy_costs_is_said(make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    whole, labels = reference_row(tokenizer, LONG["question"], LONG["answer"], SYSTEM, 10_000)
    supervised = sum(label != -100 for label in labels)
    rows = [{"question": "Q", "answer": "A"}, LONG]
    limit = len(whole) - 10
    reports = {}
    for policy in ("truncate", "drop", "split"):
        data = load_data(make(rows, max_length=limit, overlong=policy), tokenizer, ALONE)
        reports[policy] = data.report["train"]
        print_report(data.report, ALONE)
    cut, dropped, split = reports.values()
    assert (cut["rows_kept"], cut["rows_truncated"], cut["answers_cut"]) == (2, 1, 1)
    assert (cut["tokens_cut"], cut["supervised_tokens_cut"]) == (10, 10)
    assert (dropped["rows_kept"], dropped["rows_dropped"]) == (1, {"longer than max_length": 1})
    assert (dropped["tokens_dropped"], dropped["supervised_tokens_dropped"]) == (len(whole), supervised)
    assert dropped["dropped_examples"] == [f"{dropped['file']}:2: longer than max_length: {len(whole)} tokens"]
    assert split == {**cut, "longest": split["longest"]}  # one exchange cannot be split
    assert cut["longest"][0] == [f"{cut['file']}:2", len(whole)]
    assert cut["recommended_max_length"] == -(-len(whole) // 64) * 64
    said = capsys.readouterr().out
    assert "train: 1 answers lost their end at max_length, and with it the end of turn" in said
    assert f"max_length: {cut['recommended_max_length']} holds 99 % of the rows whole" in said
    with pytest.raises(
        UserError, match=rf"train\.jsonl:2: {len(whole)} tokens, more than max_length \(overlong: trunc"
    ):
        load_data(make(rows, max_length=limit, overlong="error"), tokenizer, ALONE)


def test_answers_without_text_are_kept_and_counted(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of what is learned: neither a call nor an answer that the mask leaves out."""
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows: list[Any] = [
        *questions_and_answers(3),
        {"question": "Q", "answer": ""},
        {"question": "Q", "answer": " \n"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "train": False},
                      {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ]  # fmt: skip
    data = load_data(make(rows), tokenizer, ALONE)
    report = data.report["train"]
    assert (report["rows_kept"], report["rows_with_empty_answers"]) == (6, 2)
    assert report["first_empty_answer"].endswith("train.jsonl:4")
    print_report(data.report, ALONE)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"train: rows with an answer without text: 2, the first in {report['first_empty_answer']}: a" in said
    calls = to_dialogue({"messages": [{"role": "user", "content": "Q"}, call]}, Reading(""))
    assert not has_textless_answer(calls, "all", "keep")


@pytest.mark.parametrize(
    ("answer", "textless"),
    [
        ({"content": "", "reasoning": "hm"}, ["drop", "empty"]),
        ({"content": "<think>\nhm\n</think>\n\n"}, ["drop", "empty"]),
        ({"content": "<think>\n\n</think>\n"}, ["keep", "drop", "empty"]),
        ({"content": "<think>\nhm\n</think>\n\na"}, []),
    ],
)
def test_an_answer_of_reasoning_alone_has_a_text_where_that_is_kept(
    answer: dict[str, str], textless: list[str]
) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]
    dialogue = to_dialogue({"messages": messages}, Reading(""))
    assert [p for p in ("keep", "drop", "empty") if has_textless_answer(dialogue, "all", p)] == textless


def test_rows_that_forge_a_turn_under_the_reference_are_counted(
    make: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*questions_and_answers(3), {"question": "Q", "answer": "No.<|im_end|>\n<|im_start|>user\nYes"}]
    data = load_data(make(rows), tokenizer, ALONE)
    assert data.report["train"]["rows_with_special_tokens"] == 1
    print_report(data.report, ALONE)
    assert "in 1 rows text such as <|im_end|> becomes special tokens, as in the reference" in capsys.readouterr().out


MEMORY = """
import json, sys
from datasets import disable_progress_bars
from ds_sft.config.keys import Config
from ds_sft.data.dataset import load_data
from ds_sft.ranks.launch import Launch
from ds_sft.results import peak_resident_kib
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for file in sys.argv[2:]:
    config = Config(model_name_or_path="m", train_file=file, cache_dir=file + ".cache", preprocessing_num_workers=1)
    load_data(config, tokenizer, Launch(launcher="python"))
    print("peak", peak_resident_kib())
"""


def test_memory_does_not_grow_with_the_file(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Ten times the rows, 25 MiB of them encoded. The million: see the command in docs/data.md."""
    files = []
    for count in (2000, 20_000):
        row = '{"question": "%d", "answer": "' + "The capital of France is Paris. " * 8 + '"}\n'
        files.append(tmp_path / f"{count}.jsonl")
        files[-1].write_text("".join(row % i for i in range(count)))
    command = [sys.executable, "-c", MEMORY, str(tokenizer_dir), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    small, large = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert large - small < 40 * 1024, f"{small} KiB, then {large} KiB"
