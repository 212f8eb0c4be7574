"""Which of PyTorch's attention kernels a process may use on a GPU."""

from __future__ import annotations


def avoid_plans() -> None:
    """Keep `scaled_dot_product_attention` from cuDNN in this process: flash or memory-efficient kernels take its place.

    On Hopper cuDNN comes first, and builds a plan for every new length and strides, forward and backward: about 0.1 s
    of the host each (on an H200 two micro batches of 82 and 94 rows took 19 s). Whoever meets new lengths all the time
    waits for plans and for nothing else: padded batches, validation, rows verified one by one, and above all
    generation, whose keys grow by one with every token. The other kernels have no plans. `varlen_attn` of
    torch 2.15 takes cuDNN first, too, and obeys this switch. Without a GPU this changes nothing. Only
    model/attention_kernels.py calls cuDNN, for lone long rows of few lengths, and for these alone.
    """
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)
