"""Which name was meant, and what a library said."""

from __future__ import annotations

import pytest

from ds_sft.errors import first_line, nearest

OURS = ["max_length", "train_file", "eval_file", "model_name_or_path", "profile_steps", "swanlab_mode"]
LORA = ["lora_alpha", "lora_rank", "lora_dropout"]
THEIRS = ["local_rank", "learning_rate", "save_steps", "report_to", "gradient_accumulation_steps", "num_train_epochs"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("max-lenght", "max_length"),
        ("max_seq_length", "max_length"),
        ("saev_steps", "save_steps"),  # and not ours with the same word
        ("grad_accum", "gradient_accumulation_steps"),
        ("epochs", "num_train_epochs"),
        ("model", "model_name_or_path"),  # and not swanlab_mode, a letter less
        ("report", "report_to"),
        ("local_rnk", "local_rank"),
        ("lora_r", None),  # it is no misspelt local_rank
        ("zzzz", None),
    ],
)
def test_the_nearest_name(wrong: str, meant: str | None) -> None:
    assert nearest(wrong, OURS, THEIRS) == meant


def test_words_in_common_come_before_letters() -> None:
    assert nearest("lora_r", [*OURS, *LORA], THEIRS) == "lora_rank"
    assert nearest("lora_r", THEIRS, [*OURS, *LORA]) == "lora_rank"


def test_of_equals_the_first_group_is_taken() -> None:
    assert nearest("eval", ["eval_file"], ["eval_steps"]) == "eval_file"
    assert nearest("eval", ["eval_steps"], ["eval_file"]) == "eval_steps"


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("no such model\n\nHave a look at ...", "no such model"),
        ("\n  no such model  \n", "no such model"),
        ("", "ValueError"),
        (" \n", "ValueError"),
    ],
)
def test_the_first_line_of_what_a_library_says(said: str, line: str) -> None:
    assert first_line(ValueError(said)) == line
