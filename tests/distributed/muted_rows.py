"""Started by test_trajectory.py: train.py on rows of which some teach nothing.

The data path drops such rows; the Trainer must still be right about them. MUTED in the environment: the numbers of the
rows whose labels become -100.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import Any

from datasets import Dataset

import ds_sft.data.dataset
from ds_sft.train import main

MUTED = {int(number) for number in os.environ["MUTED"].split()}
load_data = ds_sft.data.dataset.load_data


def load_muted(*args: Any) -> Any:
    data = load_data(*args)
    rows = [
        {**row, "labels": [-100] * len(row["labels"])} if number in MUTED else row
        for number, row in enumerate(data.train)
    ]
    return dataclasses.replace(data, train=Dataset.from_list(rows))


if __name__ == "__main__":
    ds_sft.data.dataset.load_data = load_muted
    sys.exit(main())
