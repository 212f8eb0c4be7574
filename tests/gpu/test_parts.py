"""Parts of a step on a GPU beside the same in PyTorch, and the time of predictions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GenerationConfig

from ds_sft.config.keys import Config
from ds_sft.export.predict import generate
from ds_sft.export.verify import loss_on_disk
from ds_sft.model import loss as loss_module
from ds_sft.model.attention import rows_attention
from ds_sft.model.attention_kernels import Attention, RowBorders
from ds_sft.model.loss import LogitTerms, supervise
from ds_sft.model.sequence import SequenceGroup
from ds_sft.model.working_copy import LentCopy, WorkingCopy
from tests.gpu.lane import DEVICE, GPU, LONG, ON_GPU, make

pytestmark = GPU


@pytest.mark.parametrize("terms", [LogitTerms(), LogitTerms(scale=0.25), LogitTerms(scale=2.0, cap=30.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(7, 400), (33, 16_384), (5, 151_936)])
def test_the_loss_kernel(rows: int, vocab: int, dtype: torch.dtype, terms: LogitTerms) -> None:
    """Its sum and gradient are PyTorch's; gradients, of 1 at most, within a rounding of their dtype."""
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=generator) * 10).to(DEVICE, dtype)
    logits[0, 0] = 200.0  # its exponential is infinite where no maximum is subtracted
    targets = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE)
    slopes, found_slopes, untouched = logits.clone(), logits.clone(), logits.clone()
    expected = loss_module._by_torch(slopes, targets, terms, learn=True)
    found = loss_module._by_kernel(found_slopes, targets, terms, learn=True)
    only_loss = loss_module._by_kernel(untouched, targets, terms, learn=False)
    assert torch.equal(untouched, logits)
    assert torch.equal(only_loss, found)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    bound = max(1e-5, torch.finfo(dtype).eps) * max(1, terms.scale)
    torch.testing.assert_close(found_slopes.float(), slopes.float(), rtol=0, atol=bound)


def forward_backward(model: Any, lengths: tuple[int, ...] = (90, 300)) -> float:
    """Loss of padded rows, whose gradients are added to the model's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (len(lengths), max(lengths)), generator=generator)
    labels, mask = ids.clone(), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        labels[row, length:], mask[row, :length] = -100, 1
    labels[:, :20] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    loss = model(**{name: value.to(DEVICE) for name, value in batch.items()}, use_cache=False).loss
    loss.backward()
    return float(loss.item())


def gradient_of(model: Any) -> torch.Tensor:
    """All gradients in one, which the model then has no more."""
    found = torch.cat([p.grad.float().flatten() for p in model.parameters()])
    model.zero_grad()
    return found


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


def loaded(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(DEVICE).train()


@pytest.fixture(scope="module")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("model"), tokenizer_dir)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_learns_the_same_with_and_without_the_kernel(
    dtype: torch.dtype, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(model_dir, dtype)
    supervise(model)
    assert loss_module.uses_kernel(torch.zeros(1, device=DEVICE)) == ON_GPU
    loss, gradient = forward_backward(model), gradient_of(model)
    monkeypatch.setattr(loss_module, "uses_kernel", lambda logits: False)
    expected, known = forward_backward(model), gradient_of(model)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert apart(gradient, known) < (1e-4 if dtype == torch.float32 else 2e-2)


class Alone(SequenceGroup):
    """A group of one rank: what it gets lies in memory as with others, parts of one tensor."""

    def exchange(self, parts: torch.Tensor) -> torch.Tensor:
        return parts.clone()


@pytest.mark.parametrize("lengths", [[700, 1, 300], [LONG], [8192]], ids=str)
def test_attention_takes_what_ranks_exchange(lengths: list[int]) -> None:
    """Queries, keys and values that are parts of one tensor, in the kernels of a GPU, as those of their own."""
    torch.manual_seed(0)
    found = []
    whole = [torch.randn(1, sum(lengths), heads, 64, device=DEVICE, dtype=torch.bfloat16) for heads in (4, 2, 2)]
    starts = torch.tensor([0, *lengths], device=DEVICE).cumsum(0, dtype=torch.int32)
    for group in (None, Alone(1, None)):
        kind = Attention("", "", in_one_kernel=ON_GPU, lone_rows_by_cudnn=ON_GPU, group=group)
        states = [values.clone().requires_grad_() for values in whole]
        borders = RowBorders(lengths, starts, kind, shared=group is not None)
        attended, _ = rows_attention(torch.nn.Module(), *(s.transpose(1, 2) for s in states), None, row_borders=borders)
        attended.backward(torch.ones_like(attended))
        found.append([attended, *(s.grad for s in states)])
    for alone, shared in zip(*found, strict=True):
        assert apart(shared.float(), alone.float()) < 1e-3


def test_the_working_copy(model_dir: Path) -> None:
    """Gradients reach the float32 weights as those of a bfloat16 model do, bit for bit in both ways to lend."""
    gradients = []
    for kind in (WorkingCopy, LentCopy):
        model = loaded(model_dir, torch.float32, attn_implementation="eager")
        with kind(model).lent(), torch.autocast(DEVICE, torch.bfloat16):
            forward_backward(model)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        gradients.append(gradient_of(model))
    half = loaded(model_dir, torch.bfloat16, attn_implementation="eager")
    forward_backward(half)
    assert torch.equal(gradients[0], gradients[1])
    assert apart(gradients[0], gradient_of(half)) < 2e-2


def test_a_prediction_costs_what_its_tokens_cost(tokenizer_dir: Path, tokenizer: Any, tmp_path: Path) -> None:
    """Lengths that were not met before cost no plan each: they take what they take again; and twice as many tokens
    twice the time. Ratios of one process, after a warm-up."""
    folder = make(tmp_path / "model", tokenizer_dir)
    ask = asking(folder, tokenizer)
    ask(16)
    fresh, again, half = ask(256), ask(256), ask(128)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert fresh < 3 * again
    assert again < 4 * half


def test_predictions_and_verification_use_kernels_without_plans(
    tokenizer_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Prompts of several lengths have a mask, which flash-attention takes none of; rows verified one by one have none.
    Neither may fall back to the composition of products and softmax."""
    folder = make(tmp_path / "model", tokenizer_dir)
    rows = [{"input_ids": [5, 6, 7, 8] * n, "labels": [5, 6, 7, 8] * n} for n in (3, 20)]
    used = []
    for work in (lambda: asking(folder, tokenizer)(4),
                 lambda: loss_on_disk(str(folder), rows, use_cpu=not ON_GPU, trust_remote_code=False)):  # fmt: skip
        with profile(activities=[ProfilerActivity.CPU]) as seen:  # operations, also those that run on a GPU
            work()
        names = {event.key for event in seen.key_averages()}
        used.append({name for name in names if name.startswith("aten::_scaled_dot_product_")})
    with_mask, without = ("efficient_attention", "flash_attention") if ON_GPU else ["flash_attention_for_cpu"] * 2
    assert used == [{f"aten::_scaled_dot_product_{with_mask}"}, {f"aten::_scaled_dot_product_{without}"}]


def asking(folder: Path, tokenizer: Any) -> Callable[[int], float]:
    prompts = [[5, 6, 7], [8] * 90, [9] * 41]

    def ask(tokens: int) -> float:
        """Seconds that answers of so many tokens take."""
        config = Config(model_name_or_path=str(folder), train_file="rows.jsonl", training={"use_cpu": not ON_GPU},
                        predict_max_new_tokens=tokens)  # fmt: skip
        GenerationConfig(min_new_tokens=tokens).save_pretrained(folder)  # no end of turn before
        started = time.perf_counter()
        answers = generate(str(folder), prompts, tokenizer, config)
        assert all(answers)
        return time.perf_counter() - started

    return ask
