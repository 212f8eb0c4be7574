"""What a GPU is asked to do for a micro batch: operations dispatched, forward, loss and backward, on the meta device.

    python benchmarks/launches.py                                 # Qwen3-0.6B's shape, 72 rows of 225 tokens
    python benchmarks/launches.py --rows 16 --length 200 --checkpointing --masters

Shapes alone are computed, so it needs no GPU and no weights. An operation that neither looks at its operands in another
way nor only allocates launches at least one kernel: that is the second number. Rows one by one are counted as on a GPU,
where each is one fused operation, forward and backward; so are Liger's norms, rotations and gates (`fused_kernels`).
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ds_sft.data.batch import collate_flat
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.fused import Kernels, use_kernels
from ds_sft.model.loss import supervise
from ds_sft.model.working_copy import WorkingCopy
from ds_sft.training.trainer import without_metadata

QWEN3: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "head_dim": 128,
                         "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 151_936,
                         "tie_word_embeddings": True}  # fmt: skip
ALLOCATIONS = (
    "aten::_unsafe_view",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::detach",
)


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.all: Counter[str] = Counter()
        self.launching: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        self.all[name] += 1
        if not function.is_view and name not in ALLOCATIONS:
            self.launching[name] += 1
        return function(*args, **kwargs or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder with a config.json [Qwen3-0.6B's shape]")
    parser.add_argument("--rows", type=int, default=72, help="[%(default)s]")
    parser.add_argument("--length", type=int, default=225, help="tokens of a row [%(default)s]")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--masters", action="store_true", help="float32 weights, lent in bfloat16")
    given = parser.parse_args()
    F.scaled_dot_product_attention = fused  # type: ignore[assignment]
    variants = (("row by row", "cpu", False), ("all rows at once", "meta", False), ("and fused kernels", "meta", True))
    for name, device, with_kernels in variants:
        counted = count(given, device, with_kernels)
        print(f"{name}: {counted.all.total():,} operations, {counted.launching.total():,} of them launch kernels")
    print("The last's:", ", ".join(f"{n:,} {op.split('::')[1]}" for op, n in counted.launching.most_common(12)))


class OneKernel(torch.autograd.Function):
    """In place of one of Liger's: an operation forward, and one backward that makes all gradients."""

    @staticmethod
    def forward(ctx: Any, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*others)
        return first.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (gradient.clone(), *map(torch.empty_like, ctx.saved_tensors))


KERNELS = Kernels(
    norm=lambda x, weight, *options: OneKernel.apply(x, weight),
    silu_mul=OneKernel.apply,
    gelu_mul=OneKernel.apply,
    rotate=lambda q, k, *options: (OneKernel.apply(q), k),
)


def count(given: argparse.Namespace, attention: str, with_kernels: bool) -> Counted:
    """`attention`: the device for whose attention the model is prepared; it computes on meta in any case."""
    config = AutoConfig.from_pretrained(given.model) if given.model else AutoConfig.for_model("qwen3", **QWEN3)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if given.masters else torch.bfloat16)
    model.train()
    keep_rows_apart(model, device=attention, dtype=torch.bfloat16)
    if with_kernels:
        use_kernels(model, KERNELS, "one operation each")
    supervise(model)
    if given.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    row = {
        "input_ids": [1] * given.length,
        "labels": [-100] * (given.length // 3) + [1] * (given.length - given.length // 3),
    }
    batch = {name: value.to("meta") for name, value in collate_flat([row] * given.rows).items()}
    copy = WorkingCopy(model)
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    with Counted() as counted, copy.lent():
        model(**batch, use_cache=False).loss.backward()
    return counted


def fused(query: Any, key: Any, value: Any, *, is_causal: bool, scale: float, **options: Any) -> Any:
    """In place of the composition that the meta device has."""
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]


if __name__ == "__main__":
    main()
