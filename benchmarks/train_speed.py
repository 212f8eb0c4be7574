"""Training speed and memory of ours, TRL, LLaMA-Factory, ms-swift and the reference's settings, side by side.

    python benchmarks/train_speed.py                        # demo model and rows; installs the peers at the first call
    python benchmarks/train_speed.py --train_file rows.jsonl --rounds 3 --json speed.json --plot speed.png
    python benchmarks/train_speed.py --only ours reference trl --runs plain --rounds 1      # a look
    python benchmarks/train_speed.py --lora 16 --runs plain # adapters of rank 16 on all linear layers
    python benchmarks/train_speed.py --scaling              # two ranks against twice one, at one thread each

All learn the same tokens from the same rows in the same order, with AdamW at the same rate, and each in an environment
of its own (`--environments`). Runs alternate A B C A B C. A probe in every process (`peers/probe`) takes clock, CPU
time and peak memory at the steps' boundaries; the first step warms up and is left out of the rates. Read ratios, not
rates: other work may run on the machine, and CPU seconds suffer least from it. A program that does not run is listed
with its error.

Useful work is 6 FLOP for each weight that multiplies a token (of the head: each supervised token), 4 where it is
frozen, and attention within the rows, forward and backward; recomputation is not counted. Its limit is a bare bfloat16
product of the MLP's shapes.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from peers.commands import CANDIDATES, ROOT, Candidate, Job, command_for, environment
from peers.environment import PEERS, make_environment
from peers.results import Result, plot, print_limit, print_scaling, print_table, print_targets, read_result

sys.path.insert(0, str(ROOT))

RUNS = {"plain": (1, 0), "zero2": (2, 2), "zero3": (2, 3)}  # ranks, DeepSpeed stage
SCALING = {"plain x1": (1, 0), "ZeRO-2 x1": (1, 2), "ZeRO-3 x1": (1, 3), "ZeRO-2 x2": (2, 2), "ZeRO-3 x2": (2, 3)}
SYSTEM = "You are a helpful assistant."
Results = list[dict[str, Any]]


def main() -> None:
    given = arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the run that is under way, too
    wanted = [c for c in CANDIDATES if not given.only or {c.program, c.name} & set(given.only)]
    wanted = [c for c in wanted if not (given.lora and c.program == "reference")]  # it trains all weights
    homes = {} if given.scaling else environments(wanted, given.environments)
    with tempfile.TemporaryDirectory(prefix="ds_sft-speed-") as name:
        job = prepare(given, given.keep or Path(name))
        try:
            results = measure_scaling(job, given) if given.scaling else measure(wanted, homes, job, given)
        except KeyboardInterrupt:
            sys.exit("interrupted")
    report(results, given)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "demo/model", help="[%(default)s, made where missing]")
    parser.add_argument(
        "--train_file", type=Path, default=ROOT / "demo/train.jsonl", help="JSON Lines of question, answer"
    )
    parser.add_argument("--batch", type=int, default=8, help="rows a step, over all ranks; even [%(default)s]")
    parser.add_argument("--steps", type=int, default=5, help="of which the first warms up [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="[%(default)s]")
    names = [*dict.fromkeys(c.program for c in CANDIDATES), *(c.name for c in CANDIDATES)]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="programs, or 'trl padded' [all]")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="[all]")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train adapters; 0: all weights [0]")
    parser.add_argument("--scaling", action="store_true", help="ours alone, two ranks against one")
    parser.add_argument("--environments", type=Path, default=ROOT / ".cache/peers", help="[%(default)s]")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds for one run [%(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was measured")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="CPU time of each against ours")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files and logs of the runs there")
    given = parser.parse_args()
    if given.batch % 2 or given.steps < 2:
        parser.error("--batch must be even, for two ranks, and --steps at least 2, as the first is not counted")
    return given


def environments(wanted: list[Candidate], folder: Path) -> dict[str, Path | RuntimeError]:
    """Where each peer is installed, or why it is not."""
    homes: dict[str, Path | RuntimeError] = {}
    for peer in dict.fromkeys(candidate.program for candidate in wanted if candidate.program in PEERS):
        try:
            homes[peer] = make_environment(peer, folder.resolve())
        except RuntimeError as error:
            homes[peer] = error
    return homes


# ---- What is learned


def prepare(given: argparse.Namespace, folder: Path) -> Job:
    """Write the rows as each program reads them, and `lengths.json`: tokens and supervised tokens of each."""
    from transformers import AutoTokenizer

    if not given.model.exists() or not given.train_file.exists():
        from ds_sft.commands.demo import make_demo

        make_demo(ROOT / "demo")
    folder.mkdir(parents=True, exist_ok=True)
    with given.train_file.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in itertools.islice(file, given.batch * given.steps)]
    if len(rows) < given.batch * given.steps:
        sys.exit(f"{given.train_file}: {len(rows)} rows; {given.steps} steps of {given.batch} rows need more")
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    rendered = [render(row, tokenizer.pad_token) for row in rows]
    write_lines(folder / "rows.jsonl", rows)
    write_lines(folder / "rendered.jsonl", rendered)
    write_lines(folder / "messages.jsonl", [messages(row) for row in rendered])
    lengths = [[len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in r.values()] for r in rendered]
    sizes = [(prompt + completion, completion) for prompt, completion in lengths]
    (folder / "lengths.json").write_text(json.dumps(sizes), encoding="utf-8")
    tokens, supervised = (sum(column) for column in zip(*sizes, strict=True))
    print(f"{len(rows)} rows, {tokens:,} tokens, {supervised:,} supervised; {given.steps} steps of {given.batch} rows")
    return Job(
        folder=folder.resolve(),
        model=given.model.resolve(),
        system=SYSTEM,
        batch=given.batch,
        steps=given.steps,
        longest=max(size[0] for size in sizes),
        tokens=tokens,
        lora=given.lora,
    )


def render(row: dict[str, str], end: str) -> dict[str, str]:
    """Ours of `template: reference` as two texts."""
    prompt = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['question']}<|im_end|>\n"
    return {"prompt": f"{prompt}<|im_start|>assistant\n", "completion": row["answer"] + end}


def messages(rendered: dict[str, str]) -> dict[str, Any]:
    """The same for ms-swift, whose template adds the end of the turn."""
    answer = re.sub(r"<\|[^|]*\|>$", "", rendered["completion"])
    turns = [("user", rendered["prompt"]), ("assistant", answer)]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


# ---- Running


def measure(wanted: list[Candidate], homes: dict[str, Any], job: Job, given: argparse.Namespace) -> Results:
    """Every candidate in every kind of run, `--rounds` times, in turn; what is known so far is kept in `--json`."""
    results: Results = []
    plan = [(run, n, candidate) for run in given.runs for n in range(given.rounds) for candidate in wanted]
    for done, (run, number, candidate) in enumerate(plan):
        ranks, stage = RUNS[run]
        threads = max((os.cpu_count() or 1) // ranks, 1)
        if candidate is wanted[0]:
            results.append({"run": run, "round": number, "bare": bare_rate(job, threads * ranks)})
        found = run_one(candidate, homes.get(candidate.program), with_ranks(job, ranks, stage, threads), given.timeout)
        results.append({"run": run, "round": number, "candidate": candidate.name, **vars(found)})
        print(f"{done + 1}/{len(plan)} {run}, round {number + 1}: {candidate.name}: {found.summary()}", flush=True)
        keep(results, job, given)
    return results


def measure_scaling(job: Job, given: argparse.Namespace) -> Results:
    """Ours with one and two ranks of one thread each: the same steps, and micro batches of as many rows."""
    job = replace(job, most=job.batch // 2)
    results: Results = []
    for number, (run, (ranks, stage)) in itertools.product(range(given.rounds), SCALING.items()):
        found = run_one(CANDIDATES[0], None, with_ranks(job, ranks, stage, threads=1), given.timeout)
        results.append({"run": run, "round": number, "candidate": CANDIDATES[0].name, **vars(found)})
        print(f"round {number + 1}: {run}: {found.summary()}", flush=True)
        keep(results, job, given)
    return results


def with_ranks(job: Job, ranks: int, stage: int, threads: int) -> Job:
    return replace(job, ranks=ranks, stage=stage, threads=threads)


def run_one(candidate: Candidate, home: Any, job: Job, timeout: int) -> Result:
    """One run, and what the probe found in it."""
    if isinstance(home, RuntimeError):
        return Result(error=f"not installed: {home}")
    out = Path(tempfile.mkdtemp(prefix=f"{candidate.program}-", dir=job.folder)) / "out"
    command, own = command_for(candidate, job, out, home)
    with out.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(candidate, job, out.parent, home) | own,
            cwd=out.parent,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            return Result(error=f"no end after {timeout} s")
        finally:
            end(process)
    result = read_result(out.parent, job)
    if result.error and code:
        result.error = first_error(out.with_suffix(".log").read_text(encoding="utf-8", errors="replace"), code)
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a run that has not ended: ranks and compilers, too, which torchrun starts in sessions of their own."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()


def first_error(log: str, code: int) -> str:
    """The line that names the first exception in a log, or its last line."""
    found = re.search(r"^(?:\[rank\d+\]: )?((?:[\w.]+(?:Error|Exception)|train\.py: error)\b.*)$", log, re.M)
    lines = log.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "")
    return found[1].strip() if found else f"exit code {code}: {last.strip()}"


def bare_rate(job: Job, threads: int) -> float:
    """GFLOP a CPU second of a bfloat16 product [tokens, hidden] x [hidden, MLP] and back, for two seconds."""
    import torch

    config = json.loads((job.model / "config.json").read_text(encoding="utf-8"))
    torch.set_num_threads(threads)
    x = torch.randn(2048, config["hidden_size"], dtype=torch.bfloat16)
    up = torch.randn(config["hidden_size"], config["intermediate_size"], dtype=torch.bfloat16)
    down = up.t().contiguous()
    rates = []
    for _ in range(4):  # the first warms up
        started, ended, products = time.process_time(), time.perf_counter() + 0.5, 0
        while time.perf_counter() < ended:
            (x @ up) @ down
            products += 2
        rates.append(products * 2 * x.numel() * up.shape[1] / (time.process_time() - started) / 1e9)
    return statistics.median(rates[1:])


def keep(results: Results, job: Job, given: argparse.Namespace) -> None:
    if given.json:
        said = {key: str(value) for key, value in vars(job).items()}
        given.json.write_text(json.dumps({"job": said, "results": results}, indent=1), encoding="utf-8")


def report(results: Results, given: argparse.Namespace) -> None:
    """Markdown, as it stands in docs/speed.md."""
    if given.scaling:
        print_scaling(results)
        return
    for run in given.runs:
        of_run = [result for result in results if result["run"] == run]
        print(f"\n{run}, ratios to `{CANDIDATES[0].name}`, medians of {given.rounds} rounds:\n")
        print_table(of_run)
        print_limit(of_run)
        print_targets(of_run)
    if given.plot:
        plot(results, given.plot)
        print(f"\nplot: {given.plot}")


if __name__ == "__main__":
    main()
