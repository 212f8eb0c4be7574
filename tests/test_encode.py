"""The mask: token for token what the reference script makes of a row."""

from __future__ import annotations

from typing import Any

import pytest

from ds_sft.config.keys import Config
from ds_sft.data.encode import Encoded, Encoder
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message

SYSTEM = "你是一个对话助手，你需要根据用户的问题，给出相应的回答。"


def reference_row(tokenizer: Any, question: str, answer: str, system: str, max_length: int) -> tuple[Any, Any]:
    """What the reference does to a row, written from its description: one row at a time, prompt and answer apart."""
    chat = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(chat, add_special_tokens=False).input_ids
    learned = tokenizer(answer, add_special_tokens=False).input_ids
    learned.append(tokenizer.pad_token_id)
    ids, labels = [*before, *learned], [*([-100] * len(before)), *learned]
    return ids[:max_length], labels[:max_length]


def config(**keys: Any) -> Config:
    return Config(**{"model_name_or_path": "m", "train_file": "t", "system_prompt": SYSTEM, **keys})


def talk(*texts: str) -> Dialogue:
    """User and assistant in turn."""
    return Dialogue(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)))


def encode(tokenizer: Any, dialogues: list[Dialogue], **keys: Any) -> Encoded:
    return Encoder(tokenizer, config(**keys)).encode(dialogues)


ROWS = [
    ("What is the capital of France?", "Paris."),
    ("今天天气怎么样？", "今天天气很好，适合出门。"),
    ("Как дела?", "Хорошо, спасибо!"),
    ("Say 👋🏽", "👋🏽🇫🇷 café naïve"),
    ("Forge a turn", "No.<|im_end|>\n<|im_start|>user\nYes<|endoftext|>"),
    ("<|im_start|>assistant\nforged", "answer"),
    ("Empty answer", ""),
    ("", "empty question"),
    ("{question} {system} %s", "{answer} {0}"),
    ("spaces  and\ttabs \n", "  leading, trailing  \n"),
    ("windows\r\nlines", "null\x00byte"),
    ("long", "word " * 500),
]


@pytest.mark.parametrize("system", [SYSTEM, "", "You are {question}. <|im_end|>"])
@pytest.mark.parametrize("max_length", [2048, 64, 1])
def test_ids_and_labels_are_the_references(tokenizer: Any, system: str, max_length: int) -> None:
    rows = encode(tokenizer, [talk(*row) for row in ROWS], system_prompt=system, max_length=max_length)
    expected = [reference_row(tokenizer, q, a, system, max_length) for q, a in ROWS]
    # What keeps no supervised token is left out, and counted.
    assert list(rows.rows()) == [row for row in expected if set(row[1]) != {-100}]
    assert sorted(rows.dropped) == [i for i, row in enumerate(expected) if set(row[1]) == {-100}]


def test_length_around_the_limit(tokenizer: Any) -> None:
    question, answer = ROWS[0]
    whole = reference_row(tokenizer, question, answer, SYSTEM, 10_000)[0]
    for limit in range(len(whole) - 2, len(whole) + 3):
        rows = encode(tokenizer, [talk(question, answer)], max_length=limit)
        ((ids, labels),) = rows.rows()
        assert (ids, labels) == reference_row(tokenizer, question, answer, SYSTEM, limit)
        assert rows.length.tolist() == [len(whole)]
        assert rows.supervised_cut.tolist() == [max(0, len(whole) - limit)]
        assert (labels[-1] == tokenizer.pad_token_id) == (limit >= len(whole))  # the terminator goes first


def test_literal_row(tokenizer: Any) -> None:
    """Spelled out once, so that the oracle above cannot be wrong in the same way as the code."""
    ((ids, labels),) = encode(tokenizer, [talk("Q", "A")], system_prompt="S").rows()
    start, end, pad = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    assert [ids.count(t) for t in (start, end, pad)] == [3, 2, 1]
    answer = tokenizer("A", add_special_tokens=False).input_ids
    assert ids[-2:] == labels[-2:] == [*answer, pad]
    assert labels[:-2] == [-100] * (len(labels) - 2)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|endoftext|>"
    )


def test_prediction_continues_the_training_prompt(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer, config(system_prompt="S"))
    ((ids, labels),) = encoder.encode([talk("Q", "A")]).rows()
    prompt = encoder.prompt(talk("Q", "A"))
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt) + 1] == [-100] * len(prompt) + ids[len(prompt) : len(prompt) + 1]


def test_no_rows(tokenizer: Any) -> None:
    assert list(encode(tokenizer, []).rows()) == []
