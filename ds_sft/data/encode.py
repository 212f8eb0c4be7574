"""Dialogues -> `input_ids` and `labels`: the mask, and what happens to rows longer than `max_length`.

With the reference template a question and an answer become, token for token, what the reference script makes of them:
ChatML written out by hand, everything before the answer unsupervised (-100), the answer and the tokenizer's pad token,
which serves as end of turn, supervised.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, takewhile
from typing import Any

import numpy as np

from ds_sft.config.keys import Config
from ds_sft.data.bad_row import BadRow
from ds_sft.data.messages import full_content, learned_messages, with_thinking
from ds_sft.data.pieces import Piece
from ds_sft.data.records import Dialogue
from ds_sft.data.rendered import left_out_by_template
from ds_sft.data.shapes import Message
from ds_sft.data.templates import open_template
from ds_sft.data.turns import THINK_TAG

IGNORE_INDEX = -100  # torch.nn.CrossEntropyLoss's default `ignore_index`
TOO_LONG = "the prompt alone fills max_length"
LONGER = "longer than max_length"
HIDDEN = BadRow("special-token text", "text of this row becomes special tokens once the tokenizer has normalised it "
                "(as <|IM_END|> where it lowers case); remove it, or write allow_special_tokens: true")  # fmt: skip
BYTE = re.compile("<0x[0-9A-F]{2}>")
GROUP = 2**18  # letters of texts that are encoded together
BEFORE = "\n"  # what text is encoded after where the tokenizer puts a space before every text


@dataclass
class Encoded:
    """Rows as a model sees them, end to end. A dialogue gives one row, several under `overlong: split`, or none."""

    input_ids: np.ndarray  # [tokens] int32
    labels: np.ndarray  # [tokens] int32; IGNORE_INDEX where nothing is learned
    starts: np.ndarray  # [rows + 1]: row r is input_ids[starts[r]:starts[r + 1]]
    dialogue: np.ndarray  # [rows]: index of the dialogue
    length: np.ndarray  # [rows]: tokens before any was cut
    supervised: np.ndarray  # [rows]: tokens whose label counts
    supervised_cut: np.ndarray  # [rows]: of those, lost to `max_length`
    bad: dict[int, BadRow] = field(default_factory=dict)  # dialogue -> why it gives no row
    # Dialogue -> reason, tokens and supervised tokens of those that are left out because of their length.
    dropped: dict[int, tuple[str, int, int]] = field(default_factory=dict)
    split: int = 0  # dialogues that became several rows
    forged_dialogues: frozenset[int] = frozenset()  # those of which text became special tokens
    textless_dialogues: frozenset[int] = frozenset()  # those with an answer to learn that has no text, and no call
    left_out: dict[int, set[str]] = field(default_factory=dict)  # dialogue -> what of it the template leaves out

    @property
    def forged(self) -> int:
        return len(self.forged_dialogues)

    def rows(self) -> Iterator[tuple[list[int], list[int]]]:
        """Ids and labels, row by row."""
        for start, end in zip(self.starts[:-1], self.starts[1:], strict=True):
            yield self.input_ids[start:end].tolist(), self.labels[start:end].tolist()


class Encoder:
    """What turns dialogues into rows: tokenizer, template, mask and length policy of a run.

    Raises:
        UserError: the key `template` names none that can be used.
    """

    def __init__(self, tokenizer: Any, config: Config) -> None:
        self.template = open_template(config, tokenizer)
        self.mask, self.max_length, self.overlong = config.mask, config.max_length, config.overlong
        self.thinking = config.thinking
        self.backend = tokenizer.backend_tokenizer
        # The reference encodes prompt and answer apart with every tokenizer; so does its template.
        self.spaced = config.template != "reference" and _puts_space_before_text(self.backend)
        added = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        # Unknown characters and single bytes become tokens that are declared special; they command nothing.
        ordinary = {i for i, text in added.items() if text == tokenizer.unk_token or BYTE.fullmatch(text)}
        special = [i for i, text in added.items() if self.template.special.fullmatch(text) and i not in ordinary]
        self.special_ids = np.array(special, np.int32)

    @cached_property
    def plain(self) -> Any:
        """A tokenizer that reads special tokens as text; it takes a second to make, so only when needed."""
        from tokenizers import Tokenizer

        state = json.loads(self.backend.to_str())
        for token in state["added_tokens"]:  # what a template writes as a header need not be declared special
            token["special"] = token["special"] or self.template.special.fullmatch(token["content"]) is not None
        plain = Tokenizer.from_str(json.dumps(state))
        plain.encode_special_tokens = True
        return plain

    def encode(self, dialogues: Sequence[Dialogue]) -> Encoded:
        """Encode dialogues, in order."""
        bad: dict[int, BadRow] = {}
        missing: dict[int, set[str]] = {}
        pieces = [self._pieces(dialogue, bad, missing, i) for i, dialogue in enumerate(dialogues)]
        rows = self._join(pieces, np.arange(len(pieces)))
        forged = {i for i, dialogue in enumerate(dialogues) if self.template.forged(dialogue)}
        hidden = self._hidden_special_tokens(rows, pieces)
        if hidden and not self.template.allow_special_tokens:
            bad |= dict.fromkeys(hidden, HIDDEN)
            pieces = [[] if i in hidden else row for i, row in enumerate(pieces)]
            rows = self._join(pieces, np.arange(len(pieces)))
        rows.bad = bad
        if self.overlong == "split" and (rows.length > self.max_length).any():
            rows = self._split_long(dialogues, pieces, rows)
        textless = frozenset(
            i for i, dialogue in enumerate(dialogues) if has_textless_answer(dialogue, self.mask, self.thinking)
        )
        forged_dialogues = frozenset((forged | hidden) - set(bad))
        return replace(
            self._fit(rows), forged_dialogues=forged_dialogues, textless_dialogues=textless, left_out=missing
        )

    def _hidden_special_tokens(self, rows: Encoded, pieces: Sequence[Sequence[Piece]]) -> set[int]:
        """Dialogues with more special tokens among their ids than their text shows: a normaliser made them."""
        is_special = np.isin(rows.input_ids, self.special_ids)
        found = _sums(is_special, rows.starts).tolist()
        return {
            i for i, count in zip(rows.dialogue.tolist(), found, strict=True)
            if count and count > sum(map(self._special_in, pieces[i]))
        }  # fmt: skip

    def _special_in(self, piece: Piece) -> int:
        """Special tokens that a piece may become."""
        if isinstance(piece.text, int):
            return 1
        return 0 if piece.plain else len(self.template.special.findall(piece.text))

    def prompt(self, dialogue: Dialogue) -> list[int]:
        """What stands before the last answer, in training and in prediction.

        Raises:
            BadRow: the template cannot render the dialogue, or its text becomes special tokens unseen.
        """
        return self.prompt_ids(self.prompt_pieces(dialogue))

    def prompt_ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of `prompt_pieces`.

        Raises:
            BadRow: text becomes special tokens unseen.
        """
        rows = self._join([pieces], np.arange(1))
        if not self.template.allow_special_tokens and self._hidden_special_tokens(rows, [pieces]):
            raise HIDDEN
        return [int(i) for i in rows.input_ids]

    def prompt_pieces(self, dialogue: Dialogue) -> list[Piece]:
        """The prompt, cut where training cuts it: around each answer that is learned, as no token spans such a border.

        Raises:
            BadRow: the template cannot render the dialogue.
        """
        last, learned = dialogue.last_answer, learned_messages(dialogue, self.mask)
        alone = [i == last for i in range(len(learned))]
        before = list(takewhile(lambda piece: not piece.learned, self._rendered(dialogue, alone)))
        learned[last] = True
        if learned == alone:
            return before
        try:
            whole = self._rendered(dialogue, learned)
        except BadRow:  # an earlier answer that the template rewrites: no row could teach it
            return before
        ends = np.cumsum([_length(piece) for piece in whole])
        return whole[: int(np.searchsorted(ends, sum(map(_length, before)))) + 1]

    def _pieces(
        self, dialogue: Dialogue, bad: dict[int, BadRow], missing: dict[int, set[str]], index: int
    ) -> list[Piece]:
        """No pieces for a dialogue that is bad; what the template leaves out of others goes to `missing`."""
        learned = learned_messages(dialogue, self.mask)
        try:
            if not any(learned):
                raise BadRow("no answer to learn", "mask: last, and the last answer says train: false")
            pieces = self._rendered(dialogue, learned)
        except BadRow as error:
            bad[index] = error
            return []
        text = "".join([piece.text for piece in pieces if isinstance(piece.text, str)])
        lost_calls = self.template.lost_calls(dialogue, learned)
        if names := left_out_by_template(with_thinking(dialogue.messages, self.thinking), learned, text, lost_calls):
            missing[index] = names
        return pieces

    def _rendered(self, dialogue: Dialogue, learned: Sequence[bool]) -> list[Piece]:
        """Raises BadRow: the template cannot render the dialogue."""
        try:
            return self.template.pieces(dialogue, learned)
        except BadRow:
            raise
        except (TypeError, ValueError, RecursionError) as error:  # tools nested hundreds deep, and the like
            text = f"the dialogue cannot be rendered: {type(error).__name__}: {str(error)[:150]}"
            raise BadRow("cannot be rendered", text) from None

    def _ids(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Token ids of each piece, encoded apart."""
        ids = [np.array([piece.text] if isinstance(piece.text, int) else [], np.int32) for piece in pieces]
        for plain in (False, True):
            chosen = [i for i, piece in enumerate(pieces) if piece.plain is plain and isinstance(piece.text, str)]
            texts = [str(pieces[i].text) for i in chosen]
            encoded = (ids for group in _grouped(texts) for ids in self._encode_texts(group, plain=plain))
            for i, found in zip(chosen, encoded, strict=True):
                ids[i] = np.array(found, np.int32)
        return ids

    def _encode_texts(self, texts: list[str], *, plain: bool) -> list[list[int]]:
        backend = self.plain if plain else self.backend
        backend.no_truncation()  # what its file or an earlier caller may have left
        backend.no_padding()
        if not self.spaced:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        before = backend.encode(BEFORE, add_special_tokens=False).ids
        found = backend.encode_batch_fast([BEFORE + text for text in texts], add_special_tokens=False)
        return [
            encoding.ids[len(before) :] if encoding.ids[: len(before)] == before
            else backend.encode(text, add_special_tokens=False).ids
            for encoding, text in zip(found, texts, strict=True)
        ]  # fmt: skip

    def _join(self, rows: Sequence[Sequence[Piece]], dialogue: np.ndarray) -> Encoded:
        """Rows of whole length from their pieces; rows without pieces are left out."""
        flat = list(chain.from_iterable(rows))
        ids = self._ids(flat)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        input_ids = np.concatenate([np.zeros(0, np.int32), *ids])
        learned = np.repeat(np.fromiter((piece.learned for piece in flat), bool, len(flat)), lengths)
        num_pieces = np.fromiter(map(len, rows), np.int64, len(rows))
        row_of_piece = np.repeat(np.arange(len(rows)), num_pieces)
        length = np.bincount(row_of_piece, weights=lengths, minlength=len(rows)).astype(np.int64)
        keep = num_pieces > 0
        length, dialogue = length[keep], dialogue[keep]
        starts = np.concatenate([[0], np.cumsum(length)])
        labels = np.where(learned, input_ids, np.int32(IGNORE_INDEX))
        return Encoded(input_ids, labels, starts, dialogue, length, _sums(learned, starts), np.zeros_like(length))

    def _split_long(self, dialogues: Sequence[Dialogue], pieces: list[list[Piece]], rows: Encoded) -> Encoded:
        """Cut dialogues that are too long at turn borders; see `_parts`."""
        long = set(rows.dialogue[rows.length > self.max_length].tolist())
        parts = [[row] for row in pieces]
        dropped: dict[int, tuple[str, int, int]] = {}
        for i in long:
            try:
                parts[i], unlearned = self._parts(dialogues[i])
            except BadRow as error:
                parts[i], rows.bad[i] = [], error
                continue
            if unlearned:
                dropped[i] = (LONGER, unlearned, 0)
        index = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        joined = self._join(list(chain.from_iterable(parts)), index)
        return replace(joined, bad=rows.bad, dropped=dropped, split=sum(len(part) > 1 for part in parts))

    def _parts(self, dialogue: Dialogue) -> tuple[list[list[Piece]], int]:
        """The dialogue in as few parts as fit, each with the system turn before it and whole exchanges in it.

        Parts in which nothing is learned are left out; the number of their tokens comes second.

        An exchange begins where the user speaks after an answer. One that is too long on its own stays one part.
        """
        messages, learned = dialogue.messages, learned_messages(dialogue, self.mask)
        first = next((i for i, message in enumerate(messages) if message.role != "system"), 0)
        borders = [i for i in range(first + 1, len(messages)) if _begins_exchange(messages, i)]
        edges = [first, *borders, len(messages)]
        parts: list[list[Piece]] = []
        start = unlearned = 0
        exchanges = 1  # of the part before: this one has about as many
        while start < len(edges) - 1:
            part = partial(self._part, dialogue, learned, first, edges[start])
            fits = partial(self._fits, part, edges)
            end = last_that_fits(fits, start + 1, len(edges) - 1, guess=start + exchanges)
            best = part(edges[end])
            if any(piece.learned for piece in best):
                parts.append(best)
            else:
                unlearned += self._tokens(best)
            start, exchanges = end, end - start
        return parts, unlearned

    def _fits(self, part: Callable[[int], list[Piece]], edges: Sequence[int], end: int) -> bool:
        return self._tokens(part(edges[end])) <= self.max_length

    def _tokens(self, pieces: Sequence[Piece]) -> int:
        return sum(map(len, self._ids(pieces)))

    def _part(self, dialogue: Dialogue, learned: list[bool], first: int, start: int, end: int) -> list[Piece]:
        messages = (*dialogue.messages[:first], *dialogue.messages[start:end])
        return self._rendered(replace(dialogue, messages=messages), [*learned[:first], *learned[start:end]])

    def _fit(self, rows: Encoded) -> Encoded:
        """Apply `max_length`: leave rows out, or cut their ends, and leave out those with nothing to learn."""
        long = rows.length > self.max_length
        drop = long & (self.overlong in ("drop", "error"))
        position = np.arange(len(rows.input_ids)) - np.repeat(rows.starts[:-1], rows.length)
        inside = (position < self.max_length) & np.repeat(~drop, rows.length)
        kept_length = np.where(drop, 0, np.minimum(rows.length, self.max_length))
        starts = np.concatenate([[0], np.cumsum(kept_length)])
        labels = rows.labels[inside]
        supervised = _sums(labels != IGNORE_INDEX, starts)
        keep = supervised > 0
        dropped = dict(rows.dropped)
        for row in np.flatnonzero(~keep):
            reason = LONGER if drop[row] else TOO_LONG
            _, tokens, lost = dropped.get(int(rows.dialogue[row]), ("", 0, 0))
            dropped[int(rows.dialogue[row])] = (
                reason,
                tokens + int(rows.length[row]),
                lost + int(rows.supervised[row]),
            )
        token = np.repeat(keep, kept_length)
        return Encoded(
            input_ids=rows.input_ids[inside][token],
            labels=labels[token],
            starts=np.concatenate([[0], np.cumsum(kept_length[keep])]),
            dialogue=rows.dialogue[keep],
            length=rows.length[keep],
            supervised=supervised[keep],
            supervised_cut=(rows.supervised - supervised)[keep],
            bad=rows.bad,
            dropped=dropped,
            split=rows.split,
        )


def has_textless_answer(dialogue: Dialogue, mask: str, thinking: str) -> bool:
    """Whether an answer that is learned has no text, reasoning or call: all that is learned is its end."""
    messages = zip(with_thinking(dialogue.messages, thinking), learned_messages(dialogue, mask), strict=True)
    return any(
        learned and not message.tool_calls and not THINK_TAG.sub("", full_content(message)).strip()
        for message, learned in messages
    )


def last_that_fits(fits: Callable[[int], bool], low: int, high: int, *, guess: int) -> int:
    """The largest number up to `high` that fits, where those below it do; `low` if none, which is not asked.

    It asks about two numbers where the guess is right, and else a few more the further it is off.
    """
    best, beyond, step, number = low, high + 1, 1, guess
    while best + 1 < beyond:
        number = min(max(number, best + 1), beyond - 1)
        if fits(number):
            best, number = number, number + step
        else:
            beyond, number = number, number - step
        step *= 2
        if low < best and beyond <= high:
            number = (best + beyond) // 2
    return best


def _begins_exchange(messages: Sequence[Message], index: int) -> bool:
    return messages[index].role == "user" and messages[index - 1].role == "assistant"


def _grouped(texts: Sequence[str]) -> Iterator[list[str]]:
    """Texts in groups of about GROUP letters: for each token of a group the tokenizer keeps some hundred bytes."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _length(piece: Piece) -> int:
    """Letters of a piece; 1 for one that is a token."""
    return 1 if isinstance(piece.text, int) else len(piece.text)


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sum of `values` in each row."""
    totals = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    return np.asarray(totals[starts[1:]] - totals[starts[:-1]])


def _puts_space_before_text(backend: Any) -> bool:
    """SentencePiece's habit: the start of every text becomes the start of a word."""
    ids = [i for text in ("x", "y") for i in backend.encode(text, add_special_tokens=False).ids]
    text: str = backend.decode(ids, skip_special_tokens=False)
    return text != "xy"


def use_threads(*, enabled: bool) -> None:
    """Whether the tokenizers library takes all cores; where processes do, its threads would only compete."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if enabled else "false"
