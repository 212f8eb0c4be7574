"""Two warnings are kept back, and no other; bars where nobody would see them move."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ds_sft.quiet import NO_GPU, quiet

SCRIPT = """
import logging, os, warnings
os.environ.pop("DS_ACCELERATOR", None)
from ds_sft.quiet import quiet
quiet(bars=True)
quiet(bars=True)
import deepspeed  # asks for the accelerator
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import logger
assert get_accelerator().device_name() == "cpu"
logger.warning("news of DeepSpeed")
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Please use another.", FutureWarning)
warnings.warn("`torch.load` is deprecated.", FutureWarning)
warnings.warn("`torch.distributed.launch` is deprecated", UserWarning)
"""


def test_what_is_kept_back() -> None:
    env = {"PATH": "/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=env)
    said = done.stdout + done.stderr
    assert NO_GPU not in said
    assert "all_gather_into_tensor" not in said
    assert "news of DeepSpeed" in said
    assert "`torch.load` is deprecated." in said
    assert "`torch.distributed.launch` is deprecated" in said


BARS = """
import sys
from ds_sft.quiet import quiet
quiet(bars=sys.argv[1] == "shown")
from datasets import Dataset
from huggingface_hub.utils import tqdm as hub
from tqdm.auto import tqdm
from transformers.utils import logging
Dataset.from_dict({"x": [1, 2]}).map(lambda row: row, desc="a bar of datasets")
list(logging.tqdm([1, 2], desc="a bar of transformers"))
list(tqdm([1, 2], desc="a bar of tqdm"))
list(hub([1, 2], desc="a bar of the hub", disable=False))  # as its downloads in a terminal
"""


@pytest.mark.parametrize("bars", ["shown", "hidden"])
def test_bars(bars: str) -> None:
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", BARS, bars], capture_output=True, text=True, check=True, env=env)
    said = [name for name in ("datasets", "transformers", "tqdm", "the hub") if f"a bar of {name}" in done.stderr]
    assert said == (["datasets", "transformers", "tqdm", "the hub"] if bars == "shown" else [])


def test_what_a_user_has_set_of_bars_stays() -> None:
    env = {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}
    quiet(bars=False, env=env)
    assert env == {"HF_HUB_DISABLE_PROGRESS_BARS": "0", "TQDM_DISABLE": "1"}
