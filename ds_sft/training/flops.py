"""Floating-point operations that learning needs: what MFU counts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ds_sft.model.loss import output_projection
from ds_sft.model.quantized import elements
from ds_sft.model.targets import whole_shape
from ds_sft.plan.weights import is_matrix, layer_of, met_by_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flops:
    """Floating-point operations that learning needs: forward and backward; recomputation is no use and not counted."""

    layers: float  # a token, in the layers' matrices
    head: float  # a token, in the output projection
    attention: float  # a pair of a token and one that it sees

    def of(self, *, tokens: float, pairs: float, head_tokens: float) -> float:
        return self.layers * tokens + self.attention * pairs + self.head * head_tokens


def count_flops(model: PreTrainedModel) -> Flops | None:
    """6 a parameter that a token is multiplied with, 12 a pair, layer and width of attention.

    Backward forms no gradient of what is frozen, so 4, and goes down to the first layer that has something trained:
    below it 2, and 4 a pair. As in PaLM, appendix B (arXiv 2204.02311), but pairs are those that causal attention
    needs: L (L + 1) / 2 of a row of L tokens. Of experts those count that a token chooses. None where experts are not
    single tensors, or where the configuration does not say how many a token chooses or how wide attention is.
    """
    config = model.config.get_text_config()
    width, layers = attention_width(config), getattr(config, "num_hidden_layers", None)
    met = share_of_experts(model)
    if met is None or not width or not layers:
        return None
    head, first = getattr(output_projection(model), "weight", None), min(first_reached(model), layers)
    left_out = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} | {id(head)}
    return Flops(
        layers=float(
            sum(
                factor * elements(p) * met_by_token(name, met)
                for name, p, factor in factors(model)
                if id(p) not in left_out and is_matrix(name, whole_shape(p))
            )
        ),
        head=0.0 if head is None else float((6 if head.requires_grad else 4) * elements(head)),
        attention=float((12 * (layers - first) + 4 * first) * width),
    )


def attention_width(config: Any) -> float | None:
    """Of all heads, for what a pair of tokens costs: a score from a key, and a part in a sum of values."""
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    of_key, of_value = (getattr(config, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim"))
    return float(heads * (of_key + of_value) / 2)


def share_of_experts(model: PreTrainedModel) -> float | None:
    """How many of a layer's experts a token meets, 1 in a dense model; None where that cannot be told."""
    config = model.config.get_text_config()
    if not any("expert" in name for name in config.to_dict()):
        return 1.0
    chosen = getattr(config, "num_experts_per_tok", None)
    fused = (whole_shape(p) for name, p in model.named_parameters() if ".experts." in name)
    number = next((shape[0] for shape in fused if len(shape) == 3), None)
    return chosen / number if chosen and number else None


def factors(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter, int]]:
    """Each parameter that a token is multiplied with, and in how many floating-point operations."""
    first = first_reached(model)
    for name, parameter in model.named_parameters():
        if ".original_module." not in name:  # which peft keeps beside the copy that is trained
            layer = layer_of(name)
            below = layer is not None and layer < first
            yield name, parameter, 6 if parameter.requires_grad else 2 if below else 4


def first_reached(model: torch.nn.Module) -> int:
    """The first layer that backward goes through: below it nothing is trained.

    0 where the embedding or nothing is, more than there are where only what is behind the layers is.
    """
    layers_seen = False
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if parameter.requires_grad:
            return layer if layer is not None else sys.maxsize if layers_seen else 0
        layers_seen |= layer is not None
    return 0
