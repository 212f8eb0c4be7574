"""A TRL training as its documentation writes it; run by `train_speed.py` in TRL's own environment.

python trl_sft.py KEYS.json     # model, rows (JSON Lines of prompt and completion), lora, and the fields of SFTConfig
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    keys = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    adapter = LoraConfig(task_type="CAUSAL_LM", **keys.pop("lora")) if "lora" in keys else None
    model, rows = keys.pop("model"), load_dataset("json", data_files=keys.pop("rows"), split="train")
    SFTTrainer(model=model, args=SFTConfig(**keys), train_dataset=rows, peft_config=adapter).train()


if __name__ == "__main__":
    main()
