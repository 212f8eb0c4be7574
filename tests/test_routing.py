"""Where tokens go: counted without padding, and balanced over a step as the model's own loss does over a batch."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ds_sft.checkpoints.manifest import Checkpoint, read_manifest
from ds_sft.data.batch import METADATA, collate_flat, collate_padded
from ds_sft.errors import UserError
from ds_sft.model.experts import experts_of
from ds_sft.model.loss import share_auxiliary, supervise
from ds_sft.model.parts import Parts
from ds_sft.model.routing import Routing, counted_tokens, prepare_experts
from ds_sft.ranks.launch import Launch
from ds_sft.training.trainer import without_metadata
from tests.test_loss import SMALL, apart
from tests.test_trainer import make_trainer

ALONE, CPU = Launch(launcher="python"), torch.device("cpu")
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17], [18, 19, 20, 21, 22]]
# Each defines or imports its own copy of Mixtral's function.
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}


def make(family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    own = {"output_router_logits": True, "router_aux_loss_coef": 1.0, **FAMILIES[family], **changes}
    config = AutoConfig.for_model(family, **{**SMALL, **own}, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name or "router" in name:
                parameter.normal_()
    return model


def batch_of(rows: list[list[int]]) -> dict[str, Any]:
    return collate_padded([{"input_ids": row, "labels": row} for row in rows], pad_token_id=0)


def prepared(model: Any, **keys: Any) -> Any:
    experts, routing = prepare_experts(model, device=CPU, **keys)
    model.ds_sft = Parts(experts=experts, routing=routing, loss=supervise(model))
    model.ds_sft.auxiliary = share_auxiliary(model, routing)
    model.register_forward_pre_hook(without_metadata, with_kwargs=True)
    return model


def learn(model: Any, micro_batches: list[list[list[int]]], *, announced: bool = True) -> tuple[float, torch.Tensor]:
    """Loss and gradient of a step of these micro batches."""
    model.zero_grad()
    rows = [row for micro_batch in micro_batches for row in micro_batch]
    count = torch.tensor(sum(len(row) - 1 for row in rows))
    if announced:
        model.ds_sft.routing.begin_step(torch.tensor(sum(map(len, rows))))
    losses = [model(**batch_of(rows), num_items_in_batch=count, use_cache=False).loss for rows in micro_batches]
    total = torch.stack(losses).sum()
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_micro_batch_has_the_loss_and_the_gradient_of_the_model(family: str) -> None:
    model = make(family)
    batch = batch_of(ROWS)
    del batch[METADATA]
    wanted = model(**batch, use_cache=False)
    assert wanted.aux_loss > 1
    wanted.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    loss, found = learn(prepared(make(family)), [ROWS])
    assert loss == pytest.approx(wanted.loss.item(), rel=1e-6)
    assert apart(found, gradient) < 1e-5


def test_a_step_has_one_loss_and_on_average_one_gradient_however_it_is_split() -> None:
    """The mean over all orders of four micro batches; that of each by itself is another one."""
    model = prepared(make("qwen3_moe"))
    loss, gradient = learn(model, [ROWS])
    found = [learn(model, [[row] for row in order]) for order in permutations(ROWS)]
    assert [one for one, _ in found] == pytest.approx([loss] * 24, rel=1e-6)
    assert apart(torch.stack([one for _, one in found]).mean(0), gradient) < 1e-5
    assert max(apart(one, gradient) for _, one in found) > 0.1
    assert model.ds_sft.routing.logged()["aux_loss"] == pytest.approx(loss - cross_entropy(model), rel=1e-5)


def cross_entropy(model: Any) -> float:
    """Of ROWS, a mean over supervised tokens, without what the model adds."""
    total: float = model.eval()(**batch_of(ROWS), num_items_in_batch=torch.tensor(14), output_router_logits=False,
                                use_cache=False).loss.item()  # fmt: skip
    return total


def test_a_step_that_nobody_announced_is_weighed_by_its_tokens() -> None:
    """For who calls the model: the shares of two halves of the same tokens are a half each."""
    model = prepared(make("mixtral"))
    whole, _ = learn(model, [ROWS[:1] * 4], announced=False)
    halves, _ = learn(model, [ROWS[:1] * 2, ROWS[:1] * 2], announced=False)
    assert halves == pytest.approx(whole, rel=1e-6)


def test_a_coefficient_of_the_run() -> None:
    """It turns the loss on, also where the model's configuration does not have it, or off; and is not saved."""
    batch = batch_of(ROWS)
    del batch[METADATA]
    own = make("mixtral", router_aux_loss_coef=0.3)(**batch, use_cache=False).loss.item()
    model = prepared(make("mixtral", output_router_logits=False), aux_loss_coef=0.3)
    assert learn(model, [ROWS])[0] == pytest.approx(own, rel=1e-6)
    assert (model.config.output_router_logits, model.config.router_aux_loss_coef) == (False, 1.0)
    model = prepared(make("mixtral"), aux_loss_coef=0)
    assert learn(model, [ROWS])[0] == pytest.approx(cross_entropy(model), rel=1e-6)


@pytest.mark.parametrize(("family", "own"), [("qwen3", {}), ("deepseek_v3", {"n_routed_experts": 4})])
def test_a_coefficient_of_nothing(family: str, own: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, num_hidden_layers=1, **own))
    with pytest.raises(UserError) as caught:
        prepare_experts(model, device=CPU, aux_loss_coef=0.1)
    assert str(caught.value) == (
        f"router_aux_loss_coef: {type(model).__name__} adds no load balancing loss to its own; leave it out"
    )


def test_a_loss_that_would_have_no_gradient() -> None:
    """Reentrant checkpointing runs layers without a graph first, and the loss is made of what routers said there."""
    model = make("qwen3_moe")
    with pytest.raises(UserError) as caught:
        prepare_experts(model, device=CPU, reentrant=True)
    assert str(caught.value) == (
        "activation_checkpointing_kwargs: use_reentrant: true: routers would learn nothing from the load balancing "
        "loss: leave it out, or write router_aux_loss_coef: 0"
    )
    assert None not in prepare_experts(model, device=CPU, aux_loss_coef=0, reentrant=True)
    _, gradient = learn(prepared(make("qwen3_moe")), [ROWS])
    model = prepared(make("qwen3_moe"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    assert apart(learn(model, [ROWS])[1], gradient) < 1e-6


def test_which_tokens_count() -> None:
    """No padding, and no row of one token, which stands in for a missing one."""
    rows = [{"input_ids": row, "labels": row} for row in ([1, 2, 3], [4, 5], [0])]
    flat = [{**row, "position_ids": list(range(len(row["input_ids"])))} for row in rows]
    assert counted_tokens(collate_flat(flat[:2])) is None
    found = counted_tokens(collate_flat(flat))
    assert found is not None
    assert found.int().tolist() == [1, 1, 1, 1, 1, 0]
    found = counted_tokens(collate_padded(rows, pad_token_id=0))
    assert found is not None
    assert found.int().tolist() == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert collate_flat(flat)[METADATA].tokens_of_rows == 5
    bare = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.tensor([[1, 0]])}
    found = counted_tokens(bare)
    assert found is not None
    assert found.int().tolist() == [1, 0]


def test_the_fullest_and_the_emptiest_expert_of_any_layer() -> None:
    """Of 4 tokens with 2 experts each; the second layer's have but two of four."""
    model = make("qwen3_moe")
    routing = Routing(model, None, CPU)
    chosen = [torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]), torch.tensor([[0, 1]] * 4)]
    for _ in range(2):  # as gradient checkpointing has it
        for experts, index in zip(experts_of(model), chosen, strict=True):
            experts(torch.zeros(4, 32), index, torch.ones(4, 2))
    assert [counts.tolist() for counts in routing.counts] == [[4, 4, 4, 4], [8, 8, 0, 0]]
    assert routing.logged() == {"expert_share_max": 1.0, "expert_share_min": 0.0}
    model.eval()
    experts_of(model)[0](torch.zeros(4, 32), chosen[0], torch.ones(4, 2))
    assert [counts.tolist() for counts in routing.counts] == [[0, 0, 0, 0]] * 2
    assert routing.logged() == {"expert_share_max": 0.0, "expert_share_min": 0.0}


def test_a_resumed_run_logs_what_an_uninterrupted_one_does() -> None:
    """A checkpoint between two log entries has what was counted, whichever rank goes on with it."""
    whole, before, after, other = (prepared(make("qwen3_moe")) for _ in range(4))
    learn(whole, [ROWS[:2], ROWS[2:]])
    learn(before, [ROWS[:2], ROWS[2:]])
    state = json.loads(json.dumps(before.ds_sft.routing.state()))
    after.ds_sft.routing.restore(state, is_main=True)
    other.ds_sft.routing.restore(state, is_main=False)
    assert other.ds_sft.routing.state()["counts"] == [[0, 0, 0, 0]] * 2
    for model in (whole, after):
        learn(model, [ROWS])
    assert whole.ds_sft.routing.state() == after.ds_sft.routing.state() != state
    found = after.ds_sft.routing.logged()
    assert list(found) == ["aux_loss", "expert_share_max", "expert_share_min"]
    assert found == whole.ds_sft.routing.logged()


def test_a_checkpoint_between_two_log_entries_has_them(tmp_path: Path) -> None:
    """In a real training: the entry of step 3 of a run resumed from step 2 is that of the run itself."""
    keys = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}
    whole = make_trainer(tmp_path / "out", model=prepared(make("qwen3_moe")), **keys)
    whole.train()
    folder = tmp_path / "out" / "checkpoint-2"
    start = Checkpoint(folder, read_manifest(folder))
    resumed = make_trainer(tmp_path / "resumed", model=prepared(make("qwen3_moe")), resumed=start, **keys)
    resumed.train(resume_from_checkpoint=str(folder))
    told = [
        {name: entry[name] for name in ("step", "loss", "aux_loss", "expert_share_max", "expert_share_min")}
        for one in (whole, resumed)
        for entry in one.state.log_history
        if "aux_loss" in entry and entry["step"] == 3
    ]
    assert told[0] == told[-1]
    assert len(told) == 2


def test_a_dense_model_is_left_alone() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **SMALL))
    assert prepare_experts(model, device=CPU) == (None, None)
