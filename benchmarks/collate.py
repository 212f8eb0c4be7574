"""Host time to put a micro batch together: rows as views of Arrow's buffers beside rows as lists of Python numbers.

    python benchmarks/collate.py                                              # rows of 20 to 350 tokens, made up
    python benchmarks/collate.py --tokens 16384 --padded

Seconds of a core, the best of several, both ways in turns and in one run. The lists are what a `datasets.Dataset` gives
by itself and what a collator in plain Python makes of them; what either leaves for later is counted with it: borders,
supervised positions and counts, which are otherwise read from the device.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.data.batch import collate_flat, collate_padded
from ds_sft.data.encode import IGNORE_INDEX
from ds_sft.data.rows import ArrowRows

PAD = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro batch [%(default)s]")
    parser.add_argument("--padded", action="store_true", help="one row beside the other, padded")
    parser.add_argument("--times", type=int, default=20, help="[%(default)s]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, numbers = make_rows(given.tokens)
    views = ArrowRows(rows)
    collate, plain = (padded, plain_padded) if given.padded else (collate_flat, plain_flat)
    assert torch.equal(collate([views[n] for n in numbers])["labels"], plain([rows[n] for n in numbers])["labels"])
    ways: dict[str, Callable[[], Any]] = {
        "lists": lambda: plain([rows[n] for n in numbers]),
        "views": lambda: collate([views[n] for n in numbers]),
    }
    seconds = {name: min(cpu_seconds(way) for _ in range(given.times)) for name, way in ways.items()}
    fetching = min(cpu_seconds(lambda: [views[n] for n in numbers]) for _ in range(given.times))
    print(f"{given.tokens:,} tokens, {len(numbers)} rows: lists {seconds['lists'] * 1e3:.2f} ms, "
          f"views {seconds['views'] * 1e3:.2f} ms ({fetching * 1e3:.2f} of them for reading rows): "
          f"{seconds['lists'] / seconds['views']:.0f} times faster")  # fmt: skip


def make_rows(tokens: int) -> tuple[Dataset, list[int]]:
    """A data set in chunks of 1,000 rows, as one on disk is, and rows of it, in any order, of so many tokens."""
    random = np.random.default_rng(0)
    lengths = random.integers(20, 350, 20_000)
    ids = [random.integers(0, 150_000, n, dtype=np.int32) for n in lengths]
    labels = [np.where(np.arange(len(row)) < len(row) // 3, np.int32(IGNORE_INDEX), row) for row in ids]
    parts = [slice(start, start + 1000) for start in range(0, len(ids), 1000)]
    rows = concatenate_datasets([Dataset.from_dict({"input_ids": ids[part], "labels": labels[part]}) for part in parts])
    order = random.permutation(len(rows)).tolist()
    enough = int(np.searchsorted(np.cumsum(lengths[order]), tokens)) + 1
    return rows, order[:enough]


def padded(features: Any) -> dict[str, Any]:
    return collate_padded(features, pad_token_id=PAD)


def plain_flat(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    joined: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        joined["input_ids"] += row["input_ids"]
        joined["labels"] += [IGNORE_INDEX, *row["labels"][1:]]
        joined["position_ids"] += range(len(row["labels"]))
    batch = {name: torch.tensor([values]) for name, values in joined.items()}
    return batch | read(batch["labels"], batch["position_ids"] == 0)


def plain_padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["labels"]) for row in rows)
    values = {"input_ids": PAD, "labels": IGNORE_INDEX}
    batch = {
        name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in rows])
        for name, fill in values.items()
    }
    mask = torch.tensor([[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows])
    return batch | {"attention_mask": mask} | read(batch["labels"], mask)


def read(labels: torch.Tensor, marks: torch.Tensor) -> dict[str, torch.Tensor]:
    """What was read from the batch afterwards."""
    following = torch.nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[:, 1:].flatten()
    positions = (following != IGNORE_INDEX).nonzero()[:, 0]
    return {"positions": positions, "targets": following[positions], "borders": marks.nonzero()}


def cpu_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
