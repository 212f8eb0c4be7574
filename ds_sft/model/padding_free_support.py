"""Which models keep rows apart that are laid end to end (`batching: padding_free`); others get padded micro batches."""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch


def why_rows_mix(model_class: type, config: Any) -> str | None:
    """Why rows of one sequence would see each other in a model; None where it keeps them apart.

    It does where attention is all that joins tokens, and transformers builds its mask from the position ids.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return ", ".join(sorted(kinds))
    source = inspect.getsource(sys.modules[model_class.__module__])
    takes_positions = "position_ids" in inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]
    if takes_positions and "create_causal_mask" in source and any(map(_gives_positions, ast.walk(ast.parse(source)))):
        return None
    return "its mask knows no position ids"


def _gives_positions(node: ast.AST) -> bool:
    """Whether an expression hands position ids to a function that makes a mask, directly or as its keywords."""
    if isinstance(node, ast.Call):
        return "mask" in ast.unparse(node.func) and "position_ids" in {keyword.arg for keyword in node.keywords}
    if not isinstance(node, ast.Dict):
        return False
    return {"attention_mask", "position_ids"} <= {key.value for key in node.keys if isinstance(key, ast.Constant)}


def uses_padding(config: Config, launch: Launch) -> bool:
    """Whether micro batches are padded: as asked, or because this model would mix rows that are laid end to end.

    Raises:
        UserError: it would, and rows are to be packed.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if config.batching == "padded":
        return True
    found = AutoConfig.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    try:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(found)]
    except KeyError:  # code that comes with the model
        mixing: str | None = "its own code"
    else:
        mixing = why_rows_mix(model_class, found)
    if mixing and config.packing != "none":
        raise UserError(
            f"packing: {config.packing}: {type(found).__name__} ({mixing}) does not keep packed rows apart; write none"
        )
    if mixing:
        launch.say(f"batching: padded: {type(found).__name__} ({mixing}) would mix rows that are laid end to end.")
    return mixing is not None
