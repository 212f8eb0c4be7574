"""What the trainer does in an evaluation, of a model that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_sft.data.batch import METADATA
from ds_sft.model.parts import Parts
from ds_sft.ranks import stop as stop_module
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import Stopped, StopRequests
from ds_sft.training.trainer import SFTTrainer


class Evaluating(SFTTrainer):
    """Two supervised tokens a batch, of loss 3 and 5."""

    def _to_device(self, inputs: Any) -> Any:
        return inputs

    def _loss_sum(self, inputs: dict[str, Any]) -> torch.Tensor:
        return torch.tensor(8.0)


@pytest.fixture
def trainer() -> Any:
    made: Any = Evaluating.__new__(Evaluating)
    made.__dict__ |= {
        "run": SimpleNamespace(stop=StopRequests(Launch(launcher="python"))),
        "args": SimpleNamespace(device=torch.device("cpu")),
        "model": torch.nn.Linear(1, 1),
        "parts": Parts(),
    }
    return made


BATCHES = [{METADATA: SimpleNamespace(supervised=2)}] * 1000


def test_an_evaluation_asks_about_stopping_about_once_a_second(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of a second a batch: 1,000 batches, 16 questions; a request in the middle ends it at the next one."""
    now, asked = [0.0], []
    monkeypatch.setattr(stop_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop_module, "any_rank", lambda *mine: (asked.append(round(now[0] * 100)), list(mine))[1])

    def batch_is_done() -> None:
        now[0] += 0.01
        if now[0] > 16:  # in the middle of the second evaluation
            trainer.run.stop.reason = "SIGTERM"

    assert trainer.token_mean(BATCHES, batch_is_done) == 4.0
    assert asked == [0, 1, 3, 7, 15, 31, 63, 127, 255, 319, 447, 511, 639, 703, 831, 895]
    with pytest.raises(Stopped, match="SIGTERM"):
        trainer.token_mean(BATCHES, batch_is_done)
    assert asked[-1] == 1639
