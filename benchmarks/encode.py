"""How fast rows are encoded, beside the tokenizers library itself and the reference's way, in one run.

    python benchmarks/encode.py --model DIR --train_file rows.jsonl --rows 20000

DIR holds a tokenizer; rows are questions and answers, repeated to `--rows`. Each round times, one after the other,
  library:    tokenizers' encode_batch on the same texts with all cores, and nothing else
  ds_sft:     what `ds-sft prepare` does: read, encode, mask, write the checked cache; all cores
  reference:  the reference script's `datasets.map`, one row at a time (on `--reference_rows` rows)
and the medians of the ratios over the rounds are printed. Read ratios, not rates: other work may run on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main() -> None:
    given = arguments()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    with open(given.train_file, encoding="utf-8") as file:
        found = [json.loads(line) for line in file]
    rows = list(itertools.islice(itertools.cycle(found), given.rows))
    with tempfile.TemporaryDirectory(prefix="ds_sft-encode-") as name:
        folder = Path(name)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(text, encoding="utf-8")
        to_library, to_reference = [], []
        for number in range(given.rounds):
            library = len(rows) / time_library(tokenizer, rows)
            ours = len(rows) / time_ours(tokenizer, folder, number)
            reference = given.reference_rows / time_reference(tokenizer, rows[: given.reference_rows], folder)
            to_library.append(ours / library)
            to_reference.append(ours / reference)
            print(f"round {number + 1}: library {library:,.0f} rows/s, ds_sft {ours:,.0f}, reference {reference:,.0f}",
                  flush=True)  # fmt: skip
    print(f"ds_sft / library    {statistics.median(to_library):.2f}")
    print(f"ds_sft / reference  {statistics.median(to_reference):.1f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo/model", help="folder of a tokenizer [%(default)s]")
    parser.add_argument("--train_file", default="demo/train.jsonl", help="questions and answers [%(default)s]")
    parser.add_argument("--rows", type=int, default=20_000, help="[%(default)s]")
    parser.add_argument("--reference_rows", type=int, default=2000, help="[%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="[%(default)s]")
    return parser.parse_args()


def texts_of(row: dict[str, str]) -> tuple[str, str]:
    """What the reference encodes of a row."""
    from ds_sft.config.keys import REFERENCE_PROMPT

    chat = f"<|im_start|>system\n{REFERENCE_PROMPT}<|im_end|>\n<|im_start|>user\n{row['question']}<|im_end|>\n"
    return chat + "<|im_start|>assistant\n", row["answer"]


def time_library(tokenizer: Any, rows: list[dict[str, str]]) -> float:
    from ds_sft.data.encode import use_threads

    use_threads(enabled=True)
    texts = [text for row in rows for text in texts_of(row)]
    started = time.perf_counter()
    for start in range(0, len(texts), 2000):
        tokenizer.backend_tokenizer.encode_batch(texts[start : start + 2000], add_special_tokens=False)
    return time.perf_counter() - started


def time_ours(tokenizer: Any, folder: Path, number: int) -> float:
    from ds_sft.config.keys import Config
    from ds_sft.data.dataset import load_data
    from ds_sft.ranks.launch import Launch

    config = Config(
        model_name_or_path="-",
        train_file=str(folder / "rows.jsonl"),
        cache_dir=str(folder / f"cache-{number}"),
        training={"output_dir": str(folder)},
    )
    started = time.perf_counter()
    data = load_data(config, tokenizer, Launch(launcher="python", rank=1, local_rank=0, world_size=2))  # prints nothing
    seconds = time.perf_counter() - started
    assert data.report["train"]["rows_kept"] == data.report["train"]["rows_read"]
    return seconds


def time_reference(tokenizer: Any, rows: list[dict[str, str]], folder: Path) -> float:
    from datasets import Dataset

    def process(row: dict[str, str]) -> dict[str, list[int]]:
        prompt, text = texts_of(row)
        before, answer = tokenizer(prompt, add_special_tokens=False), tokenizer(text, add_special_tokens=False)
        end = [tokenizer.pad_token_id]
        input_ids = before["input_ids"] + answer["input_ids"] + end
        labels = [-100] * len(before["input_ids"]) + answer["input_ids"] + end
        attention_mask = before["attention_mask"] + answer["attention_mask"] + [1]
        return {"input_ids": input_ids[:2048], "attention_mask": attention_mask[:2048], "labels": labels[:2048]}

    data = Dataset.from_list(rows)
    started = time.perf_counter()
    data.map(process, remove_columns=data.column_names, load_from_cache_file=False)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
