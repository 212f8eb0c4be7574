"""Supervised fine-tuning of chat models with the Hugging Face Trainer and DeepSpeed."""

__version__ = "0.1.0"
