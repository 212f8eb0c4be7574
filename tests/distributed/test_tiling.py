"""MLPs in tiles, whatever reduces gradients or divides weights: the training that bare PyTorch does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_forked, script, write_yaml
from tests.distributed.test_trajectory import LORA, bare_pytorch, check, check_bf16, reference_of, settings

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("name", ["none", "zero2", "zero3"])
def test_one_trajectory(model_dir: Path, tmp_path: Path, name: str) -> None:
    """Ranks and micro batches have other numbers of tiles; `offload` says that it has nothing to do on a CPU."""
    runs = {
        "whole": {"gradient_checkpointing": "offload"},
        "reentrant": {"gradient_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        "kept": {"gradient_checkpointing": False},
        "bf16": {"gradient_checkpointing": True, "bf16": True, "export_dtype": "float32"},
        "lora": {"gradient_checkpointing": True, **LORA},
    }
    keys = [settings(model_dir, tmp_path, name, 2, 2, tiled_mlp="yes", output_dir=out, **more)
            for out, more in runs.items()]  # fmt: skip
    files = [str(write_yaml(tmp_path / f"{one['output_dir']}.yaml", one)) for one in keys]
    done = run_forked([script("tiled"), *files], 2, cwd=tmp_path, timeout=600)
    assert done.code == 0, done.output[-6000:]
    said = [line for line in done.output.splitlines() if "of at most 50 tokens at a time" in line]
    assert len(said) == len(runs)
    assert done.output.count("activations are in host memory already: the same as yes here)") == 1
    whole = bare_pytorch(model_dir)
    for out in ("whole", "reentrant", "kept"):
        check(tmp_path / out, whole, rel=1e-5)
    check_bf16(tmp_path / "bf16", whole)
    check(tmp_path / "lora", reference_of(model_dir, "lora", torch.float32))
