"""A conversation with one model, or with two side by side: its history, and what a line that is typed does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import yaml

from ds_sft.commands.chat_answer import Reply, Speaker
from ds_sft.config.values import GENERATION, check_generation
from ds_sft.data.bad_row import BadRow
from ds_sft.data.prompts import AnswerParts, Prompt
from ds_sft.data.shapes import Message
from ds_sft.data.values import check_text
from ds_sft.errors import UserError, nearest

HELP = """\
  /reset                   forget the conversation
  /system [TEXT | default] show the system prompt, or set it; /system "" sets none
  /params [NAME VALUE ...] show how answers are made, or change it: /params do_sample true temperature 0.7
                           (VALUE default: as at the start)
  /retry                   ask the last question again
  /save FILE.jsonl         add the conversation to a file, as a row to train on
  /exit                    end; so does Ctrl-D
A question that begins with / is typed with //, one of several lines between two \"\"\". Ctrl-C stops an answer."""
LENGTH, REASONING, DEFAULT = "max_new_tokens", "reasoning", "default"


class Screen(Protocol):
    """Where answers are shown."""

    def say(self, text: str) -> None:
        """A line of ours, not the model's."""

    def begin(self, label: str) -> None:
        """An answer follows."""

    def hear(self, said: AnswerParts) -> None:
        """What was said so far."""

    def end(self) -> None:
        """All answers to a question are there."""


class Chat:
    """What was said, each model's history with its own answers; the first one's is saved."""

    def __init__(self, speakers: Sequence[Speaker], screen: Screen) -> None:
        self.speakers, self.screen = speakers, screen
        self.config = speakers[0].opened.config
        self.generation: dict[str, Any] = dict(self.config.generation or {})
        self.most = self.config.predict_max_new_tokens
        self.talks: list[list[Message]] = [[] for _ in speakers]
        self.dropped = [0 for _ in speakers]
        self.ended = False
        self.taught = speakers[0].prompts.reasoning
        self.asked: str | None = None  # the last question
        self.starts: Sequence[int] = [0 for _ in speakers]  # messages of each history before it

    def do(self, line: str) -> None:
        """What a line says; `ended` where it ends the conversation.

        Raises:
            UserError: a command that there is not, or that cannot be done.
        """
        text = line.strip()
        if text.startswith("//"):
            self.ask(text[1:])
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            self._command(name, rest.strip())
        elif text:
            self.ask(line)

    def _command(self, name: str, rest: str) -> None:
        alone = {"reset": self.reset, "retry": self.retry, "help": self.help, "exit": self.exit}
        with_text = {"system": self.system, "params": self.params, "save": self.save}
        if name in with_text:
            with_text[name](rest)
        elif name in alone and not rest:
            alone[name]()
        elif name in alone:
            raise UserError(f"/{name}: takes nothing after it, found {rest!r}")
        else:
            near = nearest(name, alone, with_text)
            meant = f"did you mean /{near}?" if near else "/help lists them"
            raise UserError(f"/{name}: no such command: {meant} (a question that begins with /: //{name})")

    # ---- Questions

    def ask(self, question: str) -> list[Reply]:
        """Ask every model; what it says goes into its history. An answer that was stopped counts as far as it came.

        Raises:
            UserError: the question is not asked, of no model; nothing has changed.
        """
        _require_text(question, "not asked: the question")
        if token := self.speakers[0].prompts.forges(question):
            self.screen.say(f"({token} in the question stays text: no token that ends a turn)")
        return self._ask(question, [len(talk) for talk in self.talks])

    def _ask(self, question: str, starts: Sequence[int]) -> list[Reply]:
        """Ask after so many messages of each history; those behind them are forgotten once all answers are there."""
        asking = Message("user", question)
        talks = [talk[:start] for talk, start in zip(self.talks, starts, strict=True)]
        prompts = [self._fit(number, [*talk, asking]) for number, talk in enumerate(talks)]
        config = replace(self.config, generation=self.generation)
        answers = []
        try:
            for speaker, prompt in zip(self.speakers, prompts, strict=True):
                self.screen.begin(speaker.label)
                answers.append(speaker.answer(prompt, config, self.most, self.screen.hear))
        finally:
            self.screen.end()
        for speaker, talk, answer in zip(self.speakers, talks, answers, strict=True):
            if answer.tokens or answer.ended == "end":
                talk += [asking, answer.message if answer.ended == "end" else replace(answer.message, train=False)]
            self._remark(speaker, answer)
        self.talks, self.asked, self.starts = talks, question, starts
        return answers

    def _fit(self, number: int, talk: Sequence[Message]) -> Prompt:
        speaker = self.speakers[number]
        prompt, dropped = speaker.fit(talk, self.most)
        if dropped > self.dropped[number]:
            self.screen.say(
                f"(the model has {speaker.limit:,} positions: the oldest {dropped} of {len(talk) // 2} exchanges are "
                "left out of what it reads)"
            )
        self.dropped[number] = dropped
        return prompt

    def _remark(self, speaker: Speaker, answer: Reply) -> None:
        """What is not seen of how an answer ended."""
        whose = f"{speaker.label}: " if len(self.speakers) > 1 else ""
        if answer.ended == "stopped":
            kept = "what came is kept as the answer" if answer.tokens else "nothing is kept"
            self.screen.say(f"({whose}stopped: {kept}; /retry asks again)")
        elif answer.ended == "length" and answer.tokens == self.most:
            self.screen.say(
                f"({whose}cut at {self.most} tokens: --predict_{LENGTH}, or /params {LENGTH} {2 * self.most})"
            )
        elif answer.ended == "length":
            self.screen.say(f"({whose}cut: the model's {speaker.limit or self.config.max_length:,} positions are full)")
        elif not answer.message.content.strip():
            self.screen.say(f"({whose}no text)")

    def retry(self) -> None:
        """Ask the last question again, as if it had not been answered."""
        if self.asked is None:
            raise UserError("/retry: nothing was asked yet")
        self._ask(self.asked, self.starts)

    # ---- What is asked how

    def reset(self) -> None:
        """Forget what was said."""
        self.talks = [[] for _ in self.speakers]
        self.dropped = [0 for _ in self.speakers]
        self.asked = None
        self.screen.say("(a new conversation)")

    def system(self, text: str) -> None:
        """Show the system prompt, or set it for all that follows; what was said stays."""
        _require_text(text, "/system: the prompt")
        if text:
            wanted = None if text == DEFAULT else "" if text in ('""', "''") else text
            self._set_system(wanted)
        first = self.speakers[0]
        own = "" if first.opened.trained else " but what the model's chat template may write itself"
        self.screen.say(first.system or f"(no system prompt{own})")

    def _set_system(self, text: str | None) -> None:
        known = [(speaker.prompts, speaker.before) for speaker in self.speakers]
        try:
            for speaker in self.speakers:
                speaker.set_system(text)
        except UserError:  # all of them have it, or none
            for speaker, (prompts, before) in zip(self.speakers, known, strict=True):
                speaker.prompts, speaker.before = prompts, before
            raise

    def params(self, text: str) -> None:
        """Show how answers are made, or change it.

        Raises:
            UserError: there is no such option, or it cannot have this value.
        """
        words = text.replace("=", " ").split()
        _require_options(words[::2])
        if len(words) % 2:
            raise UserError(f"/params: expected names and values in turn, such as temperature 0.7, found {text!r}")
        changed = dict(zip(words[::2], map(_value, words[1::2]), strict=True))
        reasoning, most = self._reasoning(changed), self._length(changed)
        self.generation, self.most = self._generation(changed), most
        for speaker in self.speakers:
            speaker.prompts.reasoning = speaker.prompts.chooses and reasoning
        self.screen.say(self._shown())

    def _generation(self, changed: dict[str, Any]) -> dict[str, Any]:
        own = self.config.generation or {}
        wanted = {name: own.get(name) if value == DEFAULT else value for name, value in changed.items()}
        options = {name: value for name, value in (self.generation | wanted).items() if value is not None}
        try:
            check_generation(options)
        except ValueError as error:
            raise UserError(f"/params: expected {error}") from None
        return options

    def _length(self, changed: dict[str, Any]) -> int | None:
        value = changed.pop(LENGTH, self.most)
        if value == DEFAULT:
            return self.config.predict_max_new_tokens
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"/params: expected {LENGTH} to be a whole number, 1 or more, found {value!r}")
        return value

    def _reasoning(self, changed: dict[str, Any]) -> bool:
        prompts = self.speakers[0].prompts
        value = changed.pop(REASONING, prompts.reasoning)
        value = self.taught if value == DEFAULT else value
        if not isinstance(value, bool) or (value and not prompts.chooses):
            only = "true or false" if prompts.chooses else "false (with this template the prompt is one and the same)"
            raise UserError(f"/params: expected {REASONING} to be {only}, found {value!r}")
        return value

    def _shown(self) -> str:
        shown = {"do_sample": False, **self.generation, LENGTH: self.most or "what the positions leave"}
        if self.speakers[0].prompts.chooses:
            shown[REASONING] = self.speakers[0].prompts.reasoning
        lines = [f"  {name} {_plain(value)}" for name, value in shown.items()]
        others = ", ".join(name for name in GENERATION if name not in shown)
        return "\n".join([*lines, f"  (and {others})"])

    def help(self) -> None:
        """List the commands."""
        self.screen.say(HELP)

    def exit(self) -> None:
        """End the conversation."""
        self.ended = True

    # ---- What is kept

    def save(self, name: str) -> None:
        """Add the conversation to a file of rows that a run can learn from; answers that were cut are not learned.

        Raises:
            UserError: nothing was said, or the file cannot be written.
        """
        if not self.talks[0]:
            raise UserError("/save: nothing was said yet")
        answers = [message for message in self.talks[0] if message.role == "assistant"]
        cut = sum(message.train is False for message in answers)
        if not name.endswith(".jsonl"):
            raise UserError(f"/save: expected a file that ends with .jsonl, found {name!r}")
        path = Path(name).expanduser()
        line = json.dumps(row_of(self.speakers[0].system, self.talks[0]), ensure_ascii=False) + "\n"
        try:
            rows = _append(path, line.encode("utf-8"))
        except OSError as error:
            raise UserError(f"/save: {path}: {error.strerror}") from None
        unlearned = f"; {cut} of {len(answers)} answers did not come to an end, and say train: false" if cut else ""
        self.screen.say(f"(row {rows} of {path}{unlearned})")


def _require_text(text: str, what: str) -> None:
    """Refuse bytes of another encoding than the terminal's or the pipe's.

    Raises:
        UserError: there are some.
    """
    try:
        check_text(text, what)
    except BadRow:
        raise UserError(f"{what} is not UTF-8 text") from None


def row_of(system: str, talk: Sequence[Message]) -> dict[str, Any]:
    """A row of messages, as training reads it."""
    messages = [Message("system", system), *talk] if system else talk
    return {"messages": [_turn(message) for message in messages]}


def _turn(message: Message) -> dict[str, Any]:
    told = {} if message.train is None else {"train": message.train}
    return {"role": message.role, "content": message.content, **message.extra, **told}


def _append(path: Path, line: bytes) -> int:
    """Add a line to a file whose last line may not be ended; the number of lines."""
    with path.open("a+b") as file:
        file.seek(0)
        before = file.read()
        file.write(b"\n" + line if before and not before.endswith(b"\n") else line)
    return len(before.splitlines()) + 1


def _require_options(names: Sequence[str]) -> None:
    """Raises UserError: one of them is no option, whatever its value."""
    known = (*GENERATION, LENGTH, REASONING)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            remedy = f"did you mean {near}?" if near else f"expected one of {', '.join(known)}"
            raise UserError(f"/params: {name}: no such option: {remedy}")


def _value(word: str) -> Any:
    """A word as YAML reads it."""
    try:
        return yaml.safe_load(word)
    except yaml.YAMLError:
        return word


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
