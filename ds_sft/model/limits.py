"""What a model has room for: a row of its embedding for each token, a position for each token of a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.config.values import UNSCALED_ROPE
from ds_sft.data.dataset import Data
from ds_sft.errors import UserError
from ds_sft.model.rotary import knows_scaling, read_config
from ds_sft.plan.rope import how_to_scale, scaling_in_words, trained_positions
from ds_sft.plan.shape import VOCAB_MULTIPLE, positions_of, resized_vocab, rope_of
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMED = 3  # tokens named in a line
OFFSET = 8  # rows that a table of positions has more than it has positions, at most (OPT: 2)


def check_limits(config: Config, tokenizer: PreTrainedTokenizerBase, data: Data, launch: Launch) -> None:
    """See from a model's configuration, before its weights are loaded, that it can take every row; on every rank.

    Raises:
        UserError: a token without a row in the embedding, or a row that is longer than a table of positions.
    """
    name, scaling = config.model_name_or_path, config.rope_scaling
    found = read_config(name, trust_remote_code=config.trust_remote_code, scaling=scaling)
    vocab = getattr(found.get_text_config(), "vocab_size", None)
    if vocab is not None and config.resize_embeddings:
        launch.say(_describe_resizing(vocab, tokenizer))
    elif vocab is not None:
        check_tokens(config, vocab, tokenizer, data)
    check_positions(config, found, data, launch)


# ---- Tokens


def _describe_resizing(vocab: int, tokenizer: Any) -> str:
    rows, tokens = resized_vocab(vocab, tokenizer), len(tokenizer)
    if rows == vocab:
        return f"resize_embeddings: the model's {vocab:,} rows have room for all {tokens:,} tokens: none are added."
    return (
        f"resize_embeddings: {vocab:,} -> {rows:,} embedding rows for {tokens:,} tokens, a multiple of "
        f"{VOCAB_MULTIPLE}; new ones are the mean of the others."
    )


def check_tokens(config: Config, vocab: int, tokenizer: Any, data: Data) -> None:
    """Refuse ids that an embedding of `vocab` rows does not have.

    Those that are used count: published tokenizers have tokens beyond the model's rows that no text becomes (Gemma 3
    1B: one, for images).

    Raises:
        UserError: rows, or what pads them, have such ids.
    """
    names = {number: token for token, number in tokenizer.get_vocab().items() if number >= vocab}
    if not names:
        return
    places = dict.fromkeys({tokenizer.pad_token_id} & names.keys(), "padding")
    for split, rows in (("eval", data.eval), ("train", data.train)):
        places |= {number: data.where(split, row) for number, row in _ids_beyond(rows, vocab).items()}
    ids = sorted(places)
    if not ids:
        return
    shown = ", ".join(f"{names.get(number)!r} ({number})" for number in ids[:NAMED])
    more = f" and {len(ids) - NAMED:,} more" if len(ids) > NAMED else ""
    raise UserError(
        f"model_name_or_path: {config.model_name_or_path}: the model has {vocab:,} embedding rows (vocab_size), none "
        f"for the tokens {shown}{more}, the first used by {places[ids[0]]}: write resize_embeddings: yes"
    )


def _ids_beyond(rows: Any, vocab: int) -> dict[int, int]:
    """Ids that an embedding of `vocab` rows does not have, and the first of the rows that has each."""
    chunks = [] if rows is None else rows.data.column("input_ids").chunks
    if not any((chunk.flatten().to_numpy() >= vocab).any() for chunk in chunks):  # a second for a gigabyte
        return {}
    first: dict[int, int] = {}
    for number, ids in enumerate(rows["input_ids"]):
        for beyond in (i for i in ids if i >= vocab):
            first.setdefault(beyond, number)
    return first


# ---- Positions


def check_positions(config: Config, found: Any, data: Data, launch: Launch) -> None:
    """Refuse rows that end beyond a table of positions; warn of those beyond what rotary ones were trained for.

    The longest row counts, also where rows share a sequence: positions start at 0 with each.

    Raises:
        UserError: a row is too long for the model's table.
    """
    known = _plain_config(found)
    limit, (longest, place) = positions_of(known), _longest(data)
    if config.rope_scaling is not None:
        check_scaling(config, found)
        launch.say(scaling_in_words(known))
    if limit is None:
        return
    check_company(config, known, longest, place)
    if longest <= limit:
        return
    if table_of_positions(empty_model(config, found), limit):
        raise UserError(
            f"max_length: {config.max_length}: {place} has {longest:,} tokens, and the model a table of {limit:,} "
            f"positions: write max_length: {limit}"
        )
    scaling = how_to_scale(known, longest)
    launch.say(
        f"Warning: {place} has {longest:,} tokens, more than the {limit:,} positions that the model was made for "
        f"(max_position_embeddings): lower max_length{f', or write {scaling}' if scaling else ''}."
    )


def check_scaling(config: Config, found: Any) -> None:
    """See that a model turns its queries and keys by what `rope_scaling` has put into its configuration.

    Raises:
        UserError: its code reads no such thing.
    """
    assert config.rope_scaling is not None
    model = empty_model(config, found)
    if model is not None and not knows_scaling(model, config.rope_scaling):
        kind = config.rope_scaling["rope_type"]
        raise UserError(f"rope_scaling: {type(model).__name__} computes no {kind} positions: leave it out")


def check_company(config: Config, known: dict[str, Any], longest: int, place: str) -> None:
    """See that no row is turned by the length of another: a `dynamic` or `longrope` model looks at the longest of a
    micro batch, laid end to end or padded, and a `dynamic` one at those before it, too.

    Raises:
        UserError: a row is long enough for that.
    """
    kind = rope_of(known).get("rope_type", "")
    if kind not in UNSCALED_ROPE or longest <= (trained := trained_positions(known)):
        return
    factor = float(math.ceil(max(longest, positions_of(known) or 0) / trained))
    alone = config.packing == "none" and not config.fills_batches and config.micro_batch == 1
    if kind == "longrope" and alone and config.training.get("per_device_eval_batch_size", 1) == 1:
        return
    remedy = (
        "packing: none with per_device_train_batch_size: 1 and per_device_eval_batch_size: 1" if kind == "longrope"
        else f"rope_scaling: {{rope_type: yarn, factor: {factor}}}"
    )  # fmt: skip
    raise UserError(
        f"max_length: {config.max_length}: {place} has {longest:,} tokens, and beyond {trained:,} the model's rotary "
        f"positions ({kind}) depend on other rows: {UNSCALED_ROPE[kind]}: write max_length: {trained}, or {remedy}"
    )


def _plain_config(found: Any) -> dict[str, Any]:
    """A model's configuration with the standard name for its positions (GPT-2 says n_positions)."""
    text = found.get_text_config()
    return {**text.to_dict(), "max_position_embeddings": getattr(text, "max_position_embeddings", None)}


def _longest(data: Data) -> tuple[int, str]:
    """Tokens of the longest row that is learned or measured, and its FILE:LINE."""
    ends = [(int(rows["tokens"].max()), data.where(split, int(rows["tokens"].argmax())))
            for split, rows in data.rows.items() if len(rows)]  # fmt: skip
    return max(ends, key=lambda end: end[0])


def empty_model(config: Config, found: Any) -> PreTrainedModel | None:
    """The model without memory for its weights; None where it cannot be made so."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(found, trust_remote_code=config.trust_remote_code)
    except Exception:  # code that comes with a model; `load_model` says what is wrong with it
        return None
    return made


def table_of_positions(model: PreTrainedModel | None, limit: int) -> bool:
    """Whether positions are looked up in a table of `limit` rows, learned (GPT-2) or computed once (GPT-J).

    No name tells: it is `wpe`, `embed_positions`, `pos_encoding`. Rotary positions are computed for any length.
    """
    from torch import nn

    if model is None:
        return False
    tokens = model.get_input_embeddings()
    learned = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    computed = (buffer for buffer in model.buffers() if buffer.ndim == 2 and len(buffer) == limit)
    return any(limit <= m.num_embeddings < limit + OFFSET for m in learned) or any(True for _ in computed)


def made_for(model: PreTrainedModel) -> int | None:
    """Tokens that a model was made to read at once, be it by a table or rotary; None where it does not say."""
    return positions_of(_plain_config(model.config))


def positions_left(model: PreTrainedModel) -> int | None:
    """Tokens that a prompt and its answer may have together; None where positions have no table."""
    limit = made_for(model)
    return limit if limit is not None and table_of_positions(model, limit) else None
