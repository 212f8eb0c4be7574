"""ds_sft/upstream/names.py has a row for each use, a use for each row, and tells what another version changed."""

from __future__ import annotations

import configparser
import dataclasses
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from transformers import Trainer, TrainerCallback

from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from ds_sft.training import arguments
from ds_sft.upstream.check import fault_in_words, faults, find, mentioned, next_minor, parameters, require_names
from ds_sft.upstream.names import ASSIGNED, NAMES, OVERRIDDEN, READ_IN, TEXT, USED, Name

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import upstream

ROOT = Path(__file__).resolve().parents[1]
BACKWARDS = Name("accelerate.accelerator:Accelerator.backwards", ASSIGNED, "training/timers.py", "nothing is timed")


@pytest.fixture(scope="module")
def found() -> list[upstream.Use]:
    return upstream.uses()


# ---- The table and the source


def test_every_use_has_a_row(found: list[upstream.Use]) -> None:
    unlisted = [use for use in found if not any(upstream.is_use_of(use, name) for name in NAMES)]
    assert unlisted == [], "a row of ds_sft/upstream/names.py must say what stops without it"


def test_every_row_has_its_uses(found: list[upstream.Use]) -> None:
    for name in NAMES:
        files = {file for file, _ in upstream.places(name, found)}
        assert files == set(name.users.split()), f"{name.path}: another file of ds_sft uses it, or none does"


def test_a_row_says_assigned_where_something_is(found: list[upstream.Use]) -> None:
    kinds = {name.last: name.kind for name in NAMES if name.kind in (USED, ASSIGNED)}
    assigned = {use.name for use in found if use.kind == ASSIGNED and use.name}
    assert {name for name in assigned if kinds[name] != ASSIGNED} == set()


def test_no_row_is_twice_and_files_stand_together() -> None:
    rows = [(name.path, name.as_read if name.kind == TEXT else "") for name in NAMES]
    assert len(rows) == len(set(rows))
    libraries = [name.library for name in NAMES]
    assert [a for a, b in zip(libraries, [None, *libraries], strict=False) if a != b] == list(dict.fromkeys(libraries))
    assert set(libraries) == set(READ_IN)


SOURCE = """\
import os
from torch.distributed import _shard
from transformers import Trainer
class Mine(Trainer):
    def __init__(self):
        self._mine = 1
        self._tr_loss = None
    def training_step(self, model):
        return super().training_step(model) + self._mine
def use(engine, rows, model, owner, name):
    os._exit(1)
    engine.step = lambda: None
    rows._indices
    getattr(model, "_secret"), hasattr(model, "ds_id"), (engine, "_script"), model.config
    setattr(owner, name, 1)
    return row._replace(a=1), inspect.getsource(model)
"""


def test_what_the_scanner_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library's methods that a class has, too; private names; attributes asked for or assigned; text."""
    upstream.names_of_methods()  # whose import of DeepSpeed imports by itself
    package = tmp_path / "ds_sft"
    package.mkdir()
    (package / "mine.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setattr(upstream, "ROOT", tmp_path)
    mine = type("Mine", (Trainer,), {})
    monkeypatch.setattr(upstream.importlib, "import_module", lambda name: SimpleNamespace(Mine=mine))
    assert [(use.kind, use.name, use.line) for use in upstream.uses()] == [
        (USED, "_shard", 2),
        (ASSIGNED, "_tr_loss", 7),
        (OVERRIDDEN, "transformers.trainer.Trainer.training_step", 8),
        (ASSIGNED, "step", 12),
        (USED, "_indices", 13),
        (USED, "_script", 14),
        (USED, "_secret", 14),
        (USED, "ds_id", 14),
        (ASSIGNED, "", 15),
        (TEXT, "", 16),
    ]


def test_events_of_callbacks_are_transformers_own() -> None:
    """What is made to be subclassed has no rows: an event that nobody calls would be a method like any other."""
    for file in (ROOT / "ds_sft").rglob("*.py"):
        events = re.findall(r"    def (on_\w+)\(", file.read_text(encoding="utf-8"))
        assert [event for event in events if not hasattr(TrainerCallback, event)] == [], file


# ---- The table and what is installed


def test_all_names_are_as_they_were_read() -> None:
    upstream.import_all(NAMES)
    assert [fault_in_words(*fault) for fault in faults()] == []
    for name in NAMES:  # none was left out
        if name.kind != TEXT and name.library in sys.modules:
            assert not name.seen_in or find(name.caller) is not None, name.caller
            assert "()." not in name.path or name.seen_in, f"{name.path}: where is it set?"


def test_a_run_looks_at_all_that_a_trainer_takes() -> None:
    """Before data are read; what comes with the engine is looked at then."""
    code = "import sys; from ds_sft.train import require_libraries; require_libraries(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = {name.path.partition(":")[0] for name in NAMES if name.kind != TEXT}
    early = {module for module in modules if module.startswith(("accelerate.", "datasets.", "transformers.trainer"))}
    assert len(early) > 3
    assert early <= set(done.stdout.split())


def test_versions_that_were_read_bound_those_that_are_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    texts = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    bounds = {(r.name, s.version) for r in map(Requirement, lines) for s in r.specifier if s.operator == "<"}
    assert bounds == {(library, next_minor(version)) for library, version in READ_IN.items()}
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    pinned = {name.lower().replace("-", "_"): version for name, version in pinned.items()}
    behind = {name: READ_IN[name] for name in ("torch", "transformers")}  # `make test-newest` runs with these
    assert pinned | behind == pinned | READ_IN
    for page in ("README.md", "docs/install.md"):
        assert f'pip install "torch<{next_minor(READ_IN["torch"])}"' in (ROOT / page).read_text(encoding="utf-8"), page


@pytest.mark.parametrize(("version", "following"), [("5.23.0", "5.24"), ("0.19.8", "0.20"), ("2.13", "2.14")])
def test_the_next_minor_version(version: str, following: str) -> None:
    assert next_minor(version) == following


# ---- What another version changed


def said() -> str:
    with pytest.raises(UserError) as caught:
        require_names("transformers")
    return str(caught.value)


VERSION = importlib.metadata.version("transformers")
WANTED = "pip install 'transformers>=5.24.0,<5.25'"


def test_an_override_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_clip_grad_norm")
    assert said() == (
        f"transformers {VERSION}: transformers.trainer.Trainer._clip_grad_norm is gone; ds_sft was written against "
        f"5.24.0. Here under DeepSpeed each step waits for the device: {WANTED}"
    )


@pytest.mark.parametrize(
    ("installed", "wanted"),
    [("2.16.1+cu132", "'torch<2.16'"), ("2.15.2", "'torch>=2.15.0,<2.16'"), ("2.9.1", "'torch>=2.15.0,<2.16'")],
)
def test_what_to_install(installed: str, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that is too new is not answered by the newest that is known: its CUDA may be too new as well."""
    monkeypatch.setattr(importlib.metadata, "version", lambda library: installed)
    row = next(name for name in NAMES if name.library == "torch")
    assert fault_in_words(row, "it is gone").endswith(f": pip install {wanted}")


def test_an_override_that_nobody_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and would be silent."""
    monkeypatch.setattr(Trainer, "_evaluate", lambda self: None)
    assert said() == (
        f"transformers {VERSION}: transformers.trainer.Trainer._evaluate does not use evaluate; ds_sft was written "
        "against 5.24.0. Here an evaluation counts as training, and one that a stop cut off is not made again: "
        f"{WANTED}"
    )


def test_an_override_whose_caller_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_evaluate")
    assert "transformers.trainer.Trainer._evaluate, which used evaluate, is gone; " in said()


def test_an_override_with_other_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "_clip_grad_norm", lambda self, model, *, norm: None)
    assert "Trainer._clip_grad_norm takes (self, model, norm) instead of (self, model); " in said()


def test_a_method_that_is_still_called_and_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    row = next(name for name in NAMES if name.last == "_copy_recovery_script")
    upstream.import_all([row])
    monkeypatch.delattr("deepspeed.runtime.engine.DeepSpeedEngine._copy_recovery_script")
    assert [fault for _, fault in faults([row])] == [
        "deepspeed.runtime.engine.DeepSpeedEngine._copy_recovery_script is gone"
    ]


def test_an_attribute_that_objects_have_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is set in a method, so no class has it."""
    row = next(name for name in NAMES if name.last == "_indices")
    assert list(faults([row])) == []
    monkeypatch.setattr("datasets.arrow_dataset.Dataset.__init__", lambda self: None)
    assert [fault for _, fault in faults([row])] == ["datasets.arrow_dataset.Dataset.__init__ does not use _indices"]


def test_a_name_that_is_gone_or_has_moved() -> None:
    assert [fault for _, fault in faults([BACKWARDS])] == ["accelerate.accelerator.Accelerator.backwards is gone"]
    moved = dataclasses.replace(BACKWARDS, path="accelerate.elsewhere:Accelerator.backward")
    assert [fault for _, fault in faults([moved])] == ["accelerate.elsewhere.Accelerator.backward is gone"]


@pytest.mark.parametrize(("until", "over"), [("1.11", True), ("1.12", True), ("1.13", False), ("2.0", False)])
def test_a_name_that_a_later_version_needs_no_more(monkeypatch: pytest.MonkeyPatch, until: str, over: bool) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda library: "1.12.3+cpu")
    row = dataclasses.replace(BACKWARDS, until=until)
    assert (list(faults([row])) == []) == over


def test_text_that_has_changed() -> None:
    row = Name(
        "transformers/training_args.py",
        TEXT,
        "config/upstream_keys.py",
        "no key is known",
        as_read="class TrainingArgs:",
    )
    assert [fault for _, fault in faults([row])] == ["transformers/training_args.py has no `class TrainingArgs:`"]
    gone = dataclasses.replace(row, path="transformers/arguments.py")
    assert [fault for _, fault in faults([gone])] == ["transformers/arguments.py has no `class TrainingArgs:`"]


def test_what_is_not_imported_is_neither_imported_nor_missing() -> None:
    code = "from ds_sft.upstream.check import faults; import sys; print(list(faults()), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_words_and_parameters_of_code() -> None:
    def caller(one: Any, *many: Any, named: int, **others: Any) -> Any:
        return lambda: getattr(one.attribute, "word")(sys)  # noqa: B009

    assert {"attribute", "word", "sys"} <= mentioned(caller)
    assert parameters(caller) == "one, *many, named, **others"

    def wrapper(*many: Any) -> Any:  # without functools.wraps, as torch's compiler puts one around Module.__init__
        return caller(*many, named=1)

    assert {"attribute", "word"} <= mentioned(wrapper)
    assert (mentioned(len), parameters(len)) == (set(), "?")  # in C: a class that no longer has a method has object's


# ---- In a run


def test_a_run_ends_before_it_reads_data(tmp_path: Path) -> None:
    """One line and exit code 2, as for any mistake that a user can mend."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    code = "from transformers import Trainer; del Trainer._clip_grad_norm; from ds_sft.train import main; main()"
    keys = {"model_name_or_path": "model", "train_file": "none.jsonl", "output_dir": "out", "use_cpu": "yes"}
    flags = [f"--{key}={value}" for key, value in keys.items()]
    done = subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (
        2,
        [
            f"ds_sft: error: transformers {VERSION}: transformers.trainer.Trainer._clip_grad_norm is gone; ds_sft was "
            f"written against 5.24.0. Here under DeepSpeed each step waits for the device: {WANTED}"
        ],
    )
    assert "Traceback" not in done.stderr


def test_deepspeed_is_looked_at_when_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(arguments, "require_names", lambda *libraries: asked.append(libraries))
    config = SimpleNamespace(training={"output_dir": str(tmp_path)}, micro_batch=1, trackers=[])
    arguments.training_arguments(config, None, Launch(launcher="python"))  # type: ignore[arg-type]
    assert asked == [("deepspeed", "torch")]


# ---- The script


def test_the_script_says_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert upstream.main(["datasets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "datasets.arrow_dataset.Dataset()._indices  used"
    assert re.fullmatch(r"    ds_sft/data/\w+\.py:\d+(, ds_sft/data/\w+\.py:\d+)+", lines[1])
    assert lines[2] == "    without it rows that were chosen are read as all rows"
    assert lines[-1] == "1 names, 1 of them private: 1 used"


def test_the_script_says_what_changed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert upstream.main(["accelerate", "--changed"]) == 0
    assert capsys.readouterr().out == "Nothing: all names are as they were read.\n"
    monkeypatch.setattr(upstream, "NAMES", (BACKWARDS,))
    assert upstream.main(["accelerate", "--changed"]) == 1
    assert capsys.readouterr().out.startswith("accelerate ")


def test_a_library_that_cannot_be_imported_has_not_stayed_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names are looked at in what is imported, and nothing would be."""
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert upstream.main(["sacrebleu", "--changed"]) == 1
    assert capsys.readouterr().out.startswith("sacrebleu cannot be imported: ")


def test_the_script_knows_its_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        upstream.main(["numpy"])
    assert "numpy: not among " in capsys.readouterr().err
