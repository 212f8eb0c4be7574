"""Peak memory of one forward and backward against sequence length and vocabulary: our loss and the model's own.

    python benchmarks/memory.py                     # 512 to 8,192 tokens, vocabularies of 49,152 and 151,936, bfloat16

The model is as wide as Qwen3-0.6B (hidden 1,024, MLP 3,072, 16 heads of 128, 8 for keys) and two layers deep, random,
with tied embeddings: what grows with depth (weights, activations) is not the subject, what the loss and attention take
is. A micro batch is rows of `--row` tokens, 80 % of each supervised: ours laid end to end, the model's own padded, of
the same tokens. Each measurement is a fresh process: peak resident memory while forward and backward run, above what
the process with the weights held before (the kernel's VmHWM, reset). It includes the gradients, which are as large as
the weights. Where the machine has not the memory for a run, what it would take is printed instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
KINDS = ("ours", "own")
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 1024, 3072, 2, 16, 8, 128
# What the model's own loss keeps of each logit at its peak: bfloat16 logits and their gradient, float32 logits,
# log-probabilities and gradient.
OWN_BYTES_A_LOGIT = 16


def main() -> None:
    given = arguments()
    if given.one:
        print(json.dumps(measure(given.one, *given.tokens, *given.vocab, given.row)))
        return
    print("| vocabulary | tokens | ours, MiB | the model's own, MiB | own / ours |\n|---|---|---|---|---|", flush=True)
    for vocab in given.vocab:
        for tokens in given.tokens:
            ours, own = (in_fresh_process(kind, tokens, vocab, given.row) for kind in KINDS)
            print(f"| {vocab:,} | {tokens:,} | {cell(ours)} | {cell(own)} | {times(own, ours)} |", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="[%(default)s]")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936], help="[%(default)s]")
    parser.add_argument("--row", type=int, default=512, help="tokens of a row [%(default)s]")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)  # a measurement, in this process
    given = parser.parse_args()
    if any(tokens % given.row for tokens in given.tokens):
        parser.error("--tokens must be multiples of --row")
    return given


def in_fresh_process(kind: str, tokens: int, vocab: int, row: int) -> float | str:
    """MiB, or why there is no figure."""
    needed = tokens * vocab * OWN_BYTES_A_LOGIT / 2**30 if kind == "own" else 0
    if needed > available_gib():
        return f"about {needed:.0f} GiB"
    words = [f"--one={kind}", f"--tokens={tokens}", f"--vocab={vocab}", f"--row={row}"]
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"failed: {(done.stderr.strip() or f'signal {-done.returncode}').splitlines()[-1]}"
    mib: float = json.loads(done.stdout.splitlines()[-1])
    return mib


def available_gib() -> float:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"))
    return int(found[1]) / 2**20 if found else 0.0


def cell(found: float | str) -> str:
    return found if isinstance(found, str) else f"{found:,.0f}"


def times(own: float | str, ours: float | str) -> str:
    return "-" if isinstance(own, str) or isinstance(ours, str) else f"{own / ours:.1f}"


# ---- In the fresh process


def measure(kind: str, tokens: int, vocab: int, row: int) -> float:
    """MiB above what the process held before, at the peak of one forward and backward."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    torch.manual_seed(0)
    model = make_model(kind, vocab)
    batch = make_batch(kind, tokens, vocab, row)
    warm = make_batch(kind, 2 * 16, vocab, 16)  # kernels and their workspaces
    model(**warm, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    model(**batch, use_cache=False).loss.backward()
    return (status("VmHWM") - before) / 2**10


def make_model(kind: str, vocab: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).train()
    if kind == "ours":
        from ds_sft.model.attention import keep_rows_apart
        from ds_sft.model.loss import supervise

        keep_rows_apart(model)
        supervise(model)
    return model


def make_batch(kind: str, tokens: int, vocab: int, row: int) -> dict[str, Any]:
    """The same tokens: ours as `[1, tokens]` with positions that start again, padded as `[rows, row]` with a mask."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocab, (tokens // row, row), generator=generator)
    labels = ids.clone()
    labels[:, : row // 5] = -100
    if kind == "ours":
        positions = torch.arange(row).repeat(tokens // row)[None]
        return {"input_ids": ids.view(1, -1), "labels": labels.view(1, -1), "position_ids": positions}
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def status(key: str) -> int:
    """A field of /proc/self/status, kB."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None, key
    return int(found[1])


if __name__ == "__main__":
    main()
