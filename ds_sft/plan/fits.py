"""How far a card reaches: the longest row and the largest model that fit, of every layout and in every way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ds_sft.errors import UserError
from ds_sft.plan.layouts import needed
from ds_sft.plan.recommend import Way
from ds_sft.plan.run import TILED_FROM, Run
from ds_sft.plan.shape import Shape, shape_of
from ds_sft.plan.states import states

UNIT = 1024  # tokens that rows are counted in
LONGEST = 4096  # of these units: 4 million tokens, above what any data has
QWEN3 = {  # https://huggingface.co/Qwen: hidden, intermediate, layers, heads; 8 key heads of 128 throughout
    "0.6B": (1024, 3072, 28, 16),
    "1.7B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
    "14B": (5120, 17408, 40, 40),
    "32B": (5120, 25600, 64, 64),
}
TIED = ("0.6B", "1.7B", "4B")


@dataclass(frozen=True)
class Card:
    """What a rank may take."""

    per_node: int
    gpu_memory: float
    host_memory: float | None

    def room(self, run: Run) -> float:
        """Bytes that are left of a GPU or, where that is less, of a node; below 0: no such run fits, or starts."""
        if run.refused:
            return -math.inf
        over = self.gpu_memory - sum(states(run).values())
        if over < 0:
            return over
        memory, margin, node_bytes = needed(run, self.per_node, self.gpu_memory)
        node = math.inf if self.host_memory is None else self.host_memory - node_bytes
        return min(node, self.gpu_memory - memory.device_bytes - margin)


@dataclass(frozen=True)
class Reach:
    """Of a layout, in a way."""

    layout: str
    narrow: bool  # `optimizer_dtype: bfloat16`
    way: Way
    longest: int  # tokens of a row, whole units; 0: not one unit fits
    largest: str | None  # of `QWEN3`, at the length that was asked for; None: not the smallest


def reaches(
    layouts: Callable[[Shape], Mapping[str, Run]], shape: Shape, ways: Sequence[Way], card: Card, *, narrow_too: bool
) -> Iterator[Reach]:
    """Every layout in every way, its optimizer's states in float32 and, where they can be (`narrow_too`), in bfloat16.

    Args:
        layouts: the layouts that a model of a shape has.
        shape: of the model that is asked for.
    """
    asked = layouts(shape)
    models = {name: found for name in QWEN3 if (found := _layouts_of(layouts, qwen3(name)))}
    for narrow in (False, True)[: 1 + narrow_too]:
        for name, run in asked.items():
            if not (narrow and run.engine.offload_optimizer):
                runs = {model: found[name] for model, found in models.items()}
                yield from _of_layout(name, run, runs, ways, card, narrow=narrow)


def _of_layout(
    name: str, asked: Run, models: Mapping[str, Run], ways: Sequence[Way], card: Card, *, narrow: bool
) -> Iterator[Reach]:
    names = [*models]
    fitting: dict[str, int] = {}  # how many models fit: more ranks that share a row never take more
    for way in ways:
        undivided = [model for model in names if models[model].shape.heads % way.sequence]
        number = fitting.get(way.word, 0)
        while number < len(names) and (
            names[number] in undivided or card.room(replace(way.of(models[names[number]]), narrow=narrow)) >= 0
        ):
            number += 1
        fitting[way.word] = number
        divided = [model for model in names[:number] if model not in undivided]
        longest = longest_row(replace(way.of(asked), narrow=narrow), card)
        yield Reach(name, narrow, way, longest, divided[-1] if divided else None)


def _layouts_of(layouts: Callable[[Shape], Mapping[str, Run]], shape: Shape) -> Mapping[str, Run]:
    """Nothing where what is to be trained is not in that model, or its heads cannot be divided."""
    try:
        found = layouts(shape)
        return found if all(run.weights for run in found.values()) else {}
    except UserError:
        return {}


def longest_row(run: Run, card: Card) -> int:
    """Tokens of the longest row that fits alone in a micro batch, in whole units of 1,024."""

    def alone(units: int) -> Run:
        rows = run.accumulation * (run.micro_batch if run.max_tokens is None else 1)
        return replace(run, micro_batch=1, length=units * UNIT, max_tokens=None, accumulation=rows, padded=False,
                       eval_batch=min(run.eval_batch, 1))  # fmt: skip

    def room(units: int) -> float:
        return card.room(alone(units))

    if run.tiling == "auto":  # what is computed in tiles takes less than a row just too short for it
        tiled = TILED_FROM * run.sequence // UNIT
        return UNIT * (last_with_room(room, tiled, LONGEST) or last_with_room(room, 1, tiled - 1))
    return UNIT * last_with_room(room, 1, LONGEST)


def last_with_room(room: Callable[[int], float], first: int, last: int) -> int:
    """The last number from `first` to `last` that leaves room, which is less and less; 0: none does.

    Memory is nearly a straight line in a row's length: where the line through both ends crosses zero is a good guess.
    """
    if first > last or (low := room(first)) < 0:
        return 0
    if first == last or (high := room(last)) >= 0:
        return last
    while last - first > 1:
        line = first + int((last - first) * low / (low - high))
        for guess in (line, line + 1, (first + last) // 2):
            if first < guess < last:
                found = room(guess)
                first, low, last, high = (guess, found, last, high) if found >= 0 else (first, low, guess, found)
    return first


def qwen3(name: str) -> Shape:
    """A published shape."""
    hidden, intermediate, layers, heads = QWEN3[name]
    return shape_of({"model_type": "qwen3", "hidden_size": hidden, "intermediate_size": intermediate,
                     "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8,
                     "vocab_size": 151_936, "tie_word_embeddings": name in TIED})  # fmt: skip
