"""What the tests of this folder share: where they compute, what they learn, and how train.py is started.

`GPU_TESTS_ON=cpu` runs them on a CPU, to try the tests themselves; what only a GPU can show is then left out.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.harness import ROOT, free_port, run, write_yaml

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"
GPU = [pytest.mark.gpu, pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="no CUDA device")]
RUNS = str(Path(__file__).with_name("runs.py"))
LONG = 9000  # tokens of a row that goes through a kernel of its own


@dataclass(frozen=True)
class Ran:
    """Several runs of train.py in one process: what each of them said, by name."""

    folder: Path
    said: dict[str, str]

    def out(self, name: str) -> Path:
        """The output folder of a run, which must have ended well."""
        assert name in self.said, f"{name} was not reached; the last said: {list(self.said.values())[-1:]}"
        assert (self.folder / name / "run.json").exists(), self.said[name][-6000:]
        return self.folder / name


def run_all(folder: Path, runs: Mapping[str, Mapping[str, Any]], *, ranks: int = 0, timeout: float = 500) -> Ran:
    """Run train.py with the keys of each, one after the other in one process; a run that fails does not end the rest.

    Args:
        ranks: 0: no launcher.
        timeout: seconds for all.
    """
    files = [str(write_yaml(folder / f"{name}.yaml", keys | {"output_dir": name})) for name, keys in runs.items()]
    launch = [sys.executable]
    if ranks:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    environment = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "DS_SFT_CACHE": str(folder / "cache"),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # for deterministic algorithms; read when CUDA starts
    }
    done = run([*launch, RUNS, *files], cwd=folder, env=environment, timeout=timeout)
    parts = done.output.split("---- run ")
    assert len(parts) > 1, done.output[-6000:]
    return Ran(folder, {part.partition("\n")[0]: part.partition("\n")[2] for part in parts[1:]})


def make(folder: Path, tokenizer_dir: Path, family: str = "qwen3", **changes: Any) -> Path:
    """A small model whose losses tell which tokens it saw: weights five times as large as usual at the start."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape = {"vocab_size": 400, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 16_384,
             "initializer_range": 0.1, "tie_word_embeddings": True, "pad_token_id": 0, "eos_token_id": 2}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shape, **changes}))
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


def settings(model: Path, rows: Path, **changes: Any) -> dict[str, Any]:
    """Four steps of eight rows in two micro batches, in bfloat16, and nothing after them."""
    return {
        "model_name_or_path": str(model),
        "train_file": str(rows),
        "system_prompt": "Answer.",
        "max_length": 512,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "train_sampling_strategy": "sequential",
        "max_steps": 4,
        "learning_rate": 1e-3,
        "bf16": True,
        "gradient_checkpointing": False,
        "fused_kernels": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "num_predictions": 0,
        "verify_export": False,
        "swanlab_mode": "disabled",
        "use_cpu": not ON_GPU,
        **changes,
    }
