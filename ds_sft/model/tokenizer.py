"""The tokenizer of a model, ready for training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_sft.config.keys import Config
from ds_sft.errors import UserError, first_line
from ds_sft.model.quantized import require_bitsandbytes, require_float
from ds_sft.model.rotary import read_config
from ds_sft.plan.shape import positions_of
from ds_sft.plan.source import require_model
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: Config, launch: Launch) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token, which ends every answer, is replaced by the end-of-sequence token.

    Also looks for the model's configuration, so that a wrong `model_name_or_path` is found before data is encoded.

    Raises:
        UserError: no such model, or a tokenizer this package cannot use.
    """
    name = config.model_name_or_path
    if remark := require_model(name):
        launch.say(remark)
    require_bitsandbytes(config.quantization, config.training.get("optim", ""))
    try:
        found = read_config(name, trust_remote_code=config.trust_remote_code, scaling=config.rope_scaling)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {name}: {first_line(error)}") from error
    require_float(found, name, config.quantization)
    tokenizer = open_tokenizer(name, launch, trust_remote_code=config.trust_remote_code)
    if config.rope_scaling is not None:  # a server takes the smaller of the tokenizer's length and the model's
        tokenizer.model_max_length = max(tokenizer.model_max_length, positions_of(found.get_text_config().to_dict()))
    return tokenizer


def open_tokenizer(name: str, launch: Launch, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in `name`, a folder, of an adapter too, or a hub id, as `load_tokenizer` leaves it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"model_name_or_path: {name}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"model_name_or_path: {name}: has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"model_name_or_path: {name}: its tokenizer has neither a pad nor an eos token")
        launch.say(f"The tokenizer has no pad token: {tokenizer.eos_token!r} (eos) ends the answers instead.")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"  # training batches; left is for generation
    return tokenizer
