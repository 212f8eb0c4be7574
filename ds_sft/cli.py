"""`ds-sft COMMAND`: a table of commands, each imported when it is called."""

from __future__ import annotations

import importlib
import os
import select
import sys
from collections.abc import Sequence

from ds_sft import __version__
from ds_sft.config.read import given_twice
from ds_sft.errors import UserError, nearest
from ds_sft.quiet import quiet

COMMANDS = {  # name -> module with `main(argv) -> exit code`, what it does
    "init": ("ds_sft.commands.init", "write a configuration to begin with, and with --slurm the templates of jobs"),
    "preview": ("ds_sft.commands.preview", "show the tokens a model will see, and which are learned"),
    "plan": ("ds_sft.commands.plan", "what a run will need: memory, disk, time; from its configuration alone"),
    "train": ("ds_sft.train", "fine-tune a model; the same as `python ds_sft/train.py`"),
    "prepare": ("ds_sft.commands.prepare", "encode the data of a run, without a GPU"),
    "doctor": ("ds_sft.commands.doctor", "find out what would stop a run here: devices, files, disk, network"),
    "launch": ("ds_sft.commands.launch", "say what a run on a cluster will be, and submit it to Slurm"),
    "chat": ("ds_sft.commands.chat", "talk to a trained model, or to a checkpoint, in the terminal"),
    "evaluate": ("ds_sft.commands.evaluate", "how good a model's answers are, and how much better than before"),
    "report": ("ds_sft.commands.report", "put runs on one page: curves, time, memory, keys, answers"),
    "push": ("ds_sft.commands.push", "give a trained model to others: the Hugging Face hub, with a model card"),
    "export": ("ds_sft.commands.export", "turn a checkpoint of any ZeRO stage into a model folder, without GPUs"),
    "verify": ("ds_sft.commands.verify", "compare a final model's loss with the trained one, where a run could not"),
    "demo": ("ds_sft.commands.demo", "build the demo's model and dialogues from installed packages"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 is the exit code of a mistake of the user's, 130 that of Ctrl-C, 1 that of a reader who has
    closed the pipe (`ds-sft ... | head`), as it is rich's."""
    try:
        try:
            return run_command(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # here, not while the interpreter ends
    except BrokenPipeError:
        if not drop_unread():
            raise
        return 1


def run_command(words: list[str]) -> int:
    if words and words[0].startswith("--local_rank="):  # `deepspeed --module ds_sft COMMAND` puts it there
        del words[0]
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"ds_sft {__version__}")
        return 0
    try:
        return call(words[0], words[1:])
    except UserError as error:
        print(f"ds_sft: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nds_sft: interrupted", file=sys.stderr)
        return 130


def drop_unread() -> bool:
    """Whether nobody reads the output any more, for another pipe may have broken; then what is left of it goes nowhere,
    or the interpreter would fail on it at its end."""
    watched = select.poll()
    for stream in (sys.stdout, sys.stderr):
        watched.register(stream.fileno(), 0)  # errors alone
    unread = [fd for fd, _ in watched.poll(0)]
    for fd in unread:
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    return bool(unread)


def usage() -> str:
    lines = [f"  {name:<10} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(["usage: ds-sft COMMAND [...]", "", *lines, "", "ds-sft COMMAND --help says more."])


def call(name: str, words: Sequence[str]) -> int:
    """Import and run a command.

    Raises:
        UserError: there is no such command.
    """
    if name not in COMMANDS:
        near = nearest(name, COMMANDS)
        remedy = f"did you mean {near}?" if near else f"there are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}: {remedy}")
    if name not in ("train", "doctor", "evaluate"):  # they say it on one rank
        for remark in given_twice(words):
            print(remark, file=sys.stderr)
    quiet(bars=sys.stderr.isatty())
    code: int = importlib.import_module(COMMANDS[name][0]).main(words)
    return code
