"""Parts of a decoder's layer that not every family has: experts in place of the MLP, attention by latent vectors.

As transformers 5.23 has them in memory (`models/*/modeling_*.py`): the experts of a layer are one tensor a matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]  # of parameters, by their names in a layer


def linear(name: str, outputs: int, inputs: int, *, bias: bool = False) -> Shapes:
    """The parameters of a linear layer."""
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def gated_mlp(name: str, hidden: int, intermediate: int, *, bias: bool = False) -> Shapes:
    """down(act(gate(x)) * up(x))."""
    return {
        **linear(f"{name}.gate_proj", intermediate, hidden, bias=bias),
        **linear(f"{name}.up_proj", intermediate, hidden, bias=bias),
        **linear(f"{name}.down_proj", hidden, intermediate, bias=bias),
    }


@dataclass(frozen=True, kw_only=True)
class Experts:
    """A mixture of experts in place of a layer's MLP: a router sends each token to a few gated MLPs of many."""

    number: int
    chosen: int  # by each token
    intermediate: int  # of each
    layers: tuple[int, ...]  # that have them; the others have an MLP
    shared: int = 0  # intermediate size of the one that all tokens pass beside them; 0: none
    shared_name: str = "mlp.shared_experts"
    shared_gate: bool = False  # a factor for what it computes (Qwen2)
    router: str = "mlp.gate"
    experts_first: bool = False  # before the router
    biased: bool = False  # gpt-oss: router and experts have biases, and the router's softmax is over the chosen
    sigmoid: bool = False  # GLM, DeepSeek: the router computes in float32, each score by itself
    float_weights: bool = False  # what a token's experts count stays float32
    normalised: bool = False  # divided by their sum

    @property
    def met(self) -> float:
        """Share of the experts that a token meets."""
        return self.chosen / self.number

    def shapes(self, hidden: int) -> Shapes:
        """In the layer's order."""
        number, inner, name = self.number, self.intermediate, "mlp.experts"
        first = (number, hidden, 2 * inner) if self.biased else (number, 2 * inner, hidden)
        second = (number, inner, hidden) if self.biased else (number, hidden, inner)
        experts: Shapes = {f"{name}.gate_up_proj": first, f"{name}.down_proj": second}
        if self.biased:
            experts = {f"{name}.gate_up_proj": first, f"{name}.gate_up_proj_bias": (number, 2 * inner),
                       f"{name}.down_proj": second, f"{name}.down_proj_bias": (number, hidden)}  # fmt: skip
        router = linear(self.router, number, hidden, bias=self.biased)
        return {
            **(experts | router if self.experts_first else router | experts),
            **(gated_mlp(self.shared_name, hidden, self.shared) if self.shared else {}),
            **(linear("mlp.shared_expert_gate", 1, hidden) if self.shared_gate else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): queries, keys and values from short vectors."""

    queries: int | None  # elements of the vector that queries are made of; None: of the hidden state
    values: int  # of the one for keys and values
    rotated: int  # of each query and key, the part with positions, which all keys of a token share
    plain: int  # the part without
    value: int  # of each value

    @property
    def key(self) -> int:
        return self.plain + self.rotated

    def shapes(self, hidden: int, heads: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
        name = "self_attn"
        if self.queries is None:
            yield from linear(f"{name}.q_proj", heads * self.key, hidden).items()
        else:
            yield from linear(f"{name}.q_a_proj", self.queries, hidden, bias=bias).items()
            yield f"{name}.q_a_layernorm.weight", (self.queries,)
            yield from linear(f"{name}.q_b_proj", heads * self.key, self.queries).items()
        yield from linear(f"{name}.kv_a_proj_with_mqa", self.values + self.rotated, hidden, bias=bias).items()
        yield f"{name}.kv_a_layernorm.weight", (self.values,)
        yield from linear(f"{name}.kv_b_proj", heads * (self.plain + self.value), self.values).items()
        yield from linear(f"{name}.o_proj", hidden, heads * self.value, bias=bias).items()
