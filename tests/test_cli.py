"""`ds-sft COMMAND`."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("dmo", "unknown command 'dmo': did you mean demo?"),
        ("zzz", f"unknown command 'zzz': there are {', '.join(COMMANDS)}"),
    ],
)
def test_unknown_commands(capsys: pytest.CaptureFixture[str], word: str, said: str) -> None:
    assert main([word]) == 2
    assert capsys.readouterr().err == f"ds-sft: error: {said}\n"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(UserError("wrong"), 2, "ds-sft: error: wrong\n"), (KeyboardInterrupt(), 130, "\nds-sft: interrupted\n")],
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


def test_the_installed_script() -> None:
    script = Path(sys.executable).parent / "ds-sft"
    done = subprocess.run([script, "demp"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "ds-sft: error: unknown command 'demp': did you mean demo?\n")
