"""What a template writes around an answer, found by rendering it: a table of families, literally."""

from __future__ import annotations

from typing import Any

import pytest

from ds_sft.data.turns import CALL_FORMS, CallForm, Renderer, find_turns, shows_call
from tests.families import FAMILIES, family

BLOCK = "<think>\n\n</think>\n\n"
CHATML = {"header": "<|im_start|>assistant\n", "end": "<|im_end|>", "call_end": "<|im_end|>"}
FOUND: dict[str, dict[str, Any]] = {
    "qwen": {
        **CHATML,
        "opened": "",
        "plain": ((BLOCK, len(BLOCK)), ("", 0)),
        "thought": (("<think>\n", "\n</think>\n\n"),),
        "reasoning": "field",
        "splits": False,
        "tool_header": "<|im_start|>user\n<tool_response>\n",
    },
    "thinking": {
        **CHATML,
        "opened": "<think>\n",
        "plain": ((BLOCK, len("<think>\n")), ("<think>\n", len("<think>\n")), ("", 0)),
        "thought": (("<think>\n", "\n</think>\n\n"),),
    },
    "deepseek": {
        "header": "<｜Assistant｜>",
        "opened": "<think>\n",
        "thought": (),
        "reasoning": "nowhere",
        "call_forms": (CallForm(as_text=True, content="none"),),
    },
    "glm": {
        "header": "<|assistant|>",
        "opened": "",
        # The prompt without reasoning ends in the block, not in the line end after it.
        "plain": (("\n<think></think>\n", len("\n<think></think>")), ("", 0)),
        "thought": (("\n<think>", "</think>\n"),),
        "end": "<|user|>",
        "call_end": "<|observation|>",
        "closes": True,
        "call_forms": CALL_FORMS[:1],
    },
    "harmony": {
        "header": "<|start|>assistant",
        "opened": "",
        "plain": (("<|channel|>final<|message|>", 0), ("", 0)),
        "beside": (("<|channel|>analysis<|message|>", 0), ("<|channel|>final<|message|>", 0), ("", 0)),
        "thought": (("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),),
        "end": "<|return|>",
        "call_end": "<|call|>",
        "ends": ("<|return|>", "<|call|>", "<|end|>"),
        "closes": False,
        "splits": True,
    },
    "llama": {"reasoning": "content", "end": "<|eot_id|>", "ends": ("<|eot_id|>",), "call_forms": (), "closes": False},
    "mistral": {"header": "", "opened": "", "plain": ((" ", 0), ("", 0)), "end": "</s>"},
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_a_family_writes(name: str) -> None:
    turns = find_turns(Renderer(family(name), FAMILIES[name][1]))
    assert {field: getattr(turns, field) for field in FOUND[name]} == FOUND[name]


@pytest.mark.parametrize(
    ("text", "arguments", "shown"),
    [
        ('f {"a": "x\\ny", "b": [1, true, null]}', {"a": "x\ny", "b": [1, True, None]}, True),
        ("f(a='x y', b=[1, True, None])", {"a": "x y", "b": [1, True, None]}, True),  # a call in Python
        ("<f><a>x y</a></f>", {"a": "x y"}, True),
        ("f {'a': 'x y'}", {"a": "x y"}, False),  # an object that was written as Python writes it
        ("f a", {"a": "x y"}, False),
        ("g x y a", {"a": "x y"}, False),
        ('f {"a":1}', '{"a":1}', True),
        ('f "{\\"a\\":1}"', '{"a":1}', False),  # a text that was quoted as one
        ('f "not \\"json\\""', 'not "json"', True),  # which is a text in JSON
        ("f", {}, True),
    ],
)
def test_whether_a_call_is_there(text: str, arguments: Any, shown: bool) -> None:
    assert shows_call(text, {"function": {"name": "f", "arguments": arguments}}) is shown
