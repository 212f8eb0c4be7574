"""A checkpoint is complete or it does not exist; the newest one that is intact is taken; rotation keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_sft.checkpoints import manifest
from ds_sft.checkpoints.identity import changes, changes_in_words, identity
from ds_sft.checkpoints.manifest import FACTS, Broken, complete, newest_complete, read_manifest
from ds_sft.checkpoints.rotate import move_aside, rotate
from ds_sft.checkpoints.start import Start, _fit, choose_checkpoint, where_to_start
from ds_sft.checkpoints.storage import Site
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch

ALONE = Site(Launch(launcher="python"), shared=True)
RUN = {"config": {"learning_rate": 1e-4}, "data": "abc", "zero_stage": None}
EPOCH_END = {"epoch": 1, "first_step": 4, "step": 4, "rows": 0, "samples": 13}  # as `micro_batches.Seam` has them
MID_EPOCH = {"epoch": 0, "first_step": 0, "step": 4, "rows": 16, "samples": 16}


def facts(step: int, **changes: Any) -> dict[str, Any]:
    known = dict.fromkeys(FACTS - {"save_id"}, 0) | {"step": step, "world_size": 1, "rows_a_step": 4} | RUN
    batch = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    return known | batch | {"micro_batches_a_step": 4, "here": MID_EPOCH} | changes


def save(output_dir: Path, step: int, **changes: Any) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * 1000)
    (folder / "global_step" / "zero_pp_rank_0_states.pt").write_bytes(bytes(range(256)) * 40)
    assert complete(folder, facts(step, **changes), ALONE) is None
    return folder


def config(output_dir: Path, **changes: Any) -> Config:
    training = {"output_dir": str(output_dir), "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    return Config(model_name_or_path="m", train_file="t", training=training | changes.pop("training", {}), **changes)


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    manifest = json.loads((save(tmp_path, 4) / "manifest.json").read_text(encoding="utf-8"))
    sizes = {name: size for name, (size, _) in manifest["files"].items()}
    assert sizes == {"global_step/zero_pp_rank_0_states.pt": 10240, "model.safetensors": 1000}
    assert manifest["files"]["model.safetensors"][1] == "aec7cf595ec38a7e4ac08ee5da1c44c7"
    assert (manifest["step"], manifest["format"], len(manifest["save_id"])) == (4, 1, 32)
    assert manifest.keys() >= FACTS


DAMAGE = {
    "truncated": (
        lambda f: os.truncate(f / "model.safetensors", 999),
        "model.safetensors has 999 bytes instead of 1,000",
    ),
    "a flipped bit": (
        lambda f: (f / "model.safetensors").write_bytes(b"w" * 500 + b"v" + b"w" * 499),
        "model.safetensors has other contents than were saved (hash)",
    ),
    "missing": (
        lambda f: (f / "global_step" / "zero_pp_rank_0_states.pt").unlink(),
        "global_step/zero_pp_rank_0_states.pt is missing",
    ),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it was never completed: no manifest"),
    "half a manifest": (
        lambda f: os.truncate(f / "manifest.json", 100), "its manifest cannot be read (JSONDecodeError)"
    ),
    "another format": (
        lambda f: (f / "manifest.json").write_text('{"format": 9, "step": 8, "files": {}}'),
        "its manifest has format 9, this version reads 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_one_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    save(tmp_path, 4)
    damage, reason = DAMAGE[name]
    damage(save(tmp_path, 8))
    (tmp_path / "checkpoint-12").mkdir()
    found = choose_checkpoint("auto", tmp_path, ALONE)
    assert found is not None
    assert found.step == 4
    assert capsys.readouterr().out.splitlines() == [
        f"Passed over {tmp_path}/checkpoint-12: it was never completed: no manifest.",
        f"Passed over {tmp_path}/checkpoint-8: {reason}.",
        f"Resuming from {tmp_path}/checkpoint-4, step 4, the newest usable checkpoint.",
    ]
    with pytest.raises(UserError, match="checkpoint-8: "):
        choose_checkpoint(str(tmp_path / "checkpoint-8"), tmp_path, ALONE)


def test_nothing_usable_starts_from_the_beginning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_checkpoint("auto", tmp_path, ALONE) is None
    assert capsys.readouterr().out == ""
    (tmp_path / "checkpoint-3").mkdir()
    assert choose_checkpoint("auto", tmp_path, ALONE) is None
    assert "No checkpoint in" in capsys.readouterr().out


def test_a_failed_save_has_no_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    assert complete(folder, facts(4), ALONE, "optimizer.pt: No space left on device") == (
        "optimizer.pt: No space left on device"
    )
    assert list(folder.iterdir()) == []
    folder.rmdir()
    folder.parent.joinpath("checkpoint-4").write_text("a file in its place")
    assert "Not a directory" in str(complete(folder, facts(4), ALONE))


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the files and the manifest: no checkpoint."""
    monkeypatch.setattr(manifest, "write_manifest", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 4)
    with pytest.raises(Broken):
        read_manifest(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [
        (None, None, [2, 4, 6, 8, 10]),
        (0, None, [2, 4, 6, 8, 10]),
        (3, None, [2, 4, 8, 10]),
        (2, None, [4, 8, 10]),
        (1, None, [8, 10]),
        (2, 2, [2, 8, 10]),
        (1, 2, [2, 8, 10]),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, keep: int | None, left: list[int]) -> None:
    """10 is being written, 6 never was: both are no checkpoints, and only the older one goes."""
    for step in (2, 4, 8):
        save(tmp_path, step)
    for step in (6, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, limit, tmp_path / f"checkpoint-{keep}" if keep else None)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left
    newest = newest_complete(tmp_path)
    assert newest is not None
    assert newest.step == 8


def test_a_new_start_moves_later_checkpoints_aside(tmp_path: Path) -> None:
    for step in (2, 4, 8):
        save(tmp_path, step)
    move_aside(tmp_path, 2, ALONE.launch)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert sorted(path.name for path in tmp_path.glob("earlier-*/*")) == ["checkpoint-4", "checkpoint-8"]


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, 4)
    here = config(tmp_path)
    assert where_to_start(here, RUN, ALONE).checkpoint is not None
    other = {**RUN, "config": {"learning_rate": 1e-5, "mask": "last"}}
    with pytest.raises(
        UserError, match=r"differs in: learning_rate: 0.0001 -> 1e-05; mask: 'all' -> 'last'\. Take another"
    ):
        where_to_start(here, other, ALONE)
    assert where_to_start(config(tmp_path, resume_anyway=True), other, ALONE).checkpoint is not None
    with pytest.raises(UserError, match="the rows of train_file, or how they are encoded"):
        where_to_start(here, {**RUN, "data": "xyz"}, ALONE)
    with pytest.raises(UserError, match="gradient_accumulation_steps: 4 -> 8"):
        where_to_start(config(tmp_path, training={"gradient_accumulation_steps": 8}), RUN, ALONE)
    with pytest.raises(
        UserError, match=r"was saved without DeepSpeed, and this start is under ZeRO-2: .* Leave out deepspeed, or"
    ):
        where_to_start(config(tmp_path, resume_anyway=True), {**RUN, "zero_stage": 2}, ALONE)
    assert where_to_start(config(tmp_path, resume="never"), other, ALONE).checkpoint is None
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("launcher", "deepspeed", "start_is", "remedy"),
    [
        ("python", "zero2", "without DeepSpeed, as no launcher started it",
         "Start it under a launcher, one process by torchrun --nproc_per_node 1 ..."),
        ("python", None, "without DeepSpeed",
         "Write a deepspeed key of ZeRO-2. Start it under a launcher, one process by torchrun --nproc_per_node 1 ..."),
        ("torchrun", None, "without DeepSpeed", "Write a deepspeed key of ZeRO-2"),
    ],
)  # fmt: skip
def test_a_run_under_zero_says_how_it_goes_on(
    tmp_path: Path, launcher: str, deepspeed: str | None, start_is: str, remedy: str
) -> None:
    """Stopped or finished, with another schedule."""
    under_zero, now = {**RUN, "zero_stage": 2}, {**RUN, "config": {"learning_rate": 1e-5}}
    folder = save(tmp_path, 4, zero_stage=2)
    given = config(tmp_path, training={"deepspeed": deepspeed})
    site = Site(Launch(launcher=launcher), shared=True)
    rest = (
        f" under ZeRO-2, and this start is {start_is}: a checkpoint can change its number of ranks, not its form. "
        f"{remedy}, or --resume never to start anew (`ds-sft export` gives its model)"
    )
    with pytest.raises(UserError) as error:
        where_to_start(given, now, site)
    assert str(error.value) == f"{folder} was saved{rest}"
    (tmp_path / "run.json").write_text(json.dumps({"identity": under_zero}))
    with pytest.raises(UserError) as error:
        where_to_start(given, now, site)
    assert str(error.value) == f"{tmp_path} holds a run that was finished{rest}"


def test_a_run_finished_under_zero_is_finished_without_a_launcher(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = {"deepspeed.zero_optimization.stage": 2}
    identity_then = {**RUN, "config": {**RUN["config"], **stage}, "zero_stage": 2}
    (tmp_path / "run.json").write_text(json.dumps({"identity": identity_then}))
    (tmp_path / "model.safetensors").write_bytes(b"w")
    assert where_to_start(config(tmp_path, training={"deepspeed": "zero2"}), RUN, ALONE).finished
    assert f"This run is finished: {tmp_path} holds its model." in capsys.readouterr().out


def test_weights_alone_and_orders_that_ranks_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 4)
    save(tmp_path, 8, model_only=True)
    found = choose_checkpoint("auto", tmp_path, ALONE)
    assert found is not None
    assert found.step == 4
    assert "checkpoint-8: it has the weights alone (save_only_model)." in capsys.readouterr().out
    assert [c.step for c in (newest_complete(tmp_path), newest_complete(tmp_path, resumable=True)) if c] == [8, 4]
    save(tmp_path, 12, world_size=2)
    assert where_to_start(config(tmp_path), RUN, ALONE).accumulation == 4
    grouped = config(tmp_path, training={"train_sampling_strategy": "batch_rebalance"})
    with pytest.raises(UserError, match="2 ranks saved it, this run has 1: the order of rows can only be kept with"):
        where_to_start(grouped, RUN, ALONE)
    with pytest.raises(UserError, match=r"What can: no number of ranks .* 3; 1 ranks with .* 1, 2, 4$"):
        where_to_start(config(tmp_path, training={"per_device_train_batch_size": 3}), RUN, ALONE)


def start(output_dir: Path, run: dict[str, Any] = RUN, world_size: int = 1, **changes: Any) -> Start:
    site = Site(Launch(launcher="python", world_size=world_size), shared=True)
    return where_to_start(config(output_dir, **changes), run, site)


def batch(micro: int, accumulation: int) -> dict[str, Any]:
    return {"training": {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}}


def test_as_many_rows_in_a_step_go_on(tmp_path: Path) -> None:
    save(tmp_path, 4, seam=EPOCH_END)
    found = start(tmp_path, **batch(2, 2))
    assert (found.accumulation, found.seam) == (2, EPOCH_END)
    assert found.changed == {"per_device_train_batch_size": (1, 2), "gradient_accumulation_steps": (4, 2)}
    with pytest.raises(UserError, match="per_device_train_batch_size: 1 -> 2\\. Take another"):
        start(tmp_path, **batch(2, 4))


def test_a_run_is_resumed_again_on_the_ranks_that_changed_its_accumulation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun on two ranks with 4, then on four with 2: the command still says 4."""
    asked = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    save(tmp_path, 4, world_size=4, gradient_accumulation_steps=2, rows_a_step=8, batch=asked)
    assert start(tmp_path, world_size=4).accumulation == 2
    assert "gradient_accumulation_steps is set to 2, so that a step keeps its 8 rows." in capsys.readouterr().out


def test_other_rows_in_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their order is that of the epoch, whatever the size of a step; another order would begin anew."""
    save(tmp_path, 4)
    with pytest.raises(UserError, match="gradient_accumulation_steps: 4 -> 6"):
        start(tmp_path, **batch(1, 6))
    found = start(tmp_path, resume_anyway=True, **batch(1, 6))
    assert (found.accumulation, found.seam) == (6, MID_EPOCH)
    assert found.changed == {"gradient_accumulation_steps": (4, 6), "rows_a_step": (4, 6)}
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Rows are dealt anew from step 5 on: the 16 that this epoch has learned do not come again in it.",
        "Going on with what has changed: gradient_accumulation_steps: 4 -> 6; rows_a_step: 4 -> 6.",
    ]
    two = start(tmp_path, world_size=2, resume_anyway=True, **batch(1, 4))  # of the ranks alone: a step keeps its rows
    assert (two.accumulation, two.seam) == (2, {})
    assert start(tmp_path, world_size=2, resume_anyway=True, **batch(1, 6)).accumulation == 6


@pytest.mark.parametrize(
    ("run", "changes"),
    [
        ({**RUN, "data": "xyz"}, {}),
        ({**RUN, "config": {"learning_rate": 1e-4, "seed": 1}}, {}),
        (RUN, {"training": {"train_sampling_strategy": "group_by_length", "gradient_accumulation_steps": 6}}),
        ({**RUN, "config": {"learning_rate": 1e-4, "packing": "concat"}}, {"packing": "concat"}),
        ({**RUN, "config": {"learning_rate": 1e-4, "max_length": 9}}, {"packing": "concat"}),
    ],
    ids=["rows", "seed", "grouped", "packing", "max_length"],
)
def test_what_deals_the_rows_changes_where_an_epoch_ends(
    tmp_path: Path, run: dict[str, Any], changes: dict[str, Any]
) -> None:
    save(tmp_path, 4, here=EPOCH_END)
    assert start(tmp_path, run, resume_anyway=True, **changes).seam == EPOCH_END
    save(tmp_path, 6, here=MID_EPOCH)
    said = (
        r"checkpoint-6: .*: in the middle of an epoch, 16 rows of which are learned, .* \(--resume .*/checkpoint-4\), "
    )
    with pytest.raises(UserError, match=said):
        start(tmp_path, run, resume_anyway=True, **changes)
    save(tmp_path, 8, here=None)  # of an order that is not ours, or of an older version
    with pytest.raises(UserError, match=r"checkpoint-8: .*: what deals the rows can only change where the order of"):
        start(tmp_path, run, resume_anyway=True, **changes)


def test_max_length_deals_no_rows_that_are_not_packed(tmp_path: Path) -> None:
    save(tmp_path, 4)
    changed = {**RUN, "config": {"learning_rate": 1e-4, "max_length": 9}}
    assert start(tmp_path, changed, resume_anyway=True).seam == {}


def test_a_sampler_of_trainers_own_keeps_its_batch(tmp_path: Path) -> None:
    save(tmp_path, 4, here=EPOCH_END)
    foreign = {"train_sampling_strategy": "batch_rebalance", "per_device_train_batch_size": 2}
    with pytest.raises(UserError, match="per_device_train_batch_size: 1 -> 2: the order of rows can only be kept with"):
        start(tmp_path, resume_anyway=True, training=foreign)


def test_what_states_are_made_for_is_refused_whatever_is_written(tmp_path: Path) -> None:
    save(tmp_path, 4)
    other = {**RUN, "config": {"learning_rate": 1e-5, "optim": "adafactor"}}
    said = (
        r"checkpoint-4 cannot go on with optim: None -> 'adafactor': the optimizer's states are of the old one\. Write"
    )
    for anyway in (False, True):
        with pytest.raises(UserError, match=said):
            start(tmp_path, other, resume_anyway=anyway)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adafactor"])
def test_states_that_deepspeed_cannot_convert_stay_where_they_are(tmp_path: Path, optim: str) -> None:
    """Without it 8-bit states go on, whole on every rank; AdamW's are converted."""
    save(tmp_path, 4, world_size=2, zero_stage=2)
    sharded = {**RUN, "zero_stage": 2}
    with pytest.raises(UserError) as error:
        start(tmp_path, sharded, training={"optim": optim})
    assert str(error.value) == (
        f"{tmp_path}/checkpoint-4: 2 ranks saved it, and DeepSpeed converts no states of optim: {optim} to 1; "
        "start 2 ranks, or --resume never"
    )
    assert start(tmp_path, sharded, training={"optim": "adamw_torch"}).universal
    save(tmp_path, 6, world_size=2, zero_stage=None)
    assert not start(tmp_path, training={"optim": optim}).universal


def test_micro_batches_that_tokens_fill_are_shared_by_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six a step, of 3 ranks; now one rank has all six, and 4 ranks cannot share them."""
    save(tmp_path, 4, world_size=3, gradient_accumulation_steps=2, rows_a_step=None, micro_batches_a_step=6)
    keys = {"output_dir": str(tmp_path), "gradient_accumulation_steps": 2}
    filled = replace(config(tmp_path, max_tokens_per_batch=100), training=keys)
    assert where_to_start(filled, RUN, ALONE).accumulation == 6
    assert (
        "gradient_accumulation_steps is set to 6, so that a step keeps its 6 micro batches." in capsys.readouterr().out
    )
    four = Site(Launch(launcher="python", world_size=4), shared=True)
    with pytest.raises(
        UserError, match=r"6 micro batches a step, which 4 ranks cannot share\. What can: 1, 2, 3, 6 ranks"
    ):
        _fit(choose_checkpoint("auto", tmp_path, ALONE), {}, filled, four)


def test_ranks_that_share_rows_have_fewer_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twelve rows a step, of 4 ranks. Groups of two take twice as many micro batches; eight ranks are four groups."""
    save(tmp_path, 4, world_size=4, gradient_accumulation_steps=3, rows_a_step=12, micro_batches_a_step=12)
    keys = {"output_dir": str(tmp_path), "gradient_accumulation_steps": 3, "per_device_train_batch_size": 1}
    shared = replace(config(tmp_path, sequence_parallel=2), training=keys)
    found = choose_checkpoint("auto", tmp_path, ALONE)
    assert found is not None
    for ranks, accumulation, said in (
        (4, 6, "The checkpoint is of 4 ranks, this run has 4 with sequence_parallel: 2: "),
        (8, 3, "The checkpoint is of 4 ranks, this run has 8 with sequence_parallel: 2: "),
    ):
        start = _fit(found, {}, shared, Site(Launch(launcher="python", world_size=ranks), shared=True))
        assert (start.accumulation, start.seam, start.universal) == (accumulation, {}, False)
        assert start.changed["sequence_parallel"] == (1, 2)
        assert f"{said}gradient_accumulation_steps is set to {accumulation}" in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        _fit(found, {}, shared, Site(Launch(launcher="python", world_size=10), shared=True))
    assert str(error.value) == (
        f"{found.path} learned from 12 rows a step, which 10 ranks with sequence_parallel: 2 x 1 rows "
        "(per_device_train_batch_size) cannot make up. What can: 2, 4, 6, 8, 12, 24 ranks (sequence_parallel: 2) with "
        "per_device_train_batch_size 1"
    )


def test_only_what_decides_the_result_is_compared(tmp_path: Path) -> None:
    def keys(**training: Any) -> dict[str, Any]:
        return identity(config(tmp_path, training={"bf16": True, **training}), None, "abc")

    same = {"seed": 42, "weight_decay": 0.0, "logging_steps": 7, "save_steps": 3, "output_dir": "elsewhere"}
    assert changes(keys(), keys(**same)) == {}
    assert changes(keys(), keys(seed=1, bf16=False)) == {"bf16": (True, False), "seed": (42, 1)}
    engine = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "train_batch_size": "auto"}
    other = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 6}, "train_batch_size": 8}
    known = identity(config(tmp_path), engine, "abc")
    assert known["zero_stage"] == 2
    found = changes(known, identity(config(tmp_path), other, "abc"))
    assert found == {"deepspeed.zero_optimization.reduce_bucket_size": (5, 6)}


def test_a_key_that_the_checkpoint_is_older_than_was_at_its_default(tmp_path: Path) -> None:
    then = identity(config(tmp_path), None, "abc")
    then["config"].pop("resize_embeddings", None)
    assert changes(then, identity(config(tmp_path), None, "abc")) == {}
    now = identity(config(tmp_path, resize_embeddings=True), None, "abc")
    assert changes(then, now) == {"resize_embeddings": (False, True)}


def test_the_layout_of_the_same_rows_is_not_compared(tmp_path: Path) -> None:
    def of(**keys: Any) -> dict[str, Any]:
        return identity(config(tmp_path, **keys), None, "abc")

    def filled(**keys: Any) -> dict[str, Any]:
        given = replace(config(tmp_path, max_tokens_per_batch=100, **keys), training={"output_dir": "o"})
        return identity(given, None, "abc")

    assert changes(of(), of(batching="padded", max_tokens_per_batch=512)) == {}
    assert changes(filled(), filled(batching="padded")) == {"batching": ("padding_free", "padded")}
    assert changes(of(), filled())["max_tokens_per_batch"] == (None, 100)


def test_other_validation_rows_are_another_run(tmp_path: Path) -> None:
    then = identity(config(tmp_path), None, "abc", "v1")
    now = identity(config(tmp_path), None, "abc", "v2")
    assert changes(then, now) == {"eval_data": ("v1", "v2")}
    assert changes_in_words(changes(then, now)) == "the validation rows, or how they are encoded"
    del then["eval_data"]  # of an older version, which did not look
    assert changes(then, now) == {}


def step_of(start: Start) -> int | None:
    return start.checkpoint.step if start.checkpoint else None


@pytest.mark.parametrize("resume", ["never", "a path"])
def test_a_requeued_job_goes_on_wherever_it_set_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str
) -> None:
    out = tmp_path / "out"
    named, first = (str(save(tmp_path / "named", 2)), 2) if resume != "never" else (resume, None)
    save(out, 8)  # of an earlier run
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    here = config(out, resume=named)
    for restarts in ("1", "2"):  # killed before it had set out, then before its first save
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        assert step_of(where_to_start(here, RUN, ALONE)) == first
    save(out, 4)
    assert step_of(where_to_start(here, RUN, ALONE)) == 4
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job obeys anew
    assert step_of(where_to_start(here, RUN, ALONE)) == first
    assert not list(out.glob("checkpoint-*"))


def test_a_finished_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = config(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"identity": RUN}))
    assert not where_to_start(here, RUN, ALONE).finished  # somebody moved the model away
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert where_to_start(here, RUN, ALONE).finished
    assert "This run is finished: " in capsys.readouterr().out
    other = {**RUN, "config": {"learning_rate": 1e-5}}
    with pytest.raises(UserError, match=r"learning_rate: 0.0001 -> 1e-05"):
        where_to_start(here, other, ALONE)
    assert not where_to_start(config(tmp_path, resume="never"), other, ALONE).finished
    (tmp_path / "run.json").write_text(json.dumps({"steps": 3}))  # its model was exported, but it did not end well
    assert not where_to_start(here, RUN, ALONE).finished


def test_files_have_one_owner_each() -> None:
    names = ["model.safetensors", "g/zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_3.pth", "rng_state_7.pth"]

    def owned(shared: bool, world_size: int, local: int) -> list[list[str]]:
        ranks = [Launch(launcher="torchrun", rank=r, local_rank=r % local, world_size=world_size,
                        local_world_size=local) for r in range(world_size)]  # fmt: skip
        return [Site(rank, shared).mine(names) for rank in ranks]

    assert owned(True, 4, 2) == [[names[0], names[1]], [], [], [names[2], names[3]]]
    assert owned(True, 2, 2) == [[names[0], names[1]], [names[2], names[3]]]  # of a checkpoint of 8 ranks
    assert owned(False, 4, 2) == [
        [names[0], names[1]],
        [names[2], names[3]],
        [names[0], names[1]],
        [names[2], names[3]],
    ]
