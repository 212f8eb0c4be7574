"""Ranks of train.py that need not import anything: forked from this process, which has imported all they need.

A launch costs two ranks ten seconds of imports, a run of a tiny model two. `harness.run_forked` starts this process
once for all tests of a lane, and writes a line of JSON for each run into its standard input:

{"argv": [SCRIPT, ...], "ranks": 2, "cwd": FOLDER, "env": {...}, "log": FILE, "limit": SECONDS}

A rank is then what `python SCRIPT ...` would be in that folder and environment; `"ranks": null` is no launcher at all.
The answer is a line of JSON, too: the exit codes of the ranks, when they and all that they started have ended, or null
where the limit ended them.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pkgutil
import runpy
import signal
import sys
import time
import traceback
from importlib import import_module
from typing import Any, NoReturn

import psutil

import ds_sft
from ds_sft.engine.builds import import_muon
from tests.distributed.harness import abort, free_port, kill

OURS = [module.name for module in pkgutil.walk_packages(ds_sft.__path__, "ds_sft.")]
IMPORTED = [
    *(name for name in OURS if not name.endswith("__main__")),
    "deepspeed",
    "transformers.integrations.deepspeed",
    "transformers.models.qwen3.modeling_qwen3",
]
PR_SET_CHILD_SUBREAPER = 36  # of prctl: what a rank leaves behind becomes this process's child, and is waited for


def become_rank(job: dict[str, Any], rank: int, port: int) -> NoReturn:
    """Go on as a Python process of its own would."""
    for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(job["log"], os.O_WRONLY | os.O_APPEND), 1)):
        os.dup2(source, target)
        os.close(source)
    os.dup2(1, 2)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    if job["ranks"]:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        values = (rank, rank, job["ranks"], job["ranks"], "127.0.0.1", port)
        os.environ.update(zip(names, map(str, values), strict=True))
    sys.argv = job["argv"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # nothing is left to be written: Python runs unbuffered here


def run(job: dict[str, Any]) -> list[int] | None:
    port = free_port()
    ranks = []
    for rank in range(job["ranks"] or 1):
        pid = os.fork()
        if pid == 0:
            become_rank(job, rank, port)
        ranks.append(pid)
    return wait(ranks, job["limit"])


def wait(ranks: list[int], limit: float) -> list[int] | None:
    """The exit codes; as a launcher does, end the others when one has failed: that one's code is then the run's."""
    codes: dict[int, int] = {}
    failed = 0
    deadline = time.monotonic() + limit
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:  # none is left
            return [codes[rank] for rank in ranks]
        if pid in ranks:
            codes[pid] = failed or os.waitstatus_to_exitcode(status)
            if codes[pid] and not failed:
                failed = codes[pid]
                for other in set(ranks) - codes.keys():
                    os.kill(other, signal.SIGTERM)
        elif not pid:
            if time.monotonic() > deadline:
                abort({number: psutil.Process(rank) for number, rank in enumerate(ranks) if rank not in codes})
                kill(psutil.Process().children(recursive=True))
                return None
            time.sleep(0.01)


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print when they are imported is no answer
    for name in IMPORTED:
        with contextlib.suppress(ImportError):  # of a GPU's libraries; else the rank that needs it will say so
            import_module(name)
    import_muon({})
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    gc.collect()
    gc.freeze()  # the ranks' collectors leave alone, and do not copy, what is here
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    serve()
