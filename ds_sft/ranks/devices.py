"""Which devices and cores a process sees, and how memory of GPUs is given out: settled before torch is imported."""

from __future__ import annotations

import os

from ds_sft.ranks.launch import Launch


def use_one_device(env: dict[str, str] | os._Environ[str]) -> None:
    """Without a launcher show torch the first GPU only: with more, Trainer would take nn.DataParallel.

    Must run before torch looks for devices.
    """
    env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def hide_gpus(env: dict[str, str] | os._Environ[str]) -> None:
    """Show torch and DeepSpeed no GPU, so that nothing of a run with `use_cpu` asks one, measures one or waits for one.

    DeepSpeed takes the GPU that it sees, whatever Trainer was told. Must run before torch looks for devices.
    """
    env["CUDA_VISIBLE_DEVICES"] = ""
    env["DS_ACCELERATOR"] = "cpu"


def share_cores(launch: Launch, env: dict[str, str] | os._Environ[str]) -> None:
    """Give each rank of a node its part of the cores where nobody has said OMP_NUM_THREADS; torchrun says 1 itself.

    Under `deepspeed` every rank would start a thread for every core. Must run before torch is imported.
    """
    if launch.local_world_size > 1 and not env.get("OMP_NUM_THREADS"):
        env["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // launch.local_world_size))


def grow_segments(env: dict[str, str] | os._Environ[str]) -> None:
    """Let PyTorch's allocator of GPU memory grow its segments: micro batches differ in size, and blocks of many sizes
    would leave gaps between them. Must run before torch is imported; what a user has set stays.
    """
    if not env.get("PYTORCH_CUDA_ALLOC_CONF"):  # the name of older versions
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
