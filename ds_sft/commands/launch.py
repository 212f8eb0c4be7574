"""`ds-sft launch CONFIG --nodes N --gpus-per-node G`: what a run on a cluster will be, and with Slurm its start.

    ds-sft launch --dry-run ds_configs/qwen3_dialog.yaml --nodes 2 --gpus-per-node 8 --time 24:00:00

Prints the batch arithmetic, the checkpoints and their size, and the command of every node, with Slurm and without.
Needs neither a GPU nor a cluster, and refuses what cannot work.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_sft.commands.flags import FlagParser
from ds_sft.commands.rows import count_usable, rows_of_epoch
from ds_sft.config.keys import Config
from ds_sft.config.read import load_config
from ds_sft.engine.zero import engine_config, stage
from ds_sft.errors import UserError
from ds_sft.plan.schedule import mean_tokens_of, sequences, slurm_seconds
from ds_sft.plan.size import ModelSize, in_units, model_folder, model_size, written_bytes
from ds_sft.plan.steps import Steps, steps_of
from ds_sft.plan.weights import choice_of
from ds_sft.ranks.launch import Launch, require_groups
from ds_sft.ranks.nodes import spanning_in_words
from ds_sft.shipped import clone, command, program

TEMPLATE = Path("slurm/train.sbatch")
NO_TEMPLATE = f"there is no {TEMPLATE} here: `ds-sft init --slurm` writes the templates"
SIGNAL_SECONDS = 600  # how long before its time limit slurm/train.sbatch saves
PORT = 29500  # torch's own default; slurm/job.sh derives one from the job's number
NODES_SHOWN = 4
FILLED = {  # how well it is known how many rows fill a packed sequence, or a micro batch of so many tokens
    "about": "Rows are {}: about that number of them, from the mean length in data_report.json of output_dir.",
    "at most": "Rows are {}: into how many is not known before they are encoded (a data_report.json in output_dir "
    "would say); steps and checkpoints are given as if each had max_length tokens, so at most that many.",
}
TRAVELS = "HF_HOME, HF_TOKEN, DS_SFT_CACHE, SWANLAB_API_KEY, proxies, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME"


@dataclass(frozen=True, kw_only=True)
class Node:
    """One machine of the run."""

    rank: int
    ranks: tuple[int, int]  # the first and the last of its ranks
    torchrun: str  # the command for it where there is no Slurm


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """What a run on a cluster will be."""

    nodes: list[Node]
    ranks_per_node: int
    world_size: int
    sequence_parallel: int
    across_nodes: str | None  # what is to be said of groups that span nodes
    zero_stage: int | None
    sbatch: str
    deepspeed: str
    master_addr: str
    master_port: int
    parameters: int | None
    trained_parameters: int | None
    rows: int  # of an epoch, or packed sequences
    known: str  # "exact"; where rows fill something "about", or "at most" where no row's length is known
    rows_per_step: int | None  # None: as many as max_tokens_per_batch holds
    steps_per_epoch: int
    steps: int
    checkpoints: list[int]  # the steps after which one is written
    checkpoints_kept: int
    checkpoint_bytes: int | None  # of one
    final_model_bytes: int | None
    batch: str


def main(argv: Sequence[str]) -> int:
    """Print what the run will be; without `--dry-run` submit it to Slurm too.

    Raises:
        UserError: the run cannot work like that.
    """
    parser = _parser()
    given, keys = parser.parse_known_args(argv)
    config = load_config(["--config", given.config, *keys], "ds-sft launch", flags=parser.flags)
    run = cluster_run(config, given, ["--config", given.config, *keys])
    print(json.dumps(asdict(run), indent=2) if given.json else cluster_run_in_words(run, config))
    if given.dry_run:
        return 0
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; --dry-run prints the commands for nodes without Slurm")
    if not template().exists():
        raise UserError(NO_TEMPLATE)
    return subprocess.call(shlex.split(run.sbatch))


def _parser() -> FlagParser:
    parser = FlagParser(
        "launch",
        "Say what a run on a cluster will be, and submit it with sbatch unless --dry-run is given.",
        "Any key of the configuration can follow: --learning_rate 2e-5.",
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of the run")
    parser.add_argument("--nodes", type=int, default=1, help="default: 1")
    parser.add_argument("--gpus-per-node", type=int, default=1, help="ranks of a node; 0: one rank on CPU (default: 1)")
    parser.add_argument("--time", help="Slurm's time limit: MINUTES, HH:MM:SS, D-HH:MM:SS; default: the template's")
    parser.add_argument("--hosts", help="names of the nodes, a,b,c, for the commands without Slurm")
    parser.add_argument("--port", type=int, default=PORT, help=f"of rank 0, without Slurm (default: {PORT})")
    parser.add_argument("--dry-run", action="store_true", help="print only")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def cluster_run(config: Config, given: argparse.Namespace, words: Sequence[str]) -> ClusterRun:
    """What a run will be on `given.nodes` nodes, started with the keys `words`.

    Raises:
        UserError: it cannot work like that.
    """
    if given.nodes < 1 or given.gpus_per_node < 0:
        raise UserError(
            f"--nodes {given.nodes} --gpus-per-node {given.gpus_per_node}: expected 1 or more nodes, 0 or more GPUs"
        )
    _check_time(given.time)
    per_node = max(1, given.gpus_per_node)
    ranks = given.nodes * per_node
    launch = Launch(launcher="slurm", world_size=ranks, local_world_size=per_node)
    require_groups(config.sequence_parallel, launch)
    zero_stage = stage(engine_config(config, launch))
    steps, known = _steps(config, ranks)
    saved = steps.checkpoints(config.training)
    size = _size(config)
    one, model = (None, None) if size is None else written_bytes(size, zero_stage, config)
    hosts = _hosts(given)
    return ClusterRun(
        nodes=[_node(rank, per_node, hosts, given, words) for rank in range(given.nodes)],
        ranks_per_node=per_node,
        world_size=ranks,
        sequence_parallel=config.sequence_parallel,
        across_nodes=spanning_in_words([rank // per_node for rank in range(ranks)], config.sequence_parallel),
        zero_stage=zero_stage,
        sbatch=_sbatch(given, words),
        deepspeed=_join("deepspeed", "--hostfile", "hosts", "--master_port", given.port, *program("deepspeed"), *words),
        master_addr=hosts[0],
        master_port=given.port,
        parameters=None if size is None else size.parameters,
        trained_parameters=None if size is None else size.parameters if size.trained is None else size.trained,
        rows=steps.num_rows,
        known=known,
        rows_per_step=steps.rows_per_step,
        steps_per_epoch=steps.steps_per_epoch,
        steps=steps.steps,
        checkpoints=saved,
        checkpoints_kept=min(len(saved), config.training.get("save_total_limit") or len(saved)),
        checkpoint_bytes=one,
        final_model_bytes=model,
        batch=steps.in_words(),
    )


def _check_time(text: str | None) -> None:
    if text is None:
        return
    seconds = slurm_seconds(text)
    if seconds <= SIGNAL_SECONDS:
        raise UserError(
            f"--time {text}: slurm/train.sbatch saves {SIGNAL_SECONDS} s before the limit, so it would stop at once; "
            f"give more than {SIGNAL_SECONDS // 60} minutes, or another --signal to sbatch"
        )


def _steps(config: Config, ranks: int) -> tuple[Steps, str]:
    """The steps, and how well they are known."""
    training, group = config.training, config.sequence_parallel
    rows, groups = rows_of_epoch(config, count_usable) or 0, ranks // group
    if not rows:
        raise UserError("train_file: no row is left to learn from: give more rows, or a smaller val_size")
    accumulation, mean = training["gradient_accumulation_steps"], mean_tokens_of(config)
    known = "at most" if mean is None else "about"
    if config.max_tokens_per_batch is not None and config.fills_batches:
        size = config.max_tokens_per_batch
        bins = -(-rows // max(1, size // config.max_length)) if mean is None else sequences(rows, mean, size)
        return steps_of(training, None, accumulation, groups, rows, max_tokens=size, num_bins=bins, group=group), known
    if config.packing != "none":
        rows = sequences(rows, mean or config.max_length, config.max_length)
    else:
        known = "exact"
    return steps_of(training, config.micro_batch, accumulation, groups, rows, group=group), known


def _size(config: Config) -> ModelSize | None:
    folder = model_folder(config.model_name_or_path)
    try:
        return None if folder is None else model_size(folder, choice_of(config))
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {config.model_name_or_path}: {error}") from None


def _hosts(given: argparse.Namespace) -> list[str]:
    if given.hosts is None:
        return [f"node{number}" for number in range(given.nodes)]
    hosts: list[str] = given.hosts.split(",")
    if len(hosts) != given.nodes:
        raise UserError(f"--hosts {given.hosts}: {len(hosts)} names for {given.nodes} nodes")
    return hosts


def template() -> Path:
    """The one in this folder, which a site has edited, else the clone's."""
    root = clone()
    return TEMPLATE if root is None or TEMPLATE.exists() else root / TEMPLATE


def _node(rank: int, per_node: int, hosts: Sequence[str], given: argparse.Namespace, words: Sequence[str]) -> Node:
    torchrun = _join(
        "torchrun", f"--nnodes={given.nodes}", f"--node_rank={rank}", f"--nproc_per_node={per_node}",
        f"--master_addr={hosts[0]}", f"--master_port={given.port}", "--max-restarts=0", *program("torchrun"), *words,
    )  # fmt: skip
    return Node(rank=rank, ranks=(rank * per_node, rank * per_node + per_node - 1), torchrun=torchrun)


def _sbatch(given: argparse.Namespace, words: Sequence[str]) -> str:
    time = [f"--time={given.time}"] if given.time else []
    flags = [f"--nodes={given.nodes}", f"--gpus-per-node={given.gpus_per_node}", *time]
    return _join("sbatch", *flags, template(), *words[1:])


def _join(*words: Any) -> str:
    return shlex.join(map(str, words))


# ---- For people


def cluster_run_in_words(run: ClusterRun, config: Config) -> str:
    """What is printed for people."""
    zero = "no DeepSpeed" if run.zero_stage is None else f"ZeRO-{run.zero_stage}"
    shown = run.nodes if len(run.nodes) <= NODES_SHOWN else [*run.nodes[: NODES_SHOWN - 1], run.nodes[-1]]
    lines = [
        f"{len(run.nodes)} nodes x {run.ranks_per_node} ranks = {run.world_size} ranks, {zero}.",
        *filter(None, [run.across_nodes]),
        run.batch,
        *(
            []
            if run.known == "exact"
            else [
                FILLED[run.known].format(
                    "packed into sequences" if config.packing != "none" else "filled into micro batches"
                )
            ]
        ),
        _checkpoints(run, config),
        "",
        "With Slurm:" if template().exists() else f"With Slurm ({NO_TEMPLATE}):",
        f"  {run.sbatch}",
        f"  It starts slurm/task.sh {command('python')} ... {_times(run.ranks_per_node)} on each node, with",
        "  consecutive RANKs on each, LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS, MASTER_ADDR the first node,",
        "  MASTER_PORT 15000 + job number modulo 15000.",
        "",
        "Without Slurm, on every node at about the same time:",
    ]
    for node in shown:
        first, last = node.ranks
        ranks = f"rank {first}" if first == last else f"ranks {first}-{last}"
        lines.append(f"  node {node.rank}, {ranks}:  {node.torchrun}")
        if node.rank == NODES_SHOWN - 2 and len(run.nodes) > NODES_SHOWN:
            lines.append("  ...")
    host = run.master_addr
    lines += [
        "or, where the first node reaches the others by ssh, there, with a file hosts that has a line for each such as",
        f"`{host} slots={run.ranks_per_node}`:",
        f"  {run.deepspeed}",
        f"Rank 0 answers at {host}:{run.master_port}. Every node needs what you use of {TRAVELS};",
        "deepspeed --hostfile takes them from lines NAME=VALUE in .deepspeed_env. More in slurm/README.md.",
    ]
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _checkpoints(run: ClusterRun, config: Config) -> str:
    if not run.checkpoints:
        return "Checkpoints: none (save_strategy). A run that is stopped starts again from its first step."
    count, kept = len(run.checkpoints), run.checkpoints_kept
    where = "" if kept == count else f", of which the last {kept} {'stays' if kept == 1 else 'stay'}"
    text = f"Checkpoints: {count}{where}"
    if run.checkpoint_bytes is None or run.final_model_bytes is None:
        return f"{text}; size unknown: {config.model_name_or_path} is not on this disk as safetensors."
    one, model = run.checkpoint_bytes, run.final_model_bytes
    written, disk = one * count + model, one * min(count, kept + 1) + model
    frozen = config.adapter != "none" or config.train_only
    trained = f"{run.trained_parameters:,} trained, of a model of " if frozen else ""
    return (
        f"{text}; {in_units(one)} each ({trained}{run.parameters:,} parameters), {in_units(written)} written in all, "
        f"{in_units(disk)} on disk at most."
    )
