"""Every ZeRO stage on 1, 2 and 4 ranks against plain `python`: losses, weights, memory against theory, speed.

    python benchmarks/stages.py                      # 31 M parameters in float32, constructed; about ten minutes

Theory, in bytes a parameter on each of N ranks in float32: weights, gradients, and what the optimizer keeps, which
are Adam's two moments and, from stage 1 on, the masters it updates: stage 0: 4 + 4 + 8, and DDP 4 more for its
buckets; 1: 4 + 4 + 12/N; 2: 4 + 4/N + 12/N; 3: 4/N + 4/N + 12/N. Measured: the peak of a rank's anonymous memory up
to the end of training, above that of a ZeRO-2 run with a model of almost no parameters; the largest rank's. It
includes activations, communication buffers and copies made while loading.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from zero3_loading import ROOT, make_model

TRAIN = str(ROOT / "ds_sft" / "train.py")
THEORY: dict[str, Callable[[int], float]] = {  # bytes a parameter on one of n ranks
    "DDP": lambda n: 20,
    "ZeRO-0": lambda n: 16,
    "ZeRO-1": lambda n: 8 + 12 / n,
    "ZeRO-2": lambda n: 4 + 16 / n,
    "ZeRO-3": lambda n: 20 / n,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512, help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=8, help="[%(default)s]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="[%(default)s]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds_sft-stages-") as name:
        folder = Path(name)
        parameters, _ = make_model(folder / "model", given.hidden, given.layers)
        make_model(folder / "tiny", 64, 1)
        make_rows_and_tokenizer(folder)
        print(f"{parameters / 1e6:.0f} M parameters, float32, 8 rows a step, 3 steps; memory in MiB a rank")
        print(f"{'':<8}{'ranks':>6}{'loss':>10}{'weights':>10}{'memory':>8}{'theory':>8}{'s/step':>8}", flush=True)
        reference = train(folder, "model", "DDP", 1)
        base = {ranks: train(folder, "tiny", "ZeRO-2", ranks)["mib"] for ranks in given.ranks}
        for engine, bytes_on in THEORY.items():
            for ranks in given.ranks:
                found = reference if (engine, ranks) == ("DDP", 1) else train(folder, "model", engine, ranks)
                loss = max(abs(a / b - 1) for a, b in zip(found["losses"], reference["losses"], strict=True))
                weights = difference(found["weights"], reference["weights"])
                theory = parameters * bytes_on(ranks) / 2**20
                memory = found["mib"] - base[ranks]
                print(
                    f"{engine:<8}{ranks:>6}{loss:>10.1e}{weights:>10.1e}{memory:>8.0f}{theory:>8.0f}"
                    f"{found['seconds']:>8.2f}",
                    flush=True,
                )


def make_rows_and_tokenizer(folder: Path) -> None:
    """24 dialogues of very different lengths, and a byte-level tokenizer beside each model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = [{"question": f"What is {i}?", "answer": "It is a number. " * (1 + i * 7 % 11)} for i in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [row["answer"] for row in rows], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])
    for model in ("model", "tiny"):
        tokenizer.save_pretrained(folder / model)


def train(folder: Path, model: str, engine: str, ranks: int) -> dict[str, Any]:
    """One run: the loss of each step, the final weights, the peak memory of the largest rank, seconds a step."""
    out = folder / f"{model}-{engine}-{ranks}"
    keys = {
        "model_name_or_path": folder / model,
        "train_file": folder / "train.jsonl",
        "output_dir": out,
        "cache_dir": folder / "cache",
        "system_prompt": "Answer.",
        "per_device_train_batch_size": 1,  # short rows, one at a time: activations next to nothing
        "gradient_accumulation_steps": 8 // ranks,
        "num_train_epochs": 1,
        "bf16": "no",
        "gradient_checkpointing": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "num_predictions": 0,
        "verify_export": "no",
        "swanlab_mode": "disabled",
    }
    if engine != "DDP":
        content = json.loads((ROOT / "ds_configs" / f"zero{3 if engine == 'ZeRO-3' else 2}.json").read_text())
        content["zero_optimization"]["stage"] = int(engine[-1])
        keys["deepspeed"] = json.dumps(content)
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    command = ["torchrun", f"--nproc_per_node={ranks}", "--master_port=29619", TRAIN, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        peaks: dict[int, float] = {}
        watcher = threading.Thread(target=watch, args=(process, out / "metrics.jsonl", peaks))
        watcher.start()
        code = process.wait()
        watcher.join()
        if code:
            sys.exit(f"{engine} on {ranks} ranks: exit code {code}\n{(folder / 'log').read_text()[-3000:]}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    return {
        "losses": [line["loss"] for line in lines if "loss" in line],
        "weights": out / "model.safetensors",
        "mib": max(peaks.values()),
        "seconds": record["train_seconds"] / record["steps"],
    }


def watch(process: subprocess.Popen[bytes], metrics: Path, peaks: dict[int, float]) -> None:
    """Keep the peak anonymous memory of each rank, in MiB, until training ends: the export gathers all on rank 0."""
    while process.poll() is None:
        if metrics.exists() and "train_runtime" in metrics.read_text(encoding="utf-8"):
            return
        for child in psutil.Process(process.pid).children():
            try:
                status = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii")
            except OSError:
                continue
            anonymous = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")), 0)
            peaks[child.pid] = max(peaks.get(child.pid, 0), anonymous / 2**10)
        threading.Event().wait(0.03)


def difference(file: Path, other: Path) -> float:
    """The largest difference of a weight."""
    from safetensors.torch import load_file

    weights, reference = load_file(file), load_file(other)
    return max((weights[name] - value).abs().max().item() for name, value in reference.items())


if __name__ == "__main__":
    main()
