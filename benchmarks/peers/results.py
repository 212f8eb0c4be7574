"""What the probe found, and how it is put side by side."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.commands import CANDIDATES, ROOT, Candidate, Job

sys.path.insert(0, str(ROOT))
from ds_sft.plan.shape import Shape, read_shape

LOSS_BOUND = 0.02  # of the last step's loss, relative: bfloat16 in several orders of summation, a few steps long
OURS = CANDIDATES[0].name
HEADER = ["program, micro batches", "CPU s / 1,000 tokens", "ratio", "wall s", "ratio", "GiB a rank", "ratio", "pad",
          "weights", "last loss"]  # fmt: skip


@dataclass
class Result:
    """One run. Rates are of all steps but the first; tokens are of all ranks, without padding."""

    error: str = ""
    cpu: float = 0.0  # seconds of all ranks for 1,000 tokens
    wall: float = 0.0  # seconds for 1,000 tokens
    first_step: float = 0.0  # seconds
    memory: float = 0.0  # GiB, of the largest rank, until training ended
    padding: float = 0.0  # share of the positions computed
    rate: float = 0.0  # useful GFLOP a CPU second, over whole steps
    rate_without_optimizer: float = 0.0
    weights: str = ""  # their dtype
    tokens: list[int] = field(default_factory=list)  # of each step
    supervised: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def summary(self) -> str:
        if self.error:
            return self.error
        return f"{self.cpu:.2f} CPU s, {self.wall:.2f} s for 1,000 tokens, {self.memory:.2f} GiB, {self.losses[-1]:.4f}"


def read_result(folder: Path, job: Job) -> Result:
    """Put the ranks' records together."""
    files = sorted(folder.glob("rank-*.json"))
    if len(files) != job.ranks:
        return Result(error=f"{len(files)} of {job.ranks} ranks finished their training")
    ranks = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    tokens, supervised, computed = (add(rank[key] for rank in ranks) for key in ("tokens", "supervised", "computed"))
    counted, seconds = sum(tokens[1:]), max(rank["marks"][-1][0] - rank["marks"][1][0] for rank in ranks)
    if not counted:
        return Result(error="the probe saw one step only, or no tokens")
    cpu = sum(rank["marks"][-1][1] - rank["marks"][1][1] for rank in ranks)
    updates = sum(sum(rank["optimizer"][1:]) for rank in ranks)
    lengths = [length for length, _ in json.loads((job.folder / "lengths.json").read_text(encoding="utf-8"))]
    work = useful_flop(read_shape(str(job.model)), lengths[job.batch :], counted, sum(supervised[1:]),
                       frozen=bool(job.lora)) / 1e9  # fmt: skip
    return Result(
        cpu=1000 * cpu / counted,
        wall=1000 * seconds / counted,
        first_step=max(rank["marks"][1][0] - rank["marks"][0][0] for rank in ranks),
        memory=max(rank["memory"] for rank in ranks),
        padding=1 - sum(tokens) / sum(computed),
        rate=work / cpu,
        rate_without_optimizer=work / (cpu - updates),
        weights=ranks[0]["weights"],
        tokens=tokens,
        supervised=supervised,
        losses=ranks[0]["losses"],
    )


def add(lists: Iterable[list[int]]) -> list[int]:
    return [sum(numbers) for numbers in zip(*lists, strict=True)]


def useful_flop(shape: Shape, lengths: Iterable[int], tokens: int, supervised: int, *, frozen: bool = False) -> float:
    """What must be multiplied and added, forward and backward; causal attention, each row with itself.

    `frozen`: weights get no gradient; what adapters multiply beside them is left out.
    """
    passes = 4 if frozen else 6
    layers = passes * (shape.multiplied - shape.embedding) * tokens
    head = passes * shape.embedding * supervised
    attention = 6 * shape.layers * shape.attended * sum(length**2 for length in lengths)
    return layers + head + attention


# ---- Side by side


def by_candidate(results: list[dict[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """Candidate -> round -> result."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        if "candidate" in result:
            found.setdefault(result["candidate"], {})[result["round"]] = result
    return found


def ratio(one: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], key: str) -> float | None:
    """The median over the rounds that both finished of one / other."""
    both = [n for n in one if n in other and not one[n]["error"] and not other[n]["error"]]
    return statistics.median(one[n][key] / other[n][key] for n in both) if both else None


def print_table(results: list[dict[str, Any]]) -> None:
    """A Markdown table, and below it what must be known to read it."""
    found = by_candidate(results)
    print(f"| {' | '.join(HEADER)} |\n|{'---|' * len(HEADER)}")
    notes = []
    for name, rounds in found.items():
        good = [result for result in rounds.values() if not result["error"]]
        if not good:
            error = next(iter(rounds.values()))["error"].replace("|", "\\|")
            print(f"| {name} | does not run: {error} |{' |' * (len(HEADER) - 2)}")
            continue
        print(f"| {' | '.join(cells(name, good, rounds, found.get(OURS, {})))} |")
        notes += [f"- {name}: {note}" for note in differences(good[0], found.get(OURS, {}))]
    if found.get(OURS, {}) and not all(result["error"] for result in found[OURS].values()):
        print("\n" + "\n".join(notes or ["All that ran learned the same tokens in each step; losses agree."]))


def cells(name: str, good: list[dict[str, Any]], rounds: dict[int, Any], ours: dict[int, Any]) -> list[str]:
    def pair(key: str) -> list[str]:
        to_ours = ratio(rounds, ours, key)
        return [f"{statistics.median(r[key] for r in good):.2f}", "-" if to_ours is None else f"{to_ours:.2f}"]

    last = good[0]
    marked = f"{name} *" if any(c.recommended and c.name == name for c in CANDIDATES) else name
    return [marked, *pair("cpu"), *pair("wall"), *pair("memory"), f"{last['padding']:.0%}", last["weights"],
            f"{last['losses'][-1]:.4f}"]  # fmt: skip


def differences(result: dict[str, Any], ours: dict[int, dict[str, Any]]) -> list[str]:
    """How a run's tokens and losses differ from ours, in words."""
    base = next((run for run in ours.values() if not run["error"]), None)
    if base is None:
        return []
    same = result["tokens"] == base["tokens"] and result["supervised"] == base["supervised"]
    notes = []
    if not same:
        what = [f"{sum(result[key]):,} {key} in {len(result[key])} steps (ours {sum(base[key]):,} in {len(base[key])})"
                for key in ("tokens", "supervised")]  # fmt: skip
        notes.append(f"other rows or tokens in a step: {'; '.join(what)}")
    loss, expected = (token_mean(r) if not same else r["losses"][-1] for r in (result, base))
    if not abs(loss / expected - 1) <= LOSS_BOUND:
        kind = "last loss" if same else "mean loss"
        notes.append(f"LOSS DIFFERS: {kind} {loss:.4f}, ours {expected:.4f}, bound {LOSS_BOUND:.0%}")
    return notes


def token_mean(result: dict[str, Any]) -> float:
    """The loss of the whole run, over supervised tokens."""
    weighted = zip(result["losses"], result["supervised"], strict=False)
    total: float = sum(loss * count for loss, count in weighted)
    return total / sum(result["supervised"][: len(result["losses"])])


def print_limit(results: list[dict[str, Any]]) -> None:
    """Ours as a share of the bare matrix product, in useful work a CPU second."""
    bare = {result["round"]: result["bare"] for result in results if "bare" in result}
    ours = {n: result for n, result in by_candidate(results).get(OURS, {}).items() if not result["error"]}
    if not bare or not ours:
        return
    limit = statistics.median(bare.values())
    share = {key: statistics.median(ours[n][key] / bare[n] for n in ours) for key in ("rate", "rate_without_optimizer")}
    print(
        f"\nBare bfloat16 product: {limit:.0f} GFLOP a CPU second. Useful work of `{OURS}`: {share['rate']:.0%} "
        f"of it over whole steps, {share['rate_without_optimizer']:.0%} without the optimizer's update."
    )


def print_targets(results: list[dict[str, Any]]) -> None:
    """CPU time for the same tokens: the fastest peers against ours, by kind of comparison."""
    found = by_candidate(results)

    def fastest(of: Callable[[Candidate], bool]) -> tuple[str, dict[int, Any]] | None:
        medians = {c.name: [r["cpu"] for r in found.get(c.name, {}).values() if not r["error"]]
                   for c in CANDIDATES if c.program not in ("ours", "reference") and of(c)}  # fmt: skip
        names = sorted((statistics.median(cpu), name) for name, cpu in medians.items() if cpu)
        return (names[0][1], found[names[0][1]]) if names else None

    comparisons = [
        ("fastest peer as recommended", fastest(lambda c: c.recommended), OURS),
        ("the reference's settings", ("reference single", found.get("reference single", {})), OURS),
        ("fastest peer, any layout", fastest(lambda c: True), OURS),
        ("fastest peer, single rows", fastest(lambda c: c.layout == "single"), "ours single"),
        ("fastest peer, end to end", fastest(lambda c: c.layout == "flat"), "ours flat"),
    ]
    for what, peer, base in comparisons:
        to_ours = ratio(peer[1], found.get(base, {}), "cpu") if peer else None
        if peer and to_ours is not None:
            print(f"CPU time, {what}: `{peer[0]}` {to_ours:.2f} x `{base}`")


def print_scaling(results: list[dict[str, Any]]) -> None:
    """Tokens a second of two ranks against twice one, at one thread each: one of the same engine, and without any."""
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for result in results:
        runs.setdefault(result["run"], {})[result["round"]] = result
    print("\n| ours | tokens/s | of one rank's times ranks | of one plain rank's | CPU time of one rank's |")
    print("|---|---|---|---|---|")
    for name, rounds in runs.items():
        ranks, one = int(name[-1]), runs.get(f"{name[:-1]}1", {})
        speeds, work = [ratio(base, rounds, "wall") for base in (one, runs["plain x1"])], ratio(rounds, one, "cpu")
        if None in (*speeds, work):
            error = next((r["error"] for r in rounds.values() if r["error"]), "one rank does not run")
            print(f"| {name} | does not run: {error} | | | |")
            continue
        rate = statistics.median(1000 / r["wall"] for r in rounds.values() if not r["error"])
        shares = [f"{speed / ranks:.0%}" for speed in speeds if speed is not None]
        print(f"| {name} | {rate:.0f} | {' | '.join(shares)} | {work:.2f} |")


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Bars of each candidate's CPU time for the same tokens over ours, one panel for each kind of run.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        sys.exit("--plot needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = list(dict.fromkeys(result["run"] for result in results))
    figure, panels = plt.subplots(
        1, len(runs), figsize=(5 * len(runs), 5), sharey=True, squeeze=False, layout="constrained"
    )
    names = [c.name for c in CANDIDATES if any(result.get("candidate") == c.name for result in results)]
    for panel, run in zip(panels[0], runs, strict=True):
        found = by_candidate([result for result in results if result["run"] == run])
        ratios = [ratio(found.get(name, {}), found.get(OURS, {}), "cpu") for name in names]
        colours = ["tab:orange" if name.startswith("ours") else "tab:blue" for name in names]
        bars = panel.barh(names, [value or 0 for value in ratios], color=colours)
        panel.bar_label(bars, ["does not run" if value is None else f"{value:.2f}" for value in ratios], padding=3)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(
            title=run,
            xlabel=f"CPU time for the same tokens\nover that of {OURS}",
            xlim=(0, 1.25 * max(v or 0 for v in [*ratios, 1])),
        )
    panels[0][0].invert_yaxis()
    figure.savefig(file, dpi=120)
