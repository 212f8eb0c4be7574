"""An attention of the user's: `attn_implementation: my.module:attention`.

It is called as transformers calls any (`AttentionInterface`), for every layer:

    attention(module, query, key, value, attention_mask, scaling=..., dropout=..., **kwargs)

with query [batch, heads, tokens, head_dim], key and value [batch, kv_heads, tokens, head_dim], and returns what was
attended to, [batch, tokens, heads, head_dim], and weights or None. `attention_mask` is [batch, 1, tokens, tokens], True
where a token is seen, or None: then each token sees those before it and itself. Rows laid end to end are one sequence,
batch 1, whose mask keeps them apart. A function with a parameter `row_borders` gets their borders in place of that
mask: its `starts`, [rows + 1] int32 on the device, where each row begins and the last ends, and its `lengths`, a list.
In a batch that is padded it is None.
"""

from __future__ import annotations

import inspect
from typing import Any

from ds_sft.config.extension import is_dotted, load, require_call
from ds_sft.config.keys import Config

KEY = "attn_implementation"
BORDERS = "row_borders"


def register_attention(config: Config) -> None:
    """Let a model be loaded with the function that `attn_implementation` names, if it names one.

    Raises:
        UserError: it cannot be had, or not be called as attention is.
    """
    name = config.attn_implementation
    if name is None or not is_dotted(name):
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    function = load(name, KEY)
    arguments = ("module", "query", "key", "value", "attention_mask")
    require_call(function, name, KEY, *arguments, keywords={"scaling": 1.0, "dropout": 0.0, "sliding_window": None})
    AttentionInterface.register(name, _with_borders(function) if takes_borders(name) else function)
    AttentionMaskInterface.register(name, sdpa_mask)


def takes_borders(name: str | None) -> bool:
    """Whether an attention is a user's function that keeps rows apart by their borders."""
    return is_dotted(name) and BORDERS in inspect.signature(load(str(name), KEY)).parameters


def _with_borders(function: Any) -> Any:
    """The function, which is remembered to have had the borders, without the empty mask that comes with them."""

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, row_borders: Any = None, **kwargs: Any
    ) -> Any:
        if row_borders is not None:
            row_borders.attended, attention_mask = True, None
        return function(module, query, key, value, attention_mask, row_borders=row_borders, **kwargs)

    return attend
