"""What fails in a save is recorded where it is a write, and not swallowed where it is anything else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ds_sft.data.micro_batches import Batching
from ds_sft.training.resumable import ResumableTrainer


def trainer(**attributes: Any) -> Any:
    """One without a model: only what the test needs."""
    made = ResumableTrainer.__new__(ResumableTrainer)
    made.__dict__ |= {"write_troubles": [], **attributes}
    return made


WRITES = [
    OSError(28, "No space left on device", "optimizer.pt"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
]


@pytest.mark.parametrize("error", WRITES, ids=str)
def test_a_write_that_fails_is_recorded(error: Exception) -> None:
    made = trainer()
    made._record(lambda: (_ for _ in ()).throw(error))
    assert len(made.write_troubles) == 1


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("[enforce fail at gloo/transport/tcp/pair.cc:446]")],
    ids=str,
)
def test_another_failure_is_none_of_a_write(error: Exception) -> None:
    made = trainer()
    with pytest.raises(type(error)):
        made._record(lambda: (_ for _ in ()).throw(error))
    assert made.write_troubles == []


class Engine:
    """DeepSpeed's order: the recovery scripts come before a barrier."""

    def __init__(self) -> None:
        self.checkpoint_engine = SimpleNamespace(save=self.full, makedirs=self.full)
        self.met_the_others = False

    def full(self, *args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device", "zero_to_fp32.py")

    def _copy_recovery_script(self, folder: str) -> None:
        self.full()

    def save_checkpoint(self, folder: str, save_latest: bool) -> None:
        self.checkpoint_engine.makedirs(folder, exist_ok=True)
        self.checkpoint_engine.save({}, folder)
        self._copy_recovery_script(folder)
        self.met_the_others = True


def test_no_write_keeps_a_rank_from_the_engines_barriers() -> None:
    engine = Engine()
    made = trainer(model_wrapped=engine)
    made._save_engine("out/checkpoint-4")
    assert engine.met_the_others
    assert made.write_troubles == ["zero_to_fp32.py: No space left on device"] * 3
    with pytest.raises(OSError, match="No space"):  # as it was
        engine._copy_recovery_script("out")


@pytest.mark.parametrize(
    ("step", "drop_last", "samples"), [(3, False, 12), (4, False, 13), (4, True, 16), (6, True, 24)]
)
def test_samples_of_a_manifest(step: int, drop_last: bool, samples: int) -> None:
    """13 rows, 4 a step: four steps an epoch, or three whole ones."""
    boundary = SimpleNamespace(steps_an_epoch=3 if drop_last else 4)

    class Known(ResumableTrainer):
        step_boundary: Any = boundary

    made: Any = Known.__new__(Known)
    made.__dict__ |= {
        "state": SimpleNamespace(global_step=step),
        "batching": Batching(lengths=np.full(13, 5), micro_batch=1, accumulation=2, ranks=2, padded=False, seed=0,
                             drop_last=drop_last),
    }  # fmt: skip
    assert made._samples_seen() == samples
