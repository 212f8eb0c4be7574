"""Our GPU kernel, compiled for cards that are not here. A program of its own: where nothing is interpreted. Prints what
each variant takes of a multiprocessor as JSON, which `tests/test_interpreted.py` judges.

    PYTHONPATH=.:.venv/kernels python -m tests.compiled
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ds_sft.model.loss_kernel import BLOCK, WARPS, _rows

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CAPABILITIES = (80, 90, 120)  # A100; H100 and H200; RTX 5090
ROUND = [0, 1, 2, 3, 4]  # arguments that 16 divides: the vocabularies of Qwen3, SmolLM2, Phi-3
NOT_ROUND = [0, 2, 3]  # GPT-2's 50,257 tokens
VARIANTS = [("bf16", False, True, ROUND), ("bf16", False, False, ROUND), ("bf16", True, True, ROUND),
            ("fp32", False, True, NOT_ROUND)]  # fmt: skip


def compiled(capability: int, dtype: str, capped: bool, learn: bool, divisible: list[int]) -> dict[str, Any]:
    """Registers of a thread, and bytes that do not fit into them: where there are any, each one goes to memory."""
    signature = {"logits": f"*{dtype}", "stride": "i32", "targets": "*i64", "losses": "*fp32", "vocab": "i32",
                 "scale": "fp32", "cap": "fp32"} | dict.fromkeys(("CAPPED", "LEARN", "BLOCK"), "constexpr")  # fmt: skip
    constants = {"CAPPED": capped, "LEARN": learn, "BLOCK": BLOCK}
    known = {(argument,): [["tt.divisibility", 16]] for argument in divisible}
    source = ASTSource(_rows, signature, constants, known)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", told.stdout)[0]) for name in ("REG", "STACK", "LOCAL"))
    return {"capability": capability, "dtype": dtype, "registers": registers, "spilled": stack + local}


if __name__ == "__main__":
    print(json.dumps([compiled(capability, *variant) for capability in CAPABILITIES for variant in VARIANTS]))
