"""AdamW on bfloat16 weights: rounded at random, and the same again in a resumed run."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ds_sft.engine.release import _clear_bitsandbytes
from ds_sft.ranks.launch import Launch
from ds_sft.training import optimizer
from ds_sft.training.optimizer import LOW, StochasticAdamW, optimizer_of, round_into

BELOW_ONE, ABOVE_ONE = 1 - 2**-8, 1 + 2**-7  # the neighbours of 1 in bfloat16
NUMBER = 40_000
Steps = list[list[torch.Tensor]]


def parameters(*sizes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(size, generator=draw).bfloat16()) for size in sizes]


def gradients(of: list[torch.nn.Parameter], steps: int) -> Steps:
    draw = torch.Generator().manual_seed(1)
    return [[torch.randn(p.shape, generator=draw).bfloat16() for p in of] for _ in range(steps)]


def train(made: torch.optim.Optimizer, steps: Steps) -> list[torch.Tensor]:
    """The weights after these gradients."""
    trained = [p for group in made.param_groups for p in group["params"]]
    for step in steps:
        for p, gradient in zip(trained, step, strict=True):
            p.grad = gradient.clone()
        made.step()
    return [p.detach().clone() for p in trained]


def learn(*sizes: tuple[int, ...], steps: int = 3, **options: Any) -> list[torch.Tensor]:
    trained = parameters(*sizes)
    return train(StochasticAdamW(trained, 1e-2, **options), gradients(trained, steps))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75])
def test_a_number_becomes_each_neighbour_as_often_as_it_is_near(share: float) -> None:
    exact = 1 + share * 2**-7
    noise = torch.randint(0, LOW + 1, (NUMBER,), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    narrow = torch.zeros(NUMBER, dtype=torch.bfloat16)
    round_into(narrow, torch.full((NUMBER,), exact), noise)
    assert set(narrow.tolist()) == ({1.0, ABOVE_ONE} if share else {1.0})
    assert (narrow == ABOVE_ONE).float().mean().item() == pytest.approx(share, abs=4 * (0.25 / NUMBER) ** 0.5)
    round_into(narrow, torch.full((NUMBER,), -exact), noise)
    assert narrow.float().mean().item() == pytest.approx(-exact, abs=2**-7 * 4 * (0.25 / NUMBER) ** 0.5)


def test_each_weight_is_a_neighbour_of_adamw_in_float64() -> None:
    """Three steps with decay; moments, too, which are taken over so that roundings do not add up."""
    trained = parameters((5, 7), (11,))
    made = StochasticAdamW(trained, 1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    for number, step in enumerate(gradients(trained, 3), 1):
        before = [(p.detach().double(), *(made.state[p].get(name, torch.zeros(p.shape)).double() for name in MOMENTS))
                  for p in trained]  # fmt: skip
        train(made, [step])
        for p, gradient, (weight, average, square) in zip(trained, step, before, strict=True):
            average = 0.8 * average + 0.2 * gradient.double()
            square = 0.9 * square + 0.1 * gradient.double() ** 2
            update = average / (1 - 0.8**number) / ((square / (1 - 0.9**number)).sqrt() + 1e-6)
            for found, exact in [(p, weight * (1 - 1e-2 * 0.1) - 1e-2 * update), (made.state[p]["exp_avg"], average),
                                 (made.state[p]["exp_avg_sq"], square)]:  # fmt: skip
                assert found.dtype == torch.bfloat16
                assert ((found.double() - exact).abs() <= 2**-7 * exact.abs()).all()
            assert made.state[p]["step"] == number


MOMENTS = ("exp_avg", "exp_avg_sq")


def test_updates_below_a_rounding_are_kept_on_average() -> None:
    """A hundred updates of 1e-4 to weights of 1: rounded to the nearest none of them is left."""
    start = [torch.nn.Parameter(torch.ones(NUMBER, dtype=torch.bfloat16)) for _ in range(2)]
    steps = [[torch.ones(NUMBER, dtype=torch.bfloat16)]] * 100
    (nearest,) = train(torch.optim.AdamW([start[0]], 1e-4, weight_decay=0), steps)
    (found,) = train(StochasticAdamW([start[1]], 1e-4), steps)
    assert set(nearest.tolist()) == {1.0}
    assert found.double().mean().item() == pytest.approx(0.99, abs=2e-4)


def test_the_second_moment_becomes_smaller() -> None:
    """0.999 of it is the same number in bfloat16."""
    start = [torch.nn.Parameter(torch.ones(NUMBER, dtype=torch.bfloat16)) for _ in range(2)]
    made = [torch.optim.AdamW([start[0]], 1e-4), StochasticAdamW([start[1]], 1e-4)]
    for each in made:
        train(each, [[torch.ones(NUMBER, dtype=torch.bfloat16)]] + [[torch.zeros(NUMBER, dtype=torch.bfloat16)]] * 200)
    nearest, found = (each.state[p]["exp_avg_sq"].double().mean().item() for each, p in zip(made, start, strict=True))
    assert nearest == pytest.approx(1e-3, rel=2e-2)
    assert found == pytest.approx(1e-3 * 0.999**200, rel=2e-3)


def test_a_loaded_state_goes_on_bit_for_bit() -> None:
    sizes = ((3, 5), (40,))
    whole = learn(*sizes, steps=5)
    trained = parameters(*sizes)
    steps = gradients(trained, 5)
    first = StochasticAdamW(trained, 1e-2)
    train(first, steps[:2])
    copies = [torch.nn.Parameter(p.detach().clone()) for p in trained]
    second = StochasticAdamW(copies, 1e-2)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(train(second, steps[2:]), whole, strict=True))


def test_random_bits_are_of_seed_stream_step_and_place() -> None:
    """Replicas of DistributedDataParallel must round alike; equal weights in two places must not."""
    assert all(torch.equal(a, b) for a, b in zip(learn((64,), (64,)), learn((64,), (64,)), strict=True))
    (first,) = learn((64,))
    assert not any(torch.equal(first, learn((64,), **{name: 1})[0]) for name in ("seed", "stream"))
    same = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(2)]
    one, other = train(StochasticAdamW(same, 1e-3), [[torch.ones(64, dtype=torch.bfloat16)] * 2])
    assert not torch.equal(one, other)
    assert set(one.tolist()) == set(other.tolist()) == {BELOW_ONE, 1.0}


def test_a_weight_without_a_gradient_keeps_its_place_and_its_value() -> None:
    """An expert that no token chose: what the others draw is not moved by it."""
    sizes = ((8, 8), (16,), (64,))
    with_all = learn(*sizes, steps=1)
    trained = parameters(*sizes)
    for p, gradient in zip(trained, gradients(trained, 1)[0], strict=True):
        p.grad = gradient
    trained[1].grad = None
    before = trained[1].detach().clone()
    StochasticAdamW(trained, 1e-2).step()
    assert torch.equal(trained[1], before)
    assert torch.equal(trained[0], with_all[0])
    assert torch.equal(trained[2], with_all[2])


def test_weights_are_updated_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is float32 is small, and the result does not depend on how small."""
    whole = learn((40, 50), (7,), (300,))
    updated: list[list[int]] = []
    update = optimizer._update

    def counted(pieces: Any, group: Any) -> None:
        updated.append([piece.weight.numel() for piece in pieces])
        update(pieces, group)

    monkeypatch.setattr(optimizer, "_update", counted)
    monkeypatch.setattr(optimizer, "CHUNK", 800)
    assert all(torch.equal(a, b) for a, b in zip(learn((40, 50), (7,), (300,)), whole, strict=True))
    assert updated == [[800], [800], [400, 7, 300]] * 3


def test_what_bitsandbytes_remembers_of_a_model_is_given_back() -> None:
    """Trainer names its embedding there: its float32 weights would stay for good."""
    from bitsandbytes.optim import GlobalOptimManager

    embedding = torch.nn.Embedding(4, 2)
    gone = weakref.ref(embedding)
    GlobalOptimManager.get_instance().register_module_override(embedding, "weight", {"optim_bits": 32})
    _clear_bitsandbytes()
    del embedding
    assert gone() is None


@pytest.mark.parametrize(("engine", "stream"), [(None, 0), ({"zero_optimization": {"stage": 2}}, 3)])
def test_ranks_of_zero_have_bits_of_their_own(engine: Any, stream: int, capsys: pytest.CaptureFixture[str]) -> None:
    args: Any = SimpleNamespace(learning_rate=1e-5, adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-7, seed=5,
                                process_index=3, deepspeed=engine)  # fmt: skip
    config: Any = SimpleNamespace(optimizer_dtype="bfloat16", training={})
    assert optimizer_of(config, args, Launch(launcher="python")) == (
        StochasticAdamW, {"lr": 1e-5, "betas": (0.9, 0.95), "eps": 1e-7, "seed": 5, "stream": stream}
    )  # fmt: skip
    assert capsys.readouterr().out == (
        "Optimizer: AdamW in bfloat16, stochastic rounding: weights, gradients and two moments of 2 bytes each.\n"
    )
    config.optimizer_dtype = "float32"
    assert optimizer_of(config, args, Launch(launcher="python")) is None
