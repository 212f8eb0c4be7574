"""Checkpoints that are complete or do not exist, and the newest one that every rank and node can use.

A checkpoint is complete when it has a manifest. `complete` writes it last, after every rank has written, synced and
hashed its files: every file with its size and hash, the step, and what was being trained. `choose` takes the newest
checkpoint whose files are still those.

Nothing here imports torch until ranks have to agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from ds_sft.checkpoints.identity import DATA, DEALING, Changes, changes, in_words, unchangeable
from ds_sft.config.keys import OUR_ORDERS, TORCH_ADAMW, Config
from ds_sft.errors import UserError
from ds_sft.ranks.collectives import gather
from ds_sft.ranks.launch import Launch
from ds_sft.results import EXPORTED, RESULTS

MANIFEST = "manifest.json"
FORMAT = 1
FACTS = {  # what a manifest says beside its files
    "step", "epoch", "samples", "rows_a_step", "per_device_train_batch_size", "gradient_accumulation_steps",
    "world_size", "zero_stage", "config", "data", "evaluation_due", "loss_pending", "last_logged_step", "loss_total",
    "tokens", "metrics_bytes", "save_id",
}  # fmt: skip
BATCH_KEYS = ("per_device_train_batch_size", "gradient_accumulation_steps")
SIZE = {"rows_a_step", "dataloader_drop_last"}  # how many rows of an epoch's order a step takes, not their order
SET_OUT = ".set-out"  # the Slurm job that started anew in an output folder, or from a checkpoint that was named
FINAL = ("model*.safetensors", "adapter/adapter_model.safetensors")  # what a finished run leaves in its output folder
NAME = re.compile(r"checkpoint-(\d+)")
OF_RANK = re.compile(r"(?:zero_pp_rank_|rng_state_)(\d+)")  # files that one rank writes
BLOCK = 1 << 24  # bytes read at a time
HASH_THREADS = 4  # of one rank; a thread hashes faster than most disks read


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its folder, and what its manifest says."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


@dataclass(frozen=True)
class Broken(Exception):
    """Why a folder is not a checkpoint to resume from."""

    reason: str


# ---- Reading


def steps_in(output_dir: Path) -> list[int]:
    """Steps of the folders named checkpoint-N, newest first, complete or not."""
    if not output_dir.is_dir():
        return []
    found = (NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def read_manifest(folder: Path, name: str = MANIFEST) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        Broken: there is none, or it is not one.
    """
    try:
        manifest = json.loads((folder / name).read_text(encoding="utf-8"))
        files = manifest["files"]
        int(manifest["step"]), [(int(size), str(digest)) for size, digest in files.values()]
    except FileNotFoundError:
        raise Broken("it was never completed: no manifest" if folder.is_dir() else "it is not there") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Broken(f"its manifest cannot be read ({type(error).__name__})") from None
    if manifest.get("format") != FORMAT:
        raise Broken(f"its manifest has format {manifest.get('format')}, this version reads {FORMAT}")
    if name == MANIFEST and not manifest.keys() >= FACTS:
        raise Broken(f"its manifest lacks {', '.join(sorted(FACTS - manifest.keys()))}")
    return dict(manifest)


def newest_complete(output_dir: Path, *, resumable: bool = False) -> Checkpoint | None:
    """The newest checkpoint with a manifest; its files are not looked at. `resumable`: of more than the weights."""
    for step in steps_in(output_dir):
        folder = output_dir / f"checkpoint-{step}"
        with contextlib.suppress(Broken):
            found = Checkpoint(folder, read_manifest(folder))
            if not (resumable and found.manifest.get("model_only")):
                return found
    return None


def exported_step(output_dir: Path) -> int | None:
    """The step of the exported weights with which a run goes on that was stopped behind its export; else None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((output_dir / EXPORTED).read_text(encoding="utf-8"))["results"]["steps"])
    return None


def check_files(folder: Path, files: Mapping[str, tuple[int, str]]) -> None:
    """Compare files with what the manifest says of them; sizes first.

    Raises:
        Broken: a file is missing, or has another size or hash.
    """
    for name, (size, _) in files.items():
        try:
            found = (folder / name).stat().st_size
        except OSError:
            raise Broken(f"{name} is missing") from None
        if found != size:
            raise Broken(f"{name} has {found:,} bytes instead of {size:,}")
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        try:
            hashes = list(pool.map(lambda name: hash_file(folder / name), files))
        except OSError as error:
            raise Broken(f"{error.filename}: {error.strerror}") from None
    for (name, (_, digest)), found_digest in zip(files.items(), hashes, strict=True):
        if digest != found_digest:
            raise Broken(f"{name} has other contents than were saved (hash)")


def hash_file(path: Path) -> str:
    """XXH3 with 128 bits: finds every accident, at the speed of memory; it is no defence against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Site:
    """Who keeps which files: all ranks see one output folder, or those of a node see their own."""

    launch: Launch
    shared: bool

    @property
    def leader(self) -> bool:
        """Whether this rank acts for its file system."""
        return self.launch.is_main if self.shared else self.launch.local_rank == 0

    @property
    def group(self) -> int:
        """The first rank of those that see the same folder."""
        return 0 if self.shared else self.launch.rank - self.launch.local_rank

    @property
    def ranks(self) -> range:
        """The ranks that see the same folder."""
        return range(self.group, self.group + (self.launch.world_size if self.shared else self.launch.local_world_size))

    def mine(self, names: Iterable[str]) -> list[str]:
        """The files that this rank writes, or is the one to look at."""
        ranks = self.ranks
        return [name for name in names if _owner(name, ranks) == self.launch.rank]


def _owner(name: str, ranks: range) -> int:
    match = OF_RANK.search(name)
    rank = int(match[1]) if match else ranks.start
    return rank if rank in ranks else ranks[rank % len(ranks)]


def choose(resume: str, output_dir: Path, site: Site) -> Checkpoint | None:
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


Stages = tuple[int | None, int | None]  # ZeRO's, then and now; None is without DeepSpeed
FinishedRun = tuple[Changes, bool, Stages]  # in what it differs, whether nothing is left to do
NO_RUN: FinishedRun = ({}, False, (None, None))


def where_to_start(config: Config, this_run: Mapping[str, Any], site: Site) -> Start:
    """Decide it on all ranks; all must call it. `this_run` is that of rank 0, see `runtime.identity`.

    Raises:
        UserError: the folder holds another run, or the checkpoint named cannot be used.
    """
    if config.training.get("save_only_model"):
        site.launch.say("Warning: save_only_model: a run that is stopped cannot go on from checkpoints of the weights.")
    resume = gather("auto" if _was_requeued(config) else config.resume)[0]
    if resume == "auto" and _is_finished(config, this_run, site.launch):
        return Start(finished=True)
    if resume == "auto" and _is_exported(config, this_run, site.launch):
        return Start(exported=True)
    found = choose(resume, config.output_dir, site)
    if found is None and resume != config.resume:  # requeued before the first save
        found = choose(config.resume, config.output_dir, site)
    changed: Changes = {}
    if found is not None:
        stages = found.manifest["zero_stage"], gather(this_run["zero_stage"])[0]
        _refuse_another_stage(f"{found.path} was saved", stages, config, site.launch)
        changed = gather(changes(found.manifest, this_run))[0]
        _refuse_another_run(found.path, changed, this_run, config)
    if site.leader and resume != "auto":
        here = found is not None and found.path.resolve().parent == config.output_dir.resolve()
        set_aside(config.output_dir, found.step if here and found else 0, site.launch)
        _set_out(config)
    gather(None)  # nobody writes into the folder before that
    return Start() if found is None else _fit(found, changed, config, site)


def _set_out(config: Config) -> None:
    """Remember that this Slurm job's `resume: never` or `resume: PATH` was obeyed."""
    if os.environ.get("SLURM_JOB_ID"):
        config.output_dir.mkdir(parents=True, exist_ok=True)
        for old in (RESULTS, EXPORTED):  # of an earlier run
            (config.output_dir / old).unlink(missing_ok=True)
        (config.output_dir / SET_OUT).write_text(os.environ["SLURM_JOB_ID"], encoding="utf-8")


def _was_requeued(config: Config) -> bool:
    """Whether an earlier start of this Slurm job has set out as `resume` says: it goes on then, or would never end."""
    with contextlib.suppress(OSError):
        job = (config.output_dir / SET_OUT).read_text(encoding="utf-8")
        return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and job == os.environ.get("SLURM_JOB_ID")
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
        launch.say(f"Going on with what has changed: {in_words(changed | batch | size)}.")
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
            f"{found.path}: {what or in_words(changed)}: the order of rows "
            f"can only be kept with train_sampling_strategy {' or '.join(OUR_ORDERS)}"
        )
    if then["world_size"] != launch.world_size:
        _require_one_folder(found, site)
    a_step = then.get(_kind(config))
    if a_step is None or (changed and config.resume_anyway):
        return asked
    if changed and not other_ranks and a_step != micro * asked * _groups(config, launch):
        raise UserError(_another_run(found.path, changed))
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
    where = f"{found.path}: {in_words(dealt_anew)}"
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


def _refuse_another_stage(what: str, stages: Stages, config: Config, launch: Launch) -> None:
    """See that DeepSpeed keeps the states as it did; `what` begins the line.

    Raises:
        UserError: it is another stage, or was none.
    """
    then, now = stages
    if then == now:
        return
    names = ["without DeepSpeed" if stage is None else f"under ZeRO-{stage}" for stage in stages]
    if _engine_is_ignored(config, launch):
        names[1] += ", as no launcher started it"
    raise UserError(
        f"{what} {names[0]}, and this start is {names[1]}: a checkpoint can change its number of ranks, not its form. "
        f"{_as_before(then, config, launch)}, or --resume never to start anew (`ds-sft export` gives its model)"
    )


def _as_before(then: int | None, config: Config, launch: Launch) -> str:
    """What to do for a start under the stage of the checkpoint."""
    if then is None:
        return "Leave out deepspeed"
    written = "" if _engine_is_ignored(config, launch) else f"Write a deepspeed key of ZeRO-{then}"
    started = "" if launch.distributed else "Start it under a launcher, one process by torchrun --nproc_per_node 1 ..."
    return f"{written}. {started}" if written and started else written or started


def _engine_is_ignored(config: Config, launch: Launch) -> bool:
    return bool(config.training.get("deepspeed")) and not launch.distributed


def _is_finished(config: Config, this_run: Mapping[str, Any], launch: Launch) -> bool:
    """Whether the output folder holds this run, done, with its weights; says so."""
    done = _holds(RESULTS, config, this_run, launch)
    if done:
        merged = any(config.output_dir.glob(FINAL[0]))
        later = "" if merged or config.merge != "auto" else "merge: yes merges it; "
        launch.say(
            f"This run is finished: {config.output_dir} holds its {'model' if merged else 'adapter'}. ({later}--resume "
            "never trains it anew.)"
        )
    return done


def _is_exported(config: Config, this_run: Mapping[str, Any], launch: Launch) -> bool:
    """Whether the output folder holds this run's weights, and what a stop left to be done with them; says so."""
    left = _holds(EXPORTED, config, this_run, launch)
    if left:
        launch.say(f"This run is trained, {config.output_dir} has its weights: going on with verification and answers.")
    return left


def _holds(record: str, config: Config, this_run: Mapping[str, Any], launch: Launch) -> bool:
    """Whether a file of the output folder is this run's, with its weights beside it; refuses another run's."""
    other, found, stages = gather(_recorded_run(record, config, this_run, launch) if launch.is_main else NO_RUN)[0]
    if not found:
        _refuse_another_stage(f"{config.output_dir} holds a run that was finished", stages, config, launch)
        _refuse_another_run(config.output_dir, other, this_run, config)
    return found


def _recorded_run(record: str, config: Config, this_run: Mapping[str, Any], launch: Launch) -> FinishedRun:
    """The one that a file of the output folder is of, beside this one."""
    try:
        then = json.loads((config.output_dir / record).read_text(encoding="utf-8"))["identity"]
        other = changes(then, this_run)
    except (OSError, ValueError, KeyError):
        return NO_RUN
    if _engine_is_ignored(config, launch):  # whether there is anything left to do does not hang on the launcher
        other = {name: pair for name, pair in other.items() if not name.startswith("deepspeed.")}
    done = not other and any(map(any, (config.output_dir.glob(weights) for weights in FINAL)))
    now = this_run.get("zero_stage")
    return other, done, (then.get("zero_stage", now), now)


def _refuse_another_run(where: Path, changed: Changes, this_run: Mapping[str, Any], config: Config) -> None:
    never = unchangeable(changed, this_run)
    if never:
        raise UserError(
            f"{where} cannot go on with {in_words({name: changed[name] for name in never})}: "
            f"{'; '.join(dict.fromkeys(never.values()))}. Write it as before, or take another output_dir, or --resume "
            "never to start anew"
        )
    if changed and not config.resume_anyway:
        raise UserError(_another_run(where, changed))


def _another_run(where: Path, changed: Changes) -> str:
    return (
        f"{where} is of another run, which differs in: {in_words(changed)}. Take another output_dir, "
        "or --resume never to start anew, or --resume_anyway to go on with the changes"
    )


# ---- Writing


def complete(
    folder: Path,
    facts: Mapping[str, Any],
    site: Site,
    trouble: str | None = None,
    hashed: Future[dict[str, tuple[int, str]]] | None = None,
) -> str | None:
    """Make a written folder a checkpoint, or say why it is none; the same answer on all ranks, all must call it.

    Every rank syncs and hashes the files it wrote, the first rank of each file system those of nobody; when all have
    succeeded that one writes the manifest.

    Args:
        facts: what the manifest says beside its files; of rank 0.
        trouble: what already went wrong on this rank.
        hashed: `sync_and_hash`, where a thread has begun with it.
    """
    files: dict[str, tuple[int, str]] = {}
    if trouble is None:
        try:
            files = hashed.result() if hashed is not None else sync_and_hash(folder, site)
        except OSError as error:
            trouble = describe(error)
    facts, save_id = gather((dict(facts), uuid.uuid4().hex))[0]
    parts = gather((trouble, site.group, files))
    if not any(reason for reason, _, _ in parts) and site.leader:
        listed = {name: entry for _, group, part in parts if group == site.group for name, entry in part.items()}
        manifest = {"format": FORMAT, "save_id": save_id, **facts, "files": dict(sorted(listed.items()))}
        try:
            write_manifest(folder / MANIFEST, manifest)
        except OSError as error:
            trouble = describe(error)
    reasons = [reason for reason in gather(trouble) if reason]
    return reasons[0] if reasons else None


def sync_and_hash(folder: Path, site: Site) -> dict[str, tuple[int, str]]:
    """Size and hash of this rank's files, which are on the disk then; some threads at a time."""
    names = site.mine(files_below(folder))
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        entries = list(pool.map(lambda name: _sync_and_hash_one(folder / name), names))
    if site.leader:
        for directory in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sync(directory)
        sync(folder.parent)
    return dict(zip(names, entries, strict=True))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _sync_and_hash_one(path: Path) -> tuple[int, str]:
    digest = hash_file(path)  # from memory: it was written a moment ago
    sync(path)
    return path.stat().st_size, digest


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Put the manifest in place in one step, on the disk."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(manifest, file, ensure_ascii=False, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint, the manifest first: what is left if that is interrupted is no checkpoint."""
    with contextlib.suppress(OSError):
        (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, keep: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`; never the newest complete one, a newer folder, or `keep`.

    For one process of each file system, after a checkpoint was completed.
    """
    newest = newest_complete(output_dir)
    if not limit or newest is None:
        return
    folders = [output_dir / f"checkpoint-{step}" for step in steps_in(output_dir) if step <= newest.step]
    kept = {newest.path, *([keep] if keep is not None and keep in folders else [])}
    for folder in folders:  # newest first
        if len(kept) < limit and folder not in kept and (folder / MANIFEST).exists():
            kept.add(folder)
    for folder in reversed(folders):
        if folder not in kept:
            remove(folder)


def set_aside(output_dir: Path, after: int, launch: Launch) -> None:
    """Move checkpoints newer than step `after` out of the way of a run that starts before them.

    For one process of each file system.
    """
    later = [step for step in steps_in(output_dir) if step > after]
    if not later:
        return
    aside = output_dir / f"earlier-{time.strftime('%Y%m%d-%H%M%S')}"
    aside.mkdir(exist_ok=True)
    for step in later:
        (output_dir / f"checkpoint-{step}").rename(aside / f"checkpoint-{step}")
    launch.say(f"Moved {len(later)} checkpoints of an earlier run into {aside}.")


def describe(error: BaseException) -> str:
    """What went wrong with a file, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
