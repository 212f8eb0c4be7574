"""Started by test_trajectory.py through a launcher: the package's Trainer on rows of which some teach nothing.

The data path drops such rows; the Trainer must still be right about them. Arguments: as of train.py, and MUTED, the
numbers of the rows whose labels are all -100, from the environment.
"""

from __future__ import annotations

import os
import sys

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq

from ds_sft.config import load_config
from ds_sft.data.dataset import load_data
from ds_sft.runtime.distributed import read_launch
from ds_sft.runtime.export import export_model
from ds_sft.runtime.zero import engine_config
from ds_sft.tracking import TrackerCallback, open_tracker
from ds_sft.train import begin_output
from ds_sft.training.arguments import training_arguments
from ds_sft.training.model import load_model, load_tokenizer
from ds_sft.training.trainer import SFTTrainer


def main() -> None:
    launch, config = read_launch(), load_config(sys.argv[1:])
    muted = {int(number) for number in os.environ["MUTED"].split()}
    tokenizer = load_tokenizer(config, launch)
    data = load_data(config, tokenizer, launch)
    rows = [
        {**row, "labels": [-100] * len(row["labels"])} if number in muted else row
        for number, row in enumerate(data.train)
    ]
    args = training_arguments(config, engine_config(config, launch), launch)
    model = load_model(config, args)
    begin_output(config, data.report, launch)
    with open_tracker(config, launch) as tracker:
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_list(rows),
            eval_dataset=data.eval,
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
            callbacks=[TrackerCallback(tracker)],
        )
        trainer.train()
        export_model(trainer, tokenizer, config, launch)
    trainer.end()


if __name__ == "__main__":
    main()
