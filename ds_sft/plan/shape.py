"""The shape of a model from its `config.json`: which tensors it has, without downloading or loading any of them."""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ds_sft.config import Config
from ds_sft.errors import UserError

# Decoders whose layer is [norm, attention, norm, gated MLP], and what their configuration does not say of biases:
# transformers' models/*/modeling_*.py.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
BIASED_QKV = ("qwen2",)  # on q, k and v, never on the output projection
HEAD_NORMS = ("qwen3",)  # q and k are normalised a head at a time
TIED_BY_DEFAULT = ("smollm3",)
SCALED_BY_FACTOR = ("linear", "dynamic", "yarn")  # rotary positions
VOCAB_MULTIPLE = 64  # rows that `resize_embeddings` fills up to: matrix products are fast in multiples of it
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a dense decoder."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int  # fewer than `heads`: grouped-query attention
    head_dim: int
    vocab: int
    tied: bool  # the output projection is the embedding
    head_norms: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    positions: int | None = None  # that the model was made for; None where its configuration does not say

    @property
    def q_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    def layer_tensors(self) -> list[int]:
        """Elements of each parameter of one layer, matrices first."""
        h, i, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        sizes = [h * q, h * kv, h * kv, q * h, h * i, h * i, i * h]
        sizes += [q, kv, kv] if self.qkv_bias else []
        sizes += [h] if self.output_bias else []
        sizes += [i, i, h] if self.mlp_bias else []
        sizes += [self.head_dim, self.head_dim] if self.head_norms else []
        return [*sizes, h, h]

    def tensors(self) -> list[int]:
        """Elements of each parameter of the model; tied ones once."""
        head = [] if self.tied else [self.embedding]
        return [self.embedding, *self.layer_tensors() * self.layers, self.hidden, *head]

    @property
    def embedding(self) -> int:
        return self.vocab * self.hidden

    @cached_property
    def parameters(self) -> int:
        return sum(self.tensors())

    @property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: the matrices of the layers and the output projection."""
        h, i, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        return self.layers * (2 * h * q + 2 * h * kv + 3 * h * i) + self.embedding


def shape_of_run(config: Config) -> Shape:
    """The shape of the model that a run trains: with the rows that `resize_embeddings` adds.

    Raises:
        UserError: as `read_shape`, or no tokenizer to count the tokens of.
    """
    shape = read_shape(config.model_name_or_path)
    if not config.resize_embeddings:
        return shape
    from transformers import AutoTokenizer  # seconds, for this key only: it alone knows which tokens files add up to

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"resize_embeddings: {config.model_name_or_path}: no tokenizer to count: {reason}") from None
    return replace(shape, vocab=resized_vocab(shape.vocab, tokenizer))


def resized_vocab(vocab: int, tokenizer: Any) -> int:
    """Embedding rows under `resize_embeddings`: enough for the tokenizer's largest id, never fewer than there are."""
    needed = max(tokenizer.get_vocab().values()) + 1
    return vocab if needed <= vocab else math.ceil(needed / VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def positions_of(found: Mapping[str, Any]) -> int | None:
    """Positions that a model was made for, scaled rotary ones as scaled; None where its configuration does not say.

    As vLLM derives it: a factor counts from the length of pre-training, which is `max_position_embeddings` where no
    other is stated; types that come without one (llama3, longrope) state the scaled length there.
    """
    limit = found.get("max_position_embeddings")
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = rope_of(found)
    if rope.get("rope_type") not in SCALED_BY_FACTOR:
        return limit
    return max(limit, int((rope.get("factor") or 1) * (rope.get("original_max_position_embeddings") or limit)))


def rope_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 spells them; where both are given the older `rope_scaling` replaces them all
    (findings/rope_scaling_wins.sh)."""
    rope = dict(found.get("rope_scaling") or found.get("rope_parameters") or {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if "rope_theta" in found:
        rope.setdefault("rope_theta", found["rope_theta"])
    return rope


def read_shape(model_name_or_path: str) -> Shape:
    """The shape of a folder's or a hub id's model; of the hub only `config.json` is fetched, once.

    Raises:
        UserError: no such model, no network, or an architecture whose memory this package cannot derive.
    """
    path = Path(model_name_or_path).expanduser()
    file = path / "config.json" if path.is_dir() else _from_hub(model_name_or_path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model_name_or_path: {model_name_or_path}: this folder has no config.json") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    return shape_of(found, str(file))


def _from_hub(name: str) -> Path:
    if Path(name).exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise UserError(f"model_name_or_path: {name}: no such folder, and not a hub id such as Qwen/Qwen3-0.6B")
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    _reach_hub(name)
    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=10))
    except Exception as error:  # a dozen classes of three libraries: no such model, no access, no network, offline mode
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model_name_or_path: {name}: its config.json is not to be had: {reason}") from None


def _reach_hub(name: str) -> None:
    """Say at once that there is no network: the library would try six times, aloud, for half a minute."""
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():  # the library says so itself; a proxy resolves names for us
        return
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=5).close()
    except OSError as error:
        raise UserError(
            f"model_name_or_path: {name}: {hub.hostname} cannot be reached ({error.strerror or error}); "
            "give the folder of a model, or copy its config.json into one"
        ) from None


def shape_of(found: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape that the keys of a `config.json` describe.

    Raises:
        UserError: a mixture of experts, another architecture, or a key missing.
    """
    family = str(found.get("model_type"))
    if any("expert" in key for key in found):
        raise UserError(f"{where}: model_type {family}: a mixture of experts; only dense models can be planned")
    if family not in FAMILIES:
        raise UserError(f"{where}: model_type {family}: cannot be planned; these can: {', '.join(FAMILIES)}")
    for key in NUMBERS:
        if not isinstance(found.get(key), int) or found[key] < 1:
            raise UserError(f"{where}: {key}: expected a whole number above 0, found {found.get(key)!r}")
    heads, bias = found["num_attention_heads"], bool(found.get("attention_bias", False))
    return Shape(
        family=family,
        hidden=found["hidden_size"],
        intermediate=found["intermediate_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_dim=found.get("head_dim") or (128 if family == "qwen3" else found["hidden_size"] // heads),
        vocab=found["vocab_size"],
        tied=bool(found.get("tie_word_embeddings", family in TIED_BY_DEFAULT)),
        head_norms=family in HEAD_NORMS,
        qkv_bias=family in BIASED_QKV or (bias and family != "mistral"),
        output_bias=bias and family not in (*BIASED_QKV, "mistral"),
        mlp_bias=bool(found.get("mlp_bias", False)) and family in ("llama", "smollm3"),
        positions=positions_of(found),
    )
