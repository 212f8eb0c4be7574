"""Where a run starts: at its beginning, at the newest checkpoint that every rank can use, or behind its export.

A checkpoint can be used when its files are still those that its manifest lists. What the run has changed since then
decides whether it may go on, and with how many rows a step.

Nothing here imports torch until ranks have to agree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ds_sft.checkpoints.identity import DATA, DEALING, Changes, changes, changes_in_words
from ds_sft.checkpoints.manifest import Broken, Checkpoint, check_files, read_manifest, steps_in
from ds_sft.checkpoints.other_run import another_run, is_exported, is_finished, refuse_another_run, refuse_another_stage
from ds_sft.checkpoints.rotate import move_aside
from ds_sft.checkpoints.storage import Site
from ds_sft.config.keys import OUR_ORDERS, TORCH_ADAMW, Config
from ds_sft.errors import UserError
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch, slurm_job
from ds_sft.results import EXPORTED, RESULTS

BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
SIZE = {"rows_a_step", "dataloader_drop_last"}  # how many rows of an epoch's order a step takes, not their order
SET_OUT = ".set-out"  # the Slurm job that started anew in an output folder, or from a checkpoint that was named


def choose_checkpoint(resume: str, output_dir: Path, site: Site) -> Checkpoint | None:
    """The checkpoint to resume from, the same on all ranks; all must call it. Says which, and why not a newer one.

    Args:
        resume: "never", "auto" (the newest usable one in `output_dir`), or the path of one.

    Raises:
        UserError: the one that was named cannot be used.
    """
    if resume == "never":
        return None
    if resume != "auto":
        found, reason = _usable_everywhere(Path(resume), site)
        if found is None:
            raise UserError(f"resume: {resume}: {reason}")
        site.launch.say(f"Resuming from {found.path}, step {found.step:,}.")
        return found
    steps = sorted({step for steps in gather(steps_in(output_dir)) for step in steps}, reverse=True)
    for step in steps:
        folder = output_dir / f"checkpoint-{step}"
        found, reason = _usable_everywhere(folder, site)
        if found is not None:
            site.launch.say(f"Resuming from {folder}, step {step:,}, the newest usable checkpoint.")
            return found
        site.launch.say(f"Passed over {folder}: {reason}.")
    if steps:
        site.launch.say(f"No checkpoint in {output_dir} is usable: starting from the beginning.")
    return None


def _usable_everywhere(folder: Path, site: Site) -> tuple[Checkpoint | None, str]:
    """The checkpoint, or why it cannot be used on some rank; the same answer on all."""
    manifest: dict[str, Any] = {}
    trouble = None
    try:
        manifest = read_manifest(folder)
    except Broken as broken:
        trouble = broken.reason
    known = gather((manifest.get("save_id"), trouble))
    if not any(reason for _, reason in known) and len({save for save, _ in known}) > 1:
        trouble = "the nodes have it from different saves"
    elif trouble is None:
        trouble = _trouble_with(folder, manifest, site)
    everywhere = gather(trouble)
    for rank, reason in enumerate(everywhere):
        if reason:
            return None, reason + (f" (rank {rank})" if site.launch.world_size > 1 else "")
    return Checkpoint(folder, manifest), ""


def _trouble_with(folder: Path, manifest: Mapping[str, Any], site: Site) -> str | None:
    if manifest.get("model_only"):
        return "it has the weights alone (save_only_model)"
    files = manifest["files"]
    try:
        check_files(folder, {name: files[name] for name in site.mine(files)})
    except Broken as broken:
        return broken.reason
    return None


@dataclass(frozen=True)
class Start:
    """Where a run starts: at its beginning, at a checkpoint, behind its export, or not at all: it is finished."""

    checkpoint: Checkpoint | None = None
    finished: bool = False
    exported: bool = False  # trained and exported, and stopped behind that
    accumulation: int = 0  # micro batches a step, where the checkpoint decides it
    seam: Mapping[str, int] = field(default_factory=dict)  # `micro_batches.Seam`, where rows were dealt in another way
    changed: Changes = field(default_factory=dict)  # what it goes on with that was otherwise at the checkpoint
    universal: bool = False  # the checkpoint is of another number of ranks and has to be converted

    @property
    def folder(self) -> Path | None:
        """The output folder of the run to go on from; None at the beginning."""
        return None if self.checkpoint is None else self.checkpoint.path.parent

    @property
    def metrics_bytes(self) -> int | None:
        """The size that metrics.jsonl had at the checkpoint; None at the beginning."""
        return None if self.checkpoint is None else int(self.checkpoint.manifest["metrics_bytes"])


def where_to_start(config: Config, this_run: Mapping[str, Any], site: Site) -> Start:
    """Decide it on all ranks; all must call it. `this_run` is that of rank 0, see `identity.py`.

    Raises:
        UserError: the folder holds another run, or the checkpoint named cannot be used.
    """
    if config.training.get("save_only_model"):
        site.launch.say("Warning: save_only_model: a run that is stopped cannot go on from checkpoints of the weights.")
    resume = gather("auto" if _was_requeued(config) else config.resume)[0]
    if resume == "auto" and is_finished(config, this_run, site.launch):
        return Start(finished=True)
    if resume == "auto" and is_exported(config, this_run, site.launch):
        return Start(exported=True)
    found = choose_checkpoint(resume, config.output_dir, site)
    if found is None and resume != config.resume:  # requeued before the first save
        found = choose_checkpoint(config.resume, config.output_dir, site)
    changed: Changes = {}
    if found is not None:
        stages = found.manifest["zero_stage"], gather(this_run["zero_stage"])[0]
        refuse_another_stage(f"{found.path} was saved", stages, config, site.launch)
        changed = gather(changes(found.manifest, this_run))[0]
        refuse_another_run(found.path, changed, this_run, config)
    if site.leader and resume != "auto":
        here = found is not None and found.path.resolve().parent == config.output_dir.resolve()
        move_aside(config.output_dir, found.step if here and found else 0, site.launch)
        _set_out(config)
    gather(None)  # nobody writes into the folder before that
    return Start() if found is None else _fit(found, changed, config, site)


def _set_out(config: Config) -> None:
    """Remember that this Slurm job's `resume: never` or `resume: PATH` was obeyed."""
    job = slurm_job()
    if job is not None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        for old in (RESULTS, EXPORTED):  # of an earlier run
            (config.output_dir / old).unlink(missing_ok=True)
        (config.output_dir / SET_OUT).write_text(job.number, encoding="utf-8")


def _was_requeued(config: Config) -> bool:
    """Whether an earlier start of this Slurm job has set out as `resume` says: it goes on then, or would never end."""
    job = slurm_job()
    if job is None or not job.restarts:
        return False
    with contextlib.suppress(OSError):
        return (config.output_dir / SET_OUT).read_text(encoding="utf-8") == job.number
    return False


def _fit(found: Checkpoint, changed: Changes, config: Config, site: Site) -> Start:
    """Keep the rows of a step, on however many ranks, unless others were asked for.

    Raises:
        UserError: this number of ranks cannot have as many (says which can); rows would come twice or never.
    """
    then, launch = found.manifest, site.launch
    other_ranks = then["world_size"] != launch.world_size
    universal = other_ranks and then["zero_stage"] is not None
    if universal:
        _require_convertible(found, config, launch.world_size)
    accumulation = _accumulation(found, config, site)
    micro_batches = accumulation * _groups(config, launch)
    a_step = {"rows_a_step": config.micro_batch * micro_batches, "micro_batches_a_step": micro_batches}
    kind = _kind(config)
    size = {kind: (then.get(kind), a_step[kind])} if then.get(kind) != a_step[kind] else {}
    dealing = DEALING if config.packing != "none" else DEALING - {"max_length"}
    dealt_anew = size | {name: pair for name, pair in changed.items() if name in dealing or name == DATA}
    if dealt_anew:
        _refuse_rows_twice_or_never(found, dealt_anew, config, site)
    now = {**dict(zip(BATCH_KEYS, (config.micro_batch, accumulation), strict=True)), "world_size": launch.world_size,
           "sequence_parallel": config.sequence_parallel}  # fmt: skip
    before = {"sequence_parallel": 1, **then}
    batch = {name: (before[name], value) for name, value in now.items() if before[name] != value}
    if changed or size:
        launch.say(f"Going on with what has changed: {changes_in_words(changed | batch | size)}.")
    return Start(
        found,
        accumulation=accumulation,
        seam=then.get("here") or {} if dealt_anew else then.get("seam") or {},
        changed=changed | batch | size,
        universal=universal,
    )


def _groups(config: Config, launch: Launch) -> int:
    """How many ranks have rows of their own, or groups of them that share theirs."""
    return launch.world_size // config.sequence_parallel


def _ranks(world_size: int, group: int) -> str:
    return f"{world_size} ranks" + (f" with sequence_parallel: {group}" if group > 1 else "")


def _kind(config: Config) -> str:
    """What a step has a number of, as the manifest calls it."""
    return "micro_batches_a_step" if config.fills_batches else "rows_a_step"


def _accumulation(found: Checkpoint, config: Config, site: Site) -> int:
    """The one asked for where it keeps the rows of a step, or was changed on purpose; else the one that keeps them."""
    then, launch = found.manifest, site.launch
    micro, asked = config.micro_batch, int(config.training["gradient_accumulation_steps"])
    group = then.get("sequence_parallel", 1)
    other_ranks = (then["world_size"], group) != (launch.world_size, config.sequence_parallel)
    before = then.get("batch") or {key: then[key] for key in BATCH_KEYS}  # as asked for; ranks may have changed it
    now = dict(zip(BATCH_KEYS, (micro, asked), strict=True))
    changed = {key: (before[key], now[key]) for key in BATCH_KEYS if before[key] != now[key]}
    if config.training.get("train_sampling_strategy", "random") not in OUR_ORDERS and (changed or other_ranks):
        here = _ranks(launch.world_size, config.sequence_parallel).replace(" ranks", "", 1)
        what = f"{_ranks(then['world_size'], group)} saved it, this run has {here}" if other_ranks else ""
        raise UserError(
            f"{found.path}: {what or changes_in_words(changed)}: the order of rows "
            f"can only be kept with train_sampling_strategy {' or '.join(OUR_ORDERS)}"
        )
    if then["world_size"] != launch.world_size:
        _require_one_folder(found, site)
    a_step = then.get(_kind(config))
    if a_step is None or (changed and config.resume_anyway):
        return asked
    if changed and not other_ranks and a_step != micro * asked * _groups(config, launch):
        raise UserError(another_run(found.path, changed))
    return _keep_a_step(found, a_step, config, launch)


def _keep_a_step(found: Checkpoint, a_step: int, config: Config, launch: Launch) -> int:
    """The accumulation with which a step stays as large on this number of ranks; says it where it decides it."""
    then, a_micro_batch = found.manifest, config.micro_batch * _groups(config, launch)
    what = "micro batches" if config.fills_batches else "rows"
    if a_step % a_micro_batch:
        raise UserError(_numbers_that_work(found, a_step, config, launch, what))
    accumulation = int(a_step // a_micro_batch)
    kept = f"gradient_accumulation_steps is set to {accumulation}, so that a step keeps its {a_step} {what}."
    before = _ranks(then["world_size"], then.get("sequence_parallel", 1))
    now = _ranks(launch.world_size, config.sequence_parallel)
    if before != now:
        launch.say(f"The checkpoint is of {before}, this run has {now.replace(' ranks', '', 1)}: {kept}")
    elif accumulation != config.training["gradient_accumulation_steps"]:  # ranks were others when the run began
        launch.say(f"The checkpoint has another number of ranks than its run began with: {kept}")
    return accumulation


def _require_one_folder(found: Checkpoint, site: Site) -> None:
    then, ranks = found.manifest, site.launch.world_size
    if then["zero_stage"] is not None and not site.shared:
        raise UserError(
            f"{found.path}: {then['world_size']} ranks saved it, each node its own part; to resume on "
            f"{ranks} copy the parts into one folder that all nodes share"
        )


def _require_convertible(found: Checkpoint, config: Config, ranks: int) -> None:
    """See that DeepSpeed can convert the states: it knows `exp_avg` and `exp_avg_sq`, whole, and dies of others."""
    optim = config.training.get("optim")
    if optim is not None and optim not in TORCH_ADAMW:
        before = found.manifest["world_size"]
        raise UserError(
            f"{found.path}: {before} ranks saved it, and DeepSpeed converts no states of optim: {optim} to {ranks}; "
            f"start {before} ranks, or --resume never"
        )


def _refuse_rows_twice_or_never(found: Checkpoint, dealt_anew: Changes, config: Config, site: Site) -> None:
    """Rows that are dealt in another way go on where an epoch ends; other sizes of a step also in the middle of one.

    Raises:
        UserError: some rows would come twice in the epoch under way, or never.
    """
    here, order = found.manifest.get("here"), config.training.get("train_sampling_strategy", "random")
    where = f"{found.path}: {changes_in_words(dealt_anew)}"
    if here is None or order not in OUR_ORDERS:
        raise UserError(
            f"{where}: what deals the rows can only change where the order of rows is ours (train_sampling_strategy "
            f"{' or '.join(OUR_ORDERS)}) and the checkpoint says which rows it has learned. Write it as before, or "
            "--resume never to start anew"
        )
    # In these orders the first rows of an epoch are learned, however large its steps were.
    if here["rows"] and not (order in ("random", "sequential") and dealt_anew.keys() <= SIZE):
        end = gather(_end_of_an_epoch(found))[0]
        raise UserError(
            f"{where}: in the middle of an epoch, {here['rows']:,} rows of which are learned, some would come twice "
            f"and others never. Write it as before, or resume where an epoch ends ({end}), or --resume never to start "
            "anew"
        )
    past = (
        f"the {here['rows']:,} that this epoch has learned do not come again in it" if here["rows"] else "a new epoch"
    )
    site.launch.say(f"Rows are dealt anew from step {found.step + 1:,} on: {past}.")


def _end_of_an_epoch(found: Checkpoint) -> str:
    """What to write to go on from the last checkpoint before it at which an epoch ends."""
    for step in steps_in(found.path.parent):
        with contextlib.suppress(Broken):
            other = found.path.with_name(f"checkpoint-{step}")
            if step < found.step and (read_manifest(other).get("here") or {}).get("rows") == 0:
                return f"--resume {other}"
    return "save_strategy: epoch saves there"


def _numbers_that_work(found: Checkpoint, a_step: int, config: Config, launch: Launch, what: str) -> str:
    micro, group, groups = config.micro_batch, config.sequence_parallel, _groups(config, launch)
    ranks = ", ".join(str(n * group) for n in range(1, a_step // micro + 1) if a_step % (micro * n) == 0)
    ranks = f"{ranks or 'no number of'} ranks" + (f" (sequence_parallel: {group})" if group > 1 else "")
    said = f"{found.path} learned from {a_step} {what} a step, which {_ranks(launch.world_size, group)}"
    if what != "rows":
        return f"{said} cannot share. What can: {ranks}"
    micros = [str(n) for n in range(1, a_step // groups + 1) if a_step % (n * groups) == 0]
    batches = f"; {launch.world_size} ranks with per_device_train_batch_size {', '.join(micros)}" if micros else ""
    return (
        f"{said} x {micro} rows (per_device_train_batch_size) cannot make up. What can: {ranks} with "
        f"per_device_train_batch_size {micro}{batches}"
    )
