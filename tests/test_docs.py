"""Every page: its links lead somewhere, each command is one that its program takes, its YAML is what a run reads.

Commands are given to the real parsers, which stop once they have understood: nothing runs.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import itertools
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from configparser import ConfigParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from ds_sft import cli
from ds_sft.commands.flags import FlagParser
from ds_sft.config import read, upstream_keys, values
from ds_sft.config.elsewhere import CALLED_HERE
from ds_sft.config.read import load_config
from ds_sft.config.upstream_keys import all_keys
from ds_sft.config.values import Given
from ds_sft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "slurm/README.md", "findings/README.md",
         *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]  # fmt: skip
SHELLS = ("bash", "console", "sh", "shell")
# What these take is not checked, nor what lies in llama.cpp's repository.
NOT_OURS = {
    ".",
    ".venv/bin/pre-commit",
    "curl",
    "findings/NAME.sh",
    "git",
    "hf",
    "llama-server",
    "printf",
    "transformers",
    "vllm",
}
ELSEWHERE = "llama.cpp/"
OF_SBATCH = {"account", "dependency", "gpus-per-node", "nodelist", "nodes", "ntasks-per-node", "partition", "time"}
BASE = {
    "model_name_or_path": "MODEL",
    "train_file": "rows.jsonl",
    "output_dir": "output",
}  # what a run wants


class Understood(BaseException):
    """A parser has read a command to its end."""


class Command(NamedTuple):
    """Words of a command, and the line of the page where its block begins; `inline`: it may lack arguments."""

    line: int
    words: list[str]
    inline: bool = False


# ---- What a page has


def tokens_of(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))


def inlines(page: str) -> Iterator[tuple[int, Token]]:
    """Line, and links, images and code in running text."""
    for token in tokens_of(page):
        for child in token.children or []:
            yield (token.map or [0])[0] + 1, child


def blocks(page: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and text of each code block; indented ones have no language."""
    for token in tokens_of(page):
        if token.type in ("fence", "code_block"):
            yield (token.map or [0])[0] + 1, token.info.strip(), token.content


def links(page: str) -> list[tuple[int, str]]:
    found = ((line, child.attrGet("href") or child.attrGet("src")) for line, child in inlines(page))
    return [(line, str(target)) for line, target in found if target]


def headings(page: str) -> list[str]:
    tokens = tokens_of(page)
    return [
        "".join(child.content for child in after.children or [])
        for token, after in itertools.pairwise(tokens)
        if token.type == "heading_open"
    ]


def anchors(page: str, slug: Callable[[str], str]) -> set[str]:
    return {slug(heading) for heading in headings(page)}


def github_slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def site_slug(heading: str) -> str:
    """That of Python-Markdown's `toc`."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def commands(page: str) -> list[Command]:
    """Of a shell's blocks every line; of others, and of running text, what begins with a program of ours."""
    found = []
    for line, language, text in blocks(page):
        lines = text.replace("\\\n", " ").splitlines()
        everything = language in SHELLS
        if everything or not language or language == "text":
            said = [Command(line, words) for one in lines for words in parts(one.removeprefix("$ "), everything)]
            found += [command for command in said if everything or command.words[0] in PROGRAMS]
    for line, child in inlines(page):
        if child.type == "code_inline" and child.content.split(" ")[0] in PROGRAMS:
            found += [Command(line, words, inline=True) for words in parts(child.content, True) if whole(words)]
    return found


def whole(words: Sequence[str]) -> bool:
    """Whether words in running text are a command, and not the name of a program or of its flag."""
    starts = words[0] in ("deepspeed", "python", "torchrun")
    return len(words) > 1 and (not starts or any(word == "-m" or word.endswith(".py") for word in words))


def parts(line: str, certain: bool) -> list[list[str]]:
    """The commands of a line, each as words without variables before it; none of a line that is no shell's."""
    try:
        filled = re.sub(r"\$\w+", "0", re.sub(r" \[--?\w.*?\]", "", line))  # variables, and what may be left out
        lexer = shlex.shlex(filled, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
    except ValueError:
        assert not certain, f"{line!r}: no shell can read it"
        return []
    found: list[list[str]] = [[]]
    for before, word in itertools.pairwise(["", *words]):
        if set(word) <= set("&|;()"):
            found.append([])
        elif set(before) & set("<>") or set(word) <= set("<>"):
            continue  # a file that is read or written
        elif found[-1] or not re.fullmatch(r"[A-Z_]+=.*", word):
            found[-1].append(word)
    return [one for one in found if one]


def yaml_blocks(page: str) -> list[tuple[int, str]]:
    return [
        (line, text)
        for line, language, text in blocks(page)
        if language == "yaml" or (not language and re.match(r"(?!ds_sft:)[a-z_]+:( |$)", text))
    ]


# ---- What programs take


@contextlib.contextmanager
def only_understanding(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside it a program that has read its command line, and its configuration, goes no further."""
    resolve = read._resolve

    def stop_after(read: Callable[..., Any]) -> Callable[..., Any]:
        def reading(*args: Any, **options: Any) -> Any:
            read(*args, **options)
            raise Understood

        return reading

    def read_yaml(path: Path) -> dict[str, Given]:
        return read_file(ROOT / path) if str(path).startswith("ds_configs/") else dict(GIVEN)

    def parse(parser: FlagParser, words: Sequence[str]) -> None:
        parser.keys_follow = False  # type: ignore[attr-defined]
        read_flags(parser, words)

    def parse_known_args(parser: FlagParser, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        given, rest = argparse.ArgumentParser.parse_known_args(parser, words)
        if getattr(parser, "keys_follow", True):
            own = rest and parser.prog == "ds-sft plan" and not rest[0].startswith("--")  # its file is no flag
            load_config(rest if own else ["--config", "any.yaml", *rest], flags=parser.flags)
        return given, rest

    read_flags, read_file = FlagParser.parse, read._read_yaml
    with patch.context() as inside:
        inside.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
        inside.setattr(FlagParser, "parse", stop_after(parse))
        inside.setattr(FlagParser, "parse_known_args", parse_known_args, raising=False)
        inside.setattr(read, "_resolve", stop_after(resolve))
        inside.setattr(read, "_read_yaml", read_yaml)
        inside.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        with contextlib.suppress(Understood):
            yield


GIVEN = {name: Given("", value) for name, value in BASE.items()}


def ds_sft(words: Sequence[str]) -> None:
    assert words[0] in cli.COMMANDS or words[0].startswith("--"), words[0]
    if words[0] == "train":
        load_config(words[1:])
    elif words[0] in cli.COMMANDS and words[1:]:
        cli.call(words[0], words[1:])
        raise AssertionError(f"{words[0]} has not stopped behind its parser, but done what it was told")


def python(words: Sequence[str]) -> None:
    """A script, run up to its parser, or a module."""
    if words[0].startswith(ELSEWHERE):
        return
    if words[0] == "-m":
        assert words[1] in ("ds_sft", "pytest") or importlib.util.find_spec(words[1]), words[1]
        paths = [word for word in words[2:] if word.startswith("tests/")] if words[1] == "pytest" else []
        assert all((ROOT / path).exists() for path in paths), paths
        if words[1] == "ds_sft":
            ds_sft(words[2:])
        return
    script = ROOT / words[0]
    assert script.is_file(), f"{words[0]}: no such script"
    if script.name == "train.py":
        load_config(words[1:])
    elif "argparse" in script.read_text(encoding="utf-8"):
        sys.argv = list(words)
        runpy.run_path(str(script), run_name="__main__")
        raise AssertionError(f"{words[0]} has not stopped behind its parser, but done what it was told")
    else:
        assert len(words) == 1, f"{words[0]} takes no arguments"


def launched(script: str, words: Sequence[str], module: bool) -> None:
    if not module:
        python([script, *words])
    elif script == "ds_sft.train":
        load_config(words)
    else:
        python(["-m", script, *words])


def torchrun(words: Sequence[str]) -> None:
    from torch.distributed.run import get_args_parser

    given, _ = get_args_parser().parse_known_args(list(words))
    launched(given.training_script, given.training_script_args, given.module)


def deepspeed(words: Sequence[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", plain_parse_args)
        given = parse_args(list(words))
    launched(given.user_script, given.user_args, given.module)


plain_parse_args = argparse.ArgumentParser.parse_args


def make(words: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, equals, value = word.partition("=")
        known = f"$({name})" in text if equals else re.search(rf"^{re.escape(word)}:", text, re.M)
        assert known, f"make has no {word}"
        assert all((ROOT / path).exists() for path in re.findall(r"tests/[\w/.]+", value)), value


def sbatch(words: Sequence[str]) -> None:
    script = next(i for i, word in enumerate(words) if not word.startswith("--"))
    unknown = [word for word in words[:script] if word[2:].partition("=")[0] not in OF_SBATCH]
    assert not unknown, unknown
    if words[script] != "...":
        assert (ROOT / words[script]).is_file(), f"{words[script]}: no such script"
        load_config(["--config", *words[script + 1 :]])


def pip(words: Sequence[str]) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert words[0] in ("install", "wheel"), words
    for word in words:
        extras = re.fullmatch(r"(?:\.|ds_sft\S*)\[(.*)\]", word)
        unknown = {*extras[1].split(",")} - {*setup["options.extras_require"]} if extras else set()
        assert not unknown, f"setup.cfg has no extra {unknown}"
        assert not word.endswith(".txt") or word.startswith(ELSEWHERE) or (ROOT / word).is_file(), (
            f"{word}: no such file"
        )


def bash(words: Sequence[str]) -> None:
    assert (ROOT / words[0]).is_file(), f"{words[0]}: no such script"


PROGRAMS: dict[str, Callable[[Sequence[str]], None]] = {
    "bash": bash, "deepspeed": deepspeed, "ds-sft": ds_sft, "make": make, "pip": pip, "python": python,
    "sbatch": sbatch, "torchrun": torchrun,
}  # fmt: skip


def check(command: Command, patch: pytest.MonkeyPatch) -> None:
    """Fails where the program would not understand the command."""
    program, *words = command.words
    if program in NOT_OURS:
        return
    assert program in PROGRAMS, f"{program}: say in NOT_OURS that what it takes is not checked, or check it"
    with only_understanding(patch):
        try:
            PROGRAMS[program](words)
        except (UserError, SystemExit) as error:
            lacks = command.inline and re.search("arguments are required|^missing: ", str(error))
            if str(error) != "0" and not lacks:  # 0: --help
                raise AssertionError(f"{' '.join(command.words)}: {error}") from error


# ---- Tests


@pytest.mark.parametrize("page", PAGES)
def test_links_and_anchors_lead_somewhere(page: str) -> None:
    assert dead_links(page) == []


def dead_links(page: str) -> list[str]:
    dead = []
    for line, target in links(page):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        there = (ROOT / page).parent.joinpath(path).resolve() if path else ROOT / page
        of_page = there.is_file() and there.suffix == ".md" and anchor
        slugs = [anchors(str(there), rule) for rule in (github_slug, site_slug)] if of_page else [{""}]
        if not there.exists() or not all(anchor in known for known in slugs):
            dead.append(f"line {line}: {target}")
    return dead


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_its_program_takes(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    for command in commands(page):
        try:
            check(command, monkeypatch)
        except AssertionError as error:
            raise AssertionError(f"{page}:{command.line}: {error}") from error


@pytest.mark.parametrize("page", PAGES)
def test_yaml_is_what_a_run_reads(page: str, tmp_path: Path) -> None:
    for line, text in yaml_blocks(page):
        (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
        flags = [f"--{name}={value}" for name, value in BASE.items() if not re.search(rf"^{name}:", text, re.M)]
        try:
            read = load_config(["--config", str(tmp_path / "page.yaml"), *flags])
        except UserError as error:
            raise AssertionError(f"{page}:{line}: {error}") from error
        engine = read.training.get("deepspeed")
        assert engine is None or any((ROOT / name).is_file() for name in (engine, f"ds_configs/{engine}.json")), engine


@pytest.mark.parametrize("page", PAGES)
def test_json_and_python_can_be_read(page: str) -> None:
    for _, language, text in blocks(page):
        if language == "json":
            assert [json.loads(line) for line in text.splitlines()]
        if language == "python":
            ast.parse(text)


@pytest.mark.parametrize("page", PAGES)
def test_values_of_keys_in_running_text_are_valid(page: str) -> None:
    for line, child in inlines(page):
        named = re.fullmatch(r"([a-z_]+): (\S.*)", child.content, re.S) if child.type == "code_inline" else None
        name = upstream_keys.ALIASES.get(named[1], named[1]) if named else ""
        if named and name in all_keys():
            node: Any = yaml.compose(f"{name}: {named[2]}")
            (given,) = read._given_of(node, Path(page)).values()
            try:
                values.convert(all_keys()[name], given)
            except UserError as error:
                raise AssertionError(f"{page}:{line}: {error}") from error


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_keys_name_keys(page: str) -> None:
    known = {*all_keys(), *upstream_keys.ALIASES}
    unknown = [name for name in keys_in_tables(page) if name not in known]
    assert unknown == []


def keys_in_tables(page: str) -> list[str]:
    """What is code in the first column of tables whose first column is headed `key`."""
    found: list[str] = []
    column, of_keys = 0, False
    for token in tokens_of(page):
        column = 0 if token.type == "tr_open" else column + (token.type in ("th_close", "td_close"))
        if token.type == "table_open":
            of_keys = False
        if token.type == "inline" and column == 0 and token.content == "key":
            of_keys = True
        elif token.type == "inline" and column == 0 and of_keys and token.level > 3:
            found += [child.content for child in token.children or [] if child.type == "code_inline"]
        of_keys = of_keys and token.type != "table_close"
    return found


def test_the_page_for_those_who_come_calls_keys_as_the_command_does() -> None:
    rows = re.findall(r"^\| (`.*) \|$", (ROOT / "docs/moving.md").read_text().partition("## Values")[0], re.M)
    assert len(rows) > 20
    for row in rows:
        ours, *theirs = ({*re.findall(r"`(\w+)`", cell)} for cell in row.split(" | "))
        for name in set().union(*theirs) - {"use_liger_kernel"}:  # which transformers has, and says what to write
            assert CALLED_HERE.get(name, name) in ours, name


def test_the_site_has_every_page_once() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(nav: Any) -> list[str]:
        if isinstance(nav, str):
            return [nav]
        return [leaf for item in (nav.values() if isinstance(nav, dict) else nav) for leaf in leaves(item)]

    assert sorted(leaves(site["nav"])) == sorted(PAGES)


def test_the_page_of_installation_has_every_extra_of_a_user() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {*setup["options.extras_require"]} - {"docs", "test", "dev"}  # those are for work on this package
    table = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    assert {name for name in extras if f"| `{name}` |" not in table} == set()


PAGE = """# What *is* `here`: a page, 2-sided

Run `ds-sft verify output`, not `ds-sft`; `torchrun --nnodes` is no whole command. [Up](#what-is-here-a-page-2-sided)
[Down](#nothing) [There](../CONTRIBUTING.md#tests) [Nowhere](no.md) [Out](https://example.org/no.md#no)

```bash
NAME=value ds-sft plan my.yaml \\
    --nodes 2   # two of them
make test && sbatch slurm/train.sbatch CONFIG.yaml [--key value ...]
```

    $ make lint >lint.txt
    All checks passed!
    make: it is done

```yaml
max_length: 5
```
"""


def test_what_is_found_on_a_page(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "page.md"
    page.write_text(PAGE)
    (tmp_path / "CONTRIBUTING.md").write_text("# Contributing\n\n## Tests\n")
    assert dead_links(str(page)) == ["line 3: #nothing", "line 3: no.md"]
    assert [command.words for command in commands(str(page))] == [
        ["ds-sft", "plan", "my.yaml", "--nodes", "2"],
        ["make", "test"],
        ["sbatch", "slurm/train.sbatch", "CONFIG.yaml"],
        ["make", "lint"],
        ["ds-sft", "verify", "output"],
    ]
    assert yaml_blocks(str(page)) == [(16, "max_length: 5\n")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ds-sft plan my.yaml --nodez 2", "did you mean --nodes"),
        ("ds-sft plam my.yaml", "plam"),
        ("ds-sft preview my.yaml --max_lenght 5", "did you mean --max_length"),
        ("ds-sft launch my.yaml --lerning_rate 5", "did you mean --learning_rate"),
        ("ds-sft export checkpoint out --dtype half", "invalid choice"),
        ("ds-sft verify output --learning_rate 5", "unknown flag"),
        ("python ds_sft/train.py --config my.yaml --learning_rat 1", "did you mean --learning_rate"),
        ("python ds_sft/train.py --config my.yaml --overlong cut", "expected one of truncate"),
        ("python ds_sft/train.py --config ds_configs/nothing.yaml", "no such file"),
        ("torchrun --nproc_per_nodes 2 ds_sft/train.py --config my.yaml", "2"),
        ("torchrun --nproc_per_node 2 ds_sft/train.py --confik my.yaml", "confi"),
        ("deepspeed --num_gpu 2 ds_sft/tain.py --config my.yaml", "no such script"),
        ("deepspeed ds_sft/train.py --config my.yaml --deepspeeed x", "did you mean --deepspeed"),
        ("make tests", "make has no tests"),
        ("make demo ADAPTR=lora", "make has no ADAPTR"),
        ("make test PYTEST_ARGS=tests/nothing", "tests/nothing"),
        ("sbatch slurm/trian.sbatch my.yaml", "no such script"),
        ("sbatch slurm/train.sbatch my.yaml --overlong cut", "expected one of truncate"),
        ("python benchmarks/nothing.py", "no such script"),
        ("python benchmarks/stages.py --rank 1 --hiden 5", "2"),
        ("pip install 'ds_sft[plott]'", "no extra"),
        ("rm -rf output", "NOT_OURS"),
    ],
)
def test_a_command_with_a_mistake_is_found(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    ((words,),) = [parts(text, True)]
    with pytest.raises(AssertionError, match=re.escape(said)):
        check(Command(1, words), monkeypatch)
