"""Which weights of a model a run trains, told from names and shapes alone: all, adapters beside frozen ones, or some.

As peft 0.21 names and shapes what it puts into a model (`model/adapters.py` has it do so), and bitsandbytes 0.50
stores 4 bits.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from ds_sft.config.keys import Config
from ds_sft.errors import UserError

# Of the parts of a layer that are trained, such as self_attn.q_proj: whole, not by an adapter?
Learned = Mapping[str, bool]
Shapes = Mapping[str, tuple[int, ...]]  # of a model's parameters, by their names in it; tied ones once
ALL_LINEAR, EXPERTS = "all-linear", "experts"  # of `lora_targets`, as `model/targets.py` has them
HEAD, EMBEDDING = "lm_head", "embed_tokens"
# Modules with a matrix that has no adapter, beside those with "emb" in their name: routers, ends of other models.
NO_LINEAR = (HEAD, "wte", "wpe", "gate", "router", "shared_expert_gate")
FP32 = 4
BLOCK = 64  # weights that share a scale, a float32, in nf4
CODES = 16  # numbers that 4 bits stand for, of each matrix


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The keys that decide what is trained; as they are by default, everything is."""

    adapter: str = "none"
    rank: int = 16
    targets: tuple[str, ...] = ()  # none: all linear layers but the output projection; `EXPERTS` their tensors
    modules: tuple[str, ...] = ()  # trained whole beside adapters
    dropout: bool = False
    only: tuple[str, ...] = ()
    four_bits: bool = False

    @property
    def whole(self) -> bool:
        """Whether all weights are trained."""
        return self.adapter == "none" and not self.only


ALL = Choice()


def choice_of(config: Config) -> Choice:
    if config.adapter == "none":
        return Choice(only=tuple(config.train_only or ()))
    targets = tuple(config.lora_targets or ())
    return Choice(
        adapter=config.adapter,
        rank=config.lora_rank,
        targets=() if targets == (ALL_LINEAR,) else targets,
        modules=tuple(config.lora_modules_to_save or ()),
        dropout=config.lora_dropout > 0,
        four_bits=config.quantization == "nf4",
    )


def layer_of(name: str) -> int | None:
    """The number of the layer that a parameter is in, by its name; None: before the layers or behind them."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether hidden states are multiplied with a parameter: of experts one tensor has the matrices of all."""
    return len(shape) == (3 if _of_experts(name) and "lora_" not in name else 2) and not name.endswith("bias")


def met_by_token(name: str, met: float) -> float:
    """Share of a parameter that a token meets, where it meets a share `met` of a layer's experts."""
    return met if _of_experts(name) else 1.0


def _of_experts(name: str) -> bool:
    """Whether a parameter has a part for each expert, as transformers has them in memory."""
    return ".experts." in name


def part_of(name: str) -> str:
    """The part of a layer that a parameter belongs to, its own or an adapter's: self_attn.q_proj, input_layernorm.

    Of a parameter that is no module's `weight` or `bias` its own name: mlp.experts.down_proj.
    """
    inside = re.split(r"\.\d+\.", name, maxsplit=1)[-1].replace(".modules_to_save.default", "")
    return re.sub(r"\.(lora_.*|weight|bias)$", "", inside)


@dataclass(frozen=True)
class Weight:
    """A parameter as it is in the model that is trained."""

    name: str
    shape: tuple[int, ...]
    trained: bool = True
    used: bool = True  # False: a trained copy stands in its place
    four_bits: bool = False
    beside: str | None = None  # the tensor of experts that an adapter is for: its own name is the module's

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    def bytes(self, width: int) -> int:
        """Where numbers that compute have `width` bytes."""
        if not self.four_bits:
            return self.size * width
        return -(-self.size // 2) + FP32 * (-(-self.size // BLOCK) + CODES)


@dataclass(frozen=True)
class Weights:
    """All parameters, in the model's order."""

    every: tuple[Weight, ...]
    layers: int
    met: float = 1.0  # share of a layer's experts that a token meets

    @cached_property
    def sizes(self) -> list[int]:
        return [weight.size for weight in self.every]

    @cached_property
    def trained(self) -> list[int]:
        """Elements of each that is trained."""
        return [weight.size for weight in self.every if weight.trained]

    @cached_property
    def number_trained(self) -> int:
        return sum(self.trained)

    @cached_property
    def number(self) -> int:
        return sum(self.sizes)

    @cached_property
    def number_frozen(self) -> int:
        return sum(weight.size for weight in self.every if not weight.trained and weight.used)

    def frozen_bytes(self, width: int) -> int:
        return sum(weight.bytes(width) for weight in self.every if not weight.trained)

    @cached_property
    def trained_in_layers(self) -> list[int]:
        """How many tensors are trained in each layer."""
        found = [0] * self.layers
        for weight in self.every:
            if weight.layer is not None and weight.trained:
                found[weight.layer] += 1
        return found

    @cached_property
    def trained_behind(self) -> int:
        """How many tensors are trained behind the layers."""
        ends = [weight for weight in self.every if weight.layer is None and weight.trained]
        return sum(not self._is_embedding(weight) for weight in ends)

    @cached_property
    def first(self) -> int:
        """The first layer that backward reaches: below it nothing is trained. All layers' number: it reaches none."""
        for weight in self.every:
            if weight.trained:
                return weight.layer if weight.layer is not None else 0 if self._is_embedding(weight) else self.layers
        return self.layers

    @cached_property
    def head(self) -> int:
        """Elements of the output projection if it is trained, tied or not."""
        ends = [w.size for w in self.every if w.trained and self._is_projection(w)]
        return ends[-1] if ends else 0

    @cached_property
    def embedding(self) -> int:
        """Elements of the embedding if it is trained."""
        return next((w.size for w in self.every if w.trained and self._is_embedding(w)), 0)

    @cached_property
    def twice(self) -> int:
        """Elements of a tied output projection that is trained beside adapters: their file names it twice."""
        return sum(w.size for w in self.every if w.trained and ".modules_to_save." in w.name and self.tied
                   and self._is_embedding(w))  # fmt: skip

    @cached_property
    def tied(self) -> bool:
        return not any(HEAD in weight.name.split(".") for weight in self.every)

    def _is_embedding(self, weight: Weight) -> bool:
        return EMBEDDING in weight.name.split(".")

    def _is_projection(self, weight: Weight) -> bool:
        return (EMBEDDING if self.tied else HEAD) in weight.name.split(".")

    @cached_property
    def _by_layer(self) -> list[list[Weight]]:
        found: list[list[Weight]] = [[] for _ in range(self.layers)]
        for weight in self.every:
            if weight.layer is not None:
                found[weight.layer].append(weight)
        return found

    def of_layer(self, layer: int) -> list[Weight]:
        return self._by_layer[layer]

    @cached_property
    def alike(self) -> list[int]:
        """Of each layer the first one that has the same parts."""
        first: dict[tuple[object, ...], int] = {}
        found = []
        for number, weights in enumerate(self._by_layer):
            # Below the first layer that is trained nothing is kept, of one that looks like others above it neither.
            parts = (number < self.first, *((part_of(w.name), replace(w, name="")) for w in weights))
            first.setdefault(parts, number)
            found.append(first[parts])
        return found

    def learned(self, layer: int) -> Learned:
        """Which parts of a layer are trained, whole or by an adapter."""
        return self._learned[layer]

    @cached_property
    def _learned(self) -> list[Learned]:
        return [
            {part_of(one.beside or one.name): "lora_" not in one.name for one in weights if one.trained}
            for weights in self._by_layer
        ]

    def flops(self) -> tuple[float, float]:
        """A token's floating-point operations in forward and backward: of the layers' matrices, and of the projection.

        2 forward, 2 for the gradient of what comes in, where backward goes on, 2 for that of a trained weight; of
        experts those that a token chooses.
        """
        layers = sum(self._factor(w) * self._multiplied(w) for w in self.every)
        heads = [w for w in self.every if w.used and self._is_projection(w)]
        return float(layers), float(sum((6 if w.trained else 4) * w.size for w in heads))

    @cached_property
    def multiplied_again(self) -> float:
        """Elements of the matrices that a token is multiplied with in the layers that backward reaches."""
        return sum(self._multiplied(w) for w in self.every if w.used and (w.layer or 0) >= self.first)

    def _multiplied(self, weight: Weight) -> float:
        """Elements that a token is multiplied with in the layers."""
        if weight.layer is None or not is_matrix(weight.name, weight.shape):
            return 0
        return weight.size * met_by_token(weight.name, self.met)

    def _factor(self, weight: Weight) -> int:
        if not weight.used:
            return 0
        return 6 if weight.trained else 4 if (weight.layer or 0) >= self.first else 2


def weights_of(
    base: Shapes, choice: Choice, *, layers: int = 0, met: float = 1.0, taken: tuple[str, ...] = ()
) -> Weights:
    """The parameters of a model as a run trains it.

    Args:
        base: of the model alone.
        met: share of a layer's experts that a token meets.
        taken: ends of names of linear layers that have no adapter.

    Raises:
        UserError: a key names nothing in it.
    """
    if choice.adapter != "none":
        return Weights(tuple(_with_adapters(base, choice, taken)), layers, met)
    tied = _is_tied(base)
    for pattern in choice.only:
        if not any(_contains(name, pattern, tied=tied) for name in base):
            raise UserError(f"train_only: {pattern!r} is in no weight's name")
    only = choice.only or ("",)
    every = tuple(Weight(name, shape, any(_contains(name, p, tied=tied) for p in only)) for name, shape in base.items())
    return Weights(every, layers, met)


def _is_tied(base: Shapes) -> bool:
    return not any(HEAD in name.split(".") for name in base)


def _contains(name: str, pattern: str, *, tied: bool) -> bool:
    """Whether a weight is named; a tied output projection is the embedding, under both names."""
    names = [name, f"{HEAD}.weight"] if tied and EMBEDDING in name.split(".") else [name]
    return any(fnmatch.fnmatchcase(one, f"*{pattern}*") for one in names)


def _with_adapters(base: Shapes, choice: Choice, taken: tuple[str, ...]) -> Iterator[Weight]:
    tied = _is_tied(base)
    linear = [_module(name) for name, shape in base.items() if _is_linear(name, shape)]
    linear = [module for module in linear if module.rpartition(".")[2] not in taken]
    experts = {name for name, shape in base.items() if len(shape) == 3 and _of_experts(name)}
    for target in choice.targets:
        if target not in (ALL_LINEAR, EXPERTS) and not any(_is_target(part, target) for part in (*linear, *experts)):
            raise UserError(f"lora_targets: {target!r} matches no linear layer of this model")
    experts = {name for name in experts if _is_asked(name, choice.targets, EXPERTS)}
    for name, shape in base.items():
        module, kind = _module(name), name.rpartition(".")[2]
        saved = _saved_as(module, choice.modules, tied=tied)
        matrix = module in linear and kind == "weight"
        yield Weight(name, shape, False, used=saved is None, four_bits=choice.four_bits and matrix)
        if saved is not None:
            yield Weight(f"{saved}.modules_to_save.default.{name.removeprefix(saved + '.')}", shape)
        elif matrix and (not choice.targets or _is_asked(module, choice.targets, ALL_LINEAR)):
            yield Weight(f"{module}.lora_A.default.weight", (choice.rank, shape[1]))
            yield Weight(f"{module}.lora_B.default.weight", (shape[0], choice.rank))
            if choice.adapter == "dora":
                yield Weight(f"{module}.lora_magnitude_vector.default.weight", (shape[0],))
        elif _of_experts(name) and name == [other for other in base if _module(other) == module][-1]:
            tensors = {other: shape for other, shape in base.items() if other in experts and _module(other) == module}
            yield from _on_experts(tensors, choice, transposed=f"{module}.down_proj_bias" in base)


def _on_experts(tensors: Shapes, choice: Choice, *, transposed: bool) -> Iterator[Weight]:
    """Adapters on tensors of one module's experts: peft wraps the module once for each, the last one outermost.

    tensors: [experts, out, in], `transposed` [experts, in, out].
    """
    for number, (name, (experts, *sizes)) in enumerate(tensors.items()):
        module = _module(name) + ".base_layer" * (len(tensors) - 1 - number)
        outputs, inputs = reversed(sizes) if transposed else sizes
        yield Weight(f"{module}.lora_A.default.weight", (choice.rank * experts, inputs), beside=name)
        yield Weight(f"{module}.lora_B.default.weight", (outputs, choice.rank * experts), beside=name)


def _is_asked(name: str, targets: tuple[str, ...], group: str) -> bool:
    """Whether a layer or tensor is named, itself or by the name for all of its group."""
    others = [target for target in targets if target not in (ALL_LINEAR, EXPERTS)]
    return group in targets or any(_is_target(name, target) for target in others)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    end = _module(name).rpartition(".")[2]
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and end not in NO_LINEAR
        and "emb" not in end
        and not _of_experts(name)
    )


def _is_target(module: str, target: str) -> bool:
    try:
        return _ends_with(module, target) or re.fullmatch(target, module) is not None
    except re.error as error:
        raise UserError(f"lora_targets: {target!r} is neither a name nor a regular expression: {error}") from None


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _saved_as(module: str, modules: tuple[str, ...], *, tied: bool) -> str | None:
    """The module, itself or around it, that `lora_modules_to_save` trains whole; a tied head is the embedding."""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        inner = ".".join(parts[:end])
        names = [inner, HEAD] if tied and parts[end - 1] == EMBEDDING else [inner]
        if any(_ends_with(name, wanted) for name in names for wanted in modules):
            return inner
    return None
