"""A mixture of experts beside a dense model of the same active parameters: tokens a CPU second of whole steps.

    python benchmarks/experts.py                                # ours, transformers' grouped_mm, and its loop
    python benchmarks/experts.py --experts 64 --chosen 8 --width 128 --ways ours

Steps are those of a run on a CPU in bfloat16: rows laid end to end, our attention, loss and working copy, micro batches
accumulated, AdamW over all weights, of which a mixture has more. In turns, so that other work on the machine slows all
alike; seconds are the process's own, of one thread. The median of the turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.data.batch import collate_flat
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.loss import share_auxiliary, supervise
from ds_sft.model.routing import prepare_experts
from ds_sft.model.working_copy import WorkingCopy
from ds_sft.training.trainer import without_metadata

WAYS = {"ours": None, "grouped_mm": "grouped_mm", "loop": "eager"}  # experts_implementation; None: what a run has


def main() -> None:
    given = arguments()
    torch.set_num_threads(1)
    steps = {"dense": make_step(given, dense=True)}
    for way in given.ways:
        steps[way] = make_step(given, implementation=WAYS[way])
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(given.turns + 1):
        for name, step in steps.items():
            if turn < 2 or name != "loop":  # one turn of it is long enough
                seconds[name].append(cpu_seconds(step))
    tokens = given.rows * given.length * given.accumulation
    dense = statistics.median(seconds["dense"][1:])
    print("| experts by | tokens a CPU second | of dense |\n|---|---|---|")
    for name, measured in seconds.items():
        median = statistics.median(measured[1:])  # the first has what is compiled and allocated once
        print(f"| {name} | {tokens / median:,.0f} | {dense / median:.0%} |")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--experts", type=int, default=16, help="of a layer [%(default)s]")
    parser.add_argument("--chosen", type=int, default=4, help="experts of a token [%(default)s]")
    parser.add_argument("--width", type=int, default=384, help="of an expert; the dense layer has CHOSEN times that")
    parser.add_argument("--vocab", type=int, default=4_000, help="[%(default)s]")
    parser.add_argument("--rows", type=int, default=8, help="of a micro batch [%(default)s]")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row [%(default)s]")
    parser.add_argument("--accumulation", type=int, default=4, help="micro batches of a step [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="[all]")
    return parser.parse_args()


def make_step(
    given: argparse.Namespace, *, dense: bool = False, implementation: str | None = None
) -> Callable[[], None]:
    """A step of a dense model, or of a mixture whose experts are computed in a way of transformers', or as in a run."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": given.vocab, "hidden_size": given.hidden, "num_hidden_layers": given.layers,
             "num_attention_heads": given.hidden // 64, "num_key_value_heads": given.hidden // 128, "head_dim": 64,
             "intermediate_size": given.chosen * given.width, "tie_word_embeddings": True}  # fmt: skip
    experts = {"num_experts": given.experts, "num_experts_per_tok": given.chosen, "moe_intermediate_size": given.width}
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **shape) if dense else AutoConfig.for_model("qwen3_moe", **shape, **experts)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    keep_rows_apart(model)
    _, routing = prepare_experts(model, device=torch.device("cpu"))
    if implementation is not None:
        model.set_experts_implementation(implementation)
    supervise(model)
    share_auxiliary(model, routing)
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    copy, optimizer = WorkingCopy(model), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = [batch_of(given) for _ in range(given.accumulation)]

    def step() -> None:
        for number, batch in enumerate(batches):
            with copy.lent(keep=number + 1 < len(batches)), torch.autocast("cpu", torch.bfloat16):
                model(**batch, num_items_in_batch=given.rows * given.length, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def batch_of(given: argparse.Namespace) -> dict[str, Any]:
    """Rows of random tokens, all supervised."""
    rows = [torch.randint(given.vocab, (given.length,)).tolist() for _ in range(given.rows)]
    return collate_flat([{"input_ids": r, "labels": r, "position_ids": list(range(given.length))} for r in rows])


def cpu_seconds(function: Callable[[], None]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


if __name__ == "__main__":
    main()
