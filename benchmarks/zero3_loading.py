"""How much memory each rank needs to load a model under ZeRO-3, against theory.

    python benchmarks/zero3_loading.py                       # 0.5 B parameters, constructed; 1, 2 and 4 ranks

Theory: a rank keeps 2 bytes for each of its parameters, that is 1 / ranks of the model. Rank 0 reads one tensor at a
time and the others receive it, so above its share a rank should need little more than the largest tensor twice.
Measured: anonymous resident memory above that of the same process before loading (file pages of the weights on disk,
which the kernel takes back at will, are not counted): its peak while loading, and what is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1280, help="[%(default)s]")
    parser.add_argument("--layers", type=int, default=24, help="[%(default)s]")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="[%(default)s]")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ds_sft-zero3-") as name:
        folder = Path(name)
        parameters, largest = make_model(folder / "model", given.hidden, given.layers)
        whole = 2 * parameters / 2**20
        print(f"{parameters / 1e6:.0f} M parameters, {whole:.0f} MiB in bfloat16; largest tensor {largest:.0f} MiB")
        print(
            f"{'ranks':>5}{'rank':>6}{'share, MiB':>12}{'kept, MiB':>11}{'peak, MiB':>11}{'peak / whole':>14}{'s':>7}"
        )
        for ranks in given.ranks:
            for line in sorted(launch(folder, ranks)):
                rank, kept, peak, seconds = json.loads(line)["measured"]
                numbers = f"{whole / ranks:>12.0f}{kept:>11.0f}{peak:>11.0f}{peak / whole:>14.2f}{seconds:>7.1f}"
                print(f"{ranks:>5}{rank:>6}{numbers}", flush=True)


def make_model(folder: Path, hidden: int, layers: int) -> tuple[int, float]:
    """Save a random Qwen3 in bfloat16, in shards; its parameters, and its largest tensor in MiB."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sys.path.insert(0, str(ROOT))
    config = Qwen3Config(
        vocab_size=8000,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        head_dim=64,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="200MB")
    sizes = [parameter.numel() for parameter in model.parameters()]
    return sum(sizes), 2 * max(sizes) / 2**20


def launch(folder: Path, ranks: int, script: Path = Path(__file__)) -> list[str]:
    """Start a script on `ranks` ranks with MEASURE set; the JSON lines they print."""
    command = ["torchrun", "--nproc_per_node", str(ranks), "--master_port", "29617", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MEASURE": str(folder), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return [line for line in done.stdout.splitlines() if line.startswith('{"measured"')]


def measure(folder: Path) -> None:
    """What one rank does: load the model as train.py does, watching its own memory."""
    from ds_sft.config.keys import Config
    from ds_sft.model.load import load_model
    from ds_sft.ranks.collectives import barrier
    from ds_sft.ranks.launch import read_launch
    from ds_sft.training.arguments import training_arguments

    engine = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))
    training = {"output_dir": str(folder / "out"), "bf16": True, "report_to": ["none"]}
    config = Config(model_name_or_path=str(folder / "model"), train_file="", training=training)
    args = training_arguments(config, engine, read_launch())
    barrier()
    before = peak = anonymous_mib()
    loaded = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not loaded.wait(0.002):
            peak = max(peak, anonymous_mib())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    model = load_model(config, args)
    seconds = time.monotonic() - started
    loaded.set()
    watcher.join()
    kept = anonymous_mib() - before
    print(json.dumps({"measured": [int(os.environ["RANK"]), kept, peak - before, seconds]}), flush=True)
    barrier()
    del model
    os._exit(0)


def anonymous_mib() -> float:
    """Resident memory of this process that is no file's."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 2**10


if __name__ == "__main__":
    if "MEASURE" in os.environ:
        measure(Path(os.environ["MEASURE"]))
    else:
        main()
