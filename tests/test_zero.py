"""Which DeepSpeed configuration a run uses, and what its linter refuses."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_sft.checkpoints.identity import changes, identity
from ds_sft.config.keys import ENGINES, TRAINING_DEFAULTS, Config
from ds_sft.engine.deepspeed_keys import package_folder
from ds_sft.engine.zero import engine_config, read_engine, stage
from ds_sft.errors import UserError
from ds_sft.ranks.launch import Launch
from tests.test_house import ROOT

ALONE = Launch(launcher="python")
LAUNCHED = Launch(launcher="torchrun", world_size=2)


def make(engine: Any) -> Config:
    training = {"output_dir": "o", **TRAINING_DEFAULTS, "deepspeed": engine}
    return Config(model_name_or_path="m", train_file="t", training=training)


SIZES = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")


def test_a_file_a_mapping_and_nothing(tmp_path: Path) -> None:
    file = tmp_path / "zero.json"
    file.write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    assert engine_config(make(str(file)), LAUNCHED) == {"zero_optimization": {"stage": 2}, **SIZES}
    assert engine_config(make({"zero_optimization": {"stage": 1}, **SIZES}), LAUNCHED) == {
        "zero_optimization": {"stage": 1}, **SIZES
    }  # fmt: skip
    assert engine_config(make(None), LAUNCHED) is None


@pytest.mark.parametrize(
    "given", [{}, {"zero_optimization": {}}, {"gradient_clipping": None}], ids=["nothing", "no stage", "null"]
)
def test_what_nobody_wrote_is_the_runs(given: dict[str, Any]) -> None:
    """In float32, where stage 0 trains. DeepSpeed's own would be no clipping, and a step after each micro batch."""
    config = Config(
        model_name_or_path="m", train_file="t",
        training={**TRAINING_DEFAULTS, "output_dir": "o", "bf16": False, "deepspeed": given},
    )  # fmt: skip
    assert engine_config(config, LAUNCHED) == {"zero_optimization": {"stage": 0}, **SIZES}


@pytest.mark.parametrize(("number", "added"), [(2, {}), (3, {"reduce_scatter": False})])
def test_muon_has_whole_gradients(number: int, added: dict[str, Any]) -> None:
    zero = {**STAGE3, "stage": number}
    training = {**TRAINING_DEFAULTS, **MUON, "output_dir": "o", "deepspeed": {"zero_optimization": zero}}
    config = Config(model_name_or_path="m", train_file="t", training=training)
    assert engine_config(config, LAUNCHED) == {"zero_optimization": {**zero, **added}, **SIZES}


def test_without_a_launcher_it_is_ignored_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert engine_config(make({"zero_optimization": {"stage": 2}}), ALONE) is None
    assert capsys.readouterr().out.startswith("No launcher: plain Trainer in one process, the deepspeed key is ignored")


@pytest.mark.parametrize(
    ("root", "command"),
    [(ROOT, "deepspeed ds_sft/train.py"), (None, "deepspeed --module ds_sft train")],
    ids=["in a clone", "without one"],
)
def test_what_would_use_it(
    root: Path | None, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ds_sft.shipped.clone", lambda: root)
    assert engine_config(make("zero2"), ALONE) is None
    assert capsys.readouterr().out.endswith(f" the deepspeed key is ignored (`{command} ...` uses it, and all GPUs).\n")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "deepspeed: {path}: no such file; did you mean zero2? There are zero2, zero3, zero2_offload, "
         "zero3_offload"),
        (b'{"a": 1,\n "b" 2}', "{path}:2: not JSON: Expecting ':' delimiter"),
        (b'["stage", 2]', "{path}: expected a JSON object of DeepSpeed options"),
        (b'{"a": "\xff"}', "{path}: not UTF-8; save the file as UTF-8"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("launch", [ALONE, LAUNCHED], ids=["alone", "launched"])
def test_unusable_files(tmp_path: Path, content: bytes | None, said: str, launch: Launch) -> None:
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        engine_config(make(str(path)), launch)
    assert str(caught.value) == said.format(path=path)


def test_a_package_that_is_not_there() -> None:
    """What to do works without a clone, too."""
    with pytest.raises(UserError, match=r"^nothing_here is not installed: pip install nothing_here$"):
        package_folder("nothing_here")


@pytest.mark.parametrize("name", ENGINES)
def test_what_is_shipped_has_a_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every folder, also in one that has a file of that name."""
    file = ROOT / "ds_configs" / f"{name}.json"
    (tmp_path / name).write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert read_engine(name) == json.loads(file.read_text(encoding="utf-8")) == read_engine(str(file))
    assert engine_config(make(name), LAUNCHED) == engine_config(make(str(file)), LAUNCHED)


def test_all_that_is_shipped_is_named() -> None:
    assert {file.stem for file in (ROOT / "ds_configs").glob("*.json")} == set(ENGINES)


def test_a_name_and_a_file_with_its_content_are_one_run(tmp_path: Path) -> None:
    """A checkpoint of one is gone on with by the other."""
    file = tmp_path / "mine.json"
    file.write_bytes((ROOT / "ds_configs" / "zero2.json").read_bytes())
    named, filed = (identity(c, engine_config(c, LAUNCHED), "rows") for c in (make("zero2"), make(str(file))))
    assert changes(named, filed) == {}
    other = make("zero3")
    assert changes(named, identity(other, engine_config(other, LAUNCHED), "rows")) != {}


def test_a_saved_configuration_keeps_the_name(tmp_path: Path) -> None:
    make("zero2").save(tmp_path / "config.yaml")
    assert "\ndeepspeed: zero2\n" in (tmp_path / "config.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("ds_configs/zero2.json", "no such file; write zero2, which needs none"),  # from a folder that is no clone
        ("zero3_offload.json", "no such file; write zero3_offload, which needs none"),
        ("zero4", "neither a name nor a file; did you mean zero2? There are zero2, zero3, "),
        ("ZeRO-3", "neither a name nor a file; did you mean zero3? There are "),
        ("zero3-offload", "neither a name nor a file; did you mean zero3_offload? There are "),
        ("fsdp", "neither a name nor a file; there are zero2, zero3, zero2_offload, zero3_offload"),
    ],
)
def test_what_is_neither_a_name_nor_a_file(
    value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        engine_config(make(value), LAUNCHED)
    assert str(caught.value).startswith(f"deepspeed: {value}: {said}")


@pytest.mark.parametrize(
    ("name", "keys", "optim", "said"),
    [
        ("zero3_offload", {"adapter": "lora", "quantization": "nf4"}, "adamw_torch",
         "it cannot partition the 4-bit weights of quantization: nf4; write deepspeed: zero2_offload, or leave "
         "quantization out"),
        ("zero2_offload", {"optimizer_dtype": "bfloat16"}, "adamw_torch",
         "DeepSpeed's CPU Adam rounds to nearest, which loses small updates (optimizer_dtype: bfloat16); write "
         "deepspeed: zero2 or zero3, or optimizer_dtype: float32"),
        ("zero3_offload", {}, "adamw_8bit",
         "DeepSpeed updates with its CPU Adam there, and the run has optim: adamw_8bit; write deepspeed: zero2 or "
         "zero3, or optim: adamw_torch"),
        ("zero2_offload", {}, "muon",
         "DeepSpeed updates with its CPU Adam there, and the run has optim: muon; write deepspeed: zero2 or zero3, or "
         "optim: adamw_torch"),
    ],
)  # fmt: skip
def test_what_a_named_one_contradicts_has_no_block_to_delete(
    name: str, keys: dict[str, Any], optim: str, said: str
) -> None:
    config = make(name)
    with pytest.raises(UserError) as caught:
        engine_config(replace(config, training=config.training | {"optim": optim}, **keys), LAUNCHED)
    assert str(caught.value) == f"deepspeed: {name}: {said}"


def test_an_engines_own_adam_is_not_that_of_8_bits() -> None:
    block = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    config = make({"zero_optimization": {"stage": 2}, "optimizer": block})
    with pytest.raises(UserError, match=r'optimizer\.type: "AdamW": the run has optim: adamw_8bit; delete one of the'):
        engine_config(replace(config, training=config.training | {"optim": "adamw_8bit"}), LAUNCHED)


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        engine_config(make(str(tmp_path)), LAUNCHED)


@pytest.mark.parametrize(
    ("engine", "expected"),
    [(None, None), ({}, 0), ({"zero_optimization": {}}, 0), ({"zero_optimization": {"stage": 3}}, 3)],
)
def test_stage(engine: Any, expected: int | None) -> None:
    assert stage(engine) == expected


# ---- The linter


def lint(given: dict[str, Any], launch: Launch = LAUNCHED, **training: Any) -> str | None:
    """What is said of an engine in a run with these keys; its stage is 2 where it names none."""
    engine = {"zero_optimization": {"stage": 2}} | given
    keys = {"output_dir": "o", **TRAINING_DEFAULTS, **training, "deepspeed": engine}
    try:
        engine_config(Config(model_name_or_path="m", train_file="t", training=keys), launch)
    except UserError as error:
        return str(error)
    return None


def test_a_batch_of_ranks_that_share_rows() -> None:
    """DeepSpeed would count the rows of ranks; no step has as many."""
    for written in (8, 4):
        engine = {"train_batch_size": written, "zero_optimization": {"stage": 2}}
        shared = dataclasses.replace(make(engine), sequence_parallel=2)
        with pytest.raises(UserError, match=f'train_batch_size: {written}: the run has sequence_parallel: 2; write "'):
            engine_config(shared, LAUNCHED)


@pytest.mark.parametrize("launch", [ALONE, LAUNCHED], ids=["alone", "launched"])
@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda file: file.name)
def test_what_is_shipped_is_accepted(file: Path, launch: Launch) -> None:
    assert lint(json.loads(file.read_text(encoding="utf-8")), launch) is None


# Every option of DeepSpeed's documentation that another feature of it needs.
LEGITIMATE = {
    "elasticity": {"enabled": True, "max_train_batch_size": 2000, "micro_batch_sizes": [2, 4, 6]},
    "activation_checkpointing": {"partition_activations": True},
    "aio": {"block_size": 1048576},
    "autotuning": {"enabled": False},
    "checkpoint": {"load_universal": True},
    "comms_logger": {"enabled": True},
    "communication_data_type": "fp32",
    "compression_training": {},
    "csv_monitor": {"enabled": False},
    "curriculum_learning": {"enabled": False},
    "data_efficiency": {"enabled": False},
    "data_types": {"grad_accum_dtype": "fp32"},
    "dump_state": False,
    "expert_parallel": {"enabled": False, "autoep_size": 2},
    "flops_profiler": {"enabled": True},
    "gradient_predivide_factor": 1.0,
    "hybrid_engine": {"enabled": False},
    "memory_breakdown": False,
    "prescale_gradients": False,
    "sparse_gradients": False,
    "steps_per_print": 100,
    "sequence_parallel_size": 1,
    "tensor_parallel": {"autotp_size": 1},
    "tensorboard": {"enabled": False},
    "torch_autocast": {"enabled": False},
    "wall_clock_breakdown": True,
    "wandb": {"enabled": False},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "bf16": {"enabled": True, "immediate_grad_update": True},
    "fp16": {"enabled": False, "loss_scale": 0, "hysteresis": 2},
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"warmup_num_steps": "auto", "warmup_max_lr": "auto", "total_num_steps": "auto"},
    },
    "zero_optimization": {
        "stage": 3,
        "sub_group_size": 1e9,
        "prefetch_bucket_size": 1e8,  # a field's name and its alias
        "stage3_param_persistence_threshold": 1e5,
        "stage3_max_live_parameters": 1e9,
        "zero_hpz_partition_size": 8,
        "zero_quantized_weights": False,
        "round_robin_gradients": True,
        "offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 5, "max_in_cpu": 1e9},
        "offload_optimizer": {"device": "none"},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def test_no_legitimate_option_is_refused() -> None:
    assert lint(LEGITIMATE) is None  # 1 row x 4 accumulated x 2 ranks = 8, learning rate 1e-4: the run's own


DEFAULT = "not given: DeepSpeed's own default would hold instead of the run's; write \"auto\""
AUTO = 'write "auto", or change one of the two'
STAGE3 = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
MUON = {"optim": "muon", "max_grad_norm": 0}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {  # engine, keys of the run, what is said
    "misspelt": ({"zero_optimisation": {}}, {}, "zero_optimisation: {}: unknown key: did you mean zero_optimization?"),
    "a tracker of DeepSpeed's": (
        {"wandb": {"enabled": True}},
        {"report_to": ["none"]},
        "wandb.enabled: true: the run has report_to: none; delete one of the two",
    ),
    "expert parallelism": (
        {"expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "qwen3_moe"}},
        {},
        "expert_parallel.enabled: true: DeepSpeed's AutoEP fails with this transformers or with Trainer's optimizer; "
        "delete the block: under ZeRO-3 experts are partitioned like all weights",
    ),
    "tensor parallelism": (
        {"tensor_parallel": {"autotp_size": 2}},
        {},
        "tensor_parallel.autotp_size: 2: the ranks of a group would need the same rows, and each has rows of its own "
        "here; delete the block: ZeRO-3 divides the weights",
    ),
    "sequence parallelism": (
        {"sequence_parallel_size": 2},
        {},
        "sequence_parallel_size: 2: ranks share rows by the run's key sequence_parallel; write that, and delete it",
    ),
    "DeepCompile": (
        {"compile": {"deepcompile": True}},
        {},
        "compile.deepcompile: true: no training under DeepCompile is tested; delete it, or give the run torch_compile: "
        "yes",
    ),
    "ZenFlow, whose defaults need no option": (
        {"zero_optimization": {"stage": 2, "zenflow": {}}},
        {},
        "zero_optimization.zenflow: {}: it changes weights steps after their gradients, which is another training; "
        "delete it",
    ),
    "SuperOffload": (
        {"zero_optimization": {**STAGE3, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
        {},
        "zero_optimization.offload_optimizer.super_offload: true: no training with it is tested; delete it",
    ),
    "masters in bfloat16": (
        {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto", "bf16_master_weights_and_grads": True}},
        {},
        "bf16.bf16_master_weights_and_grads: true: DeepSpeed rounds to nearest, and loses small updates; delete it, "
        "and give the run optimizer_dtype: bfloat16",
    ),
    "Muon of DeepSpeed's own": (
        {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Muon", "params": {"lr": "auto"}}},
        MUON,
        'optimizer.type: "Muon": its rates are not those of a run without DeepSpeed; delete the block, and give the '
        "run optim: muon",
    ),
    "Muon clipped": (
        {"zero_optimization": {"stage": 2}},
        {"optim": "muon"},
        "max_grad_norm: 1.0: DeepSpeed clips what optim: muon has made of the gradients, which makes every step "
        "shorter; write 0, or delete the deepspeed key",
    ),
    "Muon in fp16": (
        {"zero_optimization": {"stage": 2}},
        {**MUON, "bf16": False, "fp16": True},
        "fp16: true: DeepSpeed adds scaled gradients to the momentum of optim: muon, and the scale changes; write "
        "bf16: yes",
    ),
    "Muon without ZeRO": (
        {"zero_optimization": {"stage": 0}},
        {**MUON, "bf16": False},
        "zero_optimization.stage: 0: no training with optim: muon is tested; write 1, 2 or 3",
    ),
    "Muon of scattered gradients": (
        {"zero_optimization": {**STAGE3, "reduce_scatter": True}},
        MUON,
        "zero_optimization.reduce_scatter: true: optim: muon wants whole gradients in stage 3; delete it",
    ),
    "Muon beside weights on the host": (
        {"zero_optimization": {**STAGE3, "offload_param": {"device": "cpu"}}},
        MUON,
        'zero_optimization.offload_param.device: "cpu": no training with it and optim: muon is tested; delete it',
    ),
    "no ZeRO": (
        {"zero_optimization": None},
        {},
        'zero_optimization: null: expected an object of options, such as {"stage": 2}',
    ),
    "no stage": (
        {"zero_optimization": {}},
        {},
        "zero_optimization.stage: not given, so 0: with bf16 it keeps no float32 weights and loses updates below a "
        "rounding (weights of 1 never moved at 1e-3); write 1, or delete the deepspeed key: DDP needs the same memory",
    ),
    "nothing like it": ({"qqqq": 1}, {}, "qqqq: 1: unknown key: DeepSpeed has no such option, delete it"),
    "misspelt in a block": (
        {"zero_optimization": {"stage": 2, "overlap_com": True}},
        {},
        "zero_optimization.overlap_com: true: unknown key: did you mean overlap_comm?",
    ),
    "misspelt deeper": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}},
        {},
        'zero_optimization.offload_optimizer.devise: "cpu": unknown key: did you mean device?',
    ),
    "in bf16": ({"bf16": {"enable": True}}, {}, "bf16.enable: true: unknown key: did you mean enabled?"),
    "stage 0 in bf16": (
        {"zero_optimization": {"stage": 0}},
        {},
        "zero_optimization.stage: 0: with bf16 it keeps no float32 weights and loses updates below a rounding "
        "(weights of 1 never moved at 1e-3); write 1, or delete the deepspeed key: DDP needs the same memory",
    ),
    "no block": (
        {"zero_optimization": True},
        {},
        'zero_optimization: true: expected an object of options, such as {"stage": 2}',
    ),
    "no such stage": ({"zero_optimization": {"stage": 4}}, {}, "zero_optimization.stage: 4: expected 0, 1, 2 or 3"),
    "gather off": (
        {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
        {},
        "zero_optimization.stage3_gather_16bit_weights_on_model_save: false: "
        "checkpoints would have no model weights; write true",
    ),
    "gather not given": (
        {"zero_optimization": {"stage": 3}},
        {},
        "zero_optimization.stage3_gather_16bit_weights_on_model_save: not given: "
        "checkpoints would have no model weights; write true",
    ),
    "parameters offloaded by stage 2": (
        {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
        {},
        "zero_optimization.offload_param: only stage 3 partitions parameters, and stage is 2; delete it",
    ),
    "no such device": (
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "disk"}}},
        {},
        'zero_optimization.offload_optimizer.device: "disk": expected none, cpu or nvme',
    ),
    "nvme without a path": (
        {"zero_optimization": {**STAGE3, "offload_param": {"device": "nvme"}}},
        {},
        "zero_optimization.offload_param.nvme_path: not given: device nvme needs the path of a folder on that disk",
    ),
    "micro batch": (
        {"train_micro_batch_size_per_gpu": 2},
        {},
        f"train_micro_batch_size_per_gpu: 2: the run has per_device_train_batch_size: 1; {AUTO}",
    ),
    "accumulation": (
        {"gradient_accumulation_steps": 1},
        {},
        f"gradient_accumulation_steps: 1: the run has gradient_accumulation_steps: 4; {AUTO}",
    ),
    "batch": (
        {"train_batch_size": 32},
        {},
        "train_batch_size: 32: the run has 1 (per_device_train_batch_size) x 4 (gradient_accumulation_steps) x 2 ranks "
        '= 8; write "auto"',
    ),
    "clipping": ({"gradient_clipping": 0.5}, {}, f"gradient_clipping: 0.5: the run has max_grad_norm: 1.0; {AUTO}"),
    "bf16 off": ({"bf16": {"enabled": False}}, {}, f"bf16.enabled: false: the run has bf16: true; {AUTO}"),
    "bf16 on": ({"bf16": {"enabled": True}}, {"bf16": False}, f"bf16.enabled: true: the run has bf16: false; {AUTO}"),
    "fp16 on": ({"fp16": {"enabled": True}}, {}, f"fp16.enabled: true: the run has fp16: false; {AUTO}"),
    "learning rate": (
        {"optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}},
        {},
        f"optimizer.params.lr: 3e-05: the run has learning_rate: 0.0001; {AUTO}",
    ),
    "betas": (
        {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
        {},
        'optimizer.params.betas: [0.9, 0.95]: the run has adam_beta1, adam_beta2: [0.9, 0.999]; write "auto"',
    ),
    "learning rate not given": (
        {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}},
        {},
        f"optimizer.params.lr: {DEFAULT}",
    ),
    "weight decay misspelt": (
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decy": 0.0}}},
        {},
        "optimizer.params.weight_decy: 0.0: unknown key: did you mean weight_decay?",
    ),
    "weight decay not given": (
        {"optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}},
        {},
        f"optimizer.params.weight_decay: {DEFAULT}",
    ),
    "another optimizer of DeepSpeed's": (
        {"optimizer": {"type": "OneBitAdam", "params": {"lr": "auto", "freeze_step": 100}}},
        {"optim": "adamw_torch"},
        'optimizer.type: "OneBitAdam": no training with it is tested; write "AdamW", or delete the block for another '
        "optim (adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit, lion_32bit, adafactor, muon)",
    ),
    "one that there is without DeepSpeed": (
        {"optimizer": {"type": "Lion", "params": {"lr": "auto"}}},
        {},
        'optimizer.type: "Lion": no training with it is tested; write "AdamW", or delete the block for optim: '
        "lion_32bit",
    ),
    "an optimizer without a name": (
        {"optimizer": {"params": {"lr": "auto"}}},
        {},
        'optimizer.type: null: no training with it is tested; write "AdamW", or delete the block for another '
        "optim (adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit, lion_32bit, adafactor, muon)",
    ),
    "warm-up not given": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}},
        {},
        f"scheduler.params.warmup_num_steps: {DEFAULT}",
    ),
    "warm-up misspelt": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
        {},
        "scheduler.params.warmup_steps: 3: unknown key: did you mean warmup_num_steps?",
    ),
    "misplaced": ({"pin_memory": True}, {}, "pin_memory: true: unknown key: DeepSpeed has no such option, delete it"),
    "optimizer": (
        {"optimizer": {"type": "AdamW"}},
        {"optim": "adafactor"},
        'optimizer.type: "AdamW": the run has optim: adafactor; delete one of the two',
    ),
    "sums of rows and columns": (
        {"zero_optimization": {"stage": 2}},
        {"optim": "adafactor"},
        "optim: adafactor: it keeps sums over rows and columns of a matrix, and DeepSpeed gives it flat parts; write "
        "adamw_8bit, or delete the deepspeed key",
    ),
    "an optimizer of the user's": (
        {"optimizer": {"type": "Lion"}},
        {"optim": "my.module:Lion"},
        'optimizer.type: "Lion": the run has optim: my.module:Lion; delete one of the two',
    ),
    "schedule": (
        {"scheduler": {"type": "WarmupLR"}},
        {"lr_scheduler_type": "cosine"},
        'scheduler.type: "WarmupLR": the run has lr_scheduler_type: cosine; delete the scheduler block',
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_contradiction_is_refused(name: str) -> None:
    engine, training, said = REFUSED[name]
    assert lint(engine, **training) == f"deepspeed: {said}"


def test_one_key_makes_an_engine_of_bfloat16() -> None:
    engine = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}}
    both = replace(make(engine), optimizer_dtype="bfloat16")
    narrow = {"enabled": "auto", "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert engine_config(both, LAUNCHED) == {**engine, **SIZES, "bf16": narrow}
    assert engine_config(make(engine), LAUNCHED) == {**engine, **SIZES}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}},
            'optimizer.type: "AdamW": DeepSpeed\'s own optimizer rounds to nearest, which loses small updates '
            "(optimizer_dtype: bfloat16); delete the block",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer.device: cpu: DeepSpeed's CPU Adam rounds to nearest, which loses "
            "small updates (optimizer_dtype: bfloat16); delete the block, or write optimizer_dtype: float32",
        ),
        (
            {"data_types": {"grad_accum_dtype": "fp32"}},
            'data_types.grad_accum_dtype: "fp32": under optimizer_dtype: bfloat16 gradients are, too; delete it',
        ),
    ],
    ids=["its optimizer", "offloaded", "accumulated in float32"],
)
def test_what_would_round_to_nearest_is_refused(changes: dict[str, Any], said: str) -> None:
    engine = {"zero_optimization": {"stage": 2}} | changes
    assert lint(engine) is None
    with pytest.raises(UserError) as caught:
        engine_config(replace(make(engine), optimizer_dtype="bfloat16"), LAUNCHED)
    assert str(caught.value) == f"deepspeed: {said}"


def test_without_a_launcher_only_what_needs_the_ranks_is_not_looked_at() -> None:
    assert lint({"train_batch_size": 32}, ALONE) is None
    assert lint({"gradient_accumulation_steps": 1}, ALONE) is not None


def test_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "zero.json").write_text('{"zero": 1}', encoding="utf-8")
    with pytest.raises(UserError) as caught:
        engine_config(make(str(tmp_path / "zero.json")), LAUNCHED)
    assert str(caught.value).startswith(f"{tmp_path}/zero.json: zero: 1: unknown key")


@pytest.mark.parametrize(("tool", "named"), [("ninja", "ninja"), ("c++", "c\\+\\+")])
def test_offload_without_what_compiles_it(monkeypatch: pytest.MonkeyPatch, tool: str, named: str) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None if name == tool else f"/usr/bin/{name}")
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    said = lint(offload)
    assert said is not None
    assert re.search(rf"compiles its CPU Adam for it and {named} cannot be found; pip install ninja, ", said)
    params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto") | {"torch_adam": True}
    assert lint({**offload, "optimizer": {"type": "AdamW", "params": params}}) is None
    assert lint(offload, ALONE) is None  # DeepSpeed is not used
