"""Started by test_sequence.py on four ranks: losses and gradients of rows that they share, beside those of one rank.

Rank 0 prints a line of JSON for each case: how far the loss, relative, and the gradient, of its length, are apart.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist

from ds_sft.data.batch import collate_flat, collate_share
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.loss import supervise
from ds_sft.model.sequence import SequenceGroup, join_group
from ds_sft.ranks.collectives import end_group
from ds_sft.ranks.launch import Launch
from tests.test_attention import learn, make, make_rows
from tests.test_loss import apart

ALONE = Launch(launcher="python", local_world_size=4)
# Heads and key heads, beside what FAMILIES has of each: fewer key heads than ranks, and no divisor of them.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ("qwen3", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("llama", {"num_attention_heads": 12, "num_key_value_heads": 6, "hidden_size": 48, "head_dim": 4}),
    ("mistral", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    ("gemma3_text", {"num_attention_heads": 4, "num_key_value_heads": 1}),
    ("olmo2", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    ("cohere", {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64}),
]


def both(family: str, changes: dict[str, Any], group: SequenceGroup, dtype: torch.dtype, *, again: bool) -> None:
    """Teach one model whole rows, and then this rank's part of them; `again`: layers are computed again in backward."""
    rows, model = make_rows(), make(family, dtype, **changes)
    attention = keep_rows_apart(model, group=group)
    supervise(model)
    if again:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradient = learn(model, [collate_flat(rows)])
    place = dist.get_rank() % group.size
    calls, exchange = [0], group.exchange

    def counted(parts: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        return exchange(parts)

    group.exchange = counted  # type: ignore[method-assign]
    found, found_gradient = learn(model, [collate_share(rows, place=place, size=group.size)])
    group.exchange = exchange  # type: ignore[method-assign]
    sums = torch.cat([torch.tensor([found]), found_gradient])
    dist.all_reduce(sums, group=group.process_group)
    assert attention.group is group
    if dist.get_rank() == 0:
        print(json.dumps({
            "case": f"{family} {changes['num_attention_heads']}/{changes['num_key_value_heads']}", "ranks": group.size,
            "dtype": str(dtype).removeprefix("torch."), "again": again, "loss": abs(sums[0].item() / loss - 1),
            "gradient": apart(sums[1:], gradient), "exchanges": calls[0],
        }), flush=True)  # fmt: skip


def main() -> None:
    dist.init_process_group("gloo")
    groups = [group for size in (2, 4) if (group := join_group(size, ALONE, 60)) is not None]
    for group in groups:
        for family, changes in CASES:
            both(family, changes, group, torch.float32, again=False)
        both(*CASES[1], group, torch.float32, again=True)
        both(*CASES[1], group, torch.bfloat16, again=False)
    end_group()


if __name__ == "__main__":
    main()
