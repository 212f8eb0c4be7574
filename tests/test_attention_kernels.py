"""All rows in one kernel a layer: which one is asked, with what, and what it has to compute, held without a GPU.

The meta device runs the genuine operator for shapes, forward and backward. What it is told (borders, window, scale,
grouped heads) is held by a reference written from its documentation in its place.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ds_sft.data.batch import collate_flat
from ds_sft.model import attention, attention_kernels
from ds_sft.model import autocast as precision
from ds_sft.model.attention import NAME, keep_rows_apart, rows_attention
from ds_sft.model.attention_kernels import Attention, RowBorders
from ds_sft.model.loss import supervise
from tests.dispatch import NoReads, Operations
from tests.distributed.harness import check_apart
from tests.test_attention import borders, learn, make, make_rows, one_by_one
from tests.test_loss import apart

META, BFLOAT16 = torch.device("meta"), torch.bfloat16
FORWARD, BACKWARD = "torch_attn::_varlen_attn", "torch_attn::_varlen_attn_backward"
IN_ONE = Attention("varlen_attn", "", in_one_kernel=True)
WINDOWS = {"qwen3": -1, "llama": -1, "mistral": 6}  # of the kernel: the token itself does not count
IN_KERNEL = [family for family, window in WINDOWS.items() if window == -1 or not attention_kernels.ONLY_PLAIN]


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, of_keys: torch.Tensor,
    longest: int, longest_key: int, *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = attention_kernels.ONLY_PLAIN,
) -> torch.Tensor:  # fmt: skip
    """`varlen_attn` as documented: [tokens, heads, head_dim], (left, right) tokens seen beside the own one, -1: all."""
    assert starts.dtype == of_keys.dtype == torch.int32
    assert starts[-1] == len(query)
    assert max(starts.diff()) <= longest == longest_key
    assert enable_gqa or query.shape[1] == key.shape[1]
    position = torch.arange(len(query))
    row = torch.bucketize(position, starts[1:], right=True)
    behind = position[:, None] - position
    seen = (row[:, None] == row) & (behind >= -window_size[1])
    if window_size[0] >= 0:
        seen &= behind <= window_size[0]
    q, k, v = (states.transpose(0, 1) for states in (query, key, value))
    k, v = (states.repeat_interleave(len(q) // len(states), 0) for states in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale).transpose(0, 1)


def plain_reference(*states: Any, is_causal: bool) -> torch.Tensor:
    """`varlen_attn` of torch 2.10 as documented."""
    assert is_causal
    return reference(*states, window_size=(-1, 0), enable_gqa=True)


def meta_batch(lengths: list[int]) -> dict[str, Any]:
    tokens = sum(lengths)
    return {"input_ids": torch.zeros(1, tokens, dtype=torch.long, device=META),
            "position_ids": torch.zeros(1, tokens, dtype=torch.long, device=META)}  # fmt: skip


def on_meta(family: str, *, checkpointing: bool = False) -> Any:
    model = make(family, BFLOAT16, head_dim=8).to(META)
    keep_rows_apart(model, device=META, dtype=BFLOAT16)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def operations_of(model: Any, lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> Operations:
    """Of forward and backward, nothing of which may read the device."""
    starts = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(META)
    monkeypatch.setattr(attention, "_borders", lambda kwargs: (lengths, starts))
    model.zero_grad()
    with NoReads() as operations:
        logits = model(**meta_batch(lengths), use_cache=False).logits
        logits.backward(torch.empty_like(logits))
    return operations


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", IN_KERNEL)
def test_one_kernel_a_layer_whatever_the_rows(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operations for 1 row and for 40, their gradients too; nothing on the way reads the device."""
    model = on_meta(family, checkpointing=checkpointing)
    few, many = (operations_of(model, lengths, monkeypatch) for lengths in ([300], [5, 23, 1, 40, 7] * 8))
    assert few.counted == many.counted
    assert many.counted["aten::select_backward"] == 0  # a copy of each gradient into zeros
    layers = model.config.num_hidden_layers
    assert (many.counted[FORWARD], many.counted[BACKWARD]) == (layers * (2 if checkpointing else 1), layers)
    query, key, value, starts, _, longest, _, causal, *words = many.arguments[FORWARD]
    assert (query.shape, key.shape, value.shape) == ((608, 4, 8), (608, 2, 8), (608, 2, 8))
    assert (starts.shape, longest) == ((41,), 128)
    if attention_kernels.ONLY_PLAIN:
        assert causal is True
        return
    scale, window, *grouped = words
    assert (scale, window) == (8**-0.5, [WINDOWS[family], 0])
    assert grouped[:1] == ([True] if attention_kernels.GROUPED else [])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text", "granite", "qwen3_moe"])
def test_rows_in_one_kernel_are_learned_as_if_alone(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reference in the kernel's place, that takes float32 on a CPU."""
    rows, model = make_rows(), make(family, head_dim=8)
    loss, gradient = learn(model, one_by_one(rows))
    monkeypatch.setattr(attention_kernels, "HALF", (torch.float32,))
    monkeypatch.setattr(attention_kernels, "varlen_attn", reference)
    monkeypatch.setattr(attention_kernels, "ONLY_PLAIN", False)
    found = keep_rows_apart(model, device=META, dtype=torch.float32)
    assert found == Attention("varlen_attn", "all rows in one kernel a layer", in_one_kernel=True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for batches in ([collate_flat(rows)], [collate_flat(rows[:2]), collate_flat(rows[2:])], one_by_one(rows)):
        found, found_gradient = learn(model, batches)
        assert found == pytest.approx(loss, rel=1e-6)
        assert apart(found_gradient, gradient) < 2e-6


@pytest.mark.parametrize(
    ("family", "why"),
    [("llama", "all rows in one kernel a layer"), ("qwen3_moe", "all rows in one kernel a layer"),
     ("mistral", "no kernel takes rows of different lengths with a window before torch 2.11"),
     ("granite", "no kernel takes rows of different lengths with a scale of the model's own before torch 2.11")],
)  # fmt: skip
def test_the_kernel_of_torch_2_10_takes_what_it_has_words_for(
    family: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and scales of a model's own go row by row there, and all learn the same."""
    rows, model = make_rows(), make(family, head_dim=8)
    loss, gradient = learn(model, one_by_one(rows))
    calls: list[None] = []
    monkeypatch.setattr(attention_kernels, "HALF", (torch.float32,))
    monkeypatch.setattr(attention_kernels, "ONLY_PLAIN", True)
    monkeypatch.setattr(
        attention_kernels,
        "varlen_attn",
        lambda *states, **words: calls.append(None) or plain_reference(*states, **words),
    )
    found = keep_rows_apart(model, device=META, dtype=torch.float32)
    in_one = why == "all rows in one kernel a layer"
    assert found == Attention("varlen_attn" if in_one else "row by row", why, in_one_kernel=in_one)
    found, found_gradient = learn(model, [collate_flat(rows)])
    assert found == pytest.approx(loss, rel=1e-6)
    assert apart(found_gradient, gradient) < 2e-6
    assert len(calls) == (model.config.num_hidden_layers if in_one else 0)


def test_torch_2_10_asks_row_by_row_where_a_layer_wants_more(monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.empty(1, 4, 5, 8, dtype=BFLOAT16)
    wanted = [(None, None), (None, 8**-0.5), (None, 0.3), (6, None)]  # window, scale
    for only_plain, known in ((True, [True, True, False, False]), (False, [True] * 4)):
        monkeypatch.setattr(attention_kernels, "ONLY_PLAIN", only_plain)
        assert [attention_kernels._has_words(query, window, scale) for window, scale in wanted] == known


@pytest.mark.parametrize("length", [32, 33, 47])
def test_a_lone_long_row_is_rounded_up_to_a_planned_length(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output and gradients are those of the row alone; the kernel meets multiples of 16 only."""
    monkeypatch.setattr(attention_kernels, "HALF", (torch.float32,))
    monkeypatch.setattr(attention_kernels, "LONE_ROW", 32)
    monkeypatch.setattr(attention_kernels, "PLANNED_LENGTHS", 16)
    torch.manual_seed(0)
    states = [torch.randn(1, heads, length, 8, requires_grad=True) for heads in (4, 2, 2)]
    gradient = torch.randn(1, length, 4, 8)
    expected = F.scaled_dot_product_attention(*states, is_causal=True, scale=0.3, enable_gqa=True).transpose(1, 2)
    known = torch.autograd.grad(expected, states, gradient)
    met: list[int] = []
    attend = F.scaled_dot_product_attention

    def watch(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        met.append(query.shape[2])
        assert torch.backends.cuda.cudnn_sdp_enabled()
        return attend(query, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    rows = borders([length], Attention("varlen_attn", "", in_one_kernel=True, lone_rows_by_cudnn=True))
    found, _ = rows_attention(torch.nn.Module(), *states, None, scaling=0.3, row_borders=rows)
    assert met == [32 if length == 32 else 48]
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, states, gradient), known, strict=True):
        torch.testing.assert_close(one, other)


def test_which_rows_cudnn_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is alone and long; two, or a shorter one, go where all others go, and so does a window."""
    cudnn = Attention("varlen_attn", "", in_one_kernel=True, lone_rows_by_cudnn=True)
    assert [borders(lengths, cudnn).by_cudnn for lengths in ([8192], [8191], [8192, 8192], [65_000])] == [
        True, False, False, True,
    ]  # fmt: skip
    assert not borders([8192], IN_ONE).by_cudnn
    states = [torch.empty(1, heads, 8200, 8, dtype=BFLOAT16, device=META) for heads in (4, 2, 2)]
    asked: list[str] = []
    for name in ("_lone_row", "_all_rows", "_row_by_row"):
        monkeypatch.setattr(attention_kernels, name, lambda *_, name=name: asked.append(name) or torch.empty(0))
    for only_plain in (False, True):
        monkeypatch.setattr(attention_kernels, "ONLY_PLAIN", only_plain)
        for window in (None, 7):
            rows_attention(torch.nn.Module(), *states, None, sliding_window=window, row_borders=borders([8200], cudnn))
    assert asked == ["_lone_row", "_all_rows", "_lone_row", "_row_by_row"]


def test_under_autocast_the_kernel_gets_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of queries and keys whose weights are float32 give float32; autocast casts for `sdpa` alone."""
    query, key, value = (torch.empty(1, heads, 9, 8, device=META) for heads in (4, 2, 2))
    monkeypatch.setattr(attention, "autocast_dtype", lambda device: torch.bfloat16)
    with Operations() as operations:
        found, _ = rows_attention(torch.nn.Module(), query, key, value, None, row_borders=borders([4, 5], IN_ONE))
    assert found.dtype == torch.bfloat16
    assert [states.dtype for states in operations.arguments[FORWARD][:3]] == [torch.bfloat16] * 3
    assert precision.autocast_dtype(META) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert precision.autocast_dtype(torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(
    ("device", "dtype", "changes", "reason"),
    [
        ("cpu", BFLOAT16, {}, "no kernel takes rows of different lengths on cpu"),
        ("meta", torch.float32, {}, "no kernel takes rows of different lengths in float32; with bf16: yes one does"),
        (
            "meta",
            BFLOAT16,
            {"attention_dropout": 0.1},
            "no kernel takes rows of different lengths with attention_dropout",
        ),
        ("meta", BFLOAT16, {"head_dim": 264}, "no kernel takes rows of different lengths with heads of 264"),
        ("meta", BFLOAT16, {"head_dim": 12}, "no kernel takes rows of different lengths with heads of 12"),
    ],
)
def test_where_rows_go_one_by_one(device: str, dtype: torch.dtype, changes: dict[str, Any], reason: str) -> None:
    model = make("llama", **changes)
    assert keep_rows_apart(model, device=device, dtype=dtype) == Attention("row by row", reason)
    assert model.config._attn_implementation == NAME


def test_what_the_kernel_cannot_take_goes_row_by_row_all_the_same() -> None:
    """Whatever was foretold: float32 states here, heads of two sizes there."""
    for dtype, of_values in ((torch.float32, 8), (BFLOAT16, 16)):
        query, key, value = (
            torch.empty(1, h, 9, d, dtype=dtype, device=META) for h, d in ((4, 8), (4, 8), (4, of_values))
        )
        with Operations() as operations:
            found, _ = rows_attention(torch.nn.Module(), query, key, value, None, row_borders=borders([4, 5], IN_ONE))
        assert found.shape == (1, 9, 4, of_values)
        assert not operations.counted[FORWARD]


def test_float32_rows_have_no_groups_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    heads: list[tuple[int, int, bool]] = []
    attend = F.scaled_dot_product_attention

    def watch(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        heads.append((query.shape[1], key.shape[1], kwargs["enable_gqa"]))
        return attend(query, key, value, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    for device in ("meta", "cpu"):
        states = [torch.zeros(1, count, 9, 8, device=device) for count in (4, 2, 2)]
        rows_attention(torch.nn.Module(), *states, None, row_borders=borders([4, 5]))
    assert heads == [(4, 4, False)] * 2 + [(4, 2, True)] * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_two_graphs_for_rows_of_any_number_and_length(backend: str) -> None:
    check_apart(check_two_graphs, backend)


def check_two_graphs(backend: str) -> None:
    """The first, and one that knows that sizes differ; attention is part of them."""
    compiled = torch.compile(rows_attention, backend=backend, fullgraph=True)
    scale = 8**-0.5 if attention_kernels.ONLY_PLAIN else 0.3
    for lengths in ([100], [5, 300], [200, 40, 7], [1] * 50, [4000]):
        shapes = [(1, heads, sum(lengths), 8) for heads in (4, 2, 2)]
        states = [torch.empty(shape, dtype=BFLOAT16, device=META, requires_grad=True) for shape in shapes]
        rows = RowBorders(lengths, borders(lengths).starts.to(META), IN_ONE)
        found, _ = compiled(torch.nn.Module(), *states, None, scaling=scale, row_borders=rows)
        found.backward(torch.empty_like(found))
        assert rows.attended
        assert found.shape == (1, sum(lengths), 4, 8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_model_on_the_meta_device_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """With our loss: forward and backward of all of it, up to the positions of supervised tokens."""
    model = on_meta("qwen3")
    supervise(model)
    monkeypatch.setattr(
        "ds_sft.model.loss.supervised_positions",
        lambda labels: (torch.zeros(9, dtype=torch.long, device=META), torch.zeros(9, dtype=torch.long, device=META)),
    )
    monkeypatch.setattr(
        attention, "_borders", lambda kwargs: ([20, 20], torch.zeros(3, dtype=torch.int32, device=META))
    )
    batch = meta_batch([20, 20])
    model(**batch, labels=batch["input_ids"], use_cache=False, num_items_in_batch=9).loss.backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_an_installed_flash_attention_that_was_asked_for_gets_the_borders() -> None:
    """By transformers' names, as the batch has them; the longest is a number of the host's."""
    model = make("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    keep_rows_apart(model, "flash_attention_2")
    given: dict[str, Any] = {}

    class Asked(Exception):
        pass

    def forward(**kwargs: Any) -> None:
        given.update(kwargs)
        raise Asked

    model.model.forward = forward
    batch = collate_flat(make_rows())
    with pytest.raises(Asked):
        model(**batch, use_cache=False)
    assert given["cu_seq_lens_q"] is given["cu_seq_lens_k"] is batch["metadata"].starts
    assert (given["max_length_q"], given["max_length_k"]) == (40, 40)


def test_a_lone_long_row_compiles() -> None:
    check_apart(check_lone_long_row)


def check_lone_long_row() -> None:
    """With cuDNN switched on for it alone, in the graph as outside of it."""
    attention_kernels.HALF, attention_kernels.LONE_ROW, attention_kernels.PLANNED_LENGTHS = (torch.float32,), 32, 16
    rows = borders([40], Attention("varlen_attn", "", in_one_kernel=True, lone_rows_by_cudnn=True))
    states = [torch.randn(1, heads, 40, 8) for heads in (4, 2, 2)]
    torch.backends.cuda.enable_cudnn_sdp(False)
    compiled = torch.compile(rows_attention, backend="eager")
    found, _ = compiled(torch.nn.Module(), *states, None, row_borders=rows)
    torch.testing.assert_close(found, rows_attention(torch.nn.Module(), *states, None, row_borders=rows)[0])
    assert not torch.backends.cuda.cudnn_sdp_enabled()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
