"""What a GPU does with us, with TRL, with TRL and Liger, and with the reference's settings, in one run.

    python benchmarks/gpu.py --json gpu.json                     # Qwen3-0.6B's shape, synthetic dialogues
    python benchmarks/gpu.py --train_file rows.jsonl --tokenizer DIR --budget 480
    python benchmarks/gpu.py --only 16k 16k-zero2 trl            # a look
    python benchmarks/gpu.py --only 64k-row 64k-whole 64k-offload 128k-offload    # long rows
    python benchmarks/gpu.py --shape 4b --only 16k-recomputed    # what is recomputed counted: column "of a product"
    python benchmarks/gpu.py --shape tiny                        # does it run? also on a CPU; lengths are 1/32

Needs no network: the model of a shape has random weights, the tokenizer is made on the spot. `--model` takes a model
instead. Peers come from the environment it runs in; `--trl PYTHON` names another. Every run is a process of its own
with a time limit; when `--budget` is used up no other is started, and the one under way ends. Rows come in the file's
order.

tokens/s, MFU and waiting for data are of the last of three logging intervals, without padding; ours counts them itself
(`metrics.jsonl`), peers by a probe (`peers/probe`). MFU: useful FLOP, of the maker's figure for dense bfloat16. "Of a
product": FLOP with what checkpointing recomputes (a third more), of a bfloat16 matrix product measured here. Memory is
what torch allocated at most (on a CPU: resident), and what the run's plan foretold. "After training" is from the last
step to the end of the process: export, verification, three answers of 256 tokens.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.commands import ROOT, Candidate, Job, command_for, environment
from peers.results import useful_flop
from train_speed import SYSTEM, end, first_error, render, write_lines

sys.path.insert(0, str(ROOT))
from ds_sft.plan.shape import read_shape

QWEN3 = {"vocab_size": 151_936, "max_position_embeddings": 131_072, "rope_theta": 1e6, "tie_word_embeddings": True,
         "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 28, "num_attention_heads": 16}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
    "4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
    "tiny": {**QWEN3, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1000},
}  # fmt: skip
# A mixture's layers instead of a dense one's: each token meets as many parameters.
CHOSEN, EXPERTS = 8, 64  # of a token, of a layer
TINY = 32  # lengths of the tiny shape are divided by it
ANSWERS = 3, 256  # predictions, and tokens of each
MAX_LENGTH = 2048  # tokens of a dialogue, at most; ours cuts longer ones, as TRL is told to
LINES = 40  # of the log of a run that failed, which are shown
WORDS = 400  # of synthetic rows
ROWS, MEAN_TOKENS, SPREAD, TEMPLATE = 1000, 183, 0.6, 44  # of synthetic dialogues: log-normal; tokens of turns


@dataclass(frozen=True)
class Run:
    """A training to measure."""

    name: str
    what: str
    program: str = "ours"
    layout: str = "flat"
    recompute: bool = False
    stage: int = 0
    tokens: int = 0  # of a micro batch that they fill
    length: int = 0  # tokens of each row; 0: dialogues
    rows: int = 16  # of a micro batch
    less: int = 1  # part of `--steps`
    keys: dict[str, Any] = field(default_factory=dict)
    predicts: bool = False
    mixture: bool = False  # of experts, with the active parameters of the shape
    target: str = ""

    @property
    def candidate(self) -> Candidate:
        return Candidate(self.program, self.layout, recompute=self.recompute)


RUNS = [
    Run("16-rows", "ours, 16 rows a step, checkpointing", recompute=True, predicts=True,
        target=">= 40,000; after training < 25 s"),
    Run("16k", "ours, 16,384 tokens", tokens=16_384,
        target=">= 110,000, 15 x TRL, <= 24 GiB, waiting for data < 1 %"),
    Run("trl", "TRL, its defaults, 16 rows", program="trl", layout="padded", recompute=True),
    Run("trl-liger", "TRL with Liger, 16 rows", program="trl", layout="padded", recompute=True,
        keys={"use_liger_kernel": True}),
    Run("16k-zero2", "ours, 16,384 tokens, ZeRO-2 on one rank", tokens=16_384, stage=2, target=">= 95 % of 16k"),
    Run("16k-zero3", "ours, 16,384 tokens, ZeRO-3 on one rank", tokens=16_384, stage=3),
    Run("8k-rows", "ours, 2 rows of 8,192 tokens, checkpointing", recompute=True, length=8192, rows=2,
        target=">= 52,000, <= 16 GiB"),
    Run("16k-rows", "ours, a row of 16,384 tokens, checkpointing", recompute=True, length=16_384, rows=1,
        target=">= 40,000, <= 25 GiB"),
    Run("64k-row", "ours, a row of 65,536 tokens, checkpointing", recompute=True, length=65_536, rows=1, less=5,
        target="trains"),
    Run("64k-whole", "the same, MLPs of all tokens at once", recompute=True, length=65_536, rows=1, less=5,
        keys={"tiled_mlp": "no"}),
    Run("64k-offload", "ours, a row of 65,536 tokens, layers' inputs on the host", recompute=True, length=65_536,
        rows=1, less=5, keys={"gradient_checkpointing": "offload"}, target=">= 90 % of 64k-row; unmeasured"),
    Run("128k-offload", "ours, a row of 131,072 tokens, layers' inputs on the host", recompute=True, length=131_072,
        rows=1, less=10, keys={"gradient_checkpointing": "offload"}, target="trains; unmeasured"),
    Run("16k-recomputed", "ours, 16,384 tokens, checkpointing", recompute=True, tokens=16_384,
        target="4b: >= 55 % of a product"),
    Run("16k-narrow", "ours, 16,384 tokens, checkpointing, optimizer_dtype: bfloat16", recompute=True, tokens=16_384,
        keys={"optimizer_dtype": "bfloat16"}, target="4b: <= 40 GiB; unmeasured"),
    Run("16k-none", "ours, 16,384 tokens, fused_kernels: none", tokens=16_384, keys={"fused_kernels": "none"}),
    Run("16k-compile", "ours, 16,384 tokens, fused_kernels: compile", tokens=16_384,
        keys={"fused_kernels": "compile"}),
    Run("16k-mixture", f"ours, 16,384 tokens, {CHOSEN} of {EXPERTS} experts", tokens=16_384, mixture=True,
        target=">= 60 % of 16k; unmeasured"),
    Run("reference", "the reference's settings, single rows", program="reference", layout="single"),
]  # fmt: skip
PACKAGES = {"trl": "trl", "trl-liger": "liger_kernel"}  # what a run needs besides torch and transformers
SHARES = ("data_wait_share", "forward_backward_share", "communication_share", "optimizer_share", "other_share")
PARTS = ("Attention ", "Padding ", "Fused kernels ", "Loss ", "Working copy ")  # as model/parts.py titles them
HEADER = ["run", "tokens/s", "of TRL's", "MFU", "of a product", "peak GiB", "planned", "waiting for data",
          "after training, s", "losses", "target"]  # fmt: skip


@dataclass(frozen=True)
class Card:
    """What computes."""

    name: str
    peak: float  # FLOP/s, its maker's figure or measured
    product: float  # FLOP/s of a bfloat16 matrix product, measured

    def in_words(self) -> str:
        return f"{self.name}; {self.peak / 1e12:,.1f} TFLOP/s at most, {self.product / 1e12:,.1f} in a bfloat16 product"


@dataclass
class Found:
    """What was measured of one run; None: it does not say."""

    run: str
    error: str = ""
    tokens_per_second: float = 0.0
    flops: float | None = None  # useful, a second
    peak_gib: float | None = None
    planned_gib: float | None = None
    data_wait: float | None = None  # share of the time
    after_seconds: float | None = None
    losses: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)  # of the time, by what it went into
    parts: list[str] = field(default_factory=list)  # what ds_sft put into the model, as it says it
    seconds: float = 0.0  # of the whole process


def main() -> None:
    given, started = arguments(), time.monotonic()
    wanted = wanted_of(given)
    with tempfile.TemporaryDirectory(prefix="ds_sft-gpu-") as name:
        folder = (given.keep or Path(name)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            card = pool.submit(prepare, given, folder).result()  # its memory is free again for the runs
        print(card.in_words(), flush=True)
        results = list(measure(wanted, given, folder, card, started))
    print("\n" + table(results, card, given.shape))


def wanted_of(given: argparse.Namespace) -> list[Run]:
    """In the order of `--only`: what comes last is left out where time is short."""
    by_name = {run.name: run for run in RUNS}
    return [by_name[name] for name in dict.fromkeys(given.only or by_name)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="0.6b", help="of a model that is made [%(default)s]")
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model, instead of one that is made")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="for the model that is made")
    parser.add_argument("--train_file", type=Path, metavar="FILE", help="JSON Lines of question, answer [synthetic]")
    names = [run.name for run in RUNS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"of {', '.join(names)} [all]")
    parser.add_argument("--steps", type=int, default=30, help="of a run, in three logging intervals [%(default)s]")
    parser.add_argument("--timeout", type=int, default=240, help="seconds for a run [%(default)s]")
    parser.add_argument("--budget", type=float, help="seconds after which no other run is started [none]")
    parser.add_argument("--trl", type=Path, metavar="PYTHON", help="a Python that has TRL [this one]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was measured")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the model, the rows and the logs there")
    return parser.parse_args()


# ---- What computes, and what is learned


def prepare(given: argparse.Namespace, folder: Path) -> Card:
    """Make the model and the rows in `folder`, where they are missing; what computes. In a process of its own."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = make_model(given, folder / "model", device)
    if any(run.mixture for run in wanted_of(given)):
        make_mixture(SHAPES[given.shape], folder / "mixture", device)
        tokenizer.save_pretrained(folder / "mixture")
    rows = read_rows(given.train_file) if given.train_file else dialogues(random.Random(0))
    rendered = [render(row, tokenizer.pad_token) for row in rows]
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "eval.jsonl", rows[:8])
    write_lines(folder / "rendered.jsonl", rendered)
    sizes = [[len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in r.values()] for r in rendered]
    (folder / "lengths.json").write_text(json.dumps([(a + b, b) for a, b in sizes]), encoding="utf-8")
    print(f"{len(rows)} dialogues of {sum(map(sum, sizes)) / len(sizes):.0f} tokens on average", flush=True)
    for length in dict.fromkeys(scaled(run.length, given.shape) for run in RUNS if run.length):
        text = " ".join(row["answer"] for row in rows)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        long = tokenizer.decode((ids * (length // len(ids) + 1))[: length + 1])
        write_lines(folder / f"rows-{length}.jsonl", [{"question": f"{n}?", "answer": long} for n in range(4)])
    return card_of(device)


def card_of(device: str) -> Card:
    import torch

    from ds_sft.training.peak import SIZES, device_peak, measure_flops

    place = torch.device(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    product = measure_flops(place, torch.bfloat16, SIZES[device])
    return Card(name, device_peak(place, torch.bfloat16).flops, product)


def make_model(given: argparse.Namespace, folder: Path, device: str) -> Any:
    """A link to the given model, or one of random weights in bfloat16; its tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    if not folder.exists() and given.model:
        folder.symlink_to(given.model.resolve())
    if not folder.exists():
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPES[given.shape])).to(torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(given.tokenizer) if given.tokenizer else make_tokenizer()
        model.generation_config = GenerationConfig(min_new_tokens=ANSWERS[1])  # answers of this length
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def make_mixture(shape: dict[str, Any], folder: Path, device: str) -> None:
    """A mixture of experts, of random weights in bfloat16, with the active parameters of a shape."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**shape, num_experts=EXPERTS, num_experts_per_tok=CHOSEN,
                           moe_intermediate_size=shape["intermediate_size"] // CHOSEN)
        ).to(torch.bfloat16)  # fmt: skip
    model.save_pretrained(folder)


def make_tokenizer() -> Any:
    """A byte-level BPE tokenizer in which each word of the synthetic rows is a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([" ".join(words())] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=special[0], eos_token=special[2])


def words() -> list[str]:
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
    chosen = random.Random(1).sample(list(itertools.product(syllables, repeat=2)), WORDS)
    return ["".join(pair) for pair in chosen]


def dialogues(chance: random.Random) -> list[dict[str, str]]:
    """Questions and answers of random words, as long as those of real dialogues."""
    known, rows = words(), []
    for _ in range(ROWS):
        count = round(MEAN_TOKENS * chance.lognormvariate(-(SPREAD**2) / 2, SPREAD)) - TEMPLATE
        texts = [" ".join(chance.choices(known, k=max(part, 1))) for part in (count // 4, count - count // 4)]
        rows.append({"question": texts[0], "answer": texts[1]})
    return rows


def read_rows(file: Path) -> list[dict[str, str]]:
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [{"question": row["question"], "answer": row["answer"]} for row in lines]


def scaled(tokens: int, shape: str) -> int:
    return tokens // TINY if shape == "tiny" else tokens


# ---- Running


def measure(wanted: list[Run], given: argparse.Namespace, folder: Path, card: Card, started: float) -> Iterator[Found]:
    """Every run in turn; what is known so far is kept in `--json`."""
    results: list[Found] = []
    for run in wanted:
        left = given.budget - (time.monotonic() - started) if given.budget else given.timeout
        found = Found(run.name, error="not started: the budget is used up")
        if left > 0:
            found = run_one(run, given, folder, "cpu" if card.name == "CPU" else "cuda", min(given.timeout, left))
        results.append(found)
        print("\n".join(in_words(found)), flush=True)
        if given.json:
            kept = {"card": vars(card), "shape": given.shape, "results": [vars(result) for result in results]}
            given.json.write_text(json.dumps(kept, indent=1), encoding="utf-8")
        yield found


def in_words(found: Found) -> Iterator[str]:
    """Lines for a reader who wonders at a figure: which kernels it had, and where the time went."""
    yield f"{found.run}: {found.error or f'{found.tokens_per_second:,.0f} tokens/s'} ({found.seconds:.0f} s)"
    if found.shares:
        yield "  " + ", ".join(f"{name.removesuffix('_share')} {share:.1%}" for name, share in found.shares.items())
    yield from (f"  {part}" for part in found.parts)


def run_one(run: Run, given: argparse.Namespace, folder: Path, device: str, timeout: float) -> Found:
    """One run, in a process of its own."""
    home = given.trl.absolute().parents[1] if given.trl and run.program == "trl" else None
    package = PACKAGES.get(run.name)
    if package and home is None and importlib.util.find_spec(package) is None:
        return Found(run.name, error=f"not installed: {package}")
    job = job_of(run, given, folder, device)
    out = folder / run.name / "out"
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir()
    command, more = command_for(run.candidate, job, out, home)
    own = environment(run.candidate, job, out.parent, home) | more | {"PYTHONUNBUFFERED": "1"}
    if run.program == "ours":
        del own["DS_SFT_PROBE"]
    began = time.monotonic()
    code, said = follow(command, own, out.parent, timeout)
    if code == 0:
        found = read(run, job, out, said)
    else:
        found = Found(run.name, error=why(code, said, timeout))
        print(
            *(f"  | {line}" for _, line in said[-LINES - 1 : -1]), sep="\n", flush=True
        )  # its log goes with the folder
    found.seconds = time.monotonic() - began
    return found


def job_of(run: Run, given: argparse.Namespace, folder: Path, device: str) -> Job:
    """The training that a run asks for."""
    steps, length = max(given.steps // run.less, 3), scaled(run.length, given.shape)
    keys: dict[str, Any] = {"max_steps": steps, "num_train_epochs": 100, "learning_rate": 1e-5, **run.keys}
    if run.tokens:
        keys |= {"max_tokens_per_batch": max(scaled(run.tokens, given.shape), MAX_LENGTH),
                 "per_device_train_batch_size": None}  # fmt: skip
    if length:
        keys |= {"train_file": folder / f"rows-{length}.jsonl", "max_length": length}
    if run.predicts:
        keys |= {"eval_file": folder / "eval.jsonl", "eval_strategy": "no", "num_predictions": ANSWERS[0],
                 "predict_max_new_tokens": ANSWERS[1], "verify_export": True}  # fmt: skip
    model = folder / ("mixture" if run.mixture else "model")
    return Job(folder=folder, model=model, system=SYSTEM, batch=run.rows, steps=steps, longest=0, tokens=0,
               stage=run.stage, threads=os.cpu_count() or 1, device=device, logging=steps // 3, more=keys)  # fmt: skip


def follow(command: list[str], own: dict[str, str], folder: Path, timeout: float) -> tuple[int | None, list[Any]]:
    """Run a command; its exit code (None: it was ended by the time limit) and its lines, each with its time."""
    said: list[tuple[float, str]] = []
    process = subprocess.Popen(command, env=own, cwd=folder, start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip

    def read_lines() -> None:
        with (folder / "log.txt").open("wb") as log:
            for line in process.stdout or ():
                log.write(line)
                said.append((time.monotonic(), line.decode(errors="replace").rstrip("\n")))

    reader = threading.Thread(target=read_lines)
    reader.start()
    try:
        code: int | None = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        end(process)
        reader.join()
    said.append((time.monotonic(), ""))
    return code, said


def why(code: int | None, said: list[Any], timeout: float) -> str:
    return f"no end after {timeout:.0f} s" if code is None else first_error("\n".join(line for _, line in said), code)


# ---- What a run left


def read(run: Run, job: Job, out: Path, said: list[Any]) -> Found:
    return read_ours(run, job, out, said) if run.program == "ours" else read_peer(run, job, out.parent)


def read_ours(run: Run, job: Job, out: Path, said: list[Any]) -> Found:
    """From `metrics.jsonl` and `run.json`; MFU becomes FLOP again, of whichever peak the run knew."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    steps = [line for line in lines if "loss" in line]
    record = json.loads((out / "run.json").read_text(encoding="utf-8"))
    last, peaks, plan = steps[-1], record["peak_memory"][0], record["plan"] or {}
    trained = next((moment for moment, line in said if line.startswith(f"Step {job.steps} of")), said[-1][0])
    lengths = [job.more["max_length"]] * 2 if run.length else None
    return Found(
        run.name,
        tokens_per_second=last["tokens_per_second"],
        flops=None if run.mixture else last["tokens_per_second"] * flop_of_a_token(job, lengths),
        peak_gib=peaks.get("gpu_gib", peaks["host_gib"]),
        planned_gib=plan.get("planned_gib"),
        data_wait=last["data_wait_share"],
        after_seconds=said[-1][0] - trained if run.predicts else None,
        losses=[step["loss"] for step in steps],
        shares={name: share for name, share in last.items() if name in SHARES},
        parts=parts_said(line for _, line in said),
    )


def parts_said(lines: Iterable[str]) -> list[str]:
    """Of the block of lines that a run says of its model, those of which speed depends."""
    return [line.strip() for line in lines if line.startswith("  ") and line.strip().startswith(PARTS)]


def read_peer(run: Run, job: Job, folder: Path) -> Found:
    """From what the probe left."""
    found = json.loads((folder / "rank-0.json").read_text(encoding="utf-8"))
    (before, began), (last, ended) = found["logged"][-2:]
    rate = sum(found["tokens"][before:last]) / (ended - began)
    return Found(run.name, tokens_per_second=rate, flops=rate * flop_of_a_token(job, None), peak_gib=found["memory"],
                 losses=found["losses"])  # fmt: skip


def flop_of_a_token(job: Job, lengths: list[int] | None) -> float:
    """Useful ones, on average: of the dialogues, or of rows of these lengths that are supervised throughout."""
    sizes = json.loads((job.folder / "lengths.json").read_text(encoding="utf-8"))
    sizes = [(length, length) for length in lengths] if lengths else sizes
    tokens, supervised = (sum(column) for column in zip(*sizes, strict=True))
    return useful_flop(read_shape(str(job.model)), [size[0] for size in sizes], tokens, supervised) / tokens


# ---- Side by side


def table(results: list[Found], card: Card, shape: str) -> str:
    """Markdown."""
    base = next((found.tokens_per_second for found in results if found.run == "trl"), 0.0)
    scale = f"; lengths and tokens are 1/{TINY} of what is said" if shape == "tiny" else ""
    lines = [f"{card.in_words()}. Shape {shape}{scale}.", "", f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    lines += [f"| {' | '.join(cells(found, card, base))} |" for found in results]
    return "\n".join(lines)


def cells(found: Found, card: Card, base: float) -> list[str]:
    run = next(run for run in RUNS if run.name == found.run)
    if found.error:
        return [run.what, found.error.replace("|", "\\|"), *[""] * (len(HEADER) - 3), run.target]
    done = None if found.flops is None else found.flops * (4 / 3 if run.recompute else 1) / card.product
    return [
        run.what,
        f"{found.tokens_per_second:,.0f}",
        said_as(found.tokens_per_second / base if base else None, "{:.2f}"),
        said_as(None if found.flops is None else found.flops / card.peak, "{:.1%}"),
        said_as(done, "{:.0%}"),
        said_as(found.peak_gib, "{:.1f}"),
        said_as(found.planned_gib, "{:.1f}"),
        said_as(found.data_wait, "{:.1%}"),
        said_as(found.after_seconds, "{:.0f}"),
        ", ".join(f"{loss:.4f}" for loss in found.losses),
        run.target,
    ]


def said_as(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
