"""Optimizers of fewer bytes a parameter under the engines: they learn, and go on bit-equal after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ds_sft.commands.export import main as export
from tests.distributed.harness import script, write_yaml, run_forked
from tests.distributed.test_adapters import keys_of
from tests.distributed.test_resume import STEPS, dropout_dir, job, metrics, run_job

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(2500)]  # many short runs
__all__ = ["dropout_dir"]  # a fixture
