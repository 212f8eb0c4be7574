"""The shape of a model from its `config.json`: which tensors it has, without downloading or loading any of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_sft.config import Config
from ds_sft.errors import UserError
from ds_sft.plan.source import cached_config, is_folder, require_model

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

    def layer_shapes(self) -> dict[str, tuple[int, ...]]:
        """Each parameter of one layer by its name in it, in the layer's order."""
        h, i, q, kv = self.hidden, self.intermediate, self.q_size, self.kv_size
        matrices = {
            "self_attn.q_proj": (q, h, self.qkv_bias),
            "self_attn.k_proj": (kv, h, self.qkv_bias),
            "self_attn.v_proj": (kv, h, self.qkv_bias),
            "self_attn.o_proj": (h, q, self.output_bias),
            "mlp.gate_proj": (i, h, self.mlp_bias),
            "mlp.up_proj": (i, h, self.mlp_bias),
            "mlp.down_proj": (h, i, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (outputs, inputs, biased) in matrices.items():
            shapes |= {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if biased else {})
            if name.endswith("o_proj") and self.head_norms:
                shapes |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (self.head_dim,))
        return shapes | dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (h,))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each parameter of the model by its name in transformers; tied ones once."""
        matrix, layer = (self.vocab, self.hidden), self.layer_shapes()
        layers = {f"model.layers.{i}.{name}": shape for i in range(self.layers) for name, shape in layer.items()}
        head = {} if self.tied else {"lm_head.weight": matrix}
        return {"model.embed_tokens.weight": matrix, **layers, "model.norm.weight": (self.hidden,), **head}

    def tensors(self) -> list[int]:
        """Elements of each parameter of the model; tied ones once."""
        return [math.prod(shape) for shape in self.shapes().values()]

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
    name = model_name_or_path
    file = Path(name).expanduser() / "config.json" if is_folder(name) else _from_hub(name)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    return shape_of(found, str(file))


def _from_hub(name: str) -> Path:
    cached = cached_config(name)
    if cached is not None:
        return cached
    require_model(name)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", etag_timeout=10))
    except Exception as error:  # a dozen classes of three libraries: no such model, no access
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"model_name_or_path: {name}: its config.json is not to be had: {reason}") from None


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
