"""`ds-sft doctor CONFIG`: find out what would stop a run here, before it costs a night in the queue.

    ds-sft doctor CONFIG.yaml                                          # one box
    torchrun --nproc_per_node 8 -m ds_sft doctor CONFIG.yaml           # with its ranks
    srun --ntasks-per-node 8 slurm/task.sh python -m ds_sft doctor CONFIG.yaml    # slurm/train.sbatch does it first

Every rank says what it sees; rank 0 compares, measures the network, and prints one line a check. The exit code is 1 if
one failed, 2 for a mistake in the configuration.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ds_sft.commands.doctor_checks import Check, compare_nodes, judge_network
from ds_sft.commands.doctor_facts import look_around
from ds_sft.commands.flags import FlagParser
from ds_sft.config.keys import Config
from ds_sft.config.read import given_twice, load_config
from ds_sft.engine.zero import engine_config, stage
from ds_sft.errors import UserError
from ds_sft.ranks.devices import hide_gpus
from ds_sft.ranks.exits import exit_with
from ds_sft.ranks.launch import Launch, print_line, read_launch, rendezvous, require_groups
from ds_sft.ranks.network import Unreachable, connect, measure_network, patience


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
        rendezvous()
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
        print_line(json.dumps([asdict(check) for check in checks]) if given.json else checks_as_text(checks))
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


def checks_as_text(checks: Sequence[Check]) -> str:
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
        return [*compare_nodes([mine], config, zero_stage), port]
    everyone = store.exchange(mine)
    checks = compare_nodes(everyone, config, zero_stage) if launch.is_main else []
    if store.agree(not any(check.status == "fail" for check in checks)):
        group = 1 if launch.world_size == 1 else config.sequence_parallel
        network = measure_network(store, config.output_dir, sequence_parallel=group)
        checks += judge_network(network, everyone, config) if launch.is_main else []
    return checks
