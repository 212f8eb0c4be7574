"""Started by the jobs of these tests in place of train.py: train.py, in which steps and saves take longer.

STEP_SECONDS, SAVE_SECONDS in the environment: how much longer a step, and a save before it is complete.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import ds_sft.training.saving
from ds_sft.train import main
from ds_sft.training.trainer import SFTTrainer

training_step, complete = SFTTrainer.training_step, ds_sft.training.saving.complete


def slow_step(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
    time.sleep(float(os.environ["STEP_SECONDS"]))
    return training_step(self, *args, **kwargs)


def slow_complete(*args: Any, **kwargs: Any) -> Any:
    time.sleep(float(os.environ.get("SAVE_SECONDS", "0")))
    return complete(*args, **kwargs)


if __name__ == "__main__":
    SFTTrainer.training_step, ds_sft.training.saving.complete = slow_step, slow_complete
    sys.exit(main())
