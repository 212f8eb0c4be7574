"""Supervised fine-tuning of chat models with the Hugging Face Trainer and DeepSpeed."""

import logging

__version__ = "0.1.0"

# transformers imports peft, and peft bitsandbytes where it is installed, in every run. On a CPU that has bfloat16
# products bitsandbytes then misses a package of kernels for answers, which nothing here uses (model/quantized.py).
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
)
