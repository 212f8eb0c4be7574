"""What an MLP computed in tiles takes, and how far its gradients are from those of all tokens at once.

    python benchmarks/tiling.py                                   # 32,768 tokens; 256 x 768, float32
    python benchmarks/tiling.py --tokens 65536 --dtype bfloat16

A layer's second half (norm, gated MLP, residual), computed again in backward as checkpointing does, forward and
backward once to warm up and twice to measure, each way in a process of its own. Seconds are the process's, of one
thread; memory is what is resident at most, above what was before the first pass. Runs on a CPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.model.tiling import TiledMLP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="of the row [%(default)s]")
    parser.add_argument("--hidden", type=int, default=256, help="size of a hidden state [%(default)s]")
    parser.add_argument("--intermediate", type=int, default=768, help="and between the matrices [%(default)s]")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of it all [%(default)s]")
    given = parser.parse_args()
    found = {}
    for tiled in (False, True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[tiled] = pool.submit(measure, given, tiled).result()
        seconds, peak, _ = found[tiled]
        print(f"{'in tiles' if tiled else 'at once':10} {seconds:6.1f} CPU s {peak / 2**20:8,.0f} MiB", flush=True)
    whole, tiles = (found[tiled][2] for tiled in (False, True))
    print(f"outputs are {'equal' if torch.equal(whole['output'], tiles['output']) else 'not equal'} bit for bit")
    for name, expected in whole.items():
        difference = (tiles[name].double() - expected.double()).norm() / expected.double().norm()
        print(f"{name}: {difference:.1e} of its norm")


def measure(given: argparse.Namespace, tiled: bool) -> tuple[float, int, dict[str, torch.Tensor]]:
    """Seconds of a pass, peak bytes above the start, and what came out: output and gradients."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    config = Qwen3Config(hidden_size=given.hidden, intermediate_size=given.intermediate, hidden_act="silu")
    norm, mlp = Qwen3RMSNorm(given.hidden).to(dtype), Qwen3MLP(config).to(dtype)
    if tiled:
        mlp.forward = TiledMLP(mlp)
    states = torch.randn(1, given.tokens, given.hidden, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(states)
    before, times = resident(), []
    for _ in range(3):
        states.grad = mlp.gate_proj.weight.grad = mlp.up_proj.weight.grad = mlp.down_proj.weight.grad = None
        began = time.process_time()
        output = checkpoint(lambda x: x + mlp(norm(x)), states, use_reentrant=False)
        output.backward(gradient)
        times.append(time.process_time() - began)
    weights = {f"gradient of {name}": weight.grad for name, weight in mlp.named_parameters()}
    made = {"output": output.detach(), "gradient of the input": states.grad, **weights}
    return sum(times[1:]) / 2, resident() - before, made


def resident() -> int:
    """Bytes at most until now."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
