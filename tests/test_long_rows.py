"""Rows of a million tokens: work that grows as they do, memory of a row or two, and what is shown of them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from ds_sft.commands import preview, preview_tokens
from ds_sft.commands.preview_tokens import shown_of
from ds_sft.config.keys import Config
from ds_sft.data import build, encode, readers, rendered
from ds_sft.data.batch import collate_flat
from ds_sft.data.dataset import load_data
from ds_sft.data.encode import Encoder, last_that_fits
from ds_sft.data.packing import pack_rows
from ds_sft.data.records import Dialogue
from ds_sft.data.rendered import left_out_by_template
from ds_sft.data.rows import views_of
from ds_sft.data.shapes import Message
from ds_sft.data.sources import DataFile
from ds_sft.export import weights as export
from ds_sft.ranks.launch import Launch
from tests.conftest import write_rows


def dialogue(exchanges: int) -> Dialogue:
    said = [[Message("user", f"Question {i}?"), Message("assistant", f"Answer {i}.")] for i in range(exchanges)]
    return Dialogue(tuple(message for pair in said for message in pair))


class Counted(str):
    """A text that counts the letters which searches go over."""

    scanned = 0

    def find(self, text: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else end
        found = super().find(text, start, end)
        Counted.scanned += (found + len(text) if found >= 0 else end) - start
        return found


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Letters gone over while it is asked what a template left out of messages, and of calls."""
    made = rendered.Search.__init__

    def count(search: rendered.Search, text: str) -> None:
        made(search, Counted(text))

    monkeypatch.setattr(rendered.Search, "__init__", count)

    def asked(messages: list[Message], text: str, missing: set[str]) -> int:
        Counted.scanned = 0
        assert left_out_by_template(messages, [False] * len(messages), text) == missing
        return Counted.scanned

    return asked


@pytest.mark.parametrize("form", [str, json.dumps], ids=["as it is", "as JSON"])
def test_what_is_left_out_is_found_in_a_few_passes(scanned: Any, form: Any) -> None:
    messages = [Message("tool", f'result "{i}"\n' * 5) for i in range(400)]
    text = "".join(f"<tool>{form(message.content)}</tool>" for message in messages)
    assert scanned(messages, text, set()) < 4 * len(text)


def test_so_is_what_is_not_there(scanned: Any) -> None:
    """Reasoning of earlier turns, as Qwen3's template drops it."""
    messages = [Message("assistant", f"<think>\nthought {i}\n</think>\n\nanswer {i}") for i in range(400)]
    text = "".join(f"<a>answer {i}</a>" for i in range(400))
    assert scanned(messages, text, {"assistant reasoning_content"}) < 8 * len(text)


def test_so_are_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [
        {"type": "function", "function": {"name": f"f{i:03}", "arguments": {"a": f"value {i:03}"}}} for i in range(400)
    ]
    messages = [Message("assistant", "", tool_calls=tuple(calls[i : i + 4])) for i in range(0, 400, 4)]
    text = "".join(json.dumps(call["function"]) + "\n" for call in calls)
    seen: list[int] = []
    shows = rendered.shows_call

    def counted(near: str, call: Any) -> bool:
        seen.append(len(near))
        return shows(near, call)

    monkeypatch.setattr(rendered, "shows_call", counted)
    assert left_out_by_template(messages, [False] * len(messages), text) == set()
    assert len(seen) == 400
    assert max(seen) < 5000
    seen.clear()
    assert left_out_by_template(messages, [False] * len(messages), text.replace("value 007", "")) == {
        "assistant tool_calls"
    }
    assert sum(seen) < 10 * len(text)


# ---- overlong: split


def test_the_longest_part_is_found_wherever_one_begins_to_look() -> None:
    for low, high, last in ((1, 1, 1), (1, 9, 1), (1, 9, 4), (3, 40, 40), (3, 40, 21)):
        for guess in range(low - 1, high + 3):
            asked: list[int] = []

            def fits(number: int, asked: list[int] = asked, last: int = last) -> bool:
                asked.append(number)
                return number <= last

            assert last_that_fits(fits, low, high, guess=guess) == last
            assert len(asked) == len(set(asked)) <= 2 + 4 * abs(guess - last).bit_length()


def test_splitting_encodes_a_row_a_few_times(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model_name_or_path="m", train_file="f", overlong="split", max_length=400, system_prompt="S")
    encoder, letters = Encoder(tokenizer, config), 0
    texts = encoder._encode_texts

    def counted(group: list[str], *, plain: bool) -> Any:
        nonlocal letters
        letters += sum(map(len, group))
        return texts(group, plain=plain)

    monkeypatch.setattr(encoder, "_encode_texts", counted)
    row = dialogue(300)
    whole = sum(len(piece.text) for piece in encoder.template.pieces(row, [True] * 600) if isinstance(piece.text, str))
    found = encoder.encode([row])
    assert len(found.dialogue) > 10
    assert all(350 < length <= 400 for length in found.length[:-1])
    assert letters < 6 * whole


# ---- Memory


def test_a_long_row_is_encoded_by_itself() -> None:
    short, long = (1, b"x" * 1000), (2, b"x" * 2**21)
    assert [len(batch) for batch in build._batches([short] * 2500)] == [1000, 1000, 500]
    assert list(build._batches([short, long, long, short, short])) == [[short], [long], [long], [short, short]]
    assert list(build._batches([])) == []


def test_its_pieces_are_encoded_in_groups(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    monkeypatch.setattr(encode, "GROUP", 10)
    assert list(encode._grouped(["1234", "12345678", "x" * 30, "a"])) == [["1234", "12345678"], ["x" * 30], ["a"]]
    config = Config(model_name_or_path="m", train_file="f")
    grouped = Encoder(tokenizer, config).encode([dialogue(20)])
    monkeypatch.undo()
    whole = Encoder(tokenizer, config).encode([dialogue(20)])
    assert (grouped.input_ids == whole.input_ids).all()
    assert (grouped.labels == whole.labels).all()


def test_parquet_is_read_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["short"] * 300 + [chr(97 + i) * 2**20 for i in range(24)]
    table = pa.table({"question": ["q"] * len(answers), "answer": answers})
    with pq.ParquetWriter(tmp_path / "rows.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 300))
        writer.write_table(table.slice(300))
    sizes: list[int] = []
    batch_of = readers._parquet_batch

    def counted(batch: pa.RecordBatch) -> Any:
        sizes.append(batch.nbytes)
        return batch_of(batch)

    monkeypatch.setattr(readers, "_parquet_batch", counted)
    rows = list(DataFile(str(tmp_path / "rows.parquet")).rows())
    assert rows == [(i, {"question": "q", "answer": answer}) for i, answer in enumerate(answers, start=1)]
    assert max(sizes) <= 8 * 2**20 + 2**16
    assert len(sizes) < 8


def test_packs_of_a_million_tokens_need_no_list_for_each_length() -> None:
    tracemalloc.start()
    packing = pack_rows([400_000, 600_000, 1_000_000, 1], 1_000_000, seed=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sorted(map(sorted, packing.packs)) == [[0, 1], [2], [3]]
    assert peak < 2**20


def test_a_row_of_a_million_tokens(tokenizer: Any, tmp_path: Path) -> None:
    """From a line of JSON to the tensors of a batch."""
    rows = [{"question": "q", "answer": "xyz" * 400_000}, {"question": "q", "answer": "short"}]
    config = Config(model_name_or_path="m", train_file=str(write_rows(tmp_path / "rows.jsonl", rows)),
                    cache_dir=str(tmp_path / "cache"), max_length=1_000_000, training={"output_dir": "o"})  # fmt: skip
    data = load_data(config, tokenizer, Launch(launcher="python"))
    assert (data.rows["train"]["tokens"][0], data.rows["train"]["length"][0] > 1_000_000) == (1_000_000, True)
    batch = collate_flat([views_of(data.train)[i] for i in range(2)])
    assert batch["position_ids"][0, [0, 999_999, 1_000_000]].tolist() == [0, 999_999, 0]
    assert batch["metadata"].starts.tolist()[:2] == [0, 1_000_000]
    assert batch["labels"][0, 999_999] == batch["input_ids"][0, 999_999] != -100


# ---- What is shown, and asked, of them


def test_preview_shows_both_ends_of_a_long_row(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preview_tokens, "SHOWN", 8)
    ids = tokenizer("abcdefghijklmnopqrst")["input_ids"]
    labels = [-100] * 5 + ids[5:]
    shown = shown_of("row 1", ids, labels, tokenizer)
    assert (shown.num_tokens, shown.num_learned) == (len(ids), len(ids) - 5)
    text = str(preview._as_text(shown, plain=True))
    cut = f"\n⎯⎯ {len(ids) - 8} tokens are not shown ⎯⎯\n"
    head, tail = tokenizer.decode(ids[:4]), tokenizer.decode(ids[-4:])
    assert text == f"{head}{cut}⟦{tail}⟧"
    from ds_sft.commands.preview_page import _sequence

    page = _sequence(shown)
    assert f'<span class="next">{cut.strip()}</span>' in page
    assert page.count('title="') == 8


def test_a_stretch_of_a_long_row_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "VERIFIED_TOKENS", 10)
    labels = [[-100] * 20 + list(range(20, 40)), [-100] * 3 + [3, 4], list(range(15)), [-100] * 28 + [28, 29]]
    rows = Dataset.from_list([{"input_ids": list(range(len(of))), "labels": of} for of in labels] * 3)
    asked = export.rows_to_verify(rows)
    assert len(asked) == 8
    assert [row["input_ids"] for row in asked][:4] == [
        list(range(15, 25)), list(range(5)), list(range(10)), list(range(20, 30))
    ]  # fmt: skip
    assert asked[0]["labels"] == [-100] * 5 + [20, 21, 22, 23, 24]
    short = Dataset.from_list([{"input_ids": [1], "labels": [1]}])
    assert export.rows_to_verify(short)[:] == short[:]
