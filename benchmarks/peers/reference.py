"""The settings of the one-GPU script that ds_sft grew out of, with a plain Trainer; run by `train_speed.py`.

    python reference.py KEYS.json     # model, rows (JSON Lines of prompt and completion) and TrainingArguments' fields

Single rows, accumulation, gradient checkpointing, weights loaded in bfloat16 and trained in it, the model's own loss.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    keys = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    name, file = keys.pop("model"), keys.pop("rows")
    args = TrainingArguments(**keys)  # first: ZeRO-3 partitions while loading
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    model.enable_input_require_grads()
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    rows = [encode(json.loads(line), tokenizer) for line in lines]
    collate = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=collate).train()  # type: ignore[arg-type]


def encode(row: dict[str, str], tokenizer: Any) -> dict[str, list[int]]:
    prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
    ids = prompt + answer
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [-100] * len(prompt) + answer}


if __name__ == "__main__":
    main()
