"""Loss and gradients over supervised tokens only, in chunks: those of the model's own loss; and no more memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from ds_sft.errors import UserError
from ds_sft.model import loss as chunked
from ds_sft.model.loss import (
    LogitTerms,
    OwnLoss,
    SupervisedLoss,
    cross_entropy_sum,
    share_auxiliary,
    supervise,
    supervised_positions,
)

VOCAB = 160
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}  # fmt: skip
# family -> what its head and its loss have that others have not
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": True},
    "mistral": {},
    "phi": {},  # a bias
    "phi3": {},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gemma3_text": {"final_logit_softcapping": None},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "olmo2": {},
    "smollm3": {},
}


# What a forward adds to the cross-entropy, at a coefficient that shows.
BALANCED = {"output_router_logits": True, "router_aux_loss_coef": 1.0}
ADDING: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**BALANCED, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "mixtral": {**BALANCED, "num_local_experts": 4},
    "olmoe": {**BALANCED, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {**BALANCED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {**BALANCED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"output_router_logits": True, "aux_loss_coef": 1.0, "kv_channels": 8, "num_local_experts": 4},
    "bamba": {
        "z_loss_coefficient": 0.1,
        "attn_layer_indices": [0, 1],
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    },
}


def make(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    own = {**FAMILIES, **ADDING}[family]
    config = AutoConfig.for_model(family, **{**SMALL, **own}, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lm_head" in name or "embed_tokens" in name:
                parameter.mul_(20)  # logits that a cap of 3 bends
    return model.train()


def make_batch() -> dict[str, torch.Tensor]:
    """Two padded rows: the first half of each, the padding and a token in between teach nothing."""
    torch.manual_seed(1)
    ids = torch.randint(1, VOCAB, (2, 24))
    mask = torch.ones_like(ids)
    mask[1, 18:] = 0
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :9] = labels[0, 15] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def learn(model: Any, *, autocast: bool = False, **changes: Any) -> tuple[float, torch.Tensor]:
    """Loss, and all gradients in one."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**{**make_batch(), **changes}, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.float().flatten() for p in model.parameters()])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tokens", [5, 1000])
def test_is_the_loss_of_the_model(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, over as many tokens as Trainer counts and over the batch's own, whatever the size of a chunk."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * VOCAB * tokens)
    model = make(family)
    known = [learn(model, num_items_in_batch=n) for n in (torch.tensor(50), 7, None)]
    assert isinstance(supervise(model), SupervisedLoss)
    for n, (loss, gradient) in zip((torch.tensor(50), 7, None), known, strict=True):
        found, found_gradient = learn(model, num_items_in_batch=n)
        assert found == pytest.approx(loss, rel=1e-6)
        assert apart(found_gradient, gradient) < 1e-6


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
@pytest.mark.parametrize("tokens", [5, 1000])
def test_smoothed_labels_are_those_of_trainer(family: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned, with a bias and a cap too; what is measured without a gradient is not smoothed."""
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * VOCAB * tokens)
    model, batch = make(family), make_batch()
    labels, count = batch.pop("labels"), torch.tensor(50)
    logits = model(**batch, use_cache=False).logits
    wanted = LabelSmoother(epsilon=0.2)({"logits": logits}, labels, shift_labels=True, num_items_in_batch=count)
    wanted.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    with torch.no_grad():
        measured = model(**batch, labels=labels, num_items_in_batch=count, use_cache=False).loss
    supervise(model, smoothing=0.2)
    found, found_gradient = learn(model, num_items_in_batch=count)
    assert found == pytest.approx(wanted.item(), rel=1e-6)
    assert apart(found_gradient, gradient) < 1e-6
    with torch.no_grad():
        again = model(**batch, labels=labels, num_items_in_batch=count, use_cache=False).loss
    assert again.item() == pytest.approx(measured.item(), rel=1e-6)
    assert abs(again.item() - found) > 0.01


def test_a_model_that_keeps_its_loss_smooths_no_labels() -> None:
    with pytest.raises(UserError) as caught:
        supervise(make("llama"), fp16=True, smoothing=0.1)
    assert str(caught.value) == (
        "label_smoothing_factor: 0.1: LlamaForCausalLM keeps its own loss (float16 has no room for gradients of "
        "unscaled sums): leave it out"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_labels_or_none(family: str) -> None:
    """Without labels the model gives logits as ever; a validation batch gives its sum and leaves no gradient."""
    model = make(family).eval()
    batch = make_batch()
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
        supervised = supervise(model)
        assert isinstance(supervised, SupervisedLoss)
        torch.testing.assert_close(model(**batch).logits, logits, rtol=0, atol=0)
        model(**batch, labels=labels)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
    assert supervised.total is not None
    assert supervised.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert not supervised.total.requires_grad


@pytest.mark.parametrize("kind", ["autocast", "bfloat16"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma2"])
def test_bfloat16(family: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 2^-12 of the model's own loss, 1e-2 of its gradient: roundings, no more than its own from float32.

    A cap on logits rounds twice as much. Measured: 2^-13.7 and 9e-3 with the cap, 2^-22 and 5e-3 without.
    """
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * VOCAB * 5)
    exact = learn(make(family).bfloat16().float())
    model = make(family, torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "autocast":
        model = model.bfloat16().float()
    own = learn(model, autocast=kind == "autocast")
    supervise(model)
    found = learn(model, autocast=kind == "autocast")
    assert found[0] == pytest.approx(own[0], rel=2**-12)
    assert apart(found[1], own[1]) < 1e-2
    assert apart(found[1], exact[1]) < 1.25 * apart(own[1], exact[1])


def auxiliary(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of a micro batch, and what the untouched model adds to it."""
    known: list[torch.Tensor] = []
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: (known.append(own(*args, **kwargs)), known[0].clone())[1]
    added = model(**batch, use_cache=False).loss - known[0]
    model.loss_function = own
    return known[0], added


@pytest.mark.parametrize("family", ADDING)
def test_what_a_model_adds_is_a_mean_over_the_micro_batches_of_a_step(family: str) -> None:
    """Each weighs as many supervised tokens as it has: the sum does not grow with their number."""
    batch = make_batch()
    parts = [{name: value[row : row + 1] for name, value in batch.items()} for row in (0, 1)]
    counts = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    total = sum(counts)
    model = make(family)
    found = [auxiliary(model, part) for part in parts]
    wanted = sum(count * (entropy + added) for count, (entropy, added) in zip(counts, found, strict=True)) / total
    wanted.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    assert all(added.item() > 0.05 for _, added in found)
    supervise(model)
    share_auxiliary(model)
    losses = [model(**part, num_items_in_batch=total, use_cache=False).loss for part in parts]
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert apart(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), gradient) < 1e-6
    assert model(**batch, use_cache=False).loss.item() == pytest.approx(sum(auxiliary_of(family, batch)), rel=1e-6)


def auxiliary_of(family: str, batch: dict[str, torch.Tensor]) -> list[float]:
    return [value.item() for value in auxiliary(make(family), batch)]


@pytest.mark.parametrize("family", ADDING)
def test_equal_rows_have_one_loss_however_they_are_split(family: str) -> None:
    """As one micro batch of four rows, as two of two, as four: routed alike, nothing is left of the split."""
    row = {name: value[:1] for name, value in make_batch().items()}
    total = 4 * (row["labels"][:, 1:] != -100).sum()
    model = make(family)
    supervise(model)
    share_auxiliary(model)

    def step(size: int) -> float:
        batch = {name: value.repeat(size, 1) for name, value in row.items()}
        losses = [model(**batch, num_items_in_batch=total, use_cache=False).loss.item() for _ in range(4 // size)]
        return sum(losses)

    assert step(2) == pytest.approx(step(4), rel=1e-6)
    assert step(1) == pytest.approx(step(4), rel=1e-6)


def test_a_micro_batch_without_a_supervised_token_adds_nothing() -> None:
    model = make("qwen3_moe")
    model.config.output_router_logits = True
    supervise(model)
    share_auxiliary(model)
    loss, gradient = learn(model, labels=torch.full((2, 24), -100), num_items_in_batch=torch.tensor(50))
    assert (loss, gradient.abs().max().item()) == (0.0, 0.0)


def test_a_tuple_has_the_same_loss() -> None:
    model = make("mixtral")
    supervise(model)
    named = model(**make_batch(), num_items_in_batch=50).loss
    assert model(**make_batch(), num_items_in_batch=50, return_dict=False)[0].item() == named.item()


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "gemma2"])
def test_nothing_to_learn(family: str) -> None:
    """Loss 0, and gradients of 0 for every parameter: hooks of gradients fire on all ranks."""
    model = make(family)
    supervise(model)
    labels = torch.full((2, 24), -100)
    for n in (torch.tensor(0), torch.tensor(50), None):
        loss, gradient = learn(model, labels=labels, num_items_in_batch=n)
        assert (loss, gradient.abs().max().item()) == (0.0, 0.0)


def test_the_sum_survives_large_logits() -> None:
    hidden = torch.tensor([[300.0, 0.0], [0.0, -300.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], requires_grad=True)
    total = cross_entropy_sum(hidden, weight, None, torch.tensor([2, 0]), LogitTerms())
    assert total.item() == pytest.approx(600 + 0.6931472)
    total.backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[2.0, 0.0], [-1.0, 0.0]]
    with pytest.raises(RuntimeError):
        total.backward()


def test_a_frozen_projection() -> None:
    hidden, weight = torch.randn(4, 3, requires_grad=True), torch.randn(5, 3)
    cross_entropy_sum(hidden, weight, None, torch.tensor([0, 1, 2, 3])).backward()
    assert hidden.grad is not None
    assert weight.grad is None


def test_positions() -> None:
    labels = torch.tensor([[5, 6, -100, 8], [-100, 2, 3, -100]])
    positions, targets = supervised_positions(labels)
    assert (positions.tolist(), targets.tolist()) == ([0, 2, 4, 5], [6, 8, 2, 3])


class ScaledTwice(MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.for_model("llama"))]):  # type: ignore[misc]
    """A model of one's own that does to its logits what nobody knows."""

    def forward(self, input_ids: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        hidden_states = self.model(input_ids=input_ids).last_hidden_state
        logits = self.lm_head(hidden_states)
        logits = logits + 1
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return loss, logits


def test_other_models_keep_their_loss() -> None:
    model = ScaledTwice(AutoConfig.for_model("llama", **SMALL))
    assert supervise(model) == OwnLoss("what it does between output projection and loss is not known")
    assert type(model.lm_head) is torch.nn.Linear


def test_half_precision_keeps_the_loss_of_the_model() -> None:
    """Sums in float16 overflow whatever the loss is scaled by; also where weights are float32 under autocast."""
    for model, fp16 in ((make("llama"), True), (make("llama").half(), False)):
        assert supervise(model, fp16=fp16) == OwnLoss("float16 has no room for gradients of unscaled sums")


PEAK = """
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from ds_sft.model.loss import supervise
from ds_sft.results import peak_resident_kib
config = AutoConfig.for_model("llama", vocab_size=150_000, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                              num_attention_heads=4, tie_word_embeddings=True)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
supervise(model)
ids = torch.randint(0, 150_000, (1, 4096))
model(input_ids=ids[:, :8], labels=ids[:, :8]).loss.backward()
before = peak_resident_kib()
model(input_ids=ids, labels=ids).loss.backward()
print(peak_resident_kib() - before)
"""


def test_memory_stays_below_the_logits_alone() -> None:
    """4,096 supervised tokens, a vocabulary of 150,000: their bfloat16 logits alone would take 1,200,000 KiB."""
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True, timeout=500)
    assert int(done.stdout) < 600_000


def test_without_the_kernel_a_gpu_computes_as_a_cpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """`fused_kernels: none`."""
    asked: list[bool] = []
    monkeypatch.setattr(chunked, "uses_kernel", lambda logits: asked.append(True) or False)
    for kernel in (True, False):
        model = make("llama")
        supervise(model, kernel=kernel)
        learn(model)
        assert bool(asked) == kernel
        asked.clear()
