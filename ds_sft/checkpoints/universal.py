"""A checkpoint for another number of ranks: DeepSpeed's universal form, converted once and verified; safe unpickling.

python -m ds_sft.checkpoints.universal CHECKPOINT/global_stepN OUTPUT_FOLDER      # what a run starts for itself
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from ds_sft.checkpoints.manifest import (
    FORMAT,
    Broken,
    Checkpoint,
    check_files,
    files_below,
    hash_file,
    read_manifest,
    sync,
    write_manifest,
)
from ds_sft.checkpoints.storage import Site
from ds_sft.errors import UserError
from ds_sft.ranks.collectives import gather, others_wait
from ds_sft.ranks.stop import StopRequests

CONVERTED = "universal.json"  # the manifest of the converted copy


def load_data_only() -> None:
    """From here on `torch.load` builds tensors and plain values only, also where DeepSpeed asks for any object.

    Unpickling runs code that a file names. The three classes below are all that DeepSpeed's own files need.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


def make_universal(checkpoint: Checkpoint, site: Site, stop: StopRequests) -> None:
    """Convert a DeepSpeed checkpoint, or find the verified result of an earlier conversion; all ranks must call it.

    Raises:
        UserError: it cannot be converted.
        Stopped: asked to stop; what was converted until then is thrown away.
    """
    trouble = None
    with others_wait(), stop.until_ranks_meet():
        if site.launch.is_main:
            try:
                with FileLock(checkpoint.path / ".universal.lock"):
                    _convert_once(checkpoint, site)
            except (OSError, subprocess.CalledProcessError) as error:
                trouble = f"{checkpoint.path} cannot be converted to {site.launch.world_size} ranks: {error}"
    stop.check()  # first: a signal to all processes of a job is no failure of the conversion
    trouble = gather(trouble)[0]
    if trouble:
        raise UserError(trouble)


def _convert_once(checkpoint: Checkpoint, site: Site) -> None:
    with contextlib.suppress(Broken):
        check_files(checkpoint.path, read_manifest(checkpoint.path, CONVERTED)["files"])
        site.launch.say(f"{checkpoint.path} was converted for other numbers of ranks before; the result is intact.")
        return
    ranks, now = checkpoint.manifest["world_size"], site.launch.world_size
    site.launch.say(
        f"Converting {checkpoint.path} from {ranks} to {now} ranks (once; DeepSpeed's universal checkpoint)."
    )
    (checkpoint.path / CONVERTED).unlink(missing_ok=True)
    name = (checkpoint.path / "latest").read_text(encoding="utf-8").strip()
    output = checkpoint.path / f"{name}_universal"
    shutil.rmtree(output, ignore_errors=True)
    _run_conversion(checkpoint.path / name, output)
    files = {}
    for below in files_below(output):
        path = output / below
        sync(path)
        files[f"{output.name}/{below}"] = (path.stat().st_size, hash_file(path))
    write_manifest(checkpoint.path / CONVERTED, {"format": FORMAT, "step": checkpoint.step, "files": files})


def _run_conversion(source: Path, output: Path) -> None:
    """In a process of its own: it has its own progress bars and its own memory, and ends with this one."""
    command = [sys.executable, "-m", __name__, str(source), str(output)]
    process = subprocess.Popen(command, start_new_session=True)  # out of reach of a Ctrl-C, and one group to end
    try:
        code = process.wait()
    finally:
        if process.returncode is None:  # asked to stop
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if code:
        raise subprocess.CalledProcessError(code, "deepspeed.checkpoint.ds_to_universal")


def end_with_parent() -> None:
    """Let Linux kill this process when its parent is gone, however that ended (prctl PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main(argv: list[str] | None = None) -> None:
    import multiprocessing

    end_with_parent()
    os.register_at_fork(after_in_child=end_with_parent)  # its workers
    from deepspeed.checkpoint import ds_to_universal

    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("source", help="CHECKPOINT/global_stepN")
    parser.add_argument("output", help="a new folder")
    given = parser.parse_args(argv)
    multiprocessing.set_start_method("fork", force=True)  # the workers must know what `load_data_only` allowed
    load_data_only()
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=given.source, output_folder=given.output, num_extract_workers=4, num_merge_workers=2,
            keep_temp_folder=False, strict=True, inject_missing_state=True,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
