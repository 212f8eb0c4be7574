"""Prompts of a conversation are what training showed, and an answer becomes the message that was taught."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_sft.config import Config
from ds_sft.data.encode import Encoder
from ds_sft.data.prompts import Prompts
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.errors import UserError
from tests.families import FAMILIES, family
from tests.test_encode import config

FAMILY = {name: family(name) for name in FAMILIES}
TEMPLATES = ["reference", *FAMILIES]
PARTS = [*"ab .,?\n\t</>|", "é", "天", "👋🏽", "Paris", "\n\n", "think"]


def keys(template: str, thinking: str = "keep", mask: str = "all", **others: Any) -> Config:
    name = "reference" if template == "reference" else "tokenizer"
    system = "" if template == "mistral" else "Be brief."  # which refuses a system turn
    return config(template=name, system_prompt=system, max_length=10_000, thinking=thinking, mask=mask, **others)


@st.composite
def dialogues(draw: st.DrawFn, template: str, thinking: str) -> Dialogue:
    """Without special-token text under the reference template, where training lets it end a turn, and no chat does;
    with thinking: empty, no content begins with white space, which goes with the block that a content has."""
    special = "" if template == "reference" else FAMILIES[template][0][0]
    begin = "x" if thinking == "empty" else ""
    said = st.lists(st.sampled_from([*PARTS, special]), max_size=8).map(lambda parts: begin + "".join(parts))
    messages = []
    for _ in range(draw(st.integers(1, 3))):
        reasoning = draw(st.none() | said)
        messages.append(Message("user", draw(said)))
        messages.append(Message("assistant", draw(said), extra={"reasoning_content": reasoning} if reasoning else {}))
    return Dialogue(tuple(messages))


@pytest.mark.parametrize("mask", ["all", "last"])
@pytest.mark.parametrize("thinking", ["keep", "drop", "empty"])
@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_row_is_prompt_answer_and_end(template: str, thinking: str, mask: str, data: st.DataObject) -> None:
    """Of a conversation in which the model says what the row says, turn by turn, every prompt is the row's."""
    tokenizer, wanted = FAMILY["qwen" if template == "reference" else template], keys(template, thinking, mask)
    try:
        encoder, prompts = Encoder(tokenizer, wanted), Prompts(tokenizer, wanted)
    except UserError:
        assert thinking == "empty"  # and the template writes no reasoning
        return
    history: list[Message] = []
    talk = data.draw(dialogues(template, thinking))
    for count in range(1, len(talk.messages), 2):
        rows = encoder.encode([Dialogue(talk.messages[: count + 1])])
        if rows.bad:  # the template rewrites an answer: no such row is learned
            return
        ((ids, labels),) = rows.rows()
        answer = list(itertools.takewhile(lambda label: label != -100, reversed(labels[: learned_to(labels)])))[::-1]
        start = learned_to(labels) - len(answer)
        prompts.reasoning = prompts.chooses and thinking == "keep" and bool(talk.messages[count].extra)
        prompt = prompts.prompt([*history, talk.messages[count - 1]])
        assert prompt.ids == ids[:start]
        written = tokenizer.backend_tokenizer.decode(answer[:-1], skip_special_tokens=False)  # without the end
        history += [talk.messages[count - 1], prompts.message(prompt, written)]


def learned_to(labels: list[int]) -> int:
    """Where the last answer ends; a template may write more."""
    return len(labels) - next(i for i, label in enumerate(reversed(labels)) if label != -100)
