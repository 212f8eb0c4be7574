"""Prompts of a conversation are what training showed, and an answer becomes the message that was taught."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_sft.config.keys import Config
from ds_sft.data.encode import Encoder
from ds_sft.data.prompts import Prompts, _without_begun, taught_reasoning
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.errors import UserError
from tests.conftest import write_rows
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


def test_an_earlier_answer_is_encoded_apart_where_it_is_learned() -> None:
    """One token of this tokenizer is the two line ends around the border of the header and the first answer."""
    tokenizer, talk = FAMILY["qwen"], [Message("user", "q"), Message("assistant", "\nx"), Message("user", "r")]
    lengths = {}
    for mask in ("all", "last"):
        wanted = config(template="reference", system_prompt="S", mask=mask)
        ((ids, _),) = Encoder(tokenizer, wanted).encode([Dialogue((*talk, Message("assistant", "y")))]).rows()
        prompt = Prompts(tokenizer, wanted).prompt(talk).ids
        assert ids[: len(prompt)] == prompt
        lengths[mask] = len(ids) - len(prompt)
    assert lengths == {"all": 2, "last": 2}
    text = "<|im_start|>assistant\n\nx"
    assert len(tokenizer(text).input_ids) < len(tokenizer(text[:22]).input_ids + tokenizer(text[22:]).input_ids)


@pytest.mark.parametrize(
    ("name", "reasoning", "written", "steps"),
    [
        ("qwen", True, "<think>\nhm</think>\n\nyes", ["", "|hm", "|hm", "yes|hm"]),
        ("qwen", True, "no <think>", ["no|", "no <thi|", "no <think>|"]),
        ("thinking", True, "hm\n</think>\n\nyes", ["|hm", "yes|hm"]),
        (
            "harmony",
            True,
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>yes",
            ["|", "|hm", "yes|hm"],
        ),
        ("harmony", False, "<|channel|>final<|message|>yes", ["|", "yes|"]),
        ("llama", False, "<think>hm</think>yes", ["|", "|hm", "yes|hm"]),
        ("reference", False, "<think>hm</think>yes", ["|", "|hm", "yes|hm"]),
    ],
)
def test_what_is_shown_only_grows(name: str, reasoning: bool, written: str, steps: list[str]) -> None:
    """Reasoning apart from content, marks of the template never, whatever part of it has come."""
    prompts = Prompts(FAMILY["qwen" if name == "reference" else name], keys(name), reasoning=reasoning)
    prompt = prompts.prompt([Message("user", "q")])
    shown = [prompts.shown(prompt, written[:end], whole=False) for end in range(len(written) + 1)]
    shown.append(prompts.shown(prompt, written))
    for before, after in itertools.pairwise(shown):
        assert after.content.startswith(before.content)
        assert after.reasoning.startswith(before.reasoning)
    assert f"{shown[-1].content}|{shown[-1].reasoning}" == steps[-1]
    told = {f"{said.content}|{said.reasoning}" for said in shown}
    assert set(steps[1:]) <= told


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("a < b", "a < b"),
        ("a < b <", "a < b"),
        ("a\n</thi", "a"),
        ("a <\n/ think ", "a"),
        ("a </</", "a </"),
        ("a <</think", "a <"),
        ("</th", ""),
        ("", ""),
        ("a k>", "a k>"),
    ],
)
def test_the_beginning_of_a_mark_is_not_shown(text: str, left: str) -> None:
    assert _without_begun(text, "\n</think>\n\n") == left


def test_only_the_end_of_a_long_answer_is_looked_at() -> None:
    """Which is asked for at every token."""
    looked: list[Any] = []

    class Text(str):
        def __getitem__(self, at: Any) -> str:
            looked.append(at)
            return super().__getitem__(at)

    assert _without_begun(Text("a < b " * 1000), "</think>") == ("a < b " * 1000).rstrip()
    assert len(looked) < 30


def test_reasoning_that_was_stopped_is_reasoning() -> None:
    prompts = Prompts(FAMILY["qwen"], keys("qwen"), reasoning=True)
    prompt = prompts.prompt([Message("user", "q")])
    assert prompts.message(prompt, "<think>\nhm, so") == Message("assistant", "", extra={"reasoning_content": "hm, so"})


@pytest.mark.parametrize(
    ("answer", "thinking", "taught"),
    [
        ({"content": "a"}, "keep", False),
        ({"content": "a", "reasoning": "r"}, "keep", True),
        ({"content": "<think>r</think>a"}, "keep", True),
        ({"content": "a", "reasoning": "r"}, "drop", False),
    ],
)
def test_reasoning_is_asked_for_where_the_data_had_some(
    tmp_path: Path, answer: dict[str, str], thinking: str, taught: bool
) -> None:
    """Where a template's prompt tells: Qwen3's ends with an empty block before an answer without."""
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **answer}]}]
    wanted = keys("qwen", thinking, train_file=str(write_rows(tmp_path / "rows.jsonl", rows)))
    assert taught_reasoning(wanted) is taught
    prompts = Prompts(FAMILY["qwen"], wanted)
    assert FAMILY["qwen"].decode(prompts.prompt([Message("user", "q")]).ids).endswith("</think>\n\n") is not taught
    (tmp_path / "rows.jsonl").unlink()
    assert taught_reasoning(wanted) is False
    assert not Prompts(FAMILY["llama"], keys("llama"), reasoning=True).reasoning  # one prompt for both


def test_a_system_prompt_that_the_template_refuses_is_a_mistake() -> None:
    wanted = config(template="tokenizer", system_prompt="S")
    said = r'^template: the template refuses this dialogue: only user and assistant; .* write system_prompt: "" to'
    with pytest.raises(UserError, match=said):
        Prompts(FAMILY["mistral"], wanted)
