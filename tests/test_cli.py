"""`ds-sft COMMAND`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ds_sft import __version__, cli
from ds_sft.cli import COMMANDS, main
from ds_sft.errors import UserError


@pytest.mark.parametrize(("words", "code"), [([], 2), (["--help"], 0), (["-h"], 0)])
def test_usage_names_every_command(capsys: pytest.CaptureFixture[str], words: list[str], code: int) -> None:
    assert main(words) == code
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ds-sft COMMAND [...]\n")
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ds_sft {__version__}\n"


def test_the_rank_that_deepspeeds_launcher_puts_before_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--local_rank=1", "--version"]) == 0
    assert capsys.readouterr().out == f"ds_sft {__version__}\n"


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dmo", "unknown command 'dmo': did you mean demo?"),
        ("zzz", f"unknown command 'zzz': there are {', '.join(COMMANDS)}"),
    ],
)
def test_unknown_commands(capsys: pytest.CaptureFixture[str], word: str, said: str) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err == f"ds_sft: error: {said}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(UserError("wrong"), 2, "ds_sft: error: wrong\n"), (KeyboardInterrupt(), 130, "\nds_sft: interrupted\n")],
)
def test_how_a_command_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    def fail(name: str, words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "call", fail)
    assert main(["demo"]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], name: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.lower().startswith(f"usage: ds-sft {name} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("plan run.yaml --gpu-memry 80GB", "--gpu-memry: unknown key: did you mean --gpu-memory?"),
        ("plan --gpu-memry 80GB run.yaml", "--gpu-memry: unknown key: did you mean --gpu-memory?"),
        ("plan run.yaml --gpu_memory 80GB", "--gpu_memory: unknown key: did you mean --gpu-memory?"),
        ("plan run.yaml --learning_rat 1", "--learning_rat: unknown key: did you mean --learning_rate?"),
        ("plan run.yaml --nodes two", "--nodes: 'two': expected a whole number above 0"),
        ("plan", "missing: model_name_or_path, train_file, output_dir: give each in the --config file or as"),
        ("launch run.yaml --dryrun", "--dryrun: unknown key: did you mean --dry-run?"),
        ("launch run.yaml --gpus 8", "--gpus: unknown key: did you mean --gpus-per-node?"),
        ("prepare run.yaml --max_len 8", "--max_len: unknown key: did you mean --max_length?"),
        ("preview run.yaml --row 3", "--row: unknown key: did you mean --rows?"),
        ("export a b --dtyp bfloat16", "--dtyp: unknown flag: did you mean --dtype?"),
        ("export a b --zzz", "--zzz: unknown flag: --help lists all flags"),
        ("export a b --dtype int3", "--dtype: invalid choice: 'int3' (choose from "),
        ("verify a b", "b: one argument too many: usage: ds-sft verify [-h] OUTPUT_DIR"),
        ("demo --dirs x", "--dirs: unknown flag: did you mean --dir?"),
    ],
)
def test_a_flag_that_is_wrong(capsys: pytest.CaptureFixture[str], words: str, said: str) -> None:
    assert main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"ds_sft: error: {said}")


def test_the_installed_script() -> None:
    script = Path(sys.executable).parent / "ds-sft"
    done = subprocess.run([script, "demp"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "ds_sft: error: unknown command 'demp': did you mean demo?\n")


@pytest.mark.parametrize(
    ("unbuffered", "words", "code", "said"),
    [
        ("", ["--help"], 1, ""),
        ("1", ["--help"], 1, ""),
        ("", ["doctor", "--help"], 1, ""),
        ("", ["preview", "--rows"], 2, "ds_sft: error: --rows: expected a value after it\n"),
    ],
)
def test_who_closes_the_pipe_is_told_nothing_of_it(unbuffered: str, words: list[str], code: int, said: str) -> None:
    """`ds-sft ... | head`: nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    command, env = [sys.executable, "-m", "ds_sft", *words], os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, env=env)
    os.close(writing)
    assert (done.returncode, done.stderr) == (code, said)


def test_another_pipe_that_breaks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str, words: list[str]) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "call", fail)
    with pytest.raises(BrokenPipeError):
        main(["demo"])
