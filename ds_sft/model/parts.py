"""What ds_sft has put into a model, and why: one object on it, `model.ds_sft`, which a reader can print.

    print(parts_of(model))

`put_in_parts` puts them in one after the other; each comes from the file that knows it, and says in words what it does,
or why it does nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.model.adapters import Adapter, Trained, choose_weights
from ds_sft.model.attention import keep_rows_apart
from ds_sft.model.attention_kernels import Attention
from ds_sft.model.dtype import computing_dtype
from ds_sft.model.experts import GroupedExperts, ListedExperts, keep_experts_together
from ds_sft.model.fused import Fused, fuse
from ds_sft.model.loss import OwnLoss, SharedAuxiliary, SupervisedLoss, share_auxiliary, supervise
from ds_sft.model.neftune import EmbeddingNoise, add_noise
from ds_sft.model.offload import InputOffload, NotOffloaded, offload_inputs
from ds_sft.model.padding import Padding, know_padding
from ds_sft.model.quantized import Quantization, quantization_of
from ds_sft.model.routing import Routing, prepare_experts
from ds_sft.model.sequence import join_group
from ds_sft.model.sequence_support import require_shared
from ds_sft.model.tiling import Tiling, tile_mlps
from ds_sft.model.working_copy import LentCopy, NoCopy, WorkingCopy, copy_weights
from ds_sft.ranks.launch import Launch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments


@dataclass
class Parts:
    """The parts of a model, in the order in which they are put in; None: a model of its kind has no such part."""

    quantization: Quantization | None = None  # of its frozen weights
    adapter: Adapter | None = None
    trained: Trained | None = None
    attention: Attention | None = None  # of rows laid end to end, and the ranks that share them
    padding: Padding | None = None  # where rows are padded
    fused_kernels: Fused | None = None
    tiled_mlps: Tiling | None = None
    listed_experts: ListedExperts | None = None
    experts: GroupedExperts | None = None
    routing: Routing | None = None
    embedding_noise: EmbeddingNoise | None = None
    loss: SupervisedLoss | OwnLoss | None = None
    auxiliary: SharedAuxiliary | None = None  # that the model adds to it
    offload: InputOffload | NotOffloaded | None = None  # of layers' inputs
    working_copy: WorkingCopy | LentCopy | NoCopy | None = None

    def __str__(self) -> str:
        """A line for each part."""
        parts = {_title(field.name): getattr(self, field.name) for field in fields(self)}
        parts = {title: part for title, part in parts.items() if part is not None}
        width = max(map(len, parts), default=0)
        return "\n".join(f"{title:{width}}  {part}" for title, part in parts.items())

    @property
    def supervised_loss(self) -> SupervisedLoss | None:
        """None where the model has its own."""
        return self.loss if isinstance(self.loss, SupervisedLoss) else None


def _title(name: str) -> str:
    """ "Tiled MLPs" of tiled_mlps."""
    return name.replace("_", " ").capitalize().replace("mlps", "MLPs")


def parts_of(model: Any) -> Parts:
    """What is in a model; nothing, of one that ds_sft has not prepared."""
    found: Parts = getattr(model, "ds_sft", None) or Parts()
    return found


def put_in_parts(
    model: PreTrainedModel, config: Config, args: TrainingArguments, launch: Launch, *, padded: bool, largest: int
) -> Parts:
    """What is trained of a model, attention, fused kernels, experts, loss and copies; all ranks must call it.

    Args:
        model: as it was loaded, before DeepSpeed or DistributedDataParallel wrap it.
        config: what the run asks for.
        args: the same for Trainer: device, precision, engine, recomputation.
        launch: says what is unusual, such as a learning rate; the parts themselves are for the caller to say.
        padded: micro batches are padded.
        largest: tokens of the largest micro batch that a rank computes, padding included.

    Raises:
        UserError: a key asks for what this model cannot have.
    """
    on_gpu = args.device.type == "cuda"
    parts = model.ds_sft = Parts(quantization_of(model))
    parts.adapter, parts.trained = choose_weights(model, config, args, launch)
    if padded:
        parts.padding = know_padding(model, compiled=args.torch_compile)
    else:
        group = join_group(config.sequence_parallel, launch, args.ddp_timeout)
        parts.attention = keep_rows_apart(model, config.attn_implementation, device=args.device,
                                          dtype=computing_dtype(args), group=group)  # fmt: skip
    parts.fused_kernels = fuse(model, config.fused_kernels, on_gpu=on_gpu, compiled=args.torch_compile)
    parts.tiled_mlps = tile_mlps(model, config, args, largest=largest)
    parts.listed_experts = keep_experts_together(model, ranks=launch.world_size)
    parts.experts, parts.routing = prepare_experts(model, device=args.device, aux_loss_coef=config.router_aux_loss_coef,
                                                   reentrant=_recomputes_reentrantly(args))  # fmt: skip
    parts.embedding_noise = add_noise(model, config.training.get("neftune_noise_alpha"))
    parts.loss = supervise(model, fp16=args.fp16, kernel=config.fused_kernels != "none",
                           smoothing=config.training.get("label_smoothing_factor") or 0.0)  # fmt: skip
    parts.auxiliary = share_auxiliary(model, parts.routing)
    require_shared(parts.attention, parts.loss)
    parts.offload = offload_inputs(model, config, args, launch, largest=largest)
    parts.working_copy = copy_weights(model, args, compiles_layers=parts.fused_kernels.layers > 0)
    return parts


def _recomputes_reentrantly(args: TrainingArguments) -> bool:
    """Whether layers are computed again in backward, and without a graph before."""
    options = args.activation_checkpointing_kwargs or {}
    return bool(args.activation_checkpointing and options.get("use_reentrant", True))
