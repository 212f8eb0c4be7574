"""What of libraries' output is no news: two warnings that come in every run and that its user can do nothing about, and
progress bars where nobody sees them move, or of every rank; all other warnings are shown.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import MutableMapping

# DeepSpeed calls collectives of torch's by names that torch 2.13 has deprecated.
DEPRECATED = r"`torch\.distributed\.\w+` is deprecated"
# On a CPU each process says so once; the run says itself which device it has.
NO_GPU = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."
# tqdm's own variable; the hub's library has bars that do not listen to it, and transformers asks the hub's library.
NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")


def quiet(*, bars: bool, env: MutableMapping[str, str] = os.environ) -> None:
    """Keep them back in this process; before torch, DeepSpeed, tqdm and the hub's library are imported.

    Args:
        bars: whether bars are shown: by one process, in a terminal. What a user has set stays.
        env: of this process and of those that it starts.
    """
    warnings.filterwarnings("ignore", message=DEPRECATED, category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    if not bars:
        for name in NO_BARS:
            env.setdefault(name, "1")


def _is_news(record: logging.LogRecord) -> bool:
    return record.getMessage() != NO_GPU
