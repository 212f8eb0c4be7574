"""Predicting under ZeRO-3: all ranks generate with the partitioned model, or rank 0 alone with the exported one?

    python benchmarks/prediction.py                 # 2 ranks, 8 prompts of 32 tokens, 32 new tokens each

Three ways, each answering the same prompts greedily:
- all ranks, parameters released after use: every parameter is gathered for every token, as a model with more than
  `stage3_max_live_parameters` (1e9) elements has it;
- all ranks, nothing released: the model is small enough to stay whole after its first use;
- what train.py does: gather each parameter once, save, load on rank 0, generate. All three steps are in its time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from zero3_loading import ROOT, launch, make_model

WAYS = {
    "released": "all ranks, parameters released",
    "kept": "all ranks, nothing released",
    "exported": "gather once, save, load, rank 0",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=640, help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=16, help="[%(default)s]")
    parser.add_argument("--ranks", type=int, default=2, help="[%(default)s]")
    parser.add_argument("--new_tokens", type=int, default=32, help="[%(default)s]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds_sft-prediction-") as name:
        folder = Path(name)
        parameters, _ = make_model(folder / "model", given.hidden, given.layers)
        print(
            f"{parameters / 1e6:.0f} M parameters, {given.ranks} ranks, 8 prompts, {given.new_tokens} new tokens each"
        )
        seconds = {}
        for way, text in WAYS.items():
            os.environ["WAY"] = f"{way} {given.new_tokens}"
            line = launch(folder, given.ranks, Path(__file__))[0]
            seconds[way] = json.loads(line)["measured"]
            print(f"{text:<34}{seconds[way]:>8.1f} s", flush=True)
        print(f"the exported model is {seconds['released'] / seconds['exported']:.1f} times as fast as the first way")


def measure(folder: Path, way: str, new_tokens: int) -> None:
    """What one rank does."""
    import deepspeed
    import torch

    from ds_sft.config.keys import Config
    from ds_sft.model.load import load_model
    from ds_sft.ranks.collectives import barrier
    from ds_sft.ranks.launch import read_launch
    from ds_sft.training.arguments import training_arguments

    engine = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))
    if way == "released":
        engine["zero_optimization"] |= {
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        }
    training = {"output_dir": str(folder / "out"), "bf16": True, "report_to": ["none"]}
    config = Config(model_name_or_path=str(folder / "model"), train_file="", training=training)
    args = training_arguments(config, engine, read_launch())
    model = load_model(config, args)
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": args.world_size}
    options = json.loads(json.dumps(args.hf_deepspeed_config.config).replace('"auto"', "false"))
    zero = {name: value for name, value in options["zero_optimization"].items() if value is not False}
    adam = {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}}
    options = {"bf16": {"enabled": True}, "zero_optimization": zero, "optimizer": adam, **sizes}
    engine = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=options)[0]
    torch.manual_seed(0)
    prompts = torch.randint(10, 8000, (8, 32))
    answer(engine.module.eval(), prompts, 2)  # the first pass learns the order of the modules
    barrier()
    started = time.monotonic()
    if way == "exported":
        predict_from_export(engine.module, prompts, new_tokens, folder)
    else:
        answer(engine.module, prompts, new_tokens)
    barrier()
    if os.environ["RANK"] == "0":
        print(json.dumps({"measured": time.monotonic() - started}), flush=True)
    os._exit(0)


def answer(model: Any, prompts: Any, new_tokens: int) -> None:
    import torch

    with torch.inference_mode():
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new_tokens, do_sample=False)


def predict_from_export(model: Any, prompts: Any, new_tokens: int, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from ds_sft.export.weights import full_weights

    main_rank = os.environ["RANK"] == "0"
    weights = full_weights(model, torch.bfloat16, keep=main_rank)
    if main_rank:
        model.save_pretrained(folder / "exported", state_dict=weights)
        unset_hf_deepspeed_config()
        answer(AutoModelForCausalLM.from_pretrained(folder / "exported", dtype="auto").eval(), prompts, new_tokens)


if __name__ == "__main__":
    if "MEASURE" in os.environ:
        sys.path.insert(0, str(ROOT))
        chosen, tokens = os.environ["WAY"].split()
        measure(Path(os.environ["MEASURE"]), chosen, int(tokens))
    else:
        main()
