"""Whether ranks can share the rows of a model: seen from its configuration, before anything is encoded or loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.model.attention import use_rows_attention
from ds_sft.model.attention_kernels import Attention
from ds_sft.model.limits import empty_model
from ds_sft.model.loss import OwnLoss, SupervisedLoss, adds_to_loss, why_own_loss
from ds_sft.model.padding_free_support import why_rows_mix
from ds_sft.model.rotary import read_config
from ds_sft.model.routing import balances

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DROPOUT = re.compile(r"(?!classifier).*(dropout|pdrop)(_prob|_rate|_p)?")  # names of shares in configurations
# Rotary positions whose frequencies depend on the longest position of a batch, of which a rank has a part.
LOOKS_AHEAD = ("dynamic", "longrope")


def require_shareable(config: Config) -> None:
    """See that attention, loss and positions of a model are exact where a rank has a part of every row.

    Raises:
        UserError: one of them would not be; says which, and what to write.
    """
    if config.sequence_parallel == 1:
        return
    name, trust = config.model_name_or_path, config.trust_remote_code
    found = read_config(name, trust_remote_code=trust, scaling=config.rope_scaling)
    model, place = empty_model(config, found), f"sequence_parallel: {config.sequence_parallel}"
    if model is None:
        raise UserError(f"{place}: {name}: its own code makes no model without weights: write 1")
    heads = found.get_text_config().num_attention_heads
    if heads % config.sequence_parallel:
        sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{place}: {type(model).__name__} has {heads} heads, and ranks get some each: write {sizes}")
    if reason := _why_not(model):
        raise UserError(f"{place}: {type(model).__name__} {reason}: write 1")


def _why_not(model: PreTrainedModel) -> str | None:
    """Why a part of a row would be learned otherwise than a row; the model is of no use afterwards."""
    text = model.config.get_text_config()
    if mixing := why_rows_mix(type(model), model.config):
        return f"would mix rows that are laid end to end ({mixing})"
    if reason := use_rows_attention(model):
        return reason
    if reason := why_own_loss(model):
        return f"keeps a loss of its own, which would lose the first token of every part ({reason})"
    if adds_to_loss(type(model)) and not balances(model):
        return "adds a loss of its own kind, a mean over one rank's tokens"
    if dropped := [name for name, value in text.to_dict().items() if DROPOUT.fullmatch(name) and value]:
        return f"drops out by chance, which would depend on the number of ranks ({', '.join(dropped)} in config.json)"
    if looking := sorted({kind for kind in _rope_types(text) if kind in LOOKS_AHEAD}):
        return f"has rotary positions that look at the longest row of a batch (rope_type: {', '.join(looking)})"
    return None


def _rope_types(text: Any) -> list[str]:
    """Of all layers: `rope_parameters` is one set of them, or one for each kind of layer."""
    known = getattr(text, "rope_parameters", None) or {}
    sets = [known, *(value for value in known.values() if isinstance(value, dict))]
    return [str(one.get("rope_type", "default")) for one in sets]


def require_shared(attention: Attention | None, loss: SupervisedLoss | OwnLoss) -> None:
    """See that what is trained, adapters and all, has the loss that `require_shareable` saw in the bare model.

    Raises:
        UserError: it has not.
    """
    if attention is not None and attention.group is not None and isinstance(loss, OwnLoss):
        raise UserError(
            f"sequence_parallel: {attention.group.size}: with what is trained of it the model keeps a loss of its own, "
            "which would lose the first token of every part: write 1, or leave the output projection as it is"
        )
