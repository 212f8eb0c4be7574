"""What the key `rope_scaling` makes of a model's configuration, from its numbers alone.

Into `config.json` go `rope_parameters`, as transformers 5 and llama.cpp's converter read them, and
`max_position_embeddings`. vLLM multiplies that by the factor of `linear`, so there it stays the length of pre-training;
of `yarn` and `llama3` it is the length that is reached.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ds_sft.config.values import ROPE_TYPES
from ds_sft.errors import UserError
from ds_sft.plan.shape import positions_of, rope_of

ORIGINAL = "original_max_position_embeddings"
CHANGED = ("rope_parameters", "max_position_embeddings")  # keys of config.json
REPLACED = ("default", "dynamic", *ROPE_TYPES)  # types of a model that another may stand in for
OF_THE_MODEL = ("rope_theta", "partial_rotary_factor")  # what holds whatever the type


def scaled(found: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` and `max_position_embeddings` of a model under the key `rope_scaling`.

    What the key leaves out is the model's: always `rope_theta`, and all options where it names the model's own type.

    Args:
        found: the model's configuration, of a model with several parts that of its text.

    Raises:
        UserError: the model has no rotary positions, or none that can be scaled so; or they would reach less far.
    """
    own = rope_of(found)
    _require_plain(own, found)
    kind = scaling["rope_type"]
    kept = (*OF_THE_MODEL, *(ROPE_TYPES[kind] if own.get("rope_type") == kind else ()))
    rope = {name: value for name, value in own.items() if name in kept} | dict(scaling)
    trained = rope.get(ORIGINAL) or trained_positions(found)
    if ORIGINAL in ROPE_TYPES[kind]:
        rope[ORIGINAL] = trained
    reach, limit = int(rope["factor"] * trained), positions_of(found) or trained
    if reach < limit:
        raise UserError(
            f"rope_scaling: factor {rope['factor']:g} of {trained:,} positions reaches {reach:,} tokens, and the model "
            f"was made for {limit:,}: write a factor of {limit / trained:g} or more, or leave rope_scaling out"
        )
    return {"rope_parameters": rope, "max_position_embeddings": reach if ORIGINAL in ROPE_TYPES[kind] else trained}


def trained_positions(found: Mapping[str, Any]) -> int:
    """Tokens of the rows that a model was made with before its positions were scaled, if they were."""
    return int(rope_of(found).get(ORIGINAL) or found.get(ORIGINAL) or found["max_position_embeddings"])


def scaling_in_words(known: Mapping[str, Any]) -> str:
    """What `rope_scaling` has made of the positions, for a model's configuration that has it."""
    rope, trained = rope_of(known), trained_positions(known)
    reach = positions_of(known) or trained
    return f"Positions: {rope['rope_type']} x {rope['factor']:g}, {trained:,} -> {reach:,}."


def how_to_scale(known: Mapping[str, Any], longest: int) -> str | None:
    """The key with which rotary positions reach `longest` tokens; None where one set of them does not serve all layers.

    Args:
        known: a model's configuration, as transformers or as its `config.json` has it.
    """
    rope = rope_of(known)
    kind = rope.get("rope_type", "default" if "rope_theta" in rope and "rope_local_base_freq" not in known else None)
    if kind not in REPLACED:
        return None
    trained = trained_positions(known)
    factor = float(math.ceil(longest / trained))
    if kind in ROPE_TYPES:  # what else its author has chosen stays
        return f"rope_scaling: {{rope_type: {kind}, factor: {factor}}}"
    return f"rope_scaling: {{rope_type: yarn, factor: {factor}, {ORIGINAL}: {trained}}}"


def _require_plain(own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises UserError: the rotary positions of a model cannot be scaled by one set of numbers."""
    kind = found.get("model_type", "this model")
    if not own or not found.get("max_position_embeddings"):
        raise UserError(f"rope_scaling: {kind} has no rotary positions: leave it out")
    if layers := [name for name, value in own.items() if isinstance(value, Mapping)]:
        raise UserError(
            f"rope_scaling: {kind} has rotary positions of several kinds ({', '.join(layers)}), each with numbers of "
            "its own: leave it out, and scale them in config.json of a copy of the model"
        )
    if own.get("rope_type", "default") not in REPLACED:
        raise UserError(
            f"rope_scaling: the rotary positions of {kind} are {own['rope_type']} already, which nothing replaces: "
            "leave it out"
        )
