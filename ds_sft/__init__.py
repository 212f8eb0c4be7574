"""Supervised fine-tuning of chat models with the Hugging Face Trainer and DeepSpeed."""

import logging

__version__ = "0.1.0"


def _is_news(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)


# Here, because every process of ours passes here before peft, which imports bitsandbytes 0.50 where it is installed. It
# then warns, on CPUs that have bfloat16, of an optional package, also where no weight has 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
