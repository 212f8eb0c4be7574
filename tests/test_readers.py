"""Files of every kind give the same rows, in bounded memory; what names a file is what is read."""

from __future__ import annotations

import datetime
import gzip
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ds_sft.commands.rows import count_quickly
from ds_sft.config.keys import Config
from ds_sft.data import readers
from ds_sft.data.bad_row import BadRow
from ds_sft.data.readers import CHUNK, holds_lines
from ds_sft.data.records import Dialogue, Reading, read_dialogues
from ds_sft.data.shapes import Message
from ds_sft.data.sources import DataFile, find_files, hub_name
from ds_sft.errors import UserError
from tests.test_records import talk

ROWS = [{"question": f"q{i} “é”\nnext, line", "answer": f"a{i}"} for i in range(5)]
TALKS = [talk(row["question"], row["answer"]) for row in ROWS]


def csv_of(rows: list[dict[str, Any]], delimiter: str = ",") -> bytes:
    """Lists and objects as JSON."""
    import csv

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """Fields in the order in which they first come; pyarrow 21 would sort those of a struct by their names."""
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, pa.schema(arrow_type(rows))), sink, row_group_size=2)
    return sink.getvalue()


def arrow_type(values: list[Any]) -> pa.DataType:
    """That of JSON values of one field."""
    known = [value for value in values if value is not None]
    if known and isinstance(known[0], dict):
        names = dict.fromkeys(name for value in known for name in value)
        return pa.struct([(name, arrow_type([value.get(name) for value in known])) for name in names])
    if known and isinstance(known[0], list):
        return pa.list_(arrow_type([item for value in known for item in value]))
    return pa.array(known).type


CONTENTS = {
    "jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode(),
    "json": json.dumps(ROWS, indent=1).encode(),
    "csv": csv_of(ROWS),
    "tsv": csv_of(ROWS, "\t"),
    "parquet": parquet_of(ROWS),
}
NUMBERS = {"jsonl": [1, 2, 3, 4, 5], "json": [2, 6, 10, 14, 18], "csv": [2, 4, 6, 8, 10], "tsv": [2, 4, 6, 8, 10],
           "parquet": [1, 2, 3, 4, 5]}  # fmt: skip


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    return bytes(pa.Codec("zstd").compress(content).to_pybytes()) if suffix == ".zst" else content


def read(file: Path | DataFile, **reading: Any) -> list[Any]:
    source = file if isinstance(file, DataFile) else DataFile(str(file))
    return list(read_dialogues(source, Reading("", **reading)))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, suffix: str) -> None:
    file = tmp_path / f"rows.{kind}{suffix}"
    file.write_bytes(compress(CONTENTS[kind], suffix))
    assert read(file) == list(zip(NUMBERS[kind], TALKS, strict=True))
    assert read(DataFile(str(file), limit=2)) == list(zip(NUMBERS[kind][:2], TALKS[:2], strict=True))


def called(**arguments: Any) -> list[dict[str, Any]]:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "20"}, {"role": "assistant", "content": "a", "reasoning": "r"}]  # fmt: skip


def tool(**properties: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": properties}}}]


CALLS = [
    {"messages": called(at="Paris"), "tools": tool(at={"type": "string"})},
    {"messages": called(zone="CET", places=["a", None]), "tools": tool(zone={"enum": ["CET", None]})},
    {"messages": called(), "tools": tool(at={"type": "string", "description": "where"})},
    {"messages": called(at="Rome", zone=None), "tools": tool(at={"type": "string", "description": None})},
]
KINDS = {
    "jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in CALLS),
    "json": json.dumps(CALLS, indent=1).encode(),
    "array.jsonl": json.dumps(CALLS).encode(),
    "held.json": json.dumps({"data": CALLS}).encode(),
    "held.jsonl": json.dumps({"rows": CALLS}, indent=2).encode(),
    "csv": csv_of(CALLS),
    "tsv": csv_of(CALLS, "\t"),
    "parquet": parquet_of(CALLS),
}


def test_an_empty_cell_of_an_optional_field_is_no_field(tmp_path: Path) -> None:
    """It takes no system prompt away, and makes no instruction a system prompt; an empty answer stays one."""
    for kind, delimiter in (("csv", ","), ("tsv", "\t")):
        qa, alpaca = tmp_path / f"qa.{kind}", tmp_path / f"alpaca.{kind}"
        qa.write_bytes(csv_of([{"question": "q", "answer": "a", "system": "", "reasoning": "", "history": ""},
                               {"question": "q", "answer": "", "system": "S", "reasoning": "", "history": ""}],
                              delimiter))  # fmt: skip
        system = Message("system", "S")
        assert read(qa) == [(2, talk("q", "a")), (3, Dialogue((system, *talk("q", "").messages)))]
        alpaca.write_bytes(csv_of([{"instruction": "S", "input": "", "output": "a"},
                                   {"instruction": "S", "input": "q", "output": "a"}], delimiter))  # fmt: skip
        rows = read_dialogues(DataFile(str(alpaca)), Reading("S"))
        assert list(rows) == [(2, talk("S", "a")), (3, talk("q", "a"))]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_rows_give_the_same_tokens_from_every_kind(tmp_path: Path, kind: str, suffix: str) -> None:
    """Parquet merges the fields of all calls and all schemas; what they have not is null there."""
    from tests.families import family
    from tests.fuzzing import encoder_of

    file = tmp_path / f"rows.{kind}{suffix}"
    file.write_bytes(compress(KINDS[kind], suffix))
    encoded = encoder_of(family("qwen"), template="tokenizer").encode([row for _, row in read(file)])
    texts = [family("qwen").decode(ids) for ids, _ in encoded.rows()]
    assert [text.count("null") for text in texts] == [0, 2, 0, 0]  # items of lists: of the arguments, of the schema
    expected = [read_arguments(text) for text in texts]
    assert expected == [{"at": "Paris"}, {"zone": "CET", "places": ["a", None]}, {}, {"at": "Rome"}]
    lines = tmp_path / "lines.jsonl"
    lines.write_bytes(KINDS["jsonl"])
    wanted = encoder_of(family("qwen"), template="tokenizer").encode([row for _, row in read(lines)])
    assert list(encoded.rows()) == list(wanted.rows())


def read_arguments(text: str) -> Any:
    return json.loads(text.partition("<tool_call>")[2].partition("</tool_call>")[0])["arguments"]


def test_maps_and_other_types_of_parquet(tmp_path: Path) -> None:
    """A map is an object, a dictionary its values, a large string a string."""
    function = pa.struct([("name", pa.large_string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    message = pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(function))])
    rows = [[{"role": "user", "content": "q"},
             {"role": "assistant", "tool_calls": [{"name": "f", "arguments": [("at", "Paris")]}]}]]  # fmt: skip
    table = {"messages": pa.array(rows, pa.list_(message)), "system": pa.array(["S"]).dictionary_encode()}
    pq.write_table(pa.table(table), tmp_path / "rows.parquet")
    ((_, dialogue),) = read(tmp_path / "rows.parquet")
    assert [message.content for message in dialogue.messages] == ["S", "q", ""]
    assert dialogue.messages[2].tool_calls[0]["function"] == {"name": "f", "arguments": {"at": "Paris"}}


def test_parquet_of_messages(tmp_path: Path) -> None:
    """Its columns are structs whose missing fields are null."""
    messages = [{"role": "user", "content": "q", "train": None}, {"role": "assistant", "content": "a", "train": None}]
    (tmp_path / "rows.parquet").write_bytes(parquet_of([{"messages": messages, "tools": None}]))
    assert read(tmp_path / "rows.parquet") == [(1, talk("q", "a"))]


@pytest.mark.parametrize(
    "content", ['[{"question": "q0", "answer": "a"}, oops]', '[{"question": "q0", "answer": "a"} x']
)
def test_nothing_is_read_beyond_the_limit(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.json").write_text(content)
    assert read(DataFile(str(tmp_path / "rows.json"), limit=1)) == [(1, talk("q0", "a"))]


def test_values_of_parquet_that_json_has_no_form_for(tmp_path: Path) -> None:
    """A date, bytes: in tools and in a call's arguments."""
    odd = {"at": datetime.datetime(2026, 1, 1), "raw": b"\xff"}
    call = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [
        {"function": {"name": "f", "arguments": odd}}]}]  # fmt: skip
    for name, row in (("tools", {"question": "q", "answer": "a", "tools": [{"name": "f", "parameters": odd}]}),
                      ("call", {"messages": call})):  # fmt: skip
        (tmp_path / f"{name}.parquet").write_bytes(parquet_of([row]))
        ((_, found),) = read(tmp_path / f"{name}.parquet")
        assert isinstance(found, BadRow)
        assert found.reason == "not JSON values"


def test_parquet_values_that_python_has_no_form_for(tmp_path: Path) -> None:
    """A date in the year 300,000, and bytes that are called text: those rows, and no other."""
    far = pa.array([0, 10**13, 0], pa.timestamp("s"))
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff")]
    )
    pq.write_table(pa.table({"question": ["q"] * 3, "answer": text, "at": far}), tmp_path / "rows.parquet")
    first, *others = read(tmp_path / "rows.parquet")
    assert first == (1, talk("q", "a"))
    assert [(number, row.reason) for number, row in others] == [(2, "not readable"), (3, "not readable")]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_one_huge_record_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Of Parquet it is passed over; in CSV, where a quote may be missing, nobody knows where it ends."""
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 1000)
    rows = [{"question": "q", "answer": "a"}, {"question": "q", "answer": "line\n" * 400}, *ROWS[:1]]
    content = csv_of(rows) if kind == "csv" else parquet_of(rows)
    (tmp_path / f"rows.{kind}").write_bytes(content)
    if kind == "csv":
        with pytest.raises(UserError, match=r"rows\.csv:20\d: a record of more than 1,000 bytes; is a quote missing"):
            read(tmp_path / "rows.csv")
        (tmp_path / "rows.csv").write_bytes(csv_of(ROWS * 40))  # much more than that in all
        assert len(read(tmp_path / "rows.csv")) == 200
        return
    (_, first), (_, large), (_, last) = read(tmp_path / "rows.parquet")
    assert (first, last) == (talk("q", "a"), TALKS[0])
    assert (large.reason, str(large)) == ("a row is too large", "a row of more than 1,000 bytes")


QA = '{"question": "q", "answer": "a"}'


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows"])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (f"{QA}\n{QA}\n", [1, 2]),
        (QA, [1]),
        (f"\n [{QA},\n{QA}]\n", [2, 3]),
        (f"[{QA}]\n\n", [1]),
        (f'{{"data": [{QA}, {QA}]}}', [1, 1]),
        (f'\n{{\n "rows": [\n{QA},\n{QA}\n ],\n "note": "", "more": [], "next": null}}\n', [4, 5]),
        (f'{{"version": "", "examples": [{QA}]}}', [1]),
        ('{"data": []}', []),
        (f'{{"info": null, "tags": [],\n"meta": {{}}, "data": [\n{QA}\n]}}', [3]),
    ],
)
def test_rows_in_json_whatever_the_name_of_the_file(tmp_path: Path, name: str, text: str, lines: list[int]) -> None:
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name) == [(line, talk("q", "a")) for line in lines]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        # Lines, whatever the first of them looks like.
        (f"[{QA}]\n{QA}\n", [(1, "found an array; expected one JSON object a line"), (2, None)]),
        (f'{{"id": 1, "data": [{QA}]}}\n{QA}\n', [(1, "no field 'question' (found: data, id)"), (2, None)]),
        (f'{{"version": "2", "data": [{QA}],\n"by": {{"x": [1]}}}}', [
            (1, 'field "version" stands beside the rows, in none of them; remove it, or write it into the rows'),
            (1, None), (2, 'field "by" stands beside the rows')]),
        (f'{{\n"info": {{"x": ["{{"]}},\n"data": [{QA}]\n}}', [(2, 'field "info" stands beside the rows'), (3, None)]),
        (f'{{"description": "a \\"b\\" \\\\", "data": [{QA}]}}', [
            (1, 'field "description" stands beside the rows'), (1, None)]),
        # Rows that have such a list besides.
        (f'{{"items": [{{"x": 1}}], {QA[1:]}', [(1, None)]),
        ('{"data": [], "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}', [
            (1, None)]),
        ('{\n "question": "q",\n "answer": "a"\n}', [
            (1, 'not JSON: it goes over several lines; expected one object a line, or {"data": [...]}'),
            (2, "not JSON"), (3, "not JSON"), (4, "not JSON")]),
    ],
)  # fmt: skip
def test_what_looks_like_a_list_of_rows(tmp_path: Path, text: str, said: list[tuple[int, str | None]]) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    for (number, row), (expected, words) in zip(read(tmp_path / "rows.jsonl"), said, strict=True):
        assert number == expected
        assert isinstance(row, Dialogue) if words is None else words in str(row)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"question": "q", "answer": "a"}', ":1: not JSON: expected a comma or ] after an item; expected an array"),
        ('[{"question": "q",\n"answer" "a"}]', ":1: not JSON: Expecting ':' delimiter; expected an array of objects"),
        ('[\n{"question": "q", "answer": "a"}\n{"question"', ":3: not JSON: expected a comma or ] after an item"),
        ('[{"question": "q", "answer": "a"}] x', ":1: not JSON: expected nothing after the array"),
        ("[" * 100_000, ":1: not JSON: RecursionError in an item"),
        ("[" + "9" * 5000 + "]", ":1: not JSON: ValueError in an item"),
        ("[,]", ":1: not JSON: Expecting value"),
        ("[", ":1: not JSON: Expecting value"),
        (f'{{"data": [{QA}]}} x', ":1: not JSON: expected nothing after the object that holds the rows"),
        (f'{{"data": [{QA}]\n"x"', ":2: not JSON: expected ,"),
        (f'{{"data": [{QA}],\nx', ":2: not JSON: Expecting value"),
        (f'{{"data": [{QA},\n', ":2: not JSON: Expecting value"),
        (f'{{"data": [{QA}], "rows": [{QA}]}}', ':1: not JSON: "data" and "rows": two lists of rows'),
        (f'{{"data": [{QA}], "x" 1}}', ":1: not JSON: expected :"),
        ('["\xff"]', ":1: not JSON: not UTF-8: invalid start byte; save the file as UTF-8"),
    ],
)
def test_broken_arrays(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "rows.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}{said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz"])
@pytest.mark.parametrize("before", ["", "\n \n"])
def test_a_long_first_row_with_a_list_is_a_row(tmp_path: Path, ending: str, before: str) -> None:
    """What shows that it is one, its own `messages`, comes after more than is read at a time."""
    row = {"train": [{"id": 1}], "notes": "n" * (CHUNK + 1), "messages": [{"role": "user", "content": "x"}]}
    file = tmp_path / f"rows.{ending}"
    write = gzip.compress if ending.endswith("gz") else bytes
    for rows in ([row], [row, row]):
        file.write_bytes(write((before + "".join(f"{json.dumps(row)}\n" for row in rows)).encode()))
        assert [json.loads(raw) for _, raw in DataFile(str(file)).rows()] == rows  # type: ignore[arg-type]
        assert holds_lines(file) is True
    file.write_bytes(write(json.dumps({"notes": "", "train": [row, row]}).encode()))
    assert [json.loads(raw) for _, raw in DataFile(str(file)).rows()] == [row, row]  # type: ignore[arg-type]
    assert holds_lines(file) is False


def test_only_lines_are_counted_unread(tmp_path: Path) -> None:
    """For a plan: a list under the name of lines has as many lines as it likes."""
    counts = []
    for content in (CONTENTS["jsonl"], CONTENTS["json"], KINDS["held.jsonl"]):
        (tmp_path / "rows.jsonl").write_bytes(content)
        counts.append(
            count_quickly(DataFile(str(tmp_path / "rows.jsonl")), Config(model_name_or_path="m", train_file="t"))
        )
    assert counts == [5, None, None]


def test_arrays_are_read_item_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders of what is read at a time fall everywhere in the text."""
    rows: list[Any] = [*ROWS, 12, "x", [], {}, None, True, {"question": '[{\\"', "answer": "}]👋"}]
    file = tmp_path / "rows.json"
    for indent in (None, 2):
        for held in (rows, {"data": rows}):
            text = json.dumps(held, ensure_ascii=False, indent=indent)
            file.write_text(f"{text}\n\n", encoding="utf-8")
            for chunk in (1, 2, 3, 7, 64) if held is rows else (24, 25, 64):
                monkeypatch.setattr(readers, "CHUNK", chunk)
                found = [json.loads(item) for _, item in DataFile(str(file)).rows()]
                assert found == rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"question,answer\nq,a,b\n", [(2, "3 fields; expected 2: question, answer")]),
        (b"question,answer\nq\n\nr,b\n", [(2, "1 fields; expected 2: question, answer"), (4, None)]),
        (b"question\tanswer\nq\ta\n", [(2, "no field 'question' (found: question\\tanswer)")]),
        (b"question;answer\nq;a\n", [(2, "no field 'question' (found: question;answer)")]),
    ],
)
def test_rows_of_a_table_that_do_not_fit(tmp_path: Path, content: bytes, said: list[tuple[int, str | None]]) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    for (number, row), (expected, text) in zip(read(tmp_path / "rows.csv"), said, strict=True):
        assert number == expected
        assert isinstance(row, Dialogue) if text is None else text in str(row)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b'question,answer\n"q,a\n', ":2: not CSV: unexpected end of data"),
        ("a.csv", b'question,answer\n"q"x,a\n', ":2: not CSV: ',' expected after '\"'"),
        ("a.tsv", b'question\tanswer\n"q"x\ta\n', ":2: not CSV: '\t' expected after '\"'"),
        ("a.csv", b"question,question\nq,a\n", ":1: field names 'question, question': expected each once"),
        ("a.csv", b"question,answer\n\xff,a\n", ":2: not UTF-8: byte 0xff at column 1; save the file as UTF-8"),
        ("a.parquet", b"PAR1 this is not", ": cannot be read: Parquet magic bytes not found"),
        ("a.parquet.gz", b"no", ": cannot be read: zlib inflate failed"),
        ("a.jsonl.gz", b"no", ": cannot be read: zlib inflate failed"),
        ("a.jsonl.zst", b"no", ": cannot be read: ZSTD decompress failed"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    refuse(tmp_path, name, content, said)


def test_a_compressed_file_that_was_cut_off(tmp_path: Path) -> None:
    """Not a parameter of the test above: gzip writes the time into its bytes, and zlib's are another version's."""
    refuse(tmp_path, "a.jsonl.gz", gzip.compress(b"{}\n" * 99)[:-9], ": cannot be read: Truncated compressed stream")


def refuse(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}{said}")
    assert "\n" not in str(caught.value)


def test_a_device_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/zero: is not a regular file"):
        DataFile("/dev/zero").digest()
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="is not a regular file"):
        read(tmp_path / "pipe.jsonl")


READ_IN_LITTLE_MEMORY = """
import sys
from ds_sft.data.bad_row import BadRow
from ds_sft.data.sources import DataFile
from ds_sft.errors import UserError
from ds_sft.results import peak_resident_kib
list(DataFile(sys.argv[2]).rows())  # what a small file needs is loaded
before = peak_resident_kib()
try:
    print([(number, str(row)) if isinstance(row, BadRow) else number for number, row in DataFile(sys.argv[1]).rows()])
except UserError as error:
    print(error)
print(peak_resident_kib() - before)
"""


@pytest.mark.parametrize(
    ("name", "head", "said"),
    [
        ("a.jsonl", b'{"question": "q", "answer": "a"}\n{"question": "', "a line of more than 16,777,216 bytes"),
        ("a.json", b'[{"question": "', "or an item of more than 16,777,216 bytes"),
        ("a.csv", b'question,answer\nq,"', "a line of more than 16,777,216 bytes"),
        ("a.jsonl.gz", b'{"question": "', "a line of more than 16,777,216 bytes"),
    ],
)
def test_a_gigabyte_without_a_line_end_does_not_fill_the_memory(
    tmp_path: Path, name: str, head: bytes, said: str
) -> None:
    file, small = tmp_path / name, tmp_path / "small.jsonl"
    small.write_bytes(b"{}\n")
    if name.endswith(".gz"):
        with gzip.open(file, "wb", compresslevel=1) as stream:
            stream.write(head)
            for _ in range(1024):
                stream.write(b"x" * 2**20)
    else:
        with file.open("wb") as plain:  # a file with a hole: a gigabyte of NUL
            plain.write(head)
            plain.truncate(2**30)
    command = [sys.executable, "-c", READ_IN_LITTLE_MEMORY, str(file), str(small)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=True)
    told, kilobytes = done.stdout.strip().rsplit("\n", 1)
    assert said in told
    assert int(kilobytes) < 400 * 1024, kilobytes


# ---- What a key names


def names(value: Any) -> list[str]:
    return [file.name for file in find_files(value, "train_file")]


def test_folders_globs_and_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.jsonl", "a.json.gz", "deep/c.parquet", "notes.txt", "deep/d.csv.zst"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "out.jsonl").symlink_to("/etc/hostname")  # leads out of the folder
    (tmp_path / "in.jsonl").symlink_to(tmp_path / "b.jsonl")
    monkeypatch.chdir(tmp_path)
    assert names(".") == ["a.json.gz", "b.jsonl", "deep/c.parquet", "deep/d.csv.zst", "in.jsonl"]
    assert names("deep") == ["deep/c.parquet", "deep/d.csv.zst"]
    assert names("**/*.parquet") == ["deep/c.parquet"]
    assert names("[ab].*") == ["a.json.gz", "b.jsonl"]
    assert names(["b.jsonl", "deep"]) == ["b.jsonl", "deep/c.parquet", "deep/d.csv.zst"]
    (found,) = find_files([{"path": "b.jsonl", "weight": 0.5, "limit": 10}], "train_file")
    assert found == DataFile("b.jsonl", weight=0.5, limit=10)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([], "train_file: expected at least one file"),
        ("*.none", r"train_file: \*\.none: no file matches \(the current directory is "),
        ([{"weight": 2}], "expected a path, or a mapping of path and any of weight, limit, split, config"),
        ([{"path": "a.jsonl", "wieght": 2}], "expected a path, or a mapping of path"),
        ([{"path": "a.jsonl", "weight": 0}], "a.jsonl: weight: expected a number above 0, found 0"),
        ([{"path": "a.jsonl", "limit": 1.5}], "a.jsonl: limit: expected a whole number of rows, found 1.5"),
        ([7], "7: expected a path"),
        ([{"path": "a.jsonl", "data_format": "qq"}], "a.jsonl: data_format: expected one of auto, qa, .*, found 'qq'"),
        ([{"path": "a.jsonl", "data_fields": ["q"]}], "a.jsonl: data_fields: expected our names and the file's"),
    ],
)
def test_mistakes_in_what_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said):
        find_files(value, "train_file")


def test_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("tatsu-lab/alpaca") == "tatsu-lab/alpaca"
    assert hub_name("hub:squad") == "squad"
    assert hub_name("data/rows.jsonl") is None
    (tmp_path / "tatsu-lab").mkdir()
    assert hub_name("tatsu-lab/alpaca") is None  # the folder is here: a file in it is meant
    with pytest.raises(UserError, match="hub data set 'nobody/nothing'"):  # there is no network in tests
        DataFile("nobody/nothing", hub=True).digest()


def test_a_data_set_as_the_hub_library_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub itself cannot be reached here; its library reads a folder the same way."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_bytes(CONTENTS["jsonl"])
    (tmp_path / "set" / "test.jsonl").write_bytes(CONTENTS["jsonl"].splitlines(keepends=True)[0])
    (train,) = find_files(f"hub:{tmp_path / 'set'}", "train_file")
    assert read(train) == list(enumerate(TALKS, start=1))
    (test,) = find_files([{"path": f"hub:{tmp_path / 'set'}", "split": "test"}], "train_file")
    assert read(test) == [(1, TALKS[0])]
    assert train.digest() != test.digest()
    with pytest.raises(UserError, match="split 'none'"):
        read(DataFile(str(tmp_path / "set"), hub=True, split="none"))


def test_long_lines_are_counted_and_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 40)
    monkeypatch.setattr(readers, "CHUNK", 16)
    line = b'{"question": "q", "answer": "a"}'
    (tmp_path / "rows.jsonl").write_bytes(line + b"\n" + b"x" * 99 + b"\n" + line + b"\n" + b"y" * 99)
    found = read(tmp_path / "rows.jsonl")
    assert [number for number, _ in found] == [1, 2, 3, 4]
    assert [isinstance(row, BadRow) for _, row in found] == [False, True, False, True]
