"""Two warnings of libraries that come in every run and that its user can do nothing about; all others are shown."""

from __future__ import annotations

import logging
import warnings

# DeepSpeed calls collectives of torch's by names that torch 2.13 has deprecated.
DEPRECATED = r"`torch\.distributed\.\w+` is deprecated"
# On a CPU each process says so once; the run says itself which device it has.
NO_GPU = "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."


def quiet() -> None:
    """Keep these two back in this process; before torch and DeepSpeed are imported."""
    warnings.filterwarnings("ignore", message=DEPRECATED, category=FutureWarning)
    logging.getLogger("DeepSpeed").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return record.getMessage() != NO_GPU
