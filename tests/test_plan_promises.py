"""What a plan promises, of published shapes on cards of three sizes: that its answers agree with each other."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ds_sft.plan.cost import Hardware
from ds_sft.plan.fits import LONGEST, QWEN3, UNIT, Card, longest_row, qwen3
from ds_sft.plan.layouts import LAYOUTS, shipped_engine
from ds_sft.plan.memory import peak
from ds_sft.plan.recommend import Way, recommend
from ds_sft.plan.run import Engine, Run
from ds_sft.plan.shape import Shape, shape_of

GB = 10**9
OTHERS: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49_152,
                     "tie_word_embeddings": True},
    "Llama-3.1-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                     "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256},
    "Mistral-7B": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
                   "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_768},
    "Qwen3-30B-A3B": {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
                      "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
                      "vocab_size": 151_936, "num_experts": 128, "num_experts_per_tok": 8,
                      "moe_intermediate_size": 768},
}  # fmt: skip
MODELS = st.sampled_from([*QWEN3, *OTHERS])
LAYOUT, WAY = st.sampled_from([*LAYOUTS]), st.sampled_from([Way(False), Way(True), Way(True, True)])
CARDS = st.sampled_from([24 * GB, 80 * GB, 141 * GB])


@lru_cache
def shape(name: str) -> Shape:
    return qwen3(name) if name in QWEN3 else shape_of(OTHERS[name])


def run(name: str, layout: str, ranks: int, **keys: Any) -> Run:
    engine = Engine(stage=None) if layout == "no DeepSpeed" else shipped_engine(layout, shape(name))
    made = Run(shape=shape(name), engine=engine, ranks=ranks, micro_batch=1, length=2048, accumulation=4,
               checkpointing=True, half=True, flat=True)  # fmt: skip
    return replace(made, **keys)


@settings(max_examples=60, deadline=None)
@given(MODELS, CARDS, st.sampled_from([1, 2, 8]), st.sampled_from([512, 8192, 131_072]), st.booleans())
def test_what_is_recommended_fits_by_itself(name: str, memory: int, ranks: int, length: int, fused: bool) -> None:
    hardware = Hardware(nodes=1, gpus_per_node=ranks, flops=150e12, inside=200e9, between=25e9)
    base = {layout: run(name, layout, ranks, length=length, fused=fused) for layout in LAYOUTS}
    best = recommend(base, hardware, memory, 10**12, groups=[1])
    if best is not None:
        assert best.fits
        assert Card(ranks, memory, 10**12).room(best.run) >= 0
        assert best.run.micro_batch * best.run.accumulation == 4


@settings(max_examples=60, deadline=None)
@given(MODELS, LAYOUT, WAY, CARDS, st.sampled_from([1, 2, 8]), st.sampled_from([512, 30_000]))
def test_the_longest_row_does_not_depend_on_the_one_that_was_asked_for(
    name: str, layout: str, way: Way, memory: int, ranks: int, length: int
) -> None:
    card = Card(ranks, memory, None)
    asked = way.of(run(name, layout, ranks, length=length))
    longest = longest_row(asked, card)
    if 0 < longest < LONGEST * UNIT:
        again = replace(asked, length=longest)
        assert longest_row(again, card) == longest
        assert card.room(again) >= 0 > card.room(replace(again, length=longest + UNIT))


@settings(max_examples=80, deadline=None)
@given(MODELS, LAYOUT, WAY, st.sampled_from([2, 4, 8, 16, 64]), st.booleans())
def test_more_gpus_never_need_more_of_each(name: str, layout: str, way: Way, ranks: int, narrow: bool) -> None:
    def needs(number: int) -> int:
        return peak(way.of(run(name, layout, number, narrow=narrow)), loading=False).device_bytes

    assert needs(2 * ranks) <= needs(ranks) * 1.001  # what one rank has of a border may be another layer


@settings(max_examples=80, deadline=None)
@given(MODELS, LAYOUT, WAY, st.integers(16, 100_000), st.integers(1, 50_000), st.sampled_from(["no", "yes"]))
def test_longer_rows_never_need_less(name: str, layout: str, way: Way, length: int, more: int, tiling: str) -> None:
    def needs(tokens: int) -> int:
        return peak(way.of(run(name, layout, 2, length=tokens, tiling=tiling))).device_bytes

    assume(tiling == "no" or not length <= 4096 < length + more)  # where tiles begin, less is needed
    assert needs(length) <= needs(length + more) * (1.01 if tiling == "yes" else 1)  # tiles of about equal size
