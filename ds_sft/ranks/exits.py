"""How a rank ends because of an error: it is said once for the whole run, and the launcher ends the others."""

from __future__ import annotations

import os
import re
import socket
import sys
import time
import traceback
from typing import NoReturn

from ds_sft.ranks.launch import Launch, print_line

# How long rank 0 has to say an error that every rank meets before another rank says it instead, seconds.
# Long enough for rank 0 to reach the same line on a slow file system; launchers end the others as soon as it exits.
ERROR_GRACE = 60.0
# How long a rank that lost the others keeps quiet, seconds: the one that failed first is speaking, and the launcher
# ends this one meanwhile. What gloo, NCCL and torch's store say of a peer that is gone, and of no other trouble:
LOST_PEER_GRACE = 20.0
LOST_PEER = re.compile(
    r"gloo/transport|connection (was likely )?(closed|reset|refused)|broken pipe|failed to recv|recvvalue failed"
    r"|timed out (waiting|after)|(wait|socket|watchdog|application) timeout|connectfullmesh|monitoredbarrier"
    r"|remote (process|error)|ncclremoteerror",
    re.IGNORECASE,
)


def exit_with(message: str, launch: Launch, *, told_to_end: bool = False, code: int = 2) -> NoReturn:
    """End this rank with an exit code, 2 for a mistake of the user's, after `message` was said once for the whole run.

    All ranks usually meet the same trouble; rank 0 says it and exits, and the launcher ends the others. A rank that is
    still there after `ERROR_GRACE` met something of its own (a file missing on its node) and says so itself. One that
    was `told_to_end` before it came here need not wait for it.
    """
    if not launch.is_main:
        if told_to_end:
            sys.exit(code)
        time.sleep(ERROR_GRACE)
        message = f"[rank {launch.rank} on {socket.gethostname()}] {message}"
    print_line(f"ds_sft: error: {message}", sys.stderr)
    sys.exit(code)


def exit_after(error: Exception, launch: Launch, *, told_to_end: bool = False) -> NoReturn:
    """End this rank with exit code 1 because of an error nobody expected, at once and whatever threads are left.

    The first rank to fail prints its traceback. Those that fail because it is gone wait for the launcher to end them,
    so that the cause is what a log ends with; a rank still there after `LOST_PEER_GRACE` says what it met. One that was
    `told_to_end` meanwhile, as launchers do by SIGTERM, has nothing to add.
    """
    message = "".join(traceback.format_exception(error))
    lost = launch.world_size > 1 and isinstance(error, RuntimeError) and LOST_PEER.search(str(error))
    if lost and told_to_end:
        message = ""
    elif lost:
        time.sleep(LOST_PEER_GRACE)
        reason = " ".join(str(error).split())[:200]
        message += f"lost the other ranks ({reason}); the rank that failed first says why"
    else:
        _tell_torchrun(error)
        if "out of memory" in str(error).lower():
            message += (
                "Out of memory: try a smaller per_device_train_batch_size (and a larger gradient_accumulation_steps"
            )
            message += "), gradient_checkpointing: yes, a smaller max_length, or deepspeed: zero3.\n"
    if message:
        print_line(f"ds_sft: [rank {launch.rank} on {socket.gethostname()}] {message}", sys.stderr)
    sys.stdout.flush()
    os._exit(1)  # an ordinary exit waits for the process group and for other libraries' threads


def _tell_torchrun(error: Exception) -> None:
    """Leave the error where torchrun's summary, the last thing it prints, looks for it."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
