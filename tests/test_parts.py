"""What is put into a model: one object on it, in words; and that no model sees another's."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from ds_sft.config.keys import Config
from ds_sft.data.batch import collate_flat, collate_padded
from ds_sft.errors import UserError
from ds_sft.model import parts
from ds_sft.model.attention import NAME, keep_rows_apart
from ds_sft.model.fused import use_kernels
from ds_sft.model.loss import LossInPlaceOfLogits, OwnLoss, supervise
from ds_sft.model.parts import Parts, parts_of
from ds_sft.model.sequence import SequenceGroup
from ds_sft.model.working_copy import WorkingCopy
from ds_sft.ranks.launch import Launch
from ds_sft.train import load_model_to_train
from ds_sft.training.trainer import without_metadata
from tests.dispatch import NoReads
from tests.mixtures import make_mixture
from tests.test_attention import make, make_rows
from tests.test_fused import IN_TORCH

ALONE = Launch(launcher="python")
NO_KERNEL = "no kernel takes rows of different lengths on cpu"
LOSS = "Loss           of supervised tokens alone, a chunk of their logits at a time"
COPIES = "Working copy   24 weights in bfloat16 for each step (what is trained stays float32)"


def load(folder: Path, *, padded: bool = False, training: dict[str, Any] | None = None, **keys: Any) -> Any:
    training = {"learning_rate": 3e-4, **(training or {})}
    config = Config(model_name_or_path=str(folder), train_file="t", training=training, **keys)
    args = TrainingArguments(str(folder / "out"), use_cpu=True, report_to="none", bf16=True)
    return load_model_to_train(config, args, None, ALONE, padded=padded, largest=20_000)


def test_a_plain_model(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run says it once."""
    lines = [
        "Trained        all 99,712 parameters",
        f"Attention      row by row ({NO_KERNEL})",
        "Fused kernels  none (they are for GPUs)",
        LOSS,
        COPIES,
    ]
    assert str(load(model_dir).ds_sft).splitlines() == lines
    assert capsys.readouterr().out.splitlines() == ["Qwen3ForCausalLM:", *(f"  {line}" for line in lines)]


def test_an_adapter_and_padded_batches(model_dir: Path) -> None:
    model = load(model_dir, padded=True, adapter="lora", lora_targets=["q_proj", "v_proj"], lora_rank=4, lora_alpha=8)
    assert str(model.ds_sft).splitlines() == [
        "Adapter        lora, rank 4, its product times 2, on q_proj x 2, v_proj x 2",
        "Trained        1,792 of 101,504 parameters (1.77%); the others are frozen",
        "Padding        sdpa, with a mask for each batch of its lengths (functions of transformers' are exchanged "
        "during forward)",
        "Fused kernels  none (they are for GPUs)",
        LOSS,
        "Working copy   8 weights in bfloat16 for each step (what is trained stays float32)",
    ]


def test_a_mixture_of_experts(tokenizer_dir: Path, tmp_path: Path) -> None:
    model = load(make_mixture(tmp_path, "qwen3_moe", tokenizer_dir), router_aux_loss_coef=0.01, fused_kernels="none")
    assert str(model.ds_sft).splitlines() == [
        "Trained        all 44,480 parameters",
        f"Attention      row by row ({NO_KERNEL})",
        "Fused kernels  none (as fused_kernels says)",
        "Experts        4 a layer, in 2 of them, by one product an expert (ds_sft's)",
        "Routing        tokens of each expert are counted, load balancing loss of a step (times 0.01)",
        LOSS,
        "Auxiliary      load balancing, of all tokens of a step",
        "Working copy   25 weights in bfloat16 for each step (what is trained stays float32)",
    ]


def test_tiles_and_offload(model_dir: Path) -> None:
    model = load(model_dir, tiled_mlp="yes", training={"activation_checkpointing": "offload"})
    assert str(model.ds_sft).splitlines() == [
        "Trained        all 99,712 parameters",
        f"Attention      row by row ({NO_KERNEL})",
        "Fused kernels  none (they are for GPUs)",
        "Tiled MLPs     2, of at most 4,096 tokens at a time (micro batches have up to 20,000)",
        LOSS,
        "Offload        none (activations are in host memory already: the same as yes here)",
        COPIES,
    ]


def test_rows_that_ranks_share(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "join_group", lambda size, *_: SequenceGroup(size, None))
    model = load(model_dir, sequence_parallel=2)
    assert str(model.ds_sft).splitlines()[1] == (
        f"Attention      row by row ({NO_KERNEL}), each rank some heads of rows that 2 ranks share"
    )
    monkeypatch.setattr(parts, "supervise", lambda *_, **__: OwnLoss("its head is another"))
    with pytest.raises(UserError, match=r"^sequence_parallel: 2: with what is trained of it the model keeps a loss"):
        load(model_dir, sequence_parallel=2)


def test_a_model_that_was_not_prepared() -> None:
    assert (parts_of(make("llama")), str(Parts())) == (Parts(), "")


def test_the_projections_class_says_what_it_returns() -> None:
    """The same object and parameters, under the same names."""
    model = make("llama")
    before, names = model.lm_head, list(model.state_dict())
    supervise(model)
    assert (model.lm_head is before, list(model.state_dict()) == names) == (True, True)
    assert isinstance(model.lm_head, LossInPlaceOfLogits)
    assert "(lm_head): LossInPlaceOfLogits(in_features=" in str(model)
    assert model.lm_head(torch.zeros(1, 3, model.config.hidden_size)).shape == (1, 3, model.config.vocab_size)


# ---- Two models in one process


def prepared(family: str = "qwen3") -> Any:
    """A model with our attention, loss and fused kernels."""
    model = make(family)
    model.ds_sft = Parts(
        attention=keep_rows_apart(model), fused_kernels=use_kernels(model, IN_TORCH, "PyTorch"), loss=supervise(model)
    )
    return model


def learn(model: nn.Module) -> list[torch.Tensor]:
    """Loss and gradients of a padded batch, the way any program calls a model."""
    model.zero_grad()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_model_does_not_see_the_parts_of_another() -> None:
    """An untouched copy learns the same, bit for bit, before another is prepared and taught and after."""
    untouched = make("qwen3")
    known = learn(untouched)
    ours = prepared()
    with torch.no_grad():
        ours.model.norm.weight.fill_(2.0)  # another model: what leaked would show
    ours(**{name: value for name, value in collate_flat(make_rows()).items() if name != "metadata"}).loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(learn(untouched), known, strict=True))
    assert type(untouched.lm_head) is nn.Linear
    assert (untouched.config._attn_implementation, ours.config._attn_implementation) == ("sdpa", NAME)
    assert parts_of(untouched) == Parts()


def test_a_model_computes_while_another_is_under_way() -> None:
    """Both have our attention. The outer one still knows its rows: a layer without their borders is an error."""
    inner, outer = prepared("llama"), prepared("qwen3")
    known, found = learn(inner), []
    batch = {name: value for name, value in collate_flat(make_rows()).items() if name != "metadata"}
    outer.model.layers[0].register_forward_hook(lambda *_: found.append(learn(inner)))
    outer(**batch, use_cache=False)
    assert len(found) == 1
    assert all(torch.equal(one, other) for one, other in zip(found[0], known, strict=True))
    outer.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "row_borders"}), with_kwargs=True
    )
    with pytest.raises(RuntimeError, match="Qwen3Attention does not pass row_borders on"):
        outer(**batch, use_cache=False)


PARTS: dict[str, dict[str, Any]] = {
    "lora": {"adapter": "lora", "lora_dropout": 0.1},
    "dora": {"adapter": "dora"},
    "label_smoothing": {"training": {"label_smoothing_factor": 0.1}},
    "neftune": {"training": {"neftune_noise_alpha": 5.0}},
    "tiles": {"tiled_mlp": "yes", "training": {"activation_checkpointing": True}},
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_no_part_reads_the_device(name: str, padded: bool, model_dir: Path) -> None:
    """Forward and backward of two micro batches, with the copies of a step."""
    keys = PARTS[name]
    model = load(model_dir, padded=padded, **keys).train()
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    if "activation_checkpointing" in keys.get("training", {}):
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = collate_padded(make_rows(), pad_token_id=0) if padded else collate_flat(make_rows())
    copy = model.ds_sft.working_copy
    for last in (False, True):
        lent = copy.lent(keep=not last) if isinstance(copy, WorkingCopy) else nullcontext()
        with NoReads() as operations, lent:
            model(**batch, use_cache=False, num_items_in_batch=torch.tensor(9)).loss.backward()
        assert operations.counted["aten::mm"] > 10
