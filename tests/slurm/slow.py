"""Started by the jobs of these tests in place of train.py: train.py, in which every step takes STEP_SECONDS longer."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from ds_sft.train import main
from ds_sft.training.trainer import SFTTrainer

training_step = SFTTrainer.training_step


def slow_step(self: SFTTrainer, *args: Any, **kwargs: Any) -> Any:
    time.sleep(float(os.environ["STEP_SECONDS"]))
    return training_step(self, *args, **kwargs)


if __name__ == "__main__":
    SFTTrainer.training_step = slow_step
    sys.exit(main())
