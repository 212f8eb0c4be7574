"""How close forward and backward come to a bare matrix product: bfloat16, rows laid end to end, no Trainer.

    python benchmarks/forward_backward.py --model demo/model --rows demo/train.jsonl        # after `ds-sft demo`
    python benchmarks/forward_backward.py ... --profile                                     # where the time goes

Useful work only: 6 operations a parameter and token, attention inside each row, the output projection at supervised
tokens. Both rates are of CPU seconds in the same run, in turns; one thread, so that other work on the machine costs
waiting, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.data.batch import METADATA, BatchMetadata, collate_flat
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.loss import supervise
from ds_sft.training.flops import count_flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="[%(default)s]")
    parser.add_argument("--rows", type=Path, default=Path("demo/train.jsonl"), help="question, answer [%(default)s]")
    parser.add_argument("--count", type=int, default=16, help="rows of the batch [%(default)s]")
    parser.add_argument("--times", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    parser.add_argument("--profile", action="store_true", help="the table of torch.profiler")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.bfloat16).train()
    rows = read_rows(given.model, given.rows, given.count)
    batch = collate_flat(rows)
    work = useful_work(model, batch)
    keep_rows_apart(model)
    supervise(model)

    def learn() -> None:
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()

    learn()
    for _ in range(given.times):
        limit = max(bare_rate(batch["input_ids"].numel()) for _ in range(2))
        seconds = cpu_seconds(learn)
        rate = work / seconds
        print(f"{batch['input_ids'].numel():,} tokens: {seconds:.1f} CPU s, {rate / 1e9:.0f} GFLOP/s of useful work, "
              f"a bare product {limit / 1e9:.0f}: {rate / limit:.1%}", flush=True)  # fmt: skip
    if given.profile:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            learn()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=50))


def read_rows(model: str, file: Path, count: int) -> list[dict[str, list[int]]]:
    """The first rows of a file as ChatML; answers are supervised."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines()[:count]:
        row: dict[str, Any] = json.loads(line)
        turn = f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
        prompt, answer = (tokenizer(text)["input_ids"] for text in (turn, row["answer"] + "<|im_end|>"))
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return rows


def useful_work(model: Any, batch: dict[str, Any]) -> float:
    """Floating-point operations of forward and backward, as a run counts them for its MFU."""
    flops = count_flops(model)
    if flops is None:
        sys.exit(f"{model.config.model_type}: its operations cannot be counted")
    metadata: BatchMetadata = batch[METADATA]
    return flops.of(tokens=metadata.tokens, pairs=metadata.pairs, head_tokens=metadata.supervised)


def bare_rate(tokens: int) -> float:
    """Operations a CPU second of a product as large as those of the model's gated MLP."""
    x, weight = torch.randn(tokens, 576).bfloat16(), torch.randn(1536, 576).bfloat16()
    times = 40
    seconds = cpu_seconds(lambda: [x @ weight.T for _ in range(times)])
    return times * 2 * tokens * 576 * 1536 / seconds


def cpu_seconds(work: Callable[[], Any]) -> float:
    def now() -> float:
        return sum(resource.getrusage(resource.RUSAGE_SELF)[:2])

    start = now()
    work()
    return now() - start


if __name__ == "__main__":
    main()
