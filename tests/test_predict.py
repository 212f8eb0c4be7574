"""Answers of an exported model, and how they are shown."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ds_sft.config.keys import Config
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from ds_sft.export.predict import (
    Prediction,
    generation_options,
    predict,
    prediction_as_text,
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
    ends = {2}  # the folder's own, <|im_end|>: nothing is added
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
    new = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0)[0, ids.shape[1] :]
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


@pytest.mark.parametrize("ends", [2, [3, 2]])
def test_an_answer_ends_where_the_folder_says_and_nowhere_else(
    model_dir: Path, tokenizer: Any, tmp_path: Path, ends: Any
) -> None:
    """As a server does, which knows nothing of the run: with another end the same model talks on."""
    shown = {}
    for name, told in (("told", ends), ("not told", 399)):
        folder = Path(shutil.copytree(model_dir, tmp_path / name))
        always_says(folder, [30, 0, 31, 2, 32])
        written = json.dumps({"eos_token_id": told, "pad_token_id": 0})
        (folder / "generation_config.json").write_text(written, encoding="utf-8")
        (row,) = predict(make(folder, predict_max_new_tokens=5), SAMPLES[:1], tokenizer)
        shown[name] = row.prediction
    assert shown == {"told": tokenizer.decode([30, 31]), "not told": tokenizer.decode([30, 31, 32])}


def always_says(folder: Path, tokens: list[int]) -> None:
    """Change the weights in `folder` so that the model answers everything with these tokens, whatever stands before.

    Every layer adds nothing; the token itself decides the next: the last token of the prompt, then each of `tokens`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt_ends_with = AutoTokenizer.from_pretrained(folder)("assistant\n", add_special_tokens=False).input_ids[-1]
    for parameter in model.parameters():
        parameter.data.zero_()
    model.model.norm.weight.data.fill_(1)
    untied = model.get_input_embeddings().weight.data.clone()
    model.config.tie_word_embeddings = False
    head = torch.nn.Parameter(torch.zeros_like(untied))
    for place, (token, following) in enumerate(pairwise([prompt_ends_with, *tokens])):
        untied[token, place], head.data[following, place] = 1, 1
    model.get_input_embeddings().weight = torch.nn.Parameter(untied)
    model.lm_head.weight = head
    model.save_pretrained(folder)


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
    assert prediction_as_text(rows[1]) == "Question: в\n\nLLM: п\n\nReference: 原"
    print_predictions([])
    assert capsys.readouterr().out == ""
