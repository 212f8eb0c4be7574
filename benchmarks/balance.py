"""How long ranks would wait on each other and how much padding they compute, before and after dealing, from lengths.

    python benchmarks/balance.py --model DIR --train_file rows.jsonl

Encodes the rows, then lays out three epochs for 2, 4 and 8 ranks with `--micro` rows a micro batch and `--accumulation`
of them a step, in five ways:
  padded, in turn:       rows as the permutation has them go to the ranks in turn (what Trainer does)
  padded:                neighbours in length share a micro batch, and run at the same time
  end to end, in turn:   the same rows in turn, without padding
  end to end:            about as many tokens in each micro batch
  filled:                as many rows as `--micro` x the mean length in tokens hold (at least the longest row)
Waiting is 1 - mean / longest over the ranks, at each micro batch (ZeRO-2 and 3 reduce after each) and once a step.
What a row lasts is taken from its floating-point operations: of the matrices, and of attention, which grow with the
square of its length. `an epoch lasts` is what the slowest ranks compute one after the other, of what an even split
without padding would give a rank: 1.00 is the least.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.config.read import load_config
from ds_sft.data.dataset import load_data
from ds_sft.data.micro_batches import Batching, Epoch
from ds_sft.data.rows import lengths_of
from ds_sft.model.tokenizer import load_tokenizer
from ds_sft.ranks.launch import Launch
from ds_sft.training.arguments import attention_cost

EPOCHS = 3


class InTurn(Batching):
    """Micro batches as the permutation has them."""

    def _by_rows(self, number: int) -> Epoch:
        assert self.micro_batch is not None
        rows = self._order(number)
        total = -(-len(rows) // (self.micro_batch * self.ranks)) * self.ranks
        owner = np.arange(len(rows)) // self.micro_batch
        borders = np.concatenate([[0], np.bincount(owner, minlength=total).cumsum()])
        computed, cost = (self._total(of, owner, total) for of in (self.lengths[rows], self._cost(self.lengths[rows])))
        return Epoch(rows, borders, computed, cost, int(self.lengths.sum()), self.accumulation, self.ranks)


def main() -> None:
    given = arguments()
    words = ["--model_name_or_path", given.model, "--train_file", given.train_file, "--output_dir", "unused",
             "--max_length", str(given.max_length)]  # fmt: skip
    config, alone = load_config(words), Launch(launcher="python")
    lengths = lengths_of(load_data(config, load_tokenizer(config, alone), alone).train)
    budget = max(int(lengths.max()), int(given.micro * lengths.mean()))
    print(
        f"{len(lengths):,} rows, {lengths.mean():.0f} tokens on average, {lengths.max():,} at most; filled: {budget:,}."
    )
    print(f"{given.micro} rows a micro batch x {given.accumulation} accumulated.\n")
    print("| ranks | micro batches | padding | waiting, each micro batch | waiting, each step | an epoch lasts |")
    print("|--:|---|--:|--:|--:|--:|")
    for ranks in given.ranks:
        options = {"lengths": lengths, "accumulation": given.accumulation, "ranks": ranks, "seed": 42,
                   "attention": attention_cost(config)}  # fmt: skip
        ways = {}
        for padded, name in ((True, "padded"), (False, "end to end")):
            ways[f"{name}, in turn"] = InTurn(micro_batch=given.micro, padded=padded, **options)
            ways[name] = Batching(micro_batch=given.micro, padded=padded, **options)
        ways["filled"] = replace(ways["end to end"], micro_batch=None, max_tokens=budget)
        for name, batching in ways.items():
            least = int(batching._cost(lengths).sum())
            print(f"| {ranks} | {name} | {row([batching.epoch(number) for number in range(EPOCHS)], least)} |")


def row(epochs: list[Epoch], least: int) -> str:
    """Means over the epochs; `least` is what all rows cost without padding."""
    found = np.array([
        (epoch.padding, epoch.waiting(each_micro_batch=True)[1], epoch.waiting(each_micro_batch=False)[1],
         epoch.cost.reshape(-1, epoch.ranks).max(axis=1).sum() * epoch.ranks / least)
        for epoch in epochs
    ]).mean(axis=0)  # fmt: skip
    return " | ".join([*(f"{share:.1%}" for share in found[:3]), f"{found[3]:.2f}"])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder of a tokenizer [%(default)s]")
    parser.add_argument("--train_file", default="demo/train.jsonl", help="[%(default)s]")
    parser.add_argument("--max_length", type=int, default=2048, help="[%(default)s]")
    parser.add_argument("--micro", type=int, default=4, help="rows [%(default)s]")
    parser.add_argument("--accumulation", type=int, default=4, help="[%(default)s]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="[2 4 8]")
    return parser.parse_args()


if __name__ == "__main__":
    main()
