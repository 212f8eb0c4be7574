"""The run's keys -> `TrainingArguments`, which also starts the process group."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ds_sft.config.extension import is_dotted
from ds_sft.config.keys import MUON, OUR_ORDERS, SECRETS, Config
from ds_sft.data.micro_batches import Batching, Seam
from ds_sft.data.rows import lengths_of
from ds_sft.engine.builds import guard_builds, import_muon
from ds_sft.errors import UserError
from ds_sft.plan.shape import read_shape
from ds_sft.plan.steps import Steps
from ds_sft.ranks.collectives import gather, start_gloo
from ds_sft.ranks.launch import Launch
from ds_sft.upstream.check import require_names

if TYPE_CHECKING:
    from transformers import TrainingArguments

OUR_WAY = ("neftune_noise_alpha", "label_smoothing_factor")  # what train.py does with the model, and Trainer must not


def training_arguments(config: Config, engine: dict[str, Any] | None, launch: Launch) -> TrainingArguments:
    """Build the one `TrainingArguments` of the run; call it before the model, so that ZeRO-3 partitions while loading.

    Raises:
        UserError: transformers refuses a value or a combination.
    """
    import torch
    from transformers import TrainingArguments

    if engine is not None:
        guard_builds(launch)
        import_muon(engine)
    keys = keywords(config, engine)
    # Without `use_cpu` a box without GPUs gives every rank a world of its own (accelerate finds no backend).
    keys["use_cpu"] = keys.get("use_cpu", False) or not torch.cuda.is_available()
    if not launch.distributed:
        keys.pop("ddp_backend", None)  # accelerate would ask for a group of one
    if keys["use_cpu"]:
        keys.setdefault("dataloader_pin_memory", False)
        if launch.distributed:
            start_gloo(keys["ddp_timeout"], with_deepspeed=engine is not None)
    if launch.world_size > 1:
        launch.say(f"{launch.world_size} ranks; one that does not answer ends the run after {keys['ddp_timeout']:,} s "
                   "(ddp_timeout).")  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            args = TrainingArguments(**keys)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"TrainingArguments: {' '.join(str(error).split())}") from error
    _check_schedule(args)
    require_names("deepspeed", "torch")  # those of their modules that are imported by now
    args.report_to = []  # trackers are this package's to ask; transformers adds Kubeflow's where it finds its cluster
    return args


def _check_schedule(args: TrainingArguments) -> None:
    """See that the schedule takes its options: Trainer makes it when the model is loaded.

    Raises:
        UserError: it does not.
    """
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    options, kind = args.lr_scheduler_kwargs, args.lr_scheduler_type.value
    try:
        get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=1000, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        raise UserError(f"lr_scheduler_kwargs: {options}: lr_scheduler_type: {kind}: {error}") from error


def keywords(config: Config, engine: dict[str, Any] | None) -> dict[str, Any]:
    """What the run's keys are for `TrainingArguments`, on any machine."""
    keys = {**config.training, "per_device_train_batch_size": config.micro_batch}
    keys["activation_checkpointing"] = bool(keys.get("activation_checkpointing"))  # to offload is ours, offload.py
    keys["deepspeed"] = engine
    if keys.get("optim") == MUON or is_dotted(keys.get("optim")):  # which `optimizer_of` makes
        keys["optim"] = "adamw_torch"
    keys["logging_nan_inf_filter"] = False  # it logs 0.0, and waits for the device in every micro batch
    keys["report_to"] = ["none"]  # Trainer's own are guarded, and told of answers: see tracking/integrations.py
    for name in OUR_WAY:
        keys.pop(name, None)
    if keys.get("save_strategy") == "best":
        keys.setdefault("metric_for_best_model", "eval_loss")
    keys["push_to_hub"] = False  # Trainer would push every checkpoint, and what nobody verified: see export/hub.py
    for name in SECRETS:
        keys.pop(name, None)  # Trainer writes its arguments into every checkpoint
    keys.setdefault("ddp_find_unused_parameters", False)  # every parameter of a causal model takes part in every step
    keys.setdefault("ddp_broadcast_buffers", False)  # they are constants, such as the angles of rotary positions
    keys.setdefault("ddp_timeout", 1800)
    # Recomputation without a nested backward, as PyTorch advises: no input needs a gradient, DDP's and ZeRO's hooks run
    # once. Under ZeRO-3 that re-partitions at once it gives the same weights as no checkpointing (test_trajectory.py).
    keys["activation_checkpointing_kwargs"] = keys.get("activation_checkpointing_kwargs") or {"use_reentrant": False}
    return keys


def batching_of(
    args: TrainingArguments, config: Config, rows: Any, *, padded: bool, seam: Mapping[str, int] | None = None
) -> Batching:
    """What decides the micro batches of this run, made of these rows or packed sequences; all ranks must call it."""
    return Batching(
        lengths=lengths_of(rows),
        micro_batch=None if config.fills_batches else args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        ranks=args.world_size // config.sequence_parallel,
        group=config.sequence_parallel,
        padded=padded,
        seed=args.seed if args.data_seed is None else args.data_seed,
        order=args.train_sampling_strategy if args.train_sampling_strategy in OUR_ORDERS else "random",
        max_tokens=config.max_tokens_per_batch,
        drop_last=args.dataloader_drop_last,
        attention=gather(attention_cost(config))[0],  # ranks that disagreed would deal a row twice
        seam=Seam(**(seam or {})),
    )


def attention_cost(config: Config) -> float:
    """What a pair of tokens costs in attention: its FLOP, of those a token costs beside (PaLM, 2204.02311, appendix B).

    Causal attention computes half of the pairs, 6 x layers x width for each; a token 6 x parameters. 0 where the
    planner does not know the model: rows are then dealt by their tokens.
    """
    try:
        shape = read_shape(config.model_name_or_path)
    except UserError:
        return 0.0
    return shape.layers * shape.attended / shape.multiplied


def run_steps(args: TrainingArguments, batching: Batching) -> Steps:
    """The batch of a step, and how many steps there are."""
    return Steps(
        micro=batching.micro_batch,
        accumulation=batching.accumulation,
        ranks=batching.ranks,
        group=batching.group,
        num_rows=len(batching.lengths),
        num_bins=batching.num_bins,
        max_tokens=batching.max_tokens,
        epochs=args.num_train_epochs,
        max_steps=args.max_steps if args.max_steps > 0 else batching.steps(args.num_train_epochs),
        drop_last=batching.drop_last,
    )


def continue_from(args: TrainingArguments, accumulation: int, *, universal: bool) -> None:
    """Take up a checkpoint's rows a step, and its converted form; also in what was made of `args` for DeepSpeed."""
    args.gradient_accumulation_steps = accumulation
    if args.deepspeed_plugin is None:
        return
    for config in (args.hf_deepspeed_config.config, args.deepspeed_plugin.deepspeed_config):
        config["gradient_accumulation_steps"] = accumulation
        config["train_batch_size"] = args.per_device_train_batch_size * accumulation * args.world_size
        if universal:
            config.setdefault("checkpoint", {})["load_universal"] = True
