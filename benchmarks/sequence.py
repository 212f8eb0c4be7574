"""Rows that ranks share, on CPUs: tokens/s of one long row, and how long a row is held in as much memory.

    python benchmarks/sequence.py speed                       # a row of 16,384 tokens: one rank on one core, on two
                                                              # cores, and two ranks with a core each
    python benchmarks/sequence.py memory                      # 4,096 to 16,384 tokens: one rank, and two

The model has Qwen3's parts, hidden 512, MLP 1,536, 8 heads of 64, 4 for keys, a vocabulary of 16,384, in float32; every
token but the first is supervised, layers are computed again in backward. (For memory the vocabulary is 2,048: the loss
forms logits in chunks of 256 MiB, whatever the row, and of so few no row here fills one.) A measurement is one forward
and backward of one row in fresh processes that are pinned to cores. Speed is given by the clock, and by the CPU time of
the slowest rank, as if it had its cores to itself, which other work on the machine changes less. Memory is the kernel's
peak of resident memory (VmHWM, reset) of the fuller rank, above what it held with the weights; gradients, as large as
the weights and the same for any row, are in it. A line through the lengths gives the bytes of a token, and with them
the row that two ranks hold in what one needs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from memory import status

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
VOCAB = {"speed": 16_384, "memory": 2048}


def main() -> None:
    given = arguments()
    if given.rank is not None:
        print(json.dumps(measure(given)))
    elif given.what == "speed":
        show_speed(given)
    else:
        show_memory(given)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--layers", type=int, default=4, help="[%(default)s]")
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="of the row; of each, to fit a line [16384; 4096 8192 16384]"
    )
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # a measurement, in this process
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, default=1, help=argparse.SUPPRESS)  # of a rank
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.tokens = given.tokens or ([16_384] if given.what == "speed" else [4096, 8192, 16_384])
    return given


def show_speed(given: argparse.Namespace) -> None:
    tokens = given.tokens[0]
    print("| ranks | cores of each | tokens/s | times one rank on one core | by CPU time | times |")
    print("|---|---|---|---|---|---|")
    alone = (0.0, 0.0)
    for ranks, cores in ((1, 1), (1, 2), (2, 1)):
        found = in_fresh_processes(given, ranks, cores, tokens)
        clock, cpu = tokens / max(f["seconds"] for f in found), tokens * cores / max(f["cpu"] for f in found)
        alone = alone if any(alone) else (clock, cpu)
        print(f"| {ranks} | {cores} | {clock:,.0f} | {clock / alone[0]:.2f} | {cpu:,.0f} | {cpu / alone[1]:.2f} |",
              flush=True)  # fmt: skip


def show_memory(given: argparse.Namespace) -> None:
    print("| tokens | one rank, MiB | each of two, MiB |\n|---|---|---|")
    peaks: dict[int, list[float]] = {1: [], 2: []}
    for tokens in given.tokens:
        for ranks, known in peaks.items():
            known.append(max(f["mib"] for f in in_fresh_processes(given, ranks, 1, tokens)))
        print(f"| {tokens:,} | {peaks[1][-1]:,.0f} | {peaks[2][-1]:,.0f} |", flush=True)
    (one, fixed), (two, fixed_of_two) = (line(given.tokens, peaks[ranks]) for ranks in (1, 2))
    longest = given.tokens[-1]
    held = (one * longest + fixed - fixed_of_two) / two
    print(f"\nA token takes {one * 1024:.1f} KiB of one rank and {two * 1024:.1f} of each of two: where one rank holds "
          f"{longest:,} tokens, two hold {held:,.0f}, {held / longest:.2f} times as many.")  # fmt: skip


def line(x: list[int], y: list[float]) -> tuple[float, float]:
    """Least squares: what a token adds, and what no token would take."""
    import numpy as np

    slope, fixed = np.polyfit(x, y, 1)
    return float(slope), float(fixed)


def in_fresh_processes(given: argparse.Namespace, ranks: int, cores: int, tokens: int) -> list[dict[str, float]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, __file__, given.what, f"--layers={given.layers}", f"--tokens={tokens}",
             f"--ranks={ranks}", f"--cores={cores}", f"--port={port}"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(cores)}
    if given.what == "memory":  # else the C library keeps freed blocks for later, how many is chance
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    running = [
        subprocess.Popen([*words, f"--rank={rank}"], stdout=subprocess.PIPE, text=True, env=environment)
        for rank in range(ranks)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]


# ---- In the fresh processes


def measure(given: argparse.Namespace) -> dict[str, float]:
    """Seconds, CPU seconds and MiB of one forward and backward, after a short one that warms up."""
    import torch
    import torch.distributed as dist

    cores = sorted(os.sched_getaffinity(0))
    first = given.rank * given.cores % len(cores)
    os.sched_setaffinity(0, cores[first : first + given.cores])
    torch.set_num_threads(given.cores)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{given.port}", rank=given.rank, world_size=given.ranks)
    model = make_model(given.layers, given.ranks, VOCAB[given.what])
    learn(model, given, 64)
    batch = make_batch(given, given.tokens[0])
    before = status("VmRSS")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    started, cpu = time.perf_counter(), time.process_time()
    model(**batch, use_cache=False, num_items_in_batch=given.tokens[0]).loss.backward()
    found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    return found | {"mib": (status("VmHWM") - before) / 2**10}


def learn(model: Any, given: argparse.Namespace, tokens: int) -> None:
    model(**make_batch(given, tokens), use_cache=False, num_items_in_batch=tokens).loss.backward()
    model.zero_grad(set_to_none=True)


def make_model(layers: int, ranks: int, vocab: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from ds_sft.model.attention import keep_rows_apart
    from ds_sft.model.loss import supervise
    from ds_sft.model.sequence import join_group
    from ds_sft.ranks.launch import Launch

    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=vocab, hidden_size=512, intermediate_size=1536, num_hidden_layers=layers,
                         num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=131_072,
                         tie_word_embeddings=True)  # fmt: skip
    model = Qwen3ForCausalLM(config).train()
    quiet = Launch(launcher="python", rank=1, local_world_size=ranks)
    keep_rows_apart(model, group=join_group(ranks, quiet, 600))
    supervise(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(given: argparse.Namespace, tokens: int) -> dict[str, Any]:
    import torch

    from ds_sft.data.batch import collate_share

    ids = torch.randint(VOCAB[given.what], (tokens,), generator=torch.Generator().manual_seed(1)).numpy()
    batch: dict[str, Any] = collate_share([{"input_ids": ids, "labels": ids}], place=given.rank, size=given.ranks)
    return batch


if __name__ == "__main__":
    main()
