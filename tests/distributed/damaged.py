"""Started by test_export.py: train.py, whose final weights are damaged on disk.

DAMAGE in the environment: swapped (rows of the embedding have changed places) or truncated (a file has lost its end).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import ds_sft.export.weights
from ds_sft.train import main

export_model = ds_sft.export.weights.export_model


def export_damaged(trainer: Any, tokenizer: Any, config: Any, launch: Any, **told: Any) -> None:
    export_model(trainer, tokenizer, config, launch, **told)
    if launch.is_main:
        damage(config.output_dir / "model.safetensors")


def damage(file: Path) -> None:
    if os.environ["DAMAGE"] == "truncated":
        file.write_bytes(file.read_bytes()[:-1000])
        return
    weights = load_file(file)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, file, metadata={"format": "pt"})


if __name__ == "__main__":
    ds_sft.export.weights.export_model = export_damaged
    sys.exit(main())
