"""`ds-sft doctor CONFIG`: find out what would stop a run here, before it costs a night in the queue.

    ds-sft doctor CONFIG.yaml                                          # one box
    torchrun --nproc_per_node 8 -m ds_sft doctor CONFIG.yaml           # with its ranks
    srun --ntasks-per-node 8 slurm/task.sh python -m ds_sft doctor CONFIG.yaml    # slurm/train.sbatch does it first

Every rank says what it sees; rank 0 compares, measures the network, and prints one line a check. The exit code is 1 if
one failed, 2 for a mistake in the configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_sft.commands.flags import FlagParser
from ds_sft.config.keys import Config
from ds_sft.config.read import given_twice, load_config
from ds_sft.data.files import BadRow, find_files
from ds_sft.data.records import read_dialogues, reading_of
from ds_sft.engine.zero import engine_config, stage
from ds_sft.errors import UserError
from ds_sft.plan.cost import collectives, exchanged
from ds_sft.plan.run import Engine
from ds_sft.plan.shape import read_shape
from ds_sft.plan.size import ModelSize, in_units, in_words, model_folder, model_size, written_bytes
from ds_sft.plan.source import looks_like_path, no_such_folder
from ds_sft.plan.weights import choice_of
from ds_sft.ranks.exits import exit_with
from ds_sft.ranks.launch import Launch, hide_gpus, print_line, read_launch, require_groups
from ds_sft.ranks.network import Exchange, Network, Unreachable, connect, measure_network, patience
from ds_sft.ranks.nodes import keep_inside, name_spanning
from ds_sft.results import git_commit, versions
from ds_sft.shipped import CONFIGS, PACKAGE

READ_SECONDS = 10.0  # of reading rows, on a rank of each node
CLOCK_SECONDS = 1.0  # more makes "newer than" of files on a shared disk a lie
SLOW_GPU_NETWORK = 1e9  # bytes/s between nodes: what the wrong network card gives
Facts = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: str  # pass, warn or fail
    value: str
    remedy: str = ""


def main(argv: Sequence[str]) -> int:
    """Examine this box, or as one of several ranks all of them."""
    parser, launch = _parser(), Launch(launcher="python")
    try:
        launch = read_launch()
        given, keys = parser.parse_known_args(argv)
        config = load_config(["--config", given.config, *keys], "ds-sft doctor", flags=parser.flags)
        for remark in given_twice(argv):
            launch.say(remark)
        if config.training.get("use_cpu"):
            hide_gpus(os.environ)
        if launch.distributed:  # else this is one process that examines one box
            require_groups(config.sequence_parallel, launch)
        zero_stage = stage(engine_config(config, launch))
        patience()
    except UserError as error:
        exit_with(str(error), launch)
    try:
        checks = examine(config, launch, zero_stage)
    except Unreachable as error:
        checks = [Check("network", "fail", str(error), error.remedy)]
    except OSError as error:  # another rank has said what is wrong, and is gone
        print_line(f"[rank {launch.rank} on {socket.gethostname()}] lost rank 0: {error}", sys.stderr)
        return 1
    if checks:
        print_line(json.dumps([asdict(check) for check in checks]) if given.json else as_text(checks))
    return int(any(check.status == "fail" for check in checks))


def _parser() -> FlagParser:
    parser = FlagParser(
        "doctor",
        "Find out what would stop a run here: code, devices, files, disk, network, clocks.",
        "Any key of the configuration can follow: --output_dir /scratch/run.\n"
        "On several ranks: torchrun --nproc_per_node 8 -m ds_sft doctor CONFIG; slurm/train.sbatch does it by itself.",
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of the run")
    parser.add_argument("--json", action="store_true", help="print a JSON list of checks")
    return parser


def as_text(checks: Sequence[Check]) -> str:
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status}  {check.name:<{width}}  {check.value}")
        if check.remedy:
            lines.append(f"      {'':<{width}}  -> {check.remedy}")
    counts = {status: sum(check.status == status for check in checks) for status in ("fail", "warn", "pass")}
    return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def examine(config: Config, launch: Launch, zero_stage: int | None) -> list[Check]:
    """All checks, on rank 0; nothing on the others.

    Raises:
        Unreachable: ranks cannot talk to each other.
    """
    mine = look_around(config, launch)
    try:
        store = connect(launch)
    except Unreachable as error:
        if launch.world_size > 1:
            raise
        status = "fail" if launch.distributed else "warn"  # a process that no launcher started trains without a port
        port = Check("network", status, str(error), error.remedy)
        return [*compare([mine], config, zero_stage), port]
    everyone = store.exchange(mine)
    checks = compare(everyone, config, zero_stage) if launch.is_main else []
    if store.agree(not any(check.status == "fail" for check in checks)):
        group = 1 if launch.world_size == 1 else config.sequence_parallel
        network = measure_network(store, config.output_dir, sequence_parallel=group)
        checks += judge_network(network, everyone, config) if launch.is_main else []
    return checks


# ---- What one rank sees


def look_around(config: Config, launch: Launch) -> Facts:
    """What this rank sees of its node; JSON."""
    seconds = min(READ_SECONDS, patience() / 2)  # the other ranks wait meanwhile
    return {
        "rank": launch.rank,
        "local_rank": launch.local_rank,
        "host": socket.gethostname(),
        "code": {"commit": git_commit(), "hash": _code_hash()},
        "config": config.to_dict(),
        "versions": versions(),
        "device": _device(launch, use_cpu=bool(config.training.get("use_cpu"))),
        "model": _trouble_or(lambda: _look_at_model(config)),
        "groups": _trouble_or(lambda: _look_at_groups(config)),
        "data": _trouble_or(lambda: _look_at_data(config, seconds if launch.local_rank == 0 else 0)),
        "output": _trouble_or(lambda: _look_at_output(config.output_dir)),
        "address": _own_address(),
    }


def _trouble_or(look: Callable[[], Facts]) -> Facts:
    try:
        return look()
    except (UserError, ValueError) as error:
        return {"trouble": str(error)}
    except OSError as error:
        return {"trouble": f"{error.filename}: {error.strerror}"}


def _code_hash() -> str:
    """Of every source file of this package, and of what `deepspeed` has names for: a checkout can differ from its
    commit."""
    digest = hashlib.sha256()
    for file in sorted([*PACKAGE.rglob("*.py"), *CONFIGS.glob("*.json")]):
        digest.update(f"{file.relative_to(PACKAGE)}\n".encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _device(launch: Launch, *, use_cpu: bool) -> Facts:
    import torch

    promised = "0" if use_cpu else os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0))
        trouble = f"Slurm gave {promised} GPUs, torch {torch.__version__} sees none" if promised != "0" else None
        return {"kind": "cpu", "name": f"CPU, {cores} cores", "trouble": trouble}
    count = torch.cuda.device_count()
    if launch.local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        return {"kind": "cuda", "name": "none", "trouble": f"local rank {launch.local_rank} finds {count} GPUs "
                f"(CUDA_VISIBLE_DEVICES={visible})"}  # fmt: skip
    found = torch.cuda.get_device_properties(launch.local_rank)
    return {"kind": "cuda", "name": f"{found.name}, {in_units(found.total_memory)}", "trouble": None}


def _look_at_model(config: Config) -> Facts:
    folder = model_folder(config.model_name_or_path)
    if folder is None:
        if looks_like_path(config.model_name_or_path):
            raise UserError(f"{config.model_name_or_path}: {no_such_folder(config.model_name_or_path)}")
        return {"download": True}
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: this folder has no config.json, so it is not a model")
    (folder / "config.json").read_bytes()
    size = model_size(folder, choice_of(config))
    return {"folder": str(folder), "size": size and asdict(size)}


def _look_at_groups(config: Config) -> Facts:
    """Where the model is here, whether ranks can share its rows.

    Raises:
        UserError: they cannot.
    """
    folder = model_folder(config.model_name_or_path)
    if folder is not None and (folder / "config.json").is_file():
        from ds_sft.model.sequence_support import require_shareable

        require_shareable(config)
    return {}


def _look_at_data(config: Config, seconds: float) -> Facts:
    """Size of each file, and how many rows were read: the first of each file, and all others for which there is time.

    Raises:
        UserError: a file has no row, or one of those read cannot be used and `on_bad_row` is error.
    """
    sizes, rows, whole, until = {}, 0, True, time.monotonic() + seconds
    for key, value in (("train_file", config.train_file), ("eval_file", config.eval_file)):
        for file in find_files(value, key) if value is not None else []:
            before = rows
            for line, row in read_dialogues(file, reading_of(config, file)):
                if isinstance(row, BadRow) and config.on_bad_row == "error":
                    raise UserError(f"{file.name}:{line}: {row} (on_bad_row: skip leaves such rows out)")
                rows += 1
                if time.monotonic() > until:
                    whole = False
                    break
            if rows == before:
                raise UserError(f"{file.name}: no row in it")
            sizes[file.name] = file.size or 0
    return {"bytes": sizes, "rows": rows, "whole": whole}


def _look_at_output(folder: Path) -> Facts:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f".probe-{uuid.uuid4().hex}"
    probe.write_bytes(b"")
    probe.unlink()
    return {"free": shutil.disk_usage(folder).free}


def _own_address() -> Facts:
    """The address that this node's name stands for; gloo listens there."""
    try:
        return {"address": socket.gethostbyname(socket.gethostname())}
    except OSError as error:
        return {"trouble": f"its own name does not resolve: {error.strerror}"}


# ---- What rank 0 makes of it


def compare(everyone: Sequence[Facts], config: Config, zero_stage: int | None) -> list[Check]:
    """The checks that need no network."""
    nodes = [facts for facts in everyone if facts["local_rank"] == 0]
    return [
        _same("code", nodes, lambda facts: facts["code"], _describe_code,
              "use one clone on a shared disk, or install one wheel on every node"),
        _same("config", nodes, lambda facts: facts["config"], lambda _: "the same on all nodes",
              "give every node the same file and flags"),
        _same("packages", nodes, lambda facts: facts["versions"], _describe_versions,
              "install the same versions on every node, or one environment on a shared disk"),
        _check_devices(everyone),
        _check_model(nodes, config),
        _check_data(nodes),
        _check_output(nodes),
        *_check_disk(nodes, config, zero_stage),
        _check_names(nodes),
        *_check_groups(everyone, config.sequence_parallel),
    ]  # fmt: skip


def _same(
    name: str, nodes: Sequence[Facts], key: Callable[[Facts], Facts], describe: Callable[[Facts], str], remedy: str
) -> Check:
    """Pass if all nodes say the same; else the first difference."""
    first = key(nodes[0])
    for facts in nodes[1:]:
        for part, value in key(facts).items():
            if value != first.get(part):
                found = f"{part}: {first.get(part)} on {nodes[0]['host']}, {value} on {facts['host']}"
                return Check(name, "fail", found, remedy)
    return Check(name, "pass", describe(first))


def _describe_code(code: Facts) -> str:
    commit = code["commit"]
    return f"{commit[:12] if commit else 'no git commit'}, hash {code['hash']}"


def _describe_versions(found: Facts) -> str:
    return ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers", "deepspeed"))


def _troubles(name: str, everyone: Sequence[Facts], remedy: str) -> Check | None:
    """A fail that names the hosts where something is wrong with a thing."""
    bad = [facts for facts in everyone if facts[name].get("trouble")]
    if not bad:
        return None
    hosts = ", ".join(dict.fromkeys(facts["host"] for facts in bad))
    return Check(name, "fail", f"{bad[0][name]['trouble']} (on {hosts})", remedy)


def _check_devices(everyone: Sequence[Facts]) -> Check:
    kinds = {facts["device"]["kind"] for facts in everyone}
    named = {facts["host"]: facts["device"]["name"] for facts in everyone}
    trouble = _troubles("device", everyone, "nvidia-smi on that node; torch must be the build for its CUDA, and every "
                        "rank must see all GPUs of its node (srun --gpu-bind=none, no --gpus-per-task)")  # fmt: skip
    if trouble:
        return trouble
    if len(kinds) > 1:
        return Check("device", "fail", f"GPUs on some nodes only: {named}", "choose nodes of one kind (--constraint)")
    return Check("device", "pass", f"{len(everyone)} x {', '.join(sorted(set(named.values())))}")


def _check_model(nodes: Sequence[Facts], config: Config) -> Check:
    trouble = _troubles("model", nodes, "model_name_or_path must be readable on every node, with its files complete")
    if trouble:
        return trouble
    absent = [facts["host"] for facts in nodes if facts["model"].get("download")]
    if absent:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        value = f"{config.model_name_or_path} is not on {', '.join(absent)}"
        remedy = f"hf download {config.model_name_or_path} where there is a network, into an HF_HOME that all nodes see"
        return Check("model", "fail" if offline else "warn", value, remedy)
    found = nodes[0]["model"]
    size = in_words(ModelSize(**found["size"])) if found["size"] else "its files do not tell how large"
    return Check("model", "pass", f"{found['folder']}: {size}")


def _check_data(nodes: Sequence[Facts]) -> Check:
    trouble = _troubles("data", nodes, "train_file and eval_file must be readable on every node")
    if trouble:
        return trouble
    sizes = nodes[0]["data"]["bytes"]
    same = _same("data", nodes, lambda facts: facts["data"]["bytes"], str, "copy the same files to every node")
    if same.status == "fail":
        return same
    files = "1 file" if len(sizes) == 1 else f"{len(sizes)} files"
    found = nodes[0]["data"]
    rows = "1 row" if found["rows"] == 1 else f"{found['rows']:,} rows"
    read = f"all {rows} read" if found["whole"] else f"only {rows} read in time, at least the first of each file"
    return Check("data", "pass", f"{files}, {in_units(sum(sizes.values()))}, {read}")


def _check_output(nodes: Sequence[Facts]) -> Check:
    trouble = _troubles("output", nodes, "output_dir must be a folder that can be written on every node")
    return trouble or Check("output", "pass", "can be written")


def _check_disk(nodes: Sequence[Facts], config: Config, zero_stage: int | None) -> list[Check]:
    if any("trouble" in facts["output"] for facts in nodes):
        return []
    fullest = min(nodes, key=lambda facts: facts["output"]["free"])
    free = fullest["output"]["free"]
    size = nodes[0]["model"].get("size")
    if size is None:
        return [Check("disk", "pass", f"{in_units(free)} free")]
    one, model = written_bytes(ModelSize(**size), zero_stage, config)
    room = max(0, free - model) // one
    wanted = (config.training.get("save_total_limit") or 2) + 1  # the new one is written before the oldest goes
    status = "fail" if room < 1 else "warn" if room < wanted else "pass"
    remedy = f"free space on {fullest['host']}, lower save_total_limit, or name an output_dir on another disk"
    value = f"{in_units(free)} free: room for {room:,} checkpoints of {in_units(one)} beside the model"
    return [Check("disk", status, value, "" if status == "pass" else remedy)]


def _check_names(nodes: Sequence[Facts]) -> Check:
    """gloo, which carries some agreements on GPUs too, listens on the address of the node's own name."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    remedy = (
        "export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (slurm/site.sh): the card that joins the nodes (ip address)"
    )
    if named:
        return Check("names", "pass", f"GLOO_SOCKET_IFNAME={named}")
    trouble = _troubles("address", nodes, remedy)
    if trouble:
        return Check("names", "fail", trouble.value, remedy)
    loop = len(nodes) > 1 and [facts["host"] for facts in nodes if facts["address"]["address"].startswith("127.")]
    if loop:
        return Check(
            "names", "fail", f"the name of {', '.join(loop)} stands for 127.*, which only that node reaches", remedy
        )
    return Check("names", "pass", ", ".join(f"{facts['host']} {facts['address']['address']}" for facts in nodes[:4]))


def _check_groups(everyone: Sequence[Facts], size: int) -> list[Check]:
    """Whether ranks can share the rows of this model, and what one process that examines one box cannot see of it."""
    if trouble := _troubles("groups", everyone, remedy=""):  # it says itself what to write
        return [trouble]
    if size == 1 or len(everyone) > 1:
        return []
    remedy = f"torchrun --nproc_per_node {size} -m ds_sft doctor CONFIG measures what they exchange"
    return [Check("groups", "warn", f"sequence_parallel: {size}: of a group only one rank is here", remedy)]


def judge_network(network: Network, everyone: Sequence[Facts], config: Config) -> list[Check]:
    """What was measured between the ranks, or by one with itself."""
    if network.world_size == 1:
        return [
            Check("network", "pass", f"listens on {network.address}:{network.port}"),
            Check("collectives", "pass", f"{network.backend}: {network.latency * 1e3:.2f} ms a round trip of one rank"),
        ]
    num_nodes = sum(facts["local_rank"] == 0 for facts in everyone)
    checks = [Check("network", "pass", f"every rank reaches {network.address}:{network.port}")]
    if num_nodes > 1:
        checks.append(Check("output", "pass", f"{'shared by the nodes' if network.shared else 'one on each node'}"))
    slow = num_nodes > 1 and network.backend == "nccl" and network.bandwidth < SLOW_GPU_NETWORK
    checks.append(
        Check(
            "collectives",
            "warn" if slow else "pass",
            f"{network.backend}: {network.latency * 1e3:.2f} ms a round trip, {network.bandwidth / 1e9:.2f} GB/s",
            "NCCL_DEBUG=INFO shows the card it took; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose another" if slow else "",
        )
    )
    size = everyone[0]["model"].get("size")
    if network.exchange is not None:
        checks.append(judge_exchange(network.exchange, config))
    if size is not None:
        checks.append(Check("ZeRO", "pass", _estimate(ModelSize(**size), network, config)))
    late = network.clock_skew > CLOCK_SECONDS
    remedy = "set the clocks (chronyc tracking on each node)" if late else ""
    return [*checks, Check("clocks", "warn" if late else "pass", f"{network.clock_skew:.2f} s apart", remedy)]


def judge_exchange(exchange: Exchange, config: Config) -> Check:
    """How fast ranks that share rows exchange them, and what it costs that a group spans nodes."""
    nodes, size = exchange.nodes, exchange.size
    across = name_spanning(nodes, size)
    where = across or f"groups of {size} ranks, each in one node"
    inside, between = (speed and f"{speed / 1e9:.2f} GB/s" for speed in (exchange.inside, exchange.between))
    speeds = between if inside is None else f"{between}, {inside} inside a node" if between else inside
    value = f"{where}: {exchange.latency * 1e3:.2f} ms a round trip, {speeds}{_waiting(exchange, config)}"
    return Check("exchange", "warn" if across else "pass", value, keep_inside(nodes, size) if across else "")


def _waiting(exchange: Exchange, config: Config) -> str:
    """Seconds that a row of `max_length` waits for exchanges: what `ds-sft plan` counts, at the measured speed."""
    try:
        shape = read_shape(config.model_name_or_path)
    except UserError:  # an architecture that the planner does not know
        return ""
    half = config.training.get("bf16") or config.training.get("fp16")
    again = bool(config.training["activation_checkpointing"])
    sent = exchanged(shape, config.max_length, exchange.size, 2 if half else 4, again=again)
    seconds, *inside = (f"{sent / speed:.2g} s" for speed in (exchange.between, exchange.inside) if speed)
    otherwise = f" instead of {inside[0]}" if inside else ""
    return f"; a row of {config.max_length:,} tokens waits about {seconds}{otherwise}"


def _estimate(size: ModelSize, network: Network, config: Config) -> str:
    """Seconds of a step spent communicating if nothing overlaps: what `ds-sft plan` counts, at the measured speed."""
    half = config.training.get("bf16") or config.training.get("fp16")
    trained = size.parameters if size.trained is None else size.trained
    weights, frozen = ((2 if half else 4) * number for number in (trained, size.frozen))
    micro_batches, ranks = config.training["gradient_accumulation_steps"], network.world_size
    two, three = (
        sum(collectives(Engine(stage=stage), weights, ranks, micro_batches, frozen=frozen)) / network.bandwidth
        for stage in (2, 3)
    )
    return (
        f"communication takes about {two:.2g} s a step under ZeRO-2, {three:.2g} s under ZeRO-3 "
        f"({micro_batches} micro batches), less what overlaps"
    )
