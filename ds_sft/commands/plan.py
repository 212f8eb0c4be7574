"""`ds-sft plan [CONFIG]`: what a run will need, before it is queued.

    ds-sft plan ds_configs/qwen3_dialog.yaml --nodes 2 --gpus-per-node 8 --gpu-memory 80GB
    ds-sft plan ds_configs/qwen3_dialog.yaml --max_length 8192 --json        # keys of the run are flags here too
    ds-sft plan ds_configs/qwen3_dialog.yaml --write planned.yaml            # the recommended configuration
    ds-sft plan ds_configs/demo.yaml --gpus-per-node 0                       # this machine's CPU, one process
    ds-sft plan ds_configs/qwen3_dialog.yaml --sweep nodes=1..128 --plot sweep.png

The exit code is 1 if nothing fits, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ds_sft.commands.flag_values import count, count_or_none, flops, size, with_unit
from ds_sft.commands.flags import FlagParser
from ds_sft.commands.plan_answers import Plan
from ds_sft.config.change import with_changes
from ds_sft.config.keys import Config
from ds_sft.config.read import config_file, load_config
from ds_sft.config.upstream_keys import ALIASES
from ds_sft.errors import UserError
from ds_sft.plan.layouts import NAMED
from ds_sft.plan.schedule import slurm_seconds

TOO_LITTLE = 1  # exit code
GPUS = 8  # of a node, where nobody says it
ANOTHER_MACHINE = {"--nodes", "--gpus-per-node", "--gpu-memory"}  # flags that describe one; its disk is not here


def main(argv: Sequence[str]) -> int:
    """Plan a run; `TOO_LITTLE` where nothing fits, or the disk or the time limit are short, 2 (raised) for a mistake.

    Raises:
        UserError: a mistake in the configuration or a flag, or a model that cannot be planned.
    """
    flags = parser()
    given, rest = flags.parse_known_args(list(argv))
    if given.plot and not given.sweep:
        raise UserError("--plot: draws a sweep: give --sweep nodes=1..128 as well")
    if given.write and given.sweep:
        raise UserError("--write: a sweep recommends nothing: leave out --sweep or --write")
    if given.gpus_per_node == 0 and (given.sweep or given.nodes > 1):
        flag = "--sweep" if given.sweep else "--nodes"
        raise UserError(f"--gpus-per-node 0: a plan for a CPU is of one process: leave out {flag}")
    config = load_config(rest, prog="ds-sft plan CONFIG", flags=flags.flags)
    described = bool(ANOTHER_MACHINE & {word.partition("=")[0] for word in argv})
    settle_gpus(given, use_cpu=bool(config.training.get("use_cpu")), described=described or bool(given.sweep))
    given.elsewhere = given.gpus_per_node > 0 and described
    plan = Plan(config, given)
    if given.sweep:
        from ds_sft.commands.sweep import show_sweep

        return show_sweep(plan.base, plan.hardware, given.sweep, given.plot, as_json=given.json)
    found = plan.to_dict()
    if given.json:
        print(json.dumps(found, indent=2))
    else:
        from ds_sft.commands.plan_tables import show_plan

        show_plan(found, given)
    if given.write and plan.best:
        write_recommended(plan, rest, given.write)
    elif given.write:
        print(f"--write {given.write}: nothing is written, as nothing fits", file=sys.stderr)
    if not found["short"]:
        return 0
    print(f"ds-sft plan: too little {' and '.join(found['short'])} for this run", file=sys.stderr)
    return TOO_LITTLE


def settle_gpus(given: argparse.Namespace, *, use_cpu: bool, described: bool) -> None:
    """How many GPUs a node has: none for a run that is asked to use none, unless flags describe a machine with some."""
    none = use_cpu and not described
    if none:
        print("use_cpu: yes: the plan is for this machine's CPU; --gpus-per-node 8 plans for GPUs.", file=sys.stderr)
    elif use_cpu and given.gpus_per_node != 0:
        print("use_cpu: yes: the run uses no GPU; this plan is for GPUs, as its flags say.", file=sys.stderr)
    if given.gpus_per_node is None:
        given.gpus_per_node = 0 if none else GPUS


def parser() -> FlagParser:
    made = FlagParser("plan", __doc__)  # CONFIG is `load_config`'s: argparse would take the value of a key for it
    made.add_argument("--nodes", type=count, default=1, help="[%(default)s]")
    made.add_argument("--gpus-per-node", type=count_or_none,
                      help=f"0: one process on a CPU [{GPUS}; under use_cpu: yes 0]")  # fmt: skip
    made.add_argument("--gpu-memory", type=with_unit, default=size("80GB"), metavar="80GB", help="of one GPU [80GB]")
    made.add_argument(
        "--host-memory", type=with_unit, metavar="512GB", help="of one node [not checked; of a CPU: what is here]"
    )
    made.add_argument("--interconnect", type=with_unit, default=25e9, metavar="25GB",
                      help="bytes a second and GPU between nodes, reached: its card's, or its part of a shared one's; "
                           "what `ds-sft doctor` measures, divided by a node's GPUs [25GB: 200 Gbit/s]")  # fmt: skip
    made.add_argument("--nvlink", type=with_unit, default=200e9, metavar="200GB",
                      help="bytes a second and GPU inside a node, reached [200GB]")  # fmt: skip
    made.add_argument("--host-link", type=with_unit, default=20e9, metavar="20GB",
                      help="bytes a second and GPU to host memory [20GB]")  # fmt: skip
    made.add_argument("--flops", type=flops, metavar="150T",
                      help="floating-point operations a second that a GPU or this CPU reaches [GPU: 150T]")  # fmt: skip
    made.add_argument(
        "--tokens-per-second", type=size, help="of all GPUs, measured [run.json of output_dir, else --flops]"
    )
    made.add_argument("--rows", type=count, help="of training [counted in train_file]")
    made.add_argument("--mean-tokens", type=size, help="of a row [data_report.json of output_dir, else max_length]")
    made.add_argument("--time-limit", type=slurm_seconds, metavar="D-HH:MM:SS", help="of the job, as Slurm writes it")
    made.add_argument("--write", type=Path, metavar="FILE.yaml", help="save the recommended configuration")
    made.add_argument("--json", action="store_true", help="everything as JSON, in bytes and seconds")
    made.add_argument("--sweep", metavar="nodes=1..128", help="scaling instead: memory, time, efficiency by nodes")
    made.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the sweep (pip install matplotlib)")
    return made


def write_recommended(plan: Plan, words: Sequence[str], path: Path) -> None:
    """Save the recommended configuration: the user's file, in which only changes what is recommended or was a flag.

    Raises:
        UserError: the file cannot be written.
    """
    wanted = recommended(plan)
    then, now = plan.config.to_dict(), wanted.to_dict()
    flags = {ALIASES.get(name, name) for name in (word[2:].partition("=")[0] for word in words if word[:2] == "--")}
    changes = {name: now.get(name) for name in then | now if name in flags or then.get(name) != now.get(name)}
    file = file_among(words)
    text = "{}" if file is None else file.read_text(encoding="utf-8")
    try:
        path.write_text(with_changes(text, changes), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--write: {path}: cannot be written: {error.strerror}") from None
    print(f"Saved the recommended configuration: {path}", file=sys.stderr)


def file_among(words: Sequence[str]) -> Path | None:
    """The run's YAML in a command line that was read before; None where all keys are flags."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word.partition("=")[0] == "--config":
            return config_file(word.partition("=")[2] or after)
    return config_file(words[0]) if words and not words[0].startswith("--") else None


def recommended(plan: Plan) -> Config:
    """The configuration with the recommended layout, micro batch, accumulation and checkpointing."""
    best, config = plan.chosen, plan.config
    run, training = best.run, dict(config.training)
    engine = training.get("deepspeed") if best.name == plan.configured else None
    if engine is None and best.name in NAMED:
        engine = NAMED[best.name]
    checkpointing = "offload" if run.inputs_on_host else run.checkpointing
    training |= {"gradient_accumulation_steps": run.accumulation, "activation_checkpointing": checkpointing,
                 "deepspeed": engine}  # fmt: skip
    most = run.max_tokens
    if config.fills_batches:
        most = run.batch_tokens
    else:
        training["per_device_train_batch_size"] = run.micro_batch
    return replace(config, max_tokens_per_batch=most, sequence_parallel=run.sequence, training=training)
