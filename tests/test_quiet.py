"""Two warnings are kept back, and no other."""

from __future__ import annotations

import os
import subprocess
import sys

from ds_sft.runtime.quiet import NO_GPU

SCRIPT = """
import logging, os, warnings
os.environ.pop("DS_ACCELERATOR", None)
from ds_sft.runtime.quiet import quiet
quiet()
quiet()
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
