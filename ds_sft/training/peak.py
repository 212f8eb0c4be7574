"""The arithmetic that a device can do at most: what MFU is a share of."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# What `torch.cuda.get_device_name` says of a GPU -> its maker's figure in TFLOP/s: 16-bit matrix products accumulated
# in float32, dense (half of a figure "with sparsity"), at boost clock. From NVIDIA's data sheets and architecture white
# papers, AMD's of the Instinct accelerators, Amazon's of the A10G. The first that fits counts.
KNOWN_TFLOPS = (
    (r"GB200", 2500.0), (r"B200", 2250.0), (r"B100", 1750.0),
    (r"H200", 989.5), (r"H100 NVL", 835.5), (r"H100.*PCIe", 756.5), (r"H100|H800", 989.5), (r"H20\b", 148.0),
    (r"A100|A800", 312.0), (r"A40\b", 149.7), (r"A30\b", 165.0), (r"A10G", 70.0), (r"A10\b", 125.0),
    (r"L40S", 362.0), (r"L40\b", 181.0), (r"L4\b", 121.0), (r"RTX 6000 Ada", 364.2), (r"RTX A6000", 154.8),
    (r"RTX 5090", 209.5), (r"RTX 4090", 165.2), (r"RTX 3090 Ti", 80.0), (r"RTX 3090", 71.0),
    (r"V100.*SXM", 125.0), (r"V100", 112.0), (r"T4\b", 65.0),
    (r"MI300X", 1307.4), (r"MI250X", 383.0), (r"MI250", 362.1),
)  # fmt: skip
HALF_ONLY = r"V100|T4\b"  # no bfloat16 in hardware
MEASURE_SECONDS = 0.3
SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the matrices multiplied


@dataclass(frozen=True)
class Peak:
    flops: float  # a second
    source: str


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Of one rank's device in this dtype: its maker's figure where that is known, else measured in a moment.

    All ranks should call it at the same time: those that share a CPU then measure their part of it.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    known = known_peak(name, dtype)
    if known is not None:
        return Peak(known, f"{name}, its maker's figure for dense {_short(dtype)}")
    size = SIZES.get(device.type, 2048)
    return Peak(measure_flops(device, dtype, size), f"{name}, measured: a {_short(dtype)} matrix product of {size:,}")


def known_peak(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of a GPU by name; None where the table does not say, as for float32."""
    import torch

    wanted = dtype == torch.float16 or (dtype == torch.bfloat16 and not re.search(HALF_ONLY, name))
    return next((tflops * 1e12 for pattern, tflops in KNOWN_TFLOPS if wanted and re.search(pattern, name)), None)


def measure_flops(device: torch.device, dtype: torch.dtype, size: int, seconds: float = MEASURE_SECONDS) -> float:
    """FLOP/s of the fastest matrix product of those that fit into the time; the first, which warms up, is left out."""
    import torch

    left, right = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    durations: list[float] = []
    started = time.perf_counter()
    while len(durations) < 3 or time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        durations.append(time.perf_counter() - begun)
    return float(2 * size**3 / min(durations[1:]))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
