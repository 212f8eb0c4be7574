"""`benchmarks/launches.py`: what a GPU is asked to do for a micro batch does not grow with its rows."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from transformers import Qwen3Config

ROOT = Path(__file__).resolve().parents[1]


def launching(model: Path, rows: int) -> list[int]:
    """Operations that launch kernels: row by row, all rows at once, and with fused kernels."""
    command = [sys.executable, str(ROOT / "benchmarks" / "launches.py"), "--model", str(model), "--rows", str(rows),
               "--length", "40"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(number.replace(",", "")) for number in re.findall(r"([\d,]+) of them launch kernels", done.stdout)]


def test_a_third_of_the_launches_with_fused_kernels_whatever_the_rows(tmp_path: Path) -> None:
    Qwen3Config(hidden_size=64, intermediate_size=96, num_hidden_layers=4, head_dim=16, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=400, tie_word_embeddings=True).save_pretrained(tmp_path)  # fmt: skip
    many, few = launching(tmp_path, 72), launching(tmp_path, 12)
    assert many[0] > few[0]
    assert many[1:] == few[1:]
    assert 3 * many[2] < many[0]
