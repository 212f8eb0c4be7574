"""What preview shows is what the model sees: in the terminal, on the page, and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ds_sft.cli import main
from ds_sft.commands.preview import row_numbers
from ds_sft.commands.preview_tokens import tokens_of
from ds_sft.errors import UserError
from tests.conftest import write_rows

ROWS: list[Any] = [
    {"question": "What is the capital of France?", "answer": "Paris."},
    {"question": "今天天气怎么样？", "answer": "很好 <b>&amp;</b> 👋🏽\n<script>alert(1)</script>"},
    {"question": "Long", "answer": "word " * 80},
    "{",
    {"question": "Как дела?", "answer": "Хорошо!"},
]


@pytest.fixture
def run(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call the command on ROWS; what it printed."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    keys = {"model_name_or_path": str(model_dir), "train_file": "rows.jsonl", "output_dir": "out", "cache_dir": "cache",
            "on_bad_row": "skip", "max_length": 150, "system_prompt": "S"}  # fmt: skip
    (tmp_path / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in keys.items()), encoding="utf-8")
    monkeypatch.chdir(tmp_path)

    def call(*words: str, code: int = 0) -> str:
        assert main(["preview", "run.yaml", *words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    return call


class Tokens(HTMLParser):
    """The tokens of a page: text, ids, classes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[int], set[str]]] = []
        self.depth = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if self.depth:
            self.depth += 1
        elif tag == "span" and given.get("title"):
            self.depth = 1
            classes = set((given["class"] or "").split())
            self.found.append(("", [int(i) for i in (given["title"] or "").split()], classes))

    def handle_endtag(self, tag: str) -> None:
        self.depth = max(0, self.depth - 1)

    def handle_data(self, data: str) -> None:
        if self.depth:
            text, ids, classes = self.found[-1]
            self.found[-1] = (text + data, ids, classes)


def test_the_terminal_shows_rows_and_the_report(run: Any) -> None:
    shown = run("--rows", "1-2,9")
    assert "row 1 · rows.jsonl:1 · " in shown
    assert "row 2 · rows.jsonl:2 · " in shown
    assert (
        "<|im_start|>user↵\nWhat is the capital of France?<|im_end|>↵\n<|im_start|>assistant↵\n⟦Paris.<|endoftext|>⟧"
        in shown
    )
    assert "很好 <b>&amp;</b> 👋🏽↵\n<script>" in shown
    assert "rows dropped: not JSON" in shown


def test_the_page_has_every_token_with_its_id(run: Any, tokenizer: Any, tmp_path: Path) -> None:
    from tests.test_encode import reference_row

    assert "Wrote page.html: open it in a browser." in run("--rows", "2", "--html", "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script" not in page  # a row's text cannot run
    assert not re.search(r"""(src|href)=|url\(|@import""", page)  # nothing is loaded from elsewhere
    found = Tokens(page).found
    ids, labels = reference_row(tokenizer, ROWS[1]["question"], ROWS[1]["answer"], "S", 150)
    assert [i for _, token, _ in found for i in token] == ids
    learned = [i for _, token, classes in found if "l" in classes for i in token]
    assert learned == [label for label in labels if label != -100]
    assert [text for text, _, classes in found if "s" in classes][:2] == ["<|im_start|>", "<|im_end|>"]
    assert "".join(text for text, _, _ in found).replace("↵", "") == tokenizer.decode(ids)
    for said in ("rows.jsonl:4: not JSON", "not JSON</td>", "of them learned", "rows.jsonl:3", "orange: max_length 150",
                 "1 answers lost their end"):  # fmt: skip
        assert said in page, said


def test_the_name_of_a_file_is_one_line(run: Any, tmp_path: Path) -> None:
    """However narrow the terminal: it can be copied."""
    folder = tmp_path / ("a folder with a long name" * 5)
    folder.mkdir()
    (tmp_path / "rows.jsonl").rename(folder / "rows.jsonl")
    said = run("--train_file", str(folder / "rows.jsonl"))
    assert f"train: {folder / 'rows.jsonl'}" in said.splitlines()


def test_a_batch_after_padding_and_after_packing(run: Any, tmp_path: Path) -> None:
    flat = run("--rows", "1,2", "--batch")
    assert re.search(r"sequence 1 of a batch of 1 x \d+ tokens", flat)
    assert flat.count("next row, position 0") == 1
    filled = run("--rows", "1,2", "--batch", "--max_tokens_per_batch", "100")
    assert re.findall(r"sequence 1 of batch (\d), of 1 x", filled) == ["1", "2"]
    padded = run("--rows", "1,2", "--batch", "--batching", "padded")
    assert re.search(r"sequence 1 of a batch of 2 x \d+ tokens · .* padding", padded)
    run("--rows", "1,2", "--batch", "--batching", "padded", "--html", "padded.html")
    tokens = Tokens((tmp_path / "padded.html").read_text(encoding="utf-8")).found
    assert {ids[0] for _, ids, classes in tokens if "p" in classes} == {0}  # the pad token
    assert not [ids for _, ids, classes in tokens if {"p", "l"} <= classes]
    packed = run("--rows", "1,2", "--batch", "--packing", "concat", "--max_length", "600")
    assert re.search(r"sequence 1 of a batch of 1 x \d+ tokens", packed)
    assert packed.count("next row, position 0") == 1


def test_mistakes(run: Any) -> None:
    assert "--rows x: expected numbers from 1, such as 1-3,10" in run("--rows", "x", code=2)
    assert "--rows 99: there are 4 rows" in run("--rows", "99", code=2)
    assert "--split eval: expected one of train" in run("--split", "eval", code=2)
    assert "--html: expected a value" in run("--html", code=2)
    assert "--html none/x.html: cannot be written: No such file" in run("--html", "none/x.html", code=2)
    rows = "--limit: preview shows rows by their numbers: write --rows 1-3 for the first three"
    assert rows in run("--limit", "3", code=2)
    with pytest.raises(UserError):
        row_numbers("0", 5)
    assert row_numbers("1-3,2,9-11", 10) == [0, 1, 2, 1, 8, 9]


def test_a_row_does_not_command_the_terminal(run: Any, tmp_path: Path) -> None:
    write_rows(
        tmp_path / "rows.jsonl", [{"question": "a\x1b]0;title\x07\u202e\x9b", "answer": "\x1b[2J\r\ttab 👨\u200d👩"}]
    )
    shown = run("--rows", "1")
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(shown)
    assert r"a\x1b]0;title\x07\u202e\x9b" in shown
    assert r"\x1b[2J\r" in shown
    assert "👨\u200d👩" in shown


def test_characters_of_several_tokens_are_shown_whole(tokenizer: Any) -> None:
    text = "a👋🏽é天\n"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    tokens = tokens_of(ids, ids, tokenizer)
    assert "".join(token.text for token in tokens) == text
    assert [i for token in tokens for i in token.ids] == ids
    cut = tokens_of(ids[:2], ids[:2], tokenizer)  # half a character at the end of a row
    assert [i for token in cut for i in token.ids] == ids[:2]


FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-dev-shm-usage",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars",
         "--force-color-profile=srgb"]  # fmt: skip


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs a browser: apt-get install -y --no-install-recommends chromium"
)
def test_the_page_in_a_real_browser(run: Any, tmp_path: Path) -> None:
    """What is learned is green on the screen, and the page is as the browser has read it."""
    run("--rows", "1-4", "--html", "page.html")
    url, screenshot = (tmp_path / "page.html").as_uri(), tmp_path / "page.png"
    profiles = [f"--user-data-dir={tmp_path / name}" for name in ("first", "second")]  # a browser may be still ending
    command = ["chromium", *FLAGS, profiles[0], "--window-size=1000,1800", f"--screenshot={screenshot}", url]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    width, height, colors = read_png(screenshot)
    assert (width, height) == (1000, 1800)
    green, paper = colors.get((0xC9, 0xF0, 0xD3), 0), colors.get((255, 255, 255), 0)
    assert green > 5000  # the background of learned tokens
    assert paper > width * height / 4
    dump = ["chromium", *FLAGS, profiles[1], "--dump-dom", url]
    seen = subprocess.run(dump, check=True, timeout=300, capture_output=True, text=True).stdout
    written = Tokens((tmp_path / "page.html").read_text(encoding="utf-8")).found
    assert Tokens(seen).found == written
    assert len(written) > 100


def read_png(path: Path) -> tuple[int, int, dict[tuple[int, int, int], int]]:
    """Width, height and how many pixels have each color, of an image of 8-bit RGB or RGBA."""
    data, at, packed = path.read_bytes(), 8, b""
    while at < len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, depth, color = *(int.from_bytes(body[i : i + 4], "big") for i in (0, 4)), body[8], body[9]
        packed += body if kind == b"IDAT" else b""
        at += size + 12
    assert depth == 8
    channels = {2: 3, 6: 4}[color]
    rows, stride, before = zlib.decompress(packed), width * channels, bytearray(width * channels)
    colors: dict[tuple[int, int, int], int] = {}
    for y in range(height):
        start = y * (stride + 1)
        line = unfilter(rows[start], bytearray(rows[start + 1 : start + 1 + stride]), before, channels)
        for x in range(0, stride, channels):
            pixel = (line[x], line[x + 1], line[x + 2])
            colors[pixel] = colors.get(pixel, 0) + 1
        before = line
    return width, height, colors


def unfilter(kind: int, line: bytearray, above: bytearray, step: int) -> bytearray:
    """One line of a PNG, by the filter it was written with (W3C PNG, 9.2)."""
    for i in range(len(line)):
        left, up = line[i - step] if i >= step else 0, above[i]
        corner = above[i - step] if i >= step else 0
        if kind == 4:
            distances = abs(up - corner), abs(left - corner), abs(left + up - 2 * corner)
            guess = (left, up, corner)[distances.index(min(distances))]
        else:
            guess = (0, left, up, (left + up) // 2)[kind]
        line[i] = (line[i] + guess) & 255
    return line


def test_the_report_in_json_has_what_the_page_shows(model_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    from ds_sft.config.keys import Config
    from ds_sft.data.dataset import load_data
    from ds_sft.ranks.launch import Launch

    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    config = Config(model_name_or_path="m", train_file=str(file), on_bad_row="skip", cache_dir=str(tmp_path / "c"))
    report = load_data(config, tokenizer, Launch(launcher="python")).report["train"]
    assert json.loads(json.dumps(report)) == report
    assert report["dropped_examples"][0].startswith(f"{file}:4: not JSON: ")
