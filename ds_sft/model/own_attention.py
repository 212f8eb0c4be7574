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
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ds_sft.config.extension import is_dotted, load, require_call, said
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.dtype import computed_in
from ds_sft.model.quantized import skeleton
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    import torch

KEY = "attn_implementation"
BORDERS = "row_borders"
# Keywords that some models' layers hand on -> the attribute of a layer that has the value.
OF_LAYERS = {"scaling": "scaling", "softcap": "attn_logit_softcapping", "s_aux": "sinks"}
FIRST_ROW = 3  # tokens of the first of two rows that the function is tried on
SAME = 1e-3  # numbers around 1 that differ by less may have been summed in another order


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


def try_attention(config: Config, launch: Launch) -> None:
    """Let the function that `attn_implementation` names attend to two rows of noise, as in a layer of the model, which
    is not loaded for it; on the device and in the dtype of the run.

    Raises:
        UserError: it fails, or returns something else than what was attended to, and weights or None; or what a token
            gets depends on tokens behind it or on another row.
    """
    name = str(config.attn_implementation)
    layer = _layer_of_model(config) if is_dotted(name) else None
    if layer is None:
        return
    import torch

    device = f"cuda:{launch.local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    layer.to_empty(device=device, recurse=False)  # what is its own, such as sinks
    with torch.random.fork_rng(devices=[]):  # a run draws the same with a trial and without
        states = [each.requires_grad_() for each in _noise(layer, getattr(torch, computed_in(config)), device)]
    first = _attended(name, layer, states)
    if not first.requires_grad:
        raise UserError(f"{KEY}: {name}: what it returns has no gradient, so nothing before it would learn")
    place, changed = FIRST_ROW - 1, [each.detach().clone() for each in states]
    for each in changed:
        each[:, :, place] += 1.0
    moved = (_attended(name, layer, changed) - first).detach().float().abs().amax((0, 2, 3)) > SAME
    if moved[:place].any():
        raise UserError(f"{KEY}: {name}: a token sees those behind it in its row, which it is to predict")
    if moved[FIRST_ROW:].any():
        by = "row_borders say where they begin" if takes_borders(name) else "attention_mask keeps them apart"
        raise UserError(f"{KEY}: {name}: of two rows laid end to end the second sees the first: {by}")


def _attended(name: str, layer: Any, states: Sequence[torch.Tensor]) -> torch.Tensor:
    """What the function makes of query, key and value, [1, tokens, heads, head_dim]."""
    import torch

    query, key, value = states
    call = f"called with query {list(query.shape)} and key {list(key.shape)}"
    try:
        made = load(name, KEY)(layer, query, key, value, **_words(name, layer, query))
    except Exception as error:
        raise UserError(f"{KEY}: {name}: {call} it ends in {said(error)}") from error
    expected = [1, query.shape[2], query.shape[1], value.shape[3]]
    pair = isinstance(made, (tuple, list)) and len(made) == 2 and isinstance(made[0], torch.Tensor)
    if not pair or list(made[0].shape) != expected:
        raise UserError(
            f"{KEY}: {name}: {call} it returned {_shown(made)}: expected two, what was attended to, [batch, tokens, "
            f"heads, head_dim], here {expected}, and weights or None"
        )
    attended: torch.Tensor = made[0]
    return attended


def _layer_of_model(config: Config) -> Any:
    """An attention of the model, without weights; None where it has none that says which layer it is of and how many
    heads it has, as code that comes with a model may. Why there is no such model is said when it is loaded."""
    try:
        bare = skeleton(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except Exception:  # whatever the model's own code raises
        return None
    named = (module for module in bare.modules() if "Attention" in type(module).__name__)
    known = (module for module in named if hasattr(module, "layer_idx") and hasattr(module, "config"))
    return next((layer for layer in known if isinstance(getattr(layer.config, "num_attention_heads", None), int)), None)


def _noise(layer: Any, dtype: torch.dtype, device: str) -> Iterator[torch.Tensor]:
    """Query, key and value of a sequence whose tokens are more than the heads, so that no axis is as long."""
    import torch

    text = layer.config
    heads, size = text.num_attention_heads, getattr(layer, "head_dim", None)
    size = getattr(layer, "qk_head_dim", None) or size or text.hidden_size // heads
    of_keys = heads // getattr(layer, "num_key_value_groups", 1)
    for number, width in ((heads, size), (of_keys, size), (of_keys, getattr(layer, "v_head_dim", None) or size)):
        yield torch.randn(1, number, heads + FIRST_ROW, width).to(device, dtype)


def _words(name: str, layer: Any, query: torch.Tensor) -> dict[str, Any]:
    """What the function gets beside the states: of two rows the borders, or a mask."""
    import torch

    lengths = [FIRST_ROW, query.shape[2] - FIRST_ROW]
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(query.device)
    words = {"scaling": query.shape[3] ** -0.5, "dropout": 0.0, "position_ids": positions}
    words["sliding_window"] = getattr(layer, "sliding_window", getattr(layer.config, "sliding_window", None))
    words |= {word: getattr(layer, name) for word, name in OF_LAYERS.items() if hasattr(layer, name)}
    if takes_borders(name):
        starts = torch.tensor([0, FIRST_ROW, query.shape[2]], dtype=torch.int32, device=query.device)
        return words | {"attention_mask": None, BORDERS: SimpleNamespace(lengths=lengths, starts=starts)}
    seen = torch.block_diag(*(torch.ones(length, length) for length in lengths)).tril()  # type: ignore[no-untyped-call]
    return words | {"attention_mask": seen.bool()[None, None].to(query.device)}


def _shown(made: Any) -> str:
    if isinstance(made, (tuple, list)):
        return f"({', '.join(_shown(item) for item in made)})"
    return str(list(made.shape)) if hasattr(made, "shape") else "None" if made is None else type(made).__name__


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
