"""Answers of a loaded model, token by token: heard as they are written, and stopped in the middle."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from ds_sft.commands.opened import Opened
from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.prompts import AnswerParts, Prompt, Prompts
from ds_sft.data.shapes import Message
from ds_sft.errors import UserError
from ds_sft.export.placement import is_out_of_memory
from ds_sft.export.predict import generation_options, load_to_answer
from ds_sft.model.limits import made_for

if TYPE_CHECKING:
    import torch

ROOM = 4096  # tokens of a conversation that a GPU is asked to have room for beside the weights
ANSWER_SHARE = 4  # the part of the model's positions that an answer finds free where nobody has said how long it is
BROKEN = "\ufffd"  # how the bytes of a character that is not whole are decoded


@dataclass(frozen=True)
class Reply:
    message: Message
    ended: Literal["end", "length", "stopped"]
    tokens: int


class Speaker:
    """A model, and the prompts that it is asked with.

    Args:
        path: of the model, where it is another one than the prompts are of.
        reasoning: see `Prompts`.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, label: str, opened: Opened, path: str, *, reasoning: bool | None = None) -> None:
        self.label, self.opened = label, opened
        self.prompts = Prompts(opened.tokenizer, opened.config, reasoning=reasoning)
        self.model = load_to_answer(path, opened.tokenizer, opened.config, prompt=ROOM, rows=1)
        self.limit = made_for(self.model)
        self.before: list[Message] = []  # the system turn, where it is not the one of the keys

    @property
    def system(self) -> str:
        """The system prompt in use; none: "", or what the chat template writes by itself."""
        return self.before[0].content if self.before else self.prompts.system_prompt

    def set_system(self, text: str | None) -> None:
        """Have another system prompt than the one that was taught (None). A key says that there is none.

        Raises:
            UserError: the template has no system turn.
        """
        config = self.opened.config if text is None else replace(self.opened.config, system_prompt="")
        prompts = Prompts(self.opened.tokenizer, config, reasoning=self.prompts.reasoning)
        before = [Message("system", text)] if text else []
        try:
            prompts.prompt([*before, Message("user", "x")])
        except BadRow as error:
            raise UserError(f"/system: {error}") from None
        self.prompts, self.before = prompts, before

    def fit(self, talk: Sequence[Message], most: int | None) -> tuple[Prompt, int]:
        """The prompt for a conversation that ends with a question, and how many of its first exchanges it is without.

        Args:
            most: tokens of the answer, see `answer`.

        Raises:
            UserError: the question alone is too long, or the template refuses it.
        """
        starts = [i for i, message in enumerate(talk) if message.role == "user"]
        room = 1 if self.limit is None else max(1, min(most or self.limit // ANSWER_SHARE, self.limit // 2))
        for dropped, start in enumerate(starts):
            prompt = self._prompt(talk[start:])
            last = dropped == len(starts) - 1
            if self.limit is None or len(prompt.ids) + (1 if last else room) <= self.limit:
                return prompt, dropped
        raise UserError(
            f"not asked: with what stands around it the question has {len(prompt.ids):,} tokens, and the model "
            f"{self.limit:,} positions"
        )

    def _prompt(self, talk: Sequence[Message]) -> Prompt:
        try:
            return self.prompts.prompt([*self.before, *talk])
        except BadRow as error:
            raise UserError(f"not asked: {error}") from None

    def answer(self, prompt: Prompt, config: Config, most: int | None, hear: Callable[[AnswerParts], None]) -> Reply:
        """Ask.

        Args:
            config: its `generation` says how.
            most: tokens of the answer at most; None: as many as there are positions.
            hear: is told what was said so far, whenever that has grown.

        Raises:
            UserError: there is no memory for so long a conversation.
        """
        import torch

        left = config.max_length if self.limit is None else self.limit - len(prompt.ids)
        most = left if most is None else most if self.limit is None else min(most, left)
        ids = torch.tensor([prompt.ids], device=self.model.device)
        heard = Heard(self.opened.tokenizer, len(prompt.ids), self._ends(),
                      lambda text: hear(self.prompts.shown(prompt, text, whole=False)))  # fmt: skip
        with stoppable(heard), torch.inference_mode():
            try:
                written = self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=most,
                    **generation_options(config),
                    pad_token_id=self.opened.tokenizer.pad_token_id,
                    stopping_criteria=[heard],
                )
                heard.ids = written[0, len(prompt.ids) :].tolist()  # of several beams the best is known only now
            except KeyboardInterrupt:  # the second one; the first has asked for the next token's end
                heard.stopped = True
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise UserError(
                    f"no memory for {len(prompt.ids) + len(heard.ids):,} tokens of a conversation"
                ) from None
        text = heard.whole()
        hear(self.prompts.shown(prompt, text))
        ended = "stopped" if heard.stopped else "end" if heard.has_ended() else "length"
        return Reply(self.prompts.message(prompt, text), ended, len(heard.ids))  # type: ignore[arg-type]

    def _ends(self) -> set[int]:
        """What the model's own files say that ends an answer."""
        ends = self.model.generation_config.eos_token_id
        return {ends} if isinstance(ends, int) else set(ends or ())


@dataclass
class Heard:
    """A stopping criterion of `generate` that tells what was written so far, and stops when it is asked to.

    transformers' TextStreamer shows Japanese and Thai only when a line ends, as they have no spaces; DecodeStream of
    tokenizers fails at bytes that are no characters.
    """

    tokenizer: Any
    start: int  # tokens of the prompt
    ends: set[int]
    tell: Callable[[str], None]  # what was written so far
    ids: list[int] = field(default_factory=list)
    text: str = ""  # of the characters that are whole
    stopped: bool = False
    told: int = 0  # tokens in `text`
    context: int = 0  # tokens of it before the last that was told: spaces depend on what is before a token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        import torch

        if len(input_ids) == 1:
            self.ids = input_ids[0, self.start :].tolist()
            self._decode()
        return torch.full((len(input_ids),), self.stopped, device=input_ids.device)

    def _decode(self) -> None:
        """Tell what the last tokens add, once they are whole characters."""
        if self.has_ended():
            return
        known = self._text_of(self.ids[self.context : self.told])
        now = self._text_of(self.ids[self.context :])
        if len(now) > len(known) and not now.endswith(BROKEN):
            self.text += now[len(known) :]
            self.context, self.told = self.told, len(self.ids)
            self.tell(self.text)

    def _text_of(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def has_ended(self) -> bool:
        return bool(self.ids) and self.ids[-1] in self.ends

    def whole(self) -> str:
        """All that was written, without the end, and without a character that was stopped in the middle."""
        text = self._text_of([i for i in self.ids if i not in self.ends])
        return text if self.has_ended() else text.rstrip(BROKEN)


@contextmanager
def stoppable(heard: Heard) -> Iterator[None]:
    """Let Ctrl-C stop an answer after its token, and a second one at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if heard.stopped:
            raise KeyboardInterrupt
        heard.stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
