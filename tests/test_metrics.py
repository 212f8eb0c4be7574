"""Figures of speed: literal arithmetic, and clocks that are told the time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import deepspeed.comm.comm as comm
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ds_sft.model.lend import lend
from ds_sft.model.sequence import SequenceGroup
from ds_sft.plan.cost import model_flops_per_token
from ds_sft.plan.shape import shape_of
from ds_sft.training import clock as clock_of_a_rank
from ds_sft.training import metrics
from ds_sft.training import timers as timers_of_a_rank
from ds_sft.training.clock import EVALUATION, PARTS, Clock
from ds_sft.training.flops import Flops, count_flops
from ds_sft.training.metrics import Interval, Throughput
from ds_sft.training.peak import device_peak, known_peak
from ds_sft.training.progress import logs_in_words
from ds_sft.training.timers import WAITS, Timers

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100}  # fmt: skip


class Time:
    """A clock that goes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(clock_of_a_rank.time, "perf_counter", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    return Time(monkeypatch)


def seconds_of(clock: Clock) -> dict[str, float]:
    clock._mark()
    clock.settle()
    return {part: seconds for part, seconds in clock.take()[0].items() if seconds}


def test_every_moment_is_in_one_part(passing: Time) -> None:
    clock = Clock()
    with clock.part("forward_backward"):
        passing.passes(3)
        with clock.part("communication"):
            passing.passes(2)
        passing.passes(1)
    passing.passes(0.5)
    assert seconds_of(clock) == {"forward_backward": 4.0, "communication": 2.0, "other": 0.5}
    assert seconds_of(clock) == {}


@pytest.mark.parametrize("whole", ["save", "evaluation"])
def test_what_a_save_or_an_evaluation_sends_is_part_of_it(passing: Time, whole: str) -> None:
    clock = Clock()
    with clock.part(whole):
        passing.passes(1)
        with clock.part("communication"):
            passing.passes(5)
    assert seconds_of(clock) == {whole: 6.0}


def test_a_part_ends_with_an_error_in_it(passing: Time) -> None:
    clock = Clock()

    def save() -> None:
        with clock.part("save"):
            passing.passes(1)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    passing.passes(2)
    assert seconds_of(clock) == {"save": 1.0, "other": 2.0}


def test_a_lap_is_work_without_communication(passing: Time) -> None:
    clock = Clock()
    for work in (1.0, 4.0):
        with clock.part("forward_backward"):
            passing.passes(work)
            with clock.part("communication"):
                passing.passes(7)
        clock.lap()
    with clock.part("save"):
        passing.passes(9)
    clock.lap()
    clock.settle()
    assert clock.take()[1] == [1.0, 4.0, 0.0]


def test_marks_do_not_pile_up(passing: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock_of_a_rank, "MARKS_KEPT", 8)
    clock = Clock()
    for _ in range(100):
        with clock.part("optimizer"):
            passing.passes(1)
        clock.lap()
        assert len(clock.marks) < 8
    assert seconds_of(clock) == {"optimizer": 100.0}


class Stream:
    """Of a GPU: what is put into it, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0  # milliseconds

    def computes(self, seconds: float) -> None:
        self.now += 1000 * seconds

    def waits_for(self, other: Stream) -> None:
        self.now = max(self.now, other.now)


class Gpu:
    """Two streams, of which one is the current one, and events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.compute, self.side = Stream(), Stream()
        self.current, self.waited_for = self.compute, []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self, stream: Stream | None = None) -> None:
                self.at = (stream or gpu.current).now

            def synchronize(self) -> None:
                gpu.waited_for.append(self.at)

            def elapsed_time(self, later: Event) -> float:
                return later.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)


NAMES, SECONDS = st.sampled_from((*PARTS, EVALUATION)), st.integers(0, 9)
NESTED = st.recursive(
    st.tuples(NAMES, SECONDS, st.just([])),
    lambda parts: st.tuples(NAMES, SECONDS, st.lists(parts, max_size=4)),
    max_leaves=30,
)


@given(NESTED)
def test_no_part_is_negative_and_their_sum_is_what_passed(nested: Any) -> None:
    """However parts lie in each other, and whatever stream is the current one: another may be far ahead or behind."""

    def spend(name: str, seconds: int, inside: list[Any]) -> None:
        gpu.current = gpu.side
        gpu.side.computes(seconds * 2)
        with clock.part(name):
            gpu.current = gpu.compute
            gpu.compute.computes(seconds)
            for part in inside:
                spend(*part)

    with pytest.MonkeyPatch.context() as monkeypatch:
        gpu = Gpu(monkeypatch)
        clock = Clock("cuda")
        spend(*nested)
        clock.lap()
        clock.settle()
    seconds, laps = clock.take()
    assert min(*seconds.values(), *laps) >= 0
    assert sum(seconds.values()) == gpu.compute.now / 1000


class Engine:
    """As DeepSpeed's: it reduces in a stream of its own while it computes, and waits for it at the end."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.optimizer, self.sent = gpu, self, 3.0

    def forward(self) -> str:
        self.gpu.compute.computes(1)
        return "logits"

    def backward(self) -> None:
        gpu = self.gpu
        gpu.current = gpu.side
        gpu.side.waits_for(gpu.compute)
        comm.cdb.all_reduce()
        gpu.current = gpu.compute
        gpu.compute.computes(2)
        self.overlapping_partition_gradients_reduce_epilogue()

    def overlapping_partition_gradients_reduce_epilogue(self) -> None:
        self.gpu.compute.waits_for(self.gpu.side)

    def step(self) -> None:
        self.gpu.compute.computes(0.5)


def timed_engine(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> tuple[Timers, Engine]:
    class Backend:
        def all_reduce(self) -> None:
            gpu.current.computes(engine.sent)

    monkeypatch.setattr(comm, "cdb", Backend())
    monkeypatch.setattr(timers_of_a_rank, "COLLECTIVES", ("all_reduce",))
    timers, engine = Timers(Clock("cuda", world_size=2)), Engine(gpu)
    timers.time_engine(engine)
    return timers, engine


def test_an_exchange_is_communication() -> None:
    """Until the end of training; then it is the group's own again."""
    timers, group, parts = Timers(Clock(world_size=2)), SequenceGroup(2, None), []
    group.exchange = lambda given: parts.append(timers.clock.open[-1]) or given  # type: ignore[method-assign]
    own = group.exchange
    timers.time_exchange(group)
    with timers.clock.part("forward_backward"):
        assert group.exchange(torch.ones(2)).tolist() == [1, 1]
    timers.restore()
    assert parts == ["communication"]
    assert group.exchange is own


def learn(timers: Timers, engine: Engine) -> dict[str, float]:
    with timers.clock.part("forward_backward"):
        assert engine.forward() == "logits"
        engine.backward()
        engine.step()
    return seconds_of(timers.clock)


@pytest.mark.parametrize(("sent", "waited"), [(1.5, 0.0), (2.0, 0.0), (5.0, 3.0)])
def test_what_is_sent_beside_computation_costs_what_it_is_waited_for(
    sent: float, waited: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two seconds of computation hide as much; parts are never negative, and their sum is what passed."""
    gpu = Gpu(monkeypatch)
    timers, engine = timed_engine(gpu, monkeypatch)
    engine.sent = sent
    expected = {"forward_backward": 3.0, "communication": waited, "optimizer": 0.5}
    assert learn(timers, engine) == {part: seconds for part, seconds in expected.items() if seconds}
    assert gpu.waited_for == [gpu.compute.now]  # the last mark, once


def test_what_is_sent_in_the_stream_that_computes_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    timers, engine = timed_engine(gpu, monkeypatch)
    gpu.side = gpu.compute
    assert learn(timers, engine) == {"forward_backward": 3.0, "communication": 3.0, "optimizer": 0.5}


def test_collectives_are_timed_for_this_engine_only_and_at_the_end_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    timers, engine = timed_engine(gpu, monkeypatch)
    learn(timers, engine)
    assert vars(comm.cdb) == {}  # between two calls of the engine
    comm.cdb.all_reduce()
    assert set(vars(engine)) >= {"forward", "backward", "step"}
    timers.restore()
    assert set(vars(engine)) == {"gpu", "optimizer", "sent"}
    assert engine.forward() == "logits"


def test_an_engine_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    _, engine = timed_engine(gpu, monkeypatch)
    engine.sent = "many"  # type: ignore[assignment]
    with pytest.raises(TypeError):
        engine.backward()
    assert vars(comm.cdb) == {}


def test_waits_are_found_where_a_stage_has_them() -> None:
    """The names that are timed on a GPU are those of the installed DeepSpeed."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    epilogue, average, fetch = WAITS
    assert hasattr(DeepSpeedZeroOptimizer, epilogue)
    assert hasattr(DeepSpeedZeroOptimizer, average)
    assert hasattr(DeepSpeedZeroOptimizer_Stage3, epilogue)
    assert hasattr(PartitionedParameterCoordinator, fetch.split(".")[-1])
    assert fetch.startswith("parameter_offload.param_coordinator.")


class Wrapped(torch.nn.Module):
    """As DistributedDataParallel names what it wraps."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("compiled", [False, True])
def test_what_is_compiled_has_no_hooks_that_break_its_graph(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo does not trace a clock: `torch_compile: yes` would warn, and leave the graph where the model begins."""
    monkeypatch.setattr(timers_of_a_rank, "DistributedDataParallel", Wrapped)
    model = Wrapped()
    timers = Timers(Clock(world_size=2))
    timers.time_reduction(torch.compile(model) if compiled else model, SimpleNamespace(backward=torch.Tensor.backward))
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    assert hooks == ([0, 0] if compiled else [1, 1])
    timers.restore()
    assert [len(module._forward_pre_hooks) for module in model.modules()] == [0, 0]


def test_what_was_replaced_before_is_put_back() -> None:
    owner = SimpleNamespace(own=1)
    take_off = lend(owner, {"own": len, "other": len})
    assert owner.own is owner.other is len
    take_off()
    assert vars(owner) == {"own": 1}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("config", "model"), [(LlamaConfig, LlamaForCausalLM), (Qwen3Config, Qwen3ForCausalLM)])
def test_flops_are_the_plans(config: Any, model: Any, tied: bool) -> None:
    made = config(**SIZES, tie_word_embeddings=tied)
    flops = count_flops(model(made))
    assert flops is not None
    # The plan lets every token see the whole length, as PaLM does; here attention is causal.
    whole = flops.of(tokens=1, pairs=20, head_tokens=1)
    assert whole == model_flops_per_token(shape_of(made.to_dict()), length=20)
    assert flops.head == 6 * 100 * 32
    assert flops.of(tokens=1, pairs=20, head_tokens=0) == whole - flops.head


def test_frozen_weights_need_no_gradient_of_their_own() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))
    trained = count_flops(model)
    model.requires_grad_(False)
    frozen = count_flops(model)
    assert trained is not None
    assert frozen == Flops(layers=trained.layers * 4 / 6, head=trained.head * 4 / 6, attention=trained.attention)


def test_a_mixture_of_experts_is_not_guessed() -> None:
    """Experts that are not in single tensors."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.num_experts, model.config.num_experts_per_tok = 8, 2
    assert count_flops(model) is None


def test_figures() -> None:
    interval = Interval(tokens=800, places=1000, supervised=200, flops=3e9, possible_flops=12e9, seconds=4, waiting=0.5,
                        data_wait=0.4, forward_backward=2, communication=0.8, optimizer=0.4, save=0.2,
                        other=0.2)  # fmt: skip
    assert interval.figures() == {
        "tokens_per_second": 200, "supervised_tokens_per_second": 50, "mfu": 0.25, "padding_share": 0.2,
        "waiting_share": 0.125, "data_wait_share": 0.1, "forward_backward_share": 0.5, "communication_share": 0.2,
        "optimizer_share": 0.1, "save_share": 0.05, "other_share": 0.05, "interval_seconds": 4,
    }  # fmt: skip
    both = interval + Interval(tokens=200, places=1000, seconds=6, save=6)
    assert both.figures()["tokens_per_second"] == 100
    assert both.figures()["padding_share"] == 0.5
    assert both.figures()["save_share"] == 0.62


def test_no_peak_no_mfu() -> None:
    assert "mfu" not in Interval(tokens=1, places=1, seconds=1).figures()


def test_two_ranks_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 works 3 s and 1 s where rank 0 works 1 s and 1 s: a rank waits 1 s on average, in the first lap."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    throughput = Throughput(model, torch.device("cpu"), Clock(), head_everywhere=False)
    assert throughput.flops is not None
    ranks = [
        [10.0, 12, 4, 40, 1e9, 1.5, 0.5, 1.5, 2.0, 0, 0, 0, 1, 1],
        [14.0, 14, 6, 60, 3e9, 1.2, 0.5, 3.5, 0.0, 0, 0, 0, 3, 1],
    ]
    monkeypatch.setattr(metrics, "gather_numbers", lambda mine, device: ranks)
    joined = throughput.interval()
    assert (joined.tokens, joined.places, joined.supervised) == (24, 26, 10)
    assert (joined.seconds, joined.waiting, joined.forward_backward) == (4.0, 1.0, 2.5)
    assert joined.possible_flops == 4.0 * 4e9
    assert joined.flops == throughput.flops.of(tokens=24, pairs=100, head_tokens=10)
    assert throughput.logged()["peak_memory_gib"] == 1.5
    assert throughput.summary()["tokens"] == 48
    assert throughput.summary()["supervised_tokens"] == 20
    throughput.head_everywhere = True
    assert throughput.interval().flops == throughput.flops.of(tokens=24, pairs=100, head_tokens=24)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5), ("NVIDIA B200", 2250), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121), ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 3090", 71),
    ],
)  # fmt: skip
def test_known_peaks(name: str, tflops: float) -> None:
    assert known_peak(name, torch.bfloat16) == tflops * 1e12
    assert known_peak(name, torch.float32) is None


def test_a_v100_has_no_bfloat16() -> None:
    assert known_peak("Tesla V100-SXM2-32GB", torch.float16) == 125e12
    assert known_peak("Tesla V100-SXM2-32GB", torch.bfloat16) is None


def test_a_measured_peak() -> None:
    state = torch.get_rng_state()
    peak = device_peak(torch.device("cpu"), torch.float32)
    assert 0 < peak.flops < 1e14
    assert peak.source == "CPU, measured: a float32 matrix product of 1,024"
    assert torch.equal(torch.get_rng_state(), state)  # dropout draws the same as without it


def test_a_log_entry_in_one_line() -> None:
    logs = {"loss": 1.23456, "tokens_per_second": 12345.6, "mfu": 0.4123, "waiting_share": 0.034, "padding_share": 0.0}
    assert logs_in_words(logs) == "loss 1.2346, 12,346 tokens/s, MFU 41.2%, waiting 3%, padding 0%"
    del logs["mfu"]
    assert logs_in_words(logs) == "loss 1.2346, 12,346 tokens/s, waiting 3%, padding 0%"
    assert logs_in_words({"eval_loss": 2.0, "eval_runtime": 3.0}) == "validation loss 2.0000"
    assert logs_in_words({"train_runtime": 3.0}) == ""


def test_deepspeed_has_what_is_timed_on_a_gpu() -> None:
    """A renamed method would be passed over, and its waiting would count as computing."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    owners = (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, PartitionedParameterCoordinator)
    for path in WAITS:
        assert any(hasattr(owner, path.rpartition(".")[2]) for owner in owners), path
