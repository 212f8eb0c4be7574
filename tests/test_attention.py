"""Rows laid end to end are learned as if alone, in several families; where borders get lost, that is an error."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.data.batch import collate_flat
from ds_sft.model import attention_kernels
from ds_sft.model.attention import NAME, keep_rows_apart, lengths_of_rows, rows_attention
from ds_sft.model.attention_kernels import Attention, RowBorders
from ds_sft.model.loss import supervise
from tests.distributed.harness import check_apart
from tests.test_loss import SMALL, VOCAB, apart

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {},
    "mistral": {"sliding_window": 7},
    "gemma3_text": {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "granite": {},
    "cohere": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
ROW_BY_ROW = Attention("row by row", "")
LENGTHS = [5, 23, 1, 40, 7, 8]


def make(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    keys = {**SMALL, **FAMILIES.get(family, {}), **changes}
    config = AutoConfig.for_model(family, **keys, bos_token_id=None, eos_token_id=None)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def make_rows() -> list[dict[str, list[int]]]:
    """Rows of LENGTHS; the first third of each is no answer."""
    torch.manual_seed(1)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCAB, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


def borders(lengths: list[int], attention: Attention = ROW_BY_ROW) -> RowBorders:
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return RowBorders(lengths, starts, attention)


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["labels"]) + [0] * (longest - len(row["labels"])) for row in rows]
    return {"input_ids": fill("input_ids", 0), "labels": fill("labels", -100), "attention_mask": torch.tensor(mask)}


def learn(model: Any, batches: list[dict[str, torch.Tensor]], *, autocast: bool = False) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch, use_cache=False, num_items_in_batch=57).loss
        loss.backward()
        total += loss.item()
    return total, torch.cat([p.grad.float().flatten() for p in model.parameters()])


def one_by_one(rows: list[dict[str, list[int]]]) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.tensor([ids]) for name, ids in row.items()} for row in rows]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_four_layouts_teach_the_same(family: str, checkpointing: bool) -> None:
    """One row at a time by transformers' own attention and loss; padded, padding-free and packed by ours."""
    rows, model = make_rows(), make(family)
    loss, gradient = learn(model, one_by_one(rows))
    keep_rows_apart(model)
    supervise(model)
    assert model.config._attn_implementation == NAME
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = [collate_flat(rows[:2]), collate_flat(rows[2:])]
    for batches in ([padded(rows)], [collate_flat(rows)], packed, one_by_one(rows)):
        found, found_gradient = learn(model, batches)
        assert found == pytest.approx(loss, rel=1e-6)
        assert apart(found_gradient, gradient) < 2e-6


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_bfloat16(family: str, kind: str) -> None:
    """Within 2^-14 of the loss one row at a time, 1.5e-2 of its gradient; 2^-16 and 7e-3 measured."""
    rows, model = make_rows(), make(family, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    loss, gradient = learn(model, one_by_one(rows), autocast=kind == "autocast")
    keep_rows_apart(model)
    supervise(model)
    found, found_gradient = learn(model, [collate_flat(rows)], autocast=kind == "autocast")
    assert found == pytest.approx(loss, rel=2**-14)
    assert apart(found_gradient, gradient) < 1.5e-2


@pytest.mark.parametrize("length", [1, 2, 33, 300])
def test_a_short_row_is_as_exact_as_the_kernel(length: int) -> None:
    """In bfloat16, 6 heads that share 2 keys: at most 1.5 of the kernel's error, of output and gradients."""
    torch.manual_seed(0)
    states = [(2 * torch.randn(1, heads, length, 16)).bfloat16() for heads in (6, 2, 2, 6)]

    def run(short: int, dtype: torch.dtype) -> list[torch.Tensor]:
        *inputs, gradient = (state.to(dtype).requires_grad_() for state in states)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(attention_kernels, "SHORT_ROW", short)
            output, _ = rows_attention(torch.nn.Module(), *inputs, None, row_borders=borders([length]))
        return [t.float() for t in (output, *torch.autograd.grad(output, inputs, gradient.transpose(1, 2)))]

    exact, kernel = run(0, torch.float32), run(0, torch.bfloat16)
    for found, known, value in zip(run(length, torch.bfloat16), kernel, exact, strict=True):
        assert (found - value).norm() <= 1.5 * (known - value).norm() + 1e-6


def test_a_short_row_whose_keys_are_larger_than_its_values() -> None:
    """As DeepSeek-V3's are: within 1 % of float32, of output and gradients."""
    torch.manual_seed(0)
    sizes = ((6, 16), (2, 16), (2, 8), (6, 8))
    states = [torch.randn(1, heads, 33, size).bfloat16() for heads, size in sizes]

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        *inputs, gradient = (state.to(dtype).requires_grad_() for state in states)
        output, _ = rows_attention(torch.nn.Module(), *inputs, None, row_borders=borders([33]))
        return [t.float() for t in (output, *torch.autograd.grad(output, inputs, gradient.transpose(1, 2)))]

    for found, exact in zip(run(torch.bfloat16), run(torch.float32), strict=True):
        assert found.shape == exact.shape
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_no_mask_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tokens x tokens nor, with a window, length x length."""
    seen: list[Any] = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(query: Any, *args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
        seen.append((query.shape[2], None if attn_mask is None else tuple(attn_mask.shape)))
        return attend(query, *args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    for family, layers in (("llama", 2), ("mistral", 2)):
        model = make(family)
        keep_rows_apart(model)
        model(**collate_flat(make_rows()[:3]), use_cache=False)
        rows = [(5, None), (23, None), (1, None)]
        if family == "mistral":  # a window of 7
            rows[1:2] = [(7, (7, 7)), (7, (7, 13)), (7, (7, 13)), (2, (2, 8))]
        assert seen == rows * layers
        seen.clear()


def test_generation_and_saved_config(tmp_path: Path) -> None:
    """Prompts of different lengths, padded on the left, with a cache; the config on disk names no attention of ours."""
    model = make("llama").eval()
    ids = torch.randint(1, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    keys: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**keys)
    keep_rows_apart(model)
    assert torch.equal(model.generate(**keys), expected)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_a_cache_continues_a_sequence() -> None:
    """Position ids without a mask are rows end to end, but not beside a cache, whatever this transformers calls it."""
    model = make("llama").eval()
    keep_rows_apart(model)
    ids, positions = torch.randint(1, VOCAB, (1, 9)), torch.arange(9)[None]
    with torch.no_grad():
        whole = model(ids, position_ids=positions, use_cache=False).logits
        for name in {"past_key_values", "cache"} & set(inspect.signature(model.forward).parameters):
            begun = model(ids[:, :5], use_cache=True)[name]
            rest = model(ids[:, 5:], position_ids=positions[:, 5:], **{name: begun}).logits
            torch.testing.assert_close(rest, whole[:, 5:])


def test_borders_that_get_lost_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("llama"), collate_flat(make_rows())
    keep_rows_apart(model)
    layer = type(model.model.layers[0])
    forward = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, *args, row_borders=None, **kw: forward(self, *args, **kw))
    with pytest.raises(RuntimeError, match="LlamaAttention does not pass row_borders on: rows would see each other"):
        model(**batch, use_cache=False)
    model.config._attn_implementation_internal = "eager"
    with pytest.raises(RuntimeError, match="LlamaModel does not use ds_sft_rows: rows would see each other"):
        model(**batch, use_cache=False)
    states = torch.zeros(1, 4, 84, 8)
    with pytest.raises(RuntimeError, match="rows of 83 tokens, but queries"):
        rows_attention(model, states, states, states, None, row_borders=borders([80, 3]))
    with pytest.raises(RuntimeError, match="Module wants softcap in its attention"):
        rows_attention(torch.nn.Module(), states, states, states, None, row_borders=borders([84]), softcap=50.0)


def test_which_attention_is_used_can_be_read() -> None:
    model, asked, capped = make("llama"), make("llama"), make("gemma2", attn_logit_softcapping=50.0)
    asked.set_attn_implementation("eager")
    before = capped.config._attn_implementation
    found = [keep_rows_apart(model), keep_rows_apart(asked, "eager"), keep_rows_apart(capped)]
    used = [each.config._attn_implementation for each in (model, asked, capped)]
    assert used == [NAME, "eager", before]
    assert list(map(str, found)) == [
        "row by row (no kernel takes rows of different lengths on cpu)",
        "eager (as attn_implementation says)",
        f"{before} (Gemma2ForCausalLM caps its scores; it masks all pairs of tokens of a micro batch)",
    ]


def test_a_window_that_is_in_the_mask_only() -> None:
    """The layers of this family do not tell the attention function of their window: transformers' own mask stays."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
               "shared_expert_intermediate_size": 16}  # fmt: skip
    rows = make_rows()
    model = make("qwen2_moe", use_sliding_window=True, sliding_window=7, max_window_layers=0, **experts)
    loss, gradient = learn(model, one_by_one(rows))
    assert "has its sliding window in its mask only" in keep_rows_apart(model).why
    found, found_gradient = learn(model, [collate_flat(rows)])
    assert found == pytest.approx(loss, rel=1e-6)
    assert apart(found_gradient, gradient) < 2e-6
    without = make("qwen2_moe", use_sliding_window=False, **experts)
    keep_rows_apart(without)
    assert without.config._attn_implementation == NAME


def test_lengths() -> None:
    assert lengths_of_rows(torch.tensor([[0, 1, 2, 0, 0, 1]])) == [3, 1, 2]
    assert lengths_of_rows(torch.tensor([[0]])) == [1]
    for wrong in ([[1, 2, 0]], [[0, 1], [0, 1]]):
        with pytest.raises(ValueError, match="rows end to end"):
            lengths_of_rows(torch.tensor(wrong))


def test_rows_of_any_lengths_are_compiled_once() -> None:
    check_apart(check_compiled_once)


def check_compiled_once() -> None:
    """`torch_compile: yes`: the second batch may teach it that sizes differ, no other does."""
    model = make("llama")
    keep_rows_apart(model)
    supervise(model)
    compiled, rows = torch.compile(model, backend="eager"), make_rows()
    frames = []
    for number in range(1, len(rows) + 1):
        batch = collate_flat(rows[:number])
        assert compiled(**batch, use_cache=False).loss.item() == model(**batch, use_cache=False).loss.item()
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert len(set(frames[1:])) == 1


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
