"""The last lines a user reads."""

from __future__ import annotations

from typing import Any

import pytest

from ds_sft.training.clock import PARTS
from ds_sft.training.report import summary

SPEED = {"tokens": 4000, "seconds": 20.0, "supervised_tokens_per_second": 50.0, "waiting_share": 0.0,
         "padding_share": 0.0, **{f"{part}_share": 0.1 for part in PARTS}}  # fmt: skip
RUN = {"steps": 8, "tokens": 4000, "train_seconds": 25.0, "tokens_per_second": 200.0, "speed": SPEED,
       "peak_memory": [{"host_gib": 1.25}, {"host_gib": 1.5}], "eval_loss_first": None, "eval_loss": None,
       "best_checkpoint": None, "plan": None}  # fmt: skip
PLAN = {"planned_gib": 0.5, "measured_gib": 0.625, "freed_gib": 0.0}


def lines(**changes: Any) -> list[str]:
    return summary({**RUN, **changes}).splitlines()


def test_what_was_trained() -> None:
    assert lines()[0] == "Trained 8 steps, 4,000 tokens in 20 s (200 tokens/s)."
    assert lines(tokens=9000)[0] == "Trained 8 steps, 9,000 tokens; 4,000 of them in this start in 20 s (200 tokens/s)."


@pytest.mark.parametrize(
    ("peaks", "plan", "said"),
    [
        (
            RUN["peak_memory"],
            PLAN,
            "Memory of a rank: 1.5 GiB at most: 640.0 MiB for training (512.0 MiB planned), the rest for Python "
            "and its libraries.",
        ),
        (
            RUN["peak_memory"],
            PLAN | {"freed_gib": 0.0625},
            "Memory of a rank: 1.5 GiB at most: 640.0 MiB for training (512.0 MiB planned, up to 64.0 MiB are freed "
            "blocks that the C library keeps), the rest for Python and its libraries.",
        ),
        (
            RUN["peak_memory"],
            PLAN | {"measured_gib": 0.5, "freed_gib": 0.0625},  # as planned
            "Memory of a rank: 1.5 GiB at most: 512.0 MiB for training (512.0 MiB planned), the rest for Python "
            "and its libraries.",
        ),
        (
            RUN["peak_memory"],
            {"planned_gib": 1 / 64, "measured_gib": 1 / 32, "freed_gib": 1 / 64},  # of a tiny model
            "Memory of a rank: 1.5 GiB at most: 32.0 MiB for training (16.0 MiB planned), the rest for Python and its "
            "libraries.",
        ),
        (RUN["peak_memory"], None, "Memory of a rank: 1.5 GiB at most."),
        ([{"host_gib": 9.0, "gpu_gib": 0.625}], PLAN, "GPU memory of a rank: 640.0 MiB at most (512.0 MiB planned)."),
    ],
)
def test_one_sentence_about_memory(peaks: Any, plan: Any, said: str) -> None:
    assert [line for line in lines(peak_memory=peaks, plan=plan) if "emory" in line] == [said]


@pytest.mark.parametrize(
    ("first", "last", "best", "said"),
    [
        (2.5, 1.25, None, "Validation loss: 1.2500 last, 2.5000 first."),
        (2.5, 1.25, "checkpoint-4", "Validation loss: 1.2500 of the best checkpoint, 2.5000 first."),
        (2.5, 2.5, None, "Validation loss: 2.5000."),  # of one evaluation
    ],
)
def test_the_validation_loss(first: float, last: float, best: str | None, said: str) -> None:
    assert lines(eval_loss_first=first, eval_loss=last, best_checkpoint=best)[-1] == said
    assert not any("Validation" in line for line in lines())
