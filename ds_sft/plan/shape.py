"""The shape of a model from its `config.json`: which tensors it has, without downloading or loading any of them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.plan.blocks import Experts, Latent, gated_mlp, linear
from ds_sft.plan.source import cached_config, is_folder, require_model
from ds_sft.plan.weights import is_matrix, layer_of, met_by_token

# Decoders whose layer is [norm, attention, norm, gated MLP], and what their configuration does not say of biases:
# transformers' models/*/modeling_*.py.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# The same with experts in place of the MLP (plan/blocks.py).
MIXTURES = ("qwen3_moe", "qwen2_moe", "mixtral", "glm4_moe", "gpt_oss", "deepseek_v3")
BIASED_QKV = ("qwen2",)  # on q, k and v, never on the output projection
HEAD_NORMS = ("qwen3", "qwen3_moe")  # q and k are normalised a head at a time
WITHOUT_BIAS = ("mistral", "mixtral")
TIED_BY_DEFAULT = ("smollm3",)
SCALED_BY_FACTOR = ("linear", "dynamic", "yarn")  # rotary positions
VOCAB_MULTIPLE = 64  # rows that `resize_embeddings` fills up to: matrix products are fast in multiples of it
NUMBERS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# peft 0.21 takes these ends of names for the experts, also of an MLP beside them: a run puts no adapters there.
TAKEN = dict.fromkeys(("qwen3_moe", "glm4_moe", "deepseek_v3"), ("gate_proj", "up_proj", "down_proj"))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a decoder."""

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
    sinks: bool = False  # a score in each head for seeing nothing (gpt-oss); attention is then eager
    latent: Latent | None = None
    experts: Experts | None = None
    positions: int | None = None  # that the model was made for; None where its configuration does not say

    @property
    def q_size(self) -> int:
        return self.heads * (self.latent.key if self.latent else self.head_dim)

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def v_size(self) -> int:
        """Of what attention computes of a token, for its output projection."""
        return self.heads * (self.latent.value if self.latent else self.head_dim)

    @property
    def attended(self) -> float:
        """Width of attention for its FLOP: a pair of tokens has a score, and a part in a sum of values."""
        return (self.q_size + self.v_size) / 2

    def experts_in(self, layer: int) -> Experts | None:
        """The mixture of a layer; None: it has an MLP."""
        return self.experts if self.experts is not None and layer in self.experts.layers else None

    def layer_shapes(self, layer: int = 0) -> dict[str, tuple[int, ...]]:
        """Each parameter of a layer by its name in it, in the layer's order."""
        h, mixture = self.hidden, self.experts_in(layer)
        mlp = mixture.shapes(h) if mixture else gated_mlp("mlp", h, self.intermediate, bias=self.mlp_bias)
        norms = dict.fromkeys(("input_layernorm.weight", "post_attention_layernorm.weight"), (h,))
        return {**self._attention_shapes(), **mlp, **norms}

    def _attention_shapes(self) -> dict[str, tuple[int, ...]]:
        h, name = self.hidden, "self_attn"
        if self.latent:
            return dict(self.latent.shapes(h, self.heads, bias=self.output_bias))
        head_norms = dict.fromkeys((f"{name}.q_norm.weight", f"{name}.k_norm.weight"), (self.head_dim,))
        return {
            **({f"{name}.sinks": (self.heads,)} if self.sinks else {}),
            **linear(f"{name}.q_proj", self.q_size, h, bias=self.qkv_bias),
            **linear(f"{name}.k_proj", self.kv_size, h, bias=self.qkv_bias),
            **linear(f"{name}.v_proj", self.kv_size, h, bias=self.qkv_bias),
            **linear(f"{name}.o_proj", h, self.q_size, bias=self.output_bias),
            **(head_norms if self.head_norms else {}),
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each parameter of the model by its name in transformers; tied ones once."""
        matrix = (self.vocab, self.hidden)
        layers = {f"model.layers.{i}.{name}": shape for i in range(self.layers)
                  for name, shape in self.layer_shapes(i).items()}  # fmt: skip
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
    def met(self) -> float:
        """Share of a layer's experts that a token meets."""
        return self.experts.met if self.experts else 1.0

    @cached_property
    def active(self) -> int:
        """Parameters that a token meets: all but the experts that it does not choose."""
        return sum(round(math.prod(shape) * met_by_token(name, self.met)) for name, shape in self.shapes().items())

    @cached_property
    def multiplied(self) -> int:
        """Parameters that every token is multiplied with: the matrices of the layers and the output projection."""
        return self.embedding + sum(
            round(math.prod(shape) * met_by_token(name, self.met))
            for name, shape in self.shapes().items()
            if layer_of(name) is not None and is_matrix(name, shape)
        )


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
    """The shape of a folder's or a hub id's model.

    Raises:
        UserError: as `read_config_json`, or an architecture whose memory this package cannot derive.
    """
    return shape_of(*read_config_json(model_name_or_path))


def read_config_json(name: str) -> tuple[dict[str, Any], str]:
    """The `config.json` of a folder's or a hub id's model, and where it is; of the hub it alone is fetched, once.

    Raises:
        UserError: no such model, no network, or no JSON.
    """
    file = Path(name).expanduser() / "config.json" if is_folder(name) else _from_hub(name)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not JSON: {error}") from None
    return found, str(file)


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
        UserError: another architecture, another mixture of experts, or a key missing.
    """
    family = str(found.get("model_type"))
    mixed = any("expert" in key for key in found)
    if family not in MIXTURES and (mixed or family not in FAMILIES):
        what, known = ("a mixture of experts that ", MIXTURES) if mixed else ("", FAMILIES)
        raise UserError(f"{where}: model_type {family}: {what}cannot be planned; these can: {', '.join(known)}")
    for key in NUMBERS:
        _number(found, key, where=where)
    heads = found["num_attention_heads"]
    return Shape(
        family=family,
        hidden=found["hidden_size"],
        intermediate=found["intermediate_size"],
        layers=found["num_hidden_layers"],
        heads=heads,
        kv_heads=found.get("num_key_value_heads") or heads,
        head_dim=found.get("head_dim") or {"qwen3": 128, "gpt_oss": 64}.get(family, found["hidden_size"] // heads),
        vocab=found["vocab_size"],
        tied=bool(found.get("tie_word_embeddings", family in TIED_BY_DEFAULT)),
        head_norms=family in HEAD_NORMS or (family == "glm4_moe" and bool(found.get("use_qk_norm", False))),
        **_biases(found, family),
        sinks=family == "gpt_oss",
        latent=_latent(found, where) if family == "deepseek_v3" else None,
        experts=_experts(found, family, where) if family in MIXTURES else None,
        positions=positions_of(found),
    )


def _biases(found: Mapping[str, Any], family: str) -> dict[str, bool]:
    bias = bool(found.get("attention_bias", family == "gpt_oss")) and family not in WITHOUT_BIAS
    if family == "qwen2_moe":
        return {"qkv_bias": bool(found.get("qkv_bias", True))}
    return {
        "qkv_bias": bias or family in BIASED_QKV,
        "output_bias": bias and family not in (*BIASED_QKV, "glm4_moe"),
        "mlp_bias": bool(found.get("mlp_bias", False)) and family in ("llama", "smollm3"),
    }


def _number(found: Mapping[str, Any], *keys: str, where: str) -> int:
    """A number that has one of several names; the last is the one that is named where none is there."""
    key = next((key for key in keys if key in found), keys[-1])
    value = found.get(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{where}: {key}: expected a whole number above 0, found {value!r}")
    return value


def _latent(found: Mapping[str, Any], where: str) -> Latent:
    return Latent(
        queries=None if found.get("q_lora_rank") is None else _number(found, "q_lora_rank", where=where),
        values=_number(found, "kv_lora_rank", where=where),
        rotated=_number(found, "qk_rope_head_dim", where=where),
        plain=_number(found, "qk_nope_head_dim", where=where),
        value=_number(found, "v_head_dim", where=where),
    )


def _experts(found: Mapping[str, Any], family: str, where: str) -> Experts | None:
    """The mixture of a family, under the names of its published `config.json` or those that transformers writes."""
    layers = _mixed_layers(found, family)
    if not layers:
        return None
    routed = {"glm4_moe": "n_routed_experts", "deepseek_v3": "n_routed_experts", "mixtral": "num_local_experts",
              "gpt_oss": "num_local_experts"}.get(family, "num_experts")  # fmt: skip
    number = _number(found, "num_local_experts", routed, where=where)
    inner = "intermediate_size" if family in ("mixtral", "gpt_oss") else "moe_intermediate_size"
    own: dict[str, Any] = {}
    if family == "qwen2_moe":
        shared = _number(found, "shared_expert_intermediate_size", where=where)
        own = {"shared": shared, "shared_name": "mlp.shared_expert", "shared_gate": True}
    elif family == "gpt_oss":
        own = {"router": "mlp.router", "biased": True}
    elif family in ("glm4_moe", "deepseek_v3"):
        own = {"shared": found[inner] * (found.get("n_shared_experts") or 1), "sigmoid": True, "float_weights": True}
    return Experts(
        number=number,
        chosen=_number(found, "num_experts_per_tok", where=where),
        intermediate=_number(found, inner, where=where),
        layers=layers,
        experts_first=family in ("qwen3_moe", "glm4_moe", "deepseek_v3"),
        normalised=bool(found.get("norm_topk_prob", own.get("sigmoid", False))) or family == "mixtral",
        **{"float_weights": family == "mixtral"} | own,
    )


def _mixed_layers(found: Mapping[str, Any], family: str) -> tuple[int, ...]:
    """The layers that have experts."""
    layers = range(found["num_hidden_layers"])
    if family in ("glm4_moe", "deepseek_v3"):
        dense = found.get("first_k_dense_replace")
        return tuple(layers[(1 if family == "glm4_moe" else 3) if dense is None else dense :])
    every, without = found.get("decoder_sparse_step") or 1, found.get("mlp_only_layers") or ()
    return tuple(i for i in layers if family in ("mixtral", "gpt_oss") or (i not in without and (i + 1) % every == 0))
