"""Give the memory of training back: weights, gradients, optimizer states and DeepSpeed's flat buffers, on every rank.

A tensor is freed when nobody refers to it any more. In DeepSpeed 0.19.8, transformers 5.23 and accelerate 1.15 these do
after `Accelerator.free_memory`, too, which ends the engine's hooks and forgets the accelerator's own list:

- the Trainer: `model`, `model_wrapped` (the engine, or DistributedDataParallel with its buckets), `optimizer` (ZeRO's
  keeps the float32 masters, the states and the flat buffers of gradients), and its callback handler, which has `model`
  and `optimizer` again. Our own parts of it, the working copy and the callbacks, refer to the model or to the trainer.
- `FWD_MODULE_STACK` of `deepspeed.runtime.zero.parameter_offload`, a global: ZeRO-3 pushes the module, and it stays.
- the `lru_cache` around `PartitionedParameterCoordinator.__params_to_release`, which belongs to the class: its keys are
  coordinators and modules, from where parameters lead to their `ds_tensor` and to the engine.
- the `GlobalOptimManager` of bitsandbytes 0.50, where Trainer names each embedding whose states are to stay float32.

So the trainer is emptied, whoever still has it, and the three are cleared.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Trainer


def release(trainer: Trainer) -> None:
    """Give back what `trainer` and its engine hold; it has no attribute left. All ranks must call it."""
    import torch
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # else from_pretrained would still partition, and wait for the other ranks
    trainer.accelerator.free_memory()
    vars(trainer).clear()
    _clear_deepspeed()
    _clear_bitsandbytes()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.accelerator.empty_host_cache()  # pinned memory: what was offloaded
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)  # a process of 1,331 MiB after training on a CPU has 390 then, and 1,127 without


def _clear_deepspeed() -> None:
    """What ZeRO-3 keeps in globals; where another version keeps nothing there, there is nothing to clear."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    coordinator = sys.modules.get("deepspeed.runtime.zero.partitioned_param_coordinator")
    if offload is None or coordinator is None:
        return
    with suppress(AttributeError, KeyError):
        offload.FWD_MODULE_STACK.clear()
        traced = coordinator.PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
        inspect.getclosurevars(traced).nonlocals["func"].cache_clear()  # inside a decorator that hides it


def _clear_bitsandbytes() -> None:
    """Where a run before had one of its optimizers of 8 bits."""
    theirs = sys.modules.get("bitsandbytes.optim.optimizer")
    if theirs is not None:
        theirs.GlobalOptimManager.get_instance().module_weight_config_triple.clear()
