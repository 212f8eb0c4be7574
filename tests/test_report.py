"""A report shows what runs have left: finished, stopped, going on, or damaged; as text, and in a real browser."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ds_sft.cli import main
from ds_sft.commands.report_figures import COLORS, color_of, curves, lengths, memory, thinned, time_by_part
from ds_sft.commands.report_page import compare_tables, labelled_numbers, report_html
from ds_sft.commands.report_runs import ReportedRun, read_run, read_runs, short_names
from tests.conftest import write_rows
from tests.test_preview import FLAGS, read_png

EVIL = "</script><script>document.title = 'taken'</script><b>&amp;"
LOGGED: list[Any] = [
    {"step": 0, "eval_loss": 4.0, "eval_runtime": 1.0, "epoch": 0},
    {"step": 2, "loss": 3.0, "grad_norm": 1.5, "learning_rate": 2e-3, "tokens_per_second": 100.0, "mfu": 0.5,
     "waiting_share": 0.05, "padding_share": 0.1, "data_wait_share": 0.5, "optimizer_share": 0.5,
     "interval_seconds": 36.0, "peak_memory_gib": 0.5, "epoch": 0.5},
    {"step": 4, "loss": 2.0, "grad_norm": None, "learning_rate": 1e-3, "tokens_per_second": 200.0, "mfu": 0.3,
     "waiting_share": 0.05, "padding_share": 0.1, "data_wait_share": 0.25, "optimizer_share": 0.75,
     "interval_seconds": 108.0, "peak_memory_gib": 0.75, "epoch": 1.0},
    {"step": 4, "eval_loss": 2.5, "eval_runtime": 1.0, "epoch": 1.0},
    {"step": 4, "train_runtime": 150.0, "train_loss": 2.5, "total_flos": 1e9, "epoch": 1.0},
]  # fmt: skip
RESULTS = {"versions": {"torch": "2.13.0"}, "world_size": 2, "eval_loss": 2.5, "tokens": 25200, "identity": {},
           "peak_memory": [{"host_gib": 1.25}, {"host_gib": 1.5}],
           "plan": {"layout": "ZeRO-2", "moment": "step", "planned_gib": 0.5, "measured_gib": 0.625},
           "speed": {"seconds": 150.0, "tokens": 25200, "tokens_per_second": 168.0, "data_wait_share": 0.2,
                     "optimizer_share": 0.8, "waiting_share": 0.05, "padding_share": 0.1}}  # fmt: skip
ROWS = {"file": "rows.jsonl", "rows_read": 12, "rows_kept": 10, "rows_dropped": {"not JSON": 2}, "rows_truncated": 1,
        "tokens": 1000, "supervised_tokens": 250,
        "length_percentiles": {"p50": 60, "p90": 90, "p95": 95, "p99": 99, "max": 100}}  # fmt: skip


def write_run(folder: Path, **changes: Any) -> Path:
    """The output folder of a finished run; a file that is None is not there."""
    files = {
        "metrics.jsonl": LOGGED,
        "run.json": RESULTS,
        "data_report.json": {"train": ROWS},
        "config.yaml": {"learning_rate": 2e-3, "seed": 42, "output_dir": str(folder)},
        "predictions.jsonl": [{"question": "2+2?", "reference": "4", "prediction": "5", "before": ""}],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, list):
            write_rows(folder / name, content)
        elif content is not None:
            (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return folder


# ---- Reading


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "out"), "out")
    assert (run.state, run.missing) == ("finished", [])
    assert (run.step, run.last("loss"), run.eval_loss, run.memory_gib) == (4, 2.0, 2.5, 1.5)
    assert run.parts == {"data_wait": 30.0, "optimizer": 120.0}
    assert run.places == [
        {"step": 0, "epoch": 0, "tokens": 0, "hours": 0.0},
        {"step": 2, "epoch": 0.5, "tokens": 3600, "hours": 0.01},
        {"step": 4, "epoch": 1.0, "tokens": 25200, "hours": 0.04},
        {"step": 4, "epoch": 1.0, "tokens": 25200, "hours": 0.04},
        {"step": 4, "epoch": 1.0, "tokens": 25200, "hours": 0.04},
    ]


def test_scores_of_a_runs_own_answers(tmp_path: Path) -> None:
    """Of the model after training, in the table of results; nothing where no answer was scored."""
    models = {when: {name: {"value": value + more} for name, value in (("exact_match", 5.0), ("chrf", 7.4))}
              for when, more in (("before", 0.0), ("after", 30.0))}  # fmt: skip
    scored = {**RESULTS, "evaluation": {"sources": {"all": {"models": models}}}}
    found = labelled_numbers(read_run(write_run(tmp_path / "scored", **{"run.json": scored}), "scored"))
    assert [found[name] for name in ("exact match", "chrF", "ROUGE-L")] == ["35.0", "37.4", ""]
    assert labelled_numbers(read_run(write_run(tmp_path / "out"), "out"))["chrF"] == ""


@pytest.mark.parametrize("seconds", [10.0, 145.0], ids=["a short one", "one longer than what was logged"])
def test_time_is_that_of_all_starts(tmp_path: Path, seconds: float) -> None:
    """`run.json` knows the last start alone."""
    last_start = {**RESULTS, "speed": {"seconds": seconds, "tokens": 21600, "data_wait_share": 1.0}}
    run = read_run(write_run(tmp_path / "out", **{"run.json": last_start}), "out")
    assert run.parts == {"data_wait": 45.0, "optimizer": 99.0}
    assert run.speed["tokens_per_second"] == 175.0


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({}, "not finished, after step 4"),
        ({"PREEMPTED.json": {"step": 3, "reason": "SIGUSR1"}}, "stopped after step 3 (SIGUSR1)"),
        (
            {"running.json": {"pid": 7, "host": "n1", "since": "today"}},
            "running or killed, after step 4 (process 7 on n1, since today)",
        ),
        (
            {"run.json": {"steps": 4}},
            "trained 4 steps; not finished: export, verification or predictions did not end well",
        ),
    ],
    ids=["killed", "stopped", "running", "not exported"],
)
def test_a_run_that_has_not_finished(tmp_path: Path, files: dict[str, Any], state: str) -> None:
    folder = write_run(tmp_path / "out", **{"run.json": None, "predictions.jsonl": None, **files})
    run = read_run(folder, "out")
    assert run.state == state
    assert run.parts == {"data_wait": 45.0, "optimizer": 99.0}
    assert (run.eval_loss, run.memory_gib) == (2.5, 0.75)
    assert labelled_numbers(run)["tokens"] == "25,200"
    assert "predictions.jsonl is not there" in run.missing
    assert "2.0000" in report_html([run])


def test_what_is_damaged_is_said(tmp_path: Path) -> None:
    half = json.dumps(LOGGED[2])[:40]  # a line that is being written is no damage
    folder = write_run(tmp_path / "out", **{"metrics.jsonl": ["[]", LOGGED[1], "{", '{"loss": 1}']})
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(half)
    (folder / "run.json").write_text("{", encoding="utf-8")
    (folder / "config.yaml").write_text("a: [", encoding="utf-8")
    run = read_run(folder, "out")
    assert run.entries == [LOGGED[1]]
    assert [line.partition(":")[0] if "cannot" in line else line for line in run.missing] == [
        "run.json cannot be read",
        "metrics.jsonl:1: no JSON object with 'step'; lines left out: 3",
        "config.yaml cannot be read",
        "no validation loss was logged (keys eval_file or val_size, and eval_strategy)",
    ]


def test_answers_of_a_run_that_goes_on_are_old(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, **{"run.json": None}), "out")
    assert run.missing == ["run.json is not there", "predictions.jsonl has answers of an earlier end of this run"]


def test_a_run_that_has_logged_nothing_yet(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    shown = report_html([read_run(tmp_path, "out")])
    assert "Nothing is logged yet." in shown
    assert "There are none: a run answers a few questions at its end" in shown


def test_a_run_without_its_metrics(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, **{"metrics.jsonl": None, "run.json": {**RESULTS, "steps": 4}}), "out")
    assert (run.missing, run.step, run.eval_loss) == (["metrics.jsonl is not there"], 4, 2.5)
    assert "Nothing is logged yet." in report_html([run])


def test_names_are_as_short_as_they_can_be_told_apart_by() -> None:
    assert short_names([Path("/a/x")]) == ["x"]
    assert short_names([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert short_names([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_a_folder_that_is_named_twice_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert [run.name for run in read_runs([Path("out"), Path("out/"), tmp_path / "out"])] == ["out"]


def test_a_folder_whose_name_is_no_text(tmp_path: Path) -> None:
    (run,) = read_runs([write_run(tmp_path / "r\udcffn")])
    assert run.name == "r\ufffdn"
    assert "r\ufffdn" in report_html([run])


# ---- Figures and tables


def test_every_curve_has_all_runs(tmp_path: Path) -> None:
    changed = {"step": 2, "changed": {"learning_rate": [1e-3, 5e-4]}}
    extra = {"step": 4, "eval_chrf": 31.0}
    first = read_run(write_run(tmp_path / "a", **{"metrics.jsonl": [*LOGGED, changed, extra]}), "a")
    second = read_run(write_run(tmp_path / "b<i>"), "b<i>")
    drawn = {picture.title: picture.figure for picture in curves([first, second])}
    assert list(drawn) == ["Loss", "Learning rate", "Gradient norm", "Tokens per second", "Model FLOPs utilization",
                           "Peak memory of a rank, GiB", "eval_chrf"]  # fmt: skip
    assert [(trace.name, trace.line.dash, list(trace.x), list(trace.y)) for trace in drawn["Loss"].data] == [
        ("a", None, [2, 4], [3.0, 2.0]),  # behind the curve, when that is smooth
        ("a", None, [2, 4], [3.0, 2.0]),
        ("a, validation", "dot", [0, 4], [4.0, 2.5]),
        ("a went on with<br>learning_rate: 0.001 -&gt; 0.0005", None, [2], [3.0]),
        ("b&lt;i&gt;", None, [2, 4], [3.0, 2.0]),
        ("b&lt;i&gt;", None, [2, 4], [3.0, 2.0]),
        ("b&lt;i&gt;, validation", "dot", [0, 4], [4.0, 2.5]),
    ]
    assert list(drawn["Gradient norm"].data[0].y) == [1.5, None]  # a gap where it was no number
    hours = [trace.meta["x"]["hours"] for trace in drawn["Loss"].data]
    assert hours[:4] == [[0.01, 0.04], [0.01, 0.04], [0.0, 0.04], [0.01]]
    assert [trace.meta.get("smooth") for trace in drawn["Loss"].data[:4]] == [False, True, False, None]


def test_a_long_curve_is_thinned_to_means() -> None:
    place = {"step": 0.0}
    values, places = thinned([(float(i), {"step": i}) for i in range(3001)])
    assert values[:2] == [1.0, 4.0]
    assert values[-1] == 3000.0
    assert [place["step"] for place in (places[0], places[-1])] == [2, 3000]
    assert thinned([(1.0, place), (None, place)]) == ([1.0, None], [place, place])


def test_time_memory_and_lengths(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name), name) for name in ("a", "b")]
    (waited, optimized), (planned, measured) = time_by_part(runs).figure.data, memory(runs).figure.data
    assert (waited.name, list(waited.x), list(waited.customdata)) == ("data wait", [0.2, 0.2], ["30 s", "30 s"])
    assert (optimized.name, list(optimized.x)) == ("optimizer", [0.8, 0.8])
    assert (list(planned.x), list(measured.x)) == ([0.5, 0.5], [0.625, 0.625])
    (line,) = lengths(runs).figure.data  # the same rows are one line
    assert (line.name, list(line.x), list(line.y)) == ("train", [*ROWS["length_percentiles"]], [60, 90, 95, 99, 100])
    assert (time_by_part([ReportedRun("c")]), memory([ReportedRun("c")]), lengths([ReportedRun("c")])) == (None,) * 3


def test_long_names_beside_bars_keep_their_ends(tmp_path: Path) -> None:
    long = "sweep/with-a-long-name/lr-"
    runs = [read_run(write_run(tmp_path / name[-1]), name) for name in ("<i>a", f"{long}1", f"{long}2")]
    axis = time_by_part(runs).figure.layout.yaxis
    assert list(axis.ticktext) == ["&lt;i&gt;a", "…with-a-long-name/lr-1", "…with-a-long-name/lr-2"]
    assert list(axis.tickvals) == [0, 1, 2]  # names that are cut alike are bars of their own


def test_runs_have_colors_of_their_own() -> None:
    assert len({color_of(number) for number in range(40)}) == 40


def test_keys_in_which_runs_differ() -> None:
    first = {"learning_rate": 1e-3, "num_train_epochs": 2, "lora_targets": ["q"], "output_dir": "a"}
    second = {"learning_rate": 5e-5, "num_train_epochs": 2.0, "bf16": True, "output_dir": "b"}
    assert compare_tables([first, {}, second]) == (
        {"learning_rate": ["0.001", "not known", "5e-05"], "lora_targets": ['["q"]', "not known", "–"],
         "bf16": ["–", "not known", "true"]},
        {"num_train_epochs": ["2", "2"]},
    )  # fmt: skip


# ---- The command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_command(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "runs/a")
    write_run(here / "runs/b", **{"run.json": None, "predictions.jsonl": None})
    assert main(["report", "runs/a", "runs/b"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "b: not finished, after step 4; run.json is not there; predictions.jsonl is not there",
        "Wrote report.html (2 runs): open it in a browser.",
    ]
    assert main(["report", "runs/a", "--out", "a.html"]) == 0
    assert capsys.readouterr().out == "Wrote a.html (1 run): open it in a browser.\n"
    assert sorted(path.name for path in here.iterdir()) == ["a.html", "report.html", "runs"]
    capsys.readouterr()
    assert main(["report", "runs/a"]) == 0
    assert "Wrote runs/a/report.html (1 run): open it in a browser." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere: no such folder; expected the output_dir of a run"),
        (["empty"], "empty: no run in it (metrics.jsonl or run.json); expected the output_dir of one"),
        (["runs"], "runs: no run in it (metrics.jsonl or run.json); there are 1 in folders of it: write runs/*/"),
        (["runs/a", "--out", "no/x.html"], "--out no/x.html: cannot be written: No such file or directory"),
        (["runs/a", "--out", "runs/a/run.json"], "--out runs/a/run.json: is there already, and no .html: name another"),
        (["runs/a", "--html", "x.html"], "--html: unknown flag: --help lists all flags"),
    ],
)
def test_mistakes(here: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str) -> None:
    write_run(here / "runs/a")
    (here / "empty").mkdir()
    assert main(["report", *words]) == 2
    assert capsys.readouterr().err == f"ds_sft: error: {said}\n"


def test_without_plotly(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["report", "out"]) == 2
    assert capsys.readouterr().err == "ds_sft: error: report: needs plotly: pip install plotly\n"


# ---- The page


def hostile(folder: Path) -> list[ReportedRun]:
    """Three runs whose names, keys and texts would like to be HTML."""
    answers = [{"question": f"{EVIL} 1", "reference": EVIL, "prediction": f"{EVIL}", "before": f"{EVIL} 2"}]
    paths = [
        write_run(folder / name, **{"predictions.jsonl": answers, "config.yaml": {"system_prompt": f"{EVIL} {name}"}})
        for name in ("<img src=x onerror=alert(1)>", "b", "c")
    ]
    return read_runs(paths)


class Texts(HTMLParser):
    """What a reader reads, and the attributes of the body."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.body: dict[str, str | None] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "body":
            self.body = dict(attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_no_text_becomes_html(tmp_path: Path) -> None:
    found = Texts(report_html(hostile(tmp_path)))
    for text in (f"{EVIL} 1", EVIL, f"{EVIL}", f"{EVIL} 2", f"{EVIL} b", "<img src=x onerror=alert(1)>"):
        assert text in found.texts
    assert not {"img", "b", "link", "iframe"} & set(found.tags)


def test_an_answer_is_shown_beside_those_of_other_runs(tmp_path: Path) -> None:
    asked = [{"question": "2+2?", "reference": "4", "prediction": answer, "before": before}
             for answer, before in (("4", "0"), ("5", "0"))]  # fmt: skip
    runs = [
        read_run(write_run(tmp_path / n, **{"predictions.jsonl": [row]}), n) for n, row in zip("ab", asked, strict=True)
    ]
    section = report_html(runs).partition('<section class="row">')[2].partition("</section>")[0]
    assert re.findall(r"<th>(.*?)</th><td>(.*?)</td>", section) == [
        ("reference", "4"), ("before", "0"), ("a", "4"), ("b", "5"),
    ]  # fmt: skip


WATCH = """<script>window.refused = [];
document.addEventListener('securitypolicyviolation', event => refused.push(event.blockedURI));</script>"""
# As a reader does: hide the second run, smooth by a half, over hours, logarithmic. What is then to be seen.
USE = """<script>
async function use() {
  const choose = (id, value) => { of(id).value = value; of(id).dispatchEvent(new Event('input')); };
  document.querySelectorAll('#runs input')[1].click();
  choose('smoothing', 0.5); choose('axis', 'hours'); of('log').click();
  await draw();
  const [first] = plots, shown = first._fullData.filter(trace => trace.visible === true);
  document.body.dataset.seen = JSON.stringify({
    title: document.title, refused, loaded: performance.getEntriesByType('resource').map(entry => entry.name),
    figures: plots.length, lines: first.querySelectorAll('.scatterlayer .trace').length,
    runs: [...new Set(shown.map(trace => trace.meta.run))],
    x: shown[0].x, logged: shown[0].y, smooth: shown[1].y, axis: first.layout.xaxis.title.text,
    scales: plots.map(plot => plot.layout.yaxis.type),
    buttons: [...first.querySelectorAll('.modebar-btn')].map(button => button.dataset.title),
    fits: document.documentElement.scrollWidth <= innerWidth, width: innerWidth,
    cut: [...document.querySelectorAll('.charts .box')].filter(box => [...box.querySelectorAll('.main-svg')].some(
      svg => svg.getBoundingClientRect().right > box.getBoundingClientRect().right)).length,
  });
}
addEventListener('load', use);</script>"""


@pytest.mark.skipif(
    not shutil.which("chromium"), reason="needs a browser: apt-get install -y --no-install-recommends chromium"
)
def test_the_page_in_a_real_browser(tmp_path: Path) -> None:
    text = report_html(hostile(tmp_path / "runs"))
    file, screenshot = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(text.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{USE}</body>"), encoding="utf-8")
    narrow = look(file, tmp_path / "first", "--dump-dom", "--virtual-time-budget=20000", "--window-size=500,2000")
    seen = json.loads(Texts(narrow).body["data-seen"] or "")
    buttons = seen.pop("buttons")
    assert seen == {
        "title": "Training report: 3 runs", "refused": [], "loaded": [], "figures": 6, "lines": 6, "runs": [0, 2],
        "x": [0.01, 0.04], "logged": [3, 2], "smooth": [3, pytest.approx(7 / 3)], "axis": "hours of training",
        "scales": ["log", "linear", "log", "linear", "linear", "linear"], "fits": True, "width": 500,
        "cut": 0,
    }  # fmt: skip
    assert "Zoom" in buttons
    assert not [button for button in buttons if re.search("cloud|share|edit|plotly", button, re.I)]  # nothing is sent
    wide = look(file, tmp_path / "wide", "--dump-dom", "--virtual-time-budget=20000", "--window-size=1280,2000")
    there = json.loads(Texts(wide).body["data-seen"] or "")
    assert (there["width"], there["cut"]) == (1280, 0)
    file.write_text(text, encoding="utf-8")
    look(file, tmp_path / "second", f"--screenshot={screenshot}", "--window-size=1280,1400")
    width, height, colors = read_png(screenshot)
    assert (width, height) == (1280, 1400)
    for color in COLORS[:3]:
        rgb = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
        assert colors.get(rgb, 0) > 100, color  # the boxes of the runs, and their curves


def look(page: Path, profile: Path, *flags: str) -> str:
    """What Chromium prints of a page."""
    command = ["chromium", *FLAGS, f"--user-data-dir={profile}", *flags, page.as_uri()]
    return subprocess.run(command, check=True, timeout=300, capture_output=True, text=True).stdout
