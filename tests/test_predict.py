"""Answers of an exported model, and how they are shown."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_sft.config import Config
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.predict import (
    Prediction,
    as_text,
    end_tokens,
    generation_options,
    predict,
    print_predictions,
    write_predictions,
)

PAIRS = [("What is the capital of France?", "Paris."), ("今天天气怎么样？", "很好。"), ("x", "y")]
SAMPLES = [Dialogue((Message("user", question), Message("assistant", answer))) for question, answer in PAIRS]


def make(model_dir: Path, **keys: Any) -> Config:
    training = {"output_dir": str(model_dir), "use_cpu": True}
    return Config(model_name_or_path=str(model_dir), train_file="t", system_prompt="S", training=training, **keys)


def test_greedy_answers_do_not_depend_on_the_other_rows(model_dir: Path, tokenizer: Any) -> None:
    """Against a greedy loop written out: one row, no padding, no cache."""
    rows = predict(make(model_dir, predict_max_new_tokens=6), SAMPLES, tokenizer)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    for row, sample in zip(rows, SAMPLES, strict=True):
        assert (row.question, row.reference, row.before) == (sample.question, sample.answer, None)
        prompt = f"<|im_start|>system\nS<|im_end|>\n<|im_start|>user\n{sample.question}<|im_end|>\n"
        ids = tokenizer(prompt + "<|im_start|>assistant\n", add_special_tokens=False).input_ids
        new: list[int] = []
        while len(new) < 6 and not ends & set(new):
            with torch.no_grad():
                new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        assert row.prediction == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_sampled_answers_are_the_seeds(model_dir: Path, tokenizer: Any) -> None:
    def answers(seed: int, **options: Any) -> list[str]:
        config = make(model_dir, predict_max_new_tokens=8, generation=options or None)
        config.training["seed"] = seed  # type: ignore[index]
        return [row.prediction for row in predict(config, SAMPLES, tokenizer)]

    hot = {"do_sample": True, "temperature": 2.0}
    assert answers(1, **hot) == answers(1, **hot)
    assert answers(1, **hot) != answers(2, **hot)
    assert answers(1) == answers(2) != answers(1, **hot)  # greedy unless asked
    assert answers(1, do_sample=True, top_k=1) == answers(1)


def test_options_of_generate() -> None:
    def options(given: Any) -> dict[str, Any]:
        return generation_options(make(Path("m"), generation=given))

    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}
    assert options(None) == greedy
    assert options({"num_beams": 2}) == greedy | {"num_beams": 2}
    assert options({"do_sample": True, "top_p": 0.9}) == {"do_sample": True, "top_p": 0.9}  # the rest is the model's


def test_before_is_the_model_that_training_started_from(model_dir: Path, tokenizer: Any) -> None:
    (row,) = predict(make(model_dir, predict_max_new_tokens=3, predict_before=True), SAMPLES[:1], tokenizer)
    assert row.before == row.prediction  # here both are the same folder


def test_the_model_before_training_has_rows_for_its_tokens_too(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|think|>"]})
    samples = [Dialogue((Message("user", "<|think|>"), Message("assistant", "x")))]
    config = make(model_dir, predict_max_new_tokens=3, resize_embeddings=True)
    (row,) = predict(config, samples, tokenizer)
    assert row.question == "<|think|>"


def test_an_answer_ends_where_the_positions_of_a_table_do(tmp_path: Path, tokenizer: Any) -> None:
    """Also one to a prompt that is longer than the table, as rows that were cut have."""
    config = AutoConfig.for_model("gpt2", vocab_size=400, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    samples = [Dialogue((Message("user", "x" * size), Message("assistant", "y"))) for size in (5, 200)]
    rows = predict(make(tmp_path), samples, tokenizer)
    assert [row.question for row in rows] == ["xxxxx", "x" * 200]


def test_a_dialogue_is_continued_where_its_last_answer_stands(model_dir: Path, tokenizer: Any) -> None:
    """The prompt has the earlier turns; what is shown is the last question and the answer in the file."""
    turns = [("user", "Hi"), ("assistant", "Hello."), ("user", "Who?"), ("assistant", "Me."), ("user", "unanswered")]
    sample = Dialogue(tuple(Message(role, text) for role, text in turns))
    (row,) = predict(make(model_dir, predict_max_new_tokens=6), [sample], tokenizer)
    assert (row.question, row.reference) == ("Who?", "Me.")
    prompt = (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|endoftext|>\n"
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = torch.tensor([tokenizer(prompt, add_special_tokens=False).input_ids])
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=0)[0, ids.shape[1] :]
    assert row.prediction == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_a_dialogue_that_the_reference_cannot_write_is_passed_over(model_dir: Path, tokenizer: Any) -> None:
    """At the end of a run of hours nothing may fail on one row."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    odd = Dialogue((Message("user", "q"), Message("assistant", "", tool_calls=(call,))))
    rows = predict(make(model_dir, predict_max_new_tokens=2), [odd, SAMPLES[0]], tokenizer)
    assert [row.question for row in rows] == [SAMPLES[0].question]
    assert predict(make(Path("/nowhere")), [odd], tokenizer) == []


def test_no_rows_load_no_model(tokenizer: Any) -> None:
    assert predict(make(Path("/nowhere")), [], tokenizer) == []


@pytest.mark.parametrize(
    ("own", "turn_end", "expected"),
    [
        (None, "<|endoftext|>", [0, 2]),
        (1, "<|endoftext|>", [0, 1, 2]),
        ([1, 5], "<|endoftext|>", [0, 1, 2, 5]),
        (None, "<|im_start|>", [0, 1, 2]),  # as a template may say
    ],
)
def test_what_ends_an_answer(tokenizer: Any, own: Any, turn_end: str, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=own))
    assert end_tokens(model, tokenizer, turn_end) == expected  # 0 pad, 2 <|im_end|>


def test_file_table_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [Prediction("q [red]", "r" * 500, "a\nb", before="b0"), Prediction("в", "原", "п", before="")]
    write_predictions(rows, tmp_path / "p.jsonl")
    read = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert read[0] == {"question": "q [red]", "reference": "r" * 500, "prediction": "a\nb", "before": "b0"}
    print_predictions(rows)
    shown = capsys.readouterr().out
    assert "[red]" in shown  # text, not markup
    assert "answer before" in shown
    assert "…" in shown
    print_predictions([Prediction("q", "r", "p")])
    assert "answer before" not in capsys.readouterr().out
    assert as_text(rows[1]) == "Question: в\n\nLLM: п\n\nReference: 原"
