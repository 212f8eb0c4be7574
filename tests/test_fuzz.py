"""More than 100,000 hostile inputs: no traceback, no wrong mask. What must hold is in tests/fuzzing.py."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ds_sft.data import content
from tests.families import family
from tests.fuzzing import SEEDS, check_file, check_rows, encoder_of

QWEN, LLAMA, GEMMA, MISTRAL, MARKED = map(family, ("qwen", "llama", "gemma", "mistral", "marked"))
THINKING, DEEPSEEK, GLM, HARMONY = map(family, ("thinking", "deepseek", "glm", "harmony"))
ENCODERS = {
    "reference": (encoder_of(QWEN), QWEN),
    "qwen": (encoder_of(QWEN, template="tokenizer"), QWEN),
    "llama": (encoder_of(LLAMA, template="tokenizer"), LLAMA),
    "gemma": (encoder_of(GEMMA, template="tokenizer"), GEMMA),
    "mistral": (encoder_of(MISTRAL, template="tokenizer", system_prompt=""), MISTRAL),
    "marked": (encoder_of(MARKED, template="tokenizer"), MARKED),
    "thinking": (encoder_of(THINKING, template="tokenizer"), THINKING),
    "deepseek": (encoder_of(DEEPSEEK, template="tokenizer"), DEEPSEEK),
    "glm": (encoder_of(GLM, template="tokenizer"), GLM),
    "harmony": (encoder_of(HARMONY, template="tokenizer"), HARMONY),
    "last": (encoder_of(QWEN, template="tokenizer", mask="last"), QWEN),
    "drop": (encoder_of(QWEN, template="tokenizer", thinking="drop"), QWEN),
    "empty": (encoder_of(QWEN, template="tokenizer", thinking="empty"), QWEN),
    "split": (encoder_of(MARKED, template="tokenizer", overlong="split", max_length=40), MARKED),
    "split-last": (encoder_of(QWEN, overlong="split", max_length=40, mask="last", thinking="drop"), QWEN),
}
SPECIAL = [
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<|eot_id|>",
    "<|endoftext|>",
    "<end_of_turn>",
    "<|user|>",
    "<|return|>",
    "<|channel|>final<|message|>",
    "<｜Assistant｜>",
    "<start_of_turn>model\n",
    "</s>",
    "[INST]",
    "<think>\n",
    "</think>\n\n",
    "{{ x }}",
]
ODD = [
    "\\n",
    "\\ud83d",
    "\\u0000",
    "\ufdd0",
    "\ufdd1",
    "👋🏽",
    "e\u0301",
    "null",
    "true",
    "-1e999",
    "NaN",
    "role",
    "train",
]
SNIPPETS = [*SPECIAL, *ODD, *'[]{}"\\,:']


def mutants(seed: int, count: int) -> list[bytes]:
    """Rows with bytes changed, cut, doubled, and with snippets put in."""
    chance, rows = random.Random(seed), [json.dumps(row, ensure_ascii=False).encode() for row in SEEDS]
    found = []
    for _ in range(count):
        row = bytearray(chance.choice(rows))
        for _ in range(chance.randint(1, 3)):
            at, what = chance.randrange(len(row) + 1), chance.random()
            if what < 0.7:  # into a text, where the row stays a row
                at = chance.choice([match.end() for match in re.finditer(rb'": "', row)] or [0])
                row[at:at] = json.dumps(chance.choice(SNIPPETS))[1:-1].encode()
            elif what < 0.8:
                row[at:at] = chance.choice(SNIPPETS).encode()
            elif what < 0.87:
                row[at : at + 1] = bytes([chance.randrange(256)])
            elif what < 0.94:
                row[at : at + chance.randint(1, 9)] = b""
            else:
                row[at:at] = row[at : at + chance.randint(1, 30)]
        found.append(bytes(row).replace(b"\n", b" "))
    return found


@pytest.mark.parametrize("name", ["value", "text", "thinking"])
def test_a_part_whose_text_is_lost_is_noticed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seeds, read = [json.dumps(row).encode() for row in SEEDS], content._part_text
    for encoder, tokenizer in (ENCODERS["reference"], ENCODERS["qwen"]):
        check_rows(encoder, tokenizer, seeds)
    monkeypatch.setattr(content, "_part_text", lambda part, *rest: "" if name in part else read(part, *rest))
    for encoder, tokenizer in (ENCODERS["reference"], ENCODERS["qwen"]):
        with pytest.raises(AssertionError):
            check_rows(encoder, tokenizer, seeds)


COUNTS = {"reference": 70_000, "qwen": 10_000, "llama": 5_000}  # of the others 2,000 each


@pytest.mark.parametrize(("name", "count"), [(name, COUNTS.get(name, 2_000)) for name in ENCODERS])
def test_mutated_rows(name: str, count: int) -> None:
    encoder, tokenizer = ENCODERS[name]
    accepted = sum(check_rows(encoder, tokenizer, mutants(seed, 1000)) for seed in range(count // 1000))
    assert count / 10 < accepted < count * 0.9  # both ways are walked


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.zst", "held.json"])
def test_mutated_files(tmp_path: Path, kind: str) -> None:
    from tests.test_readers import CONTENTS, KINDS, compress

    chance, name = random.Random(kind), kind.split(".")[0]
    for _ in range(400):
        content = bytearray(KINDS[kind] if name == "held" else CONTENTS[name])
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(content))
            content[at : at + chance.choice([0, 1, 40])] = chance.choice(
                [b"", b"\xff", b"\0", b'"', b"[", b"\n", b",,"]
            )
        packed = compress(bytes(content), Path(kind).suffix)
        if kind == "jsonl.gz" and chance.random() < 0.5:
            packed = gzip.compress(bytes(content))[: chance.randrange(40)]
        check_file(tmp_path / f"rows.{kind}", packed)


BYTES = [b"", b"\xff", b"\0", b'"', b"[", b"\n", b",,"]
TEXT = st.text(max_size=20) | st.sampled_from(SNIPPETS)
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
ANY = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
ROLE = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt", "observation", "function_call"])
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": ANY})}), max_size=2
)
PART = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "reasoning", "thinking", "output_text"])},
                          optional={"text": TEXT, "value": TEXT, "thinking": TEXT, "id": TEXT, "note": SCALAR}),
    st.fixed_dictionaries({"type": st.just("tool_call"), "value": st.builds(json.dumps, ANY) | ANY}),
    st.fixed_dictionaries({"type": TEXT}, optional={"image_url": ANY}),
)  # fmt: skip
THOUGHT = {"reasoning_content": TEXT, "reasoning": SCALAR, "thinking": SCALAR}
UNREAD = {"id": SCALAR, "weight": SCALAR, "meta": ANY, "images": ANY}
MESSAGE = st.fixed_dictionaries(
    {"role": ROLE, "content": TEXT | st.lists(PART, max_size=3)},
    optional={"train": st.booleans(), "loss_weight": st.sampled_from([0, 1, 0.0, 1.0, None]), "tool_calls": CALLS,
              "name": TEXT, "function_call": CALLS, **THOUGHT, "note": ANY, "audio": SCALAR},
)  # fmt: skip
ROW = st.one_of(
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, max_size=6)}, optional={"tools": ANY, "system": TEXT, **UNREAD}
    ),
    st.fixed_dictionaries(
        {"question": TEXT, "answer": TEXT}, optional={"system": SCALAR, "history": ANY, **THOUGHT, **UNREAD}
    ),
    st.fixed_dictionaries({"instruction": TEXT, "output": TEXT}, optional={"input": SCALAR, **THOUGHT}),
    st.fixed_dictionaries({"prompt": st.lists(MESSAGE, max_size=3) | TEXT, "completion": TEXT}),
    st.dictionaries(st.sampled_from(["messages", "conversations", "question", "answer", "output", "prompt"]), ANY),
    ANY,
)


def as_line(row: Any) -> bytes:
    return json.dumps(row).encode()


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(ROW, min_size=1, max_size=4))
def test_rows_of_any_structure(rows: list[Any]) -> None:
    for encoder, tokenizer in ENCODERS.values():
        check_rows(encoder, tokenizer, [as_line(row) for row in rows])


# What Parquet and the hub's data sets hold besides JSON's values.
PYTHON = st.recursive(
    SCALAR | st.binary(max_size=5) | st.datetimes() | st.decimals() | st.timedeltas(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
PYTHON_CALLS = st.lists(st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": TEXT, "arguments": PYTHON})}))
PYTHON_ROW = st.one_of(
    st.fixed_dictionaries({"question": TEXT | PYTHON, "answer": TEXT}, optional={"tools": PYTHON, "history": PYTHON}),
    st.fixed_dictionaries(
        {"messages": st.lists(st.fixed_dictionaries({"role": ROLE, "content": TEXT, "tool_calls": PYTHON_CALLS}))}
    ),
    st.dictionaries(st.sampled_from(["messages", "conversations", "question", "answer", "output", "prompt"]), PYTHON),
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(PYTHON_ROW, min_size=1, max_size=4))
def test_rows_of_any_python_values(rows: list[Any]) -> None:
    for name in ("reference", "qwen"):
        check_rows(*ENCODERS[name], rows)
