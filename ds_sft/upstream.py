"""Names of libraries that are none of their public ones, and that ds_sft overrides, uses, assigns or reads as text.

A library may change them in any version, and most of what is built on them would then stop without a word: an override
that nobody calls, an attribute that is not found where it is asked for. So they stand here, each with what stops, and a
run compares them with what is installed as soon as the libraries are imported: nothing is imported for it, and a name
in a module that this run has not imported is left out. `READ_IN` has the version in which all names of a library were
read; setup.cfg allows no minor version above it.

python benchmarks/upstream.py      # where each is used; it finds them in the source, so that none is forgotten here
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter
from pathlib import Path
from types import CodeType
from typing import Any

from ds_sft.errors import UserError

OVERRIDDEN = "overridden"  # a method that a class of ours has, too
USED = "used"  # called or read
ASSIGNED = "assigned"  # an attribute or a function of an object is given another value
TEXT = "text"  # source that is read as text


@dataclass(frozen=True)
class Name:
    """A name of a library's."""

    path: str  # MODULE:NAME.NAME, or MODULE:CLASS().NAME where objects alone have it; of text LIBRARY/FILE
    kind: str
    users: str  # files of ds_sft
    stops: str  # what stops working without it
    seen_in: str = ""  # what calls an override, or sets or reads an attribute, and so mentions it; of its own module
    as_read: str = ""  # parameters of an override; what a text must contain

    @property
    def library(self) -> str:
        return self.path.partition("/" if self.kind == TEXT else ":")[0].partition(".")[0]

    @property
    def last(self) -> str:
        """The last part of it, as it stands in our source."""
        return self.path.rpartition(":")[2].rpartition(".")[2]

    @property
    def caller(self) -> str:
        """`seen_in` with its module."""
        return self.seen_in if ":" in self.seen_in else f"{self.path.partition(':')[0]}:{self.seen_in}"


READ_IN = {
    "accelerate": "1.15.0",
    "bitsandbytes": "0.50.2",
    "datasets": "5.2.0",
    "deepspeed": "0.19.8",
    "huggingface_hub": "2.4.0",
    "peft": "0.21.2",
    "sacrebleu": "2.6.0",
    "swanlab": "0.10.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
}
# fmt: off
NAMES = (
    # transformers
    Name("transformers.trainer:Trainer.create_scheduler", OVERRIDDEN, "training/resumable.py",
         "a resumed run has the rates of its checkpoint, not those it is asked for",
         seen_in="Trainer._prepare_for_training", as_read="self, num_training_steps, optimizer"),
    Name("transformers.trainer:Trainer.set_initial_training_values", OVERRIDDEN, "training/resumable.py",
         "epochs of other lengths end at the wrong step", seen_in="Trainer._inner_training_loop",
         as_read="self, args, dataloader"),
    Name("transformers.trainer:Trainer._init_training_state", OVERRIDDEN, "training/resumable.py",
         "a resumed run begins at the wrong row", seen_in="Trainer._inner_training_loop",
         as_read="self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial"),
    Name("transformers.trainer:Trainer._run_epoch", OVERRIDDEN, "training/resumable.py training/trainer.py",
         "epochs of other lengths, and the thread that reads ahead, do not end", seen_in="Trainer._inner_training_loop",
         as_read="self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
                 "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
                 "steps_trained_in_current_epoch"),
    Name("transformers.trainer:Trainer.get_train_dataloader", OVERRIDDEN, "training/trainer.py",
         "rows are dealt by Trainer: other rows for other numbers of ranks", seen_in="Trainer._inner_training_loop",
         as_read="self"),
    Name("transformers.trainer:Trainer.get_eval_dataloader", OVERRIDDEN, "training/trainer.py",
         "validation rows are counted twice where ranks do not divide them", seen_in="Trainer.evaluate",
         as_read="self, eval_dataset"),
    Name("transformers.trainer:Trainer.get_batch_samples", OVERRIDDEN, "training/trainer.py",
         "a step waits for the device to count its tokens, and nothing is read ahead", seen_in="Trainer._run_epoch",
         as_read="self, epoch_iterator, num_batches, device"),
    Name("transformers.trainer:Trainer.training_step", OVERRIDDEN, "training/trainer.py",
         "weights are computed with in float32, and tokens are not counted", seen_in="Trainer._run_epoch",
         as_read="self, model, inputs, num_items_in_batch"),
    Name("transformers.trainer:Trainer.compute_loss", OVERRIDDEN, "training/nonfinite.py",
         "a loss that is no number is trained on", seen_in="Trainer.training_step",
         as_read="self, model, inputs, return_outputs, num_items_in_batch"),
    Name("transformers.trainer:Trainer.floating_point_ops", OVERRIDDEN, "training/resumable.py",
         "total_flos counts what ZeRO-3 has gathered at the moment", seen_in="Trainer._run_epoch",
         as_read="self, inputs"),
    Name("transformers.trainer:Trainer._clip_grad_norm", OVERRIDDEN, "training/trainer.py",
         "under DeepSpeed each step waits for the device", seen_in="Trainer._run_epoch", as_read="self, model"),
    Name("transformers.trainer:Trainer._get_grad_norm", OVERRIDDEN, "training/nonfinite.py",
         "a step whose gradients are no numbers is kept", seen_in="Trainer._run_epoch",
         as_read="self, model, grad_norm"),
    Name("transformers.trainer:Trainer._maybe_log_save_evaluate", OVERRIDDEN,
         "training/nonfinite.py training/resumable.py",
         "a bad step is logged and saved, and a stop in an evaluation is lost", seen_in="Trainer._run_epoch",
         as_read="self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate"),
    Name("transformers.trainer:Trainer.log", OVERRIDDEN,
         "training/nonfinite.py training/resumable.py training/trainer.py",
         "speed, memory and left-out steps are not logged", seen_in="Trainer._maybe_log_save_evaluate",
         as_read="self, logs, start_time"),
    Name("transformers.trainer:Trainer.evaluate", OVERRIDDEN,
         "training/nonfinite.py training/resumable.py training/trainer.py",
         "an evaluation counts as training, and one that a stop cut off is not made again", seen_in="Trainer._evaluate",
         as_read="self, eval_dataset, ignore_keys, metric_key_prefix"),
    Name("transformers.trainer:Trainer.evaluation_loop", OVERRIDDEN, "training/trainer.py",
         "eval_loss is a mean of means, which depends on the number of ranks", seen_in="Trainer.evaluate",
         as_read="self, dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix"),
    Name("transformers.trainer:Trainer._determine_best_metric", OVERRIDDEN,
         "training/nonfinite.py training/resumable.py", "a validation loss that is no number may be the best",
         seen_in="Trainer._maybe_log_save_evaluate", as_read="self, metrics, trial"),
    Name("transformers.trainer:Trainer._finalize_training", OVERRIDDEN, "training/nonfinite.py training/resumable.py",
         "a stopped run ends as if it were complete, and its last checkpoint is not completed",
         seen_in="Trainer._inner_training_loop", as_read="self, trial, num_train_samples, start_time"),
    Name("transformers.trainer:Trainer._save_checkpoint", OVERRIDDEN, "training/resumable.py training/trainer.py",
         "checkpoints have no manifest: none is resumed from", seen_in="Trainer._maybe_log_save_evaluate",
         as_read="self, model, trial"),
    Name("transformers.trainer:Trainer.save_model", OVERRIDDEN, "training/resumable.py",
         "checkpoints of adapters have the frozen weights, too", seen_in="Trainer._save_checkpoint",
         as_read="self, output_dir, _internal_call"),
    Name("transformers.trainer:Trainer._save", OVERRIDDEN, "training/resumable.py",
         "a full disk ends the run, and other ranks wait", seen_in="Trainer.save_model",
         as_read="self, output_dir, state_dict"),
    Name("transformers.trainer:Trainer._save_optimizer_and_scheduler", OVERRIDDEN, "training/resumable.py",
         "a full disk ends the run, and other ranks wait", seen_in="Trainer._save_checkpoint",
         as_read="self, output_dir"),
    Name("transformers.trainer:Trainer._load_from_checkpoint", OVERRIDDEN, "training/resumable.py",
         "adapters and experts of a checkpoint are not loaded", seen_in="Trainer.train",
         as_read="self, resume_from_checkpoint, model"),
    Name("transformers.trainer:Trainer._load_best_model", OVERRIDDEN, "training/resumable.py",
         "adapters and experts of the best checkpoint are not loaded", seen_in="Trainer._finalize_training",
         as_read="self"),
    Name("transformers.trainer:Trainer._load_optimizer_and_scheduler", OVERRIDDEN, "training/resumable.py",
         "a resumed run has the rates of its checkpoint, not those it is asked for",
         seen_in="Trainer._prepare_for_training", as_read="self, checkpoint"),
    Name("transformers.trainer:Trainer._load_rng_state", OVERRIDDEN, "training/resumable.py",
         "a checkpoint of other ranks brings their random numbers", seen_in="Trainer._run_epoch",
         as_read="self, checkpoint"),
    Name("transformers.trainer:Trainer._issue_warnings_after_load", OVERRIDDEN, "training/resumable.py",
         "a resume warns of tied weights that are not missing", seen_in="Trainer._load_from_checkpoint",
         as_read="self, load_result"),
    Name("transformers.trainer:Trainer()._tr_loss", ASSIGNED, "training/nonfinite.py training/resumable.py",
         "the loss since the last log entry is lost in a resume", seen_in="Trainer._inner_training_loop"),
    Name("transformers.trainer:Trainer()._total_loss_scalar", ASSIGNED, "training/resumable.py",
         "train_loss is that of the last start alone", seen_in="Trainer._inner_training_loop"),
    Name("transformers.trainer:Trainer()._globalstep_last_logged", ASSIGNED,
         "training/nonfinite.py training/resumable.py",
         "the first loss after a resume is divided by the wrong number of steps",
         seen_in="Trainer._inner_training_loop"),
    Name("transformers.trainer_callback:ProgressCallback.on_train_begin", OVERRIDDEN, "training/progress.py",
         "nobody sees how far a run has come", seen_in="CallbackHandler.on_train_begin",
         as_read="self, args, state, control, **kwargs"),
    Name("transformers.trainer_callback:ProgressCallback.on_step_end", OVERRIDDEN, "training/progress.py",
         "nobody sees how far a run has come", seen_in="CallbackHandler.on_step_end",
         as_read="self, args, state, control, **kwargs"),
    Name("transformers.trainer_callback:ProgressCallback.on_prediction_step", OVERRIDDEN, "training/progress.py",
         "nobody sees how far a run has come", seen_in="CallbackHandler.on_prediction_step",
         as_read="self, args, state, control, eval_dataloader, **kwargs"),
    Name("transformers.trainer_callback:ProgressCallback.on_evaluate", OVERRIDDEN, "training/progress.py",
         "nobody sees how far a run has come", seen_in="CallbackHandler.on_evaluate",
         as_read="self, args, state, control, **kwargs"),
    Name("transformers.trainer_callback:ProgressCallback.on_log", OVERRIDDEN, "training/progress.py",
         "nobody sees how far a run has come", seen_in="CallbackHandler.on_log",
         as_read="self, args, state, control, logs, **kwargs"),
    Name("transformers.trainer_callback:ProgressCallback.on_train_end", OVERRIDDEN, "training/progress.py",
         "nobody sees how far a run has come", seen_in="CallbackHandler.on_train_end",
         as_read="self, args, state, control, **kwargs"),
    Name("transformers.trainer_callback:CallbackHandler().eval_dataloader", ASSIGNED, "training/trainer.py",
         "an evaluation shows no progress", seen_in="CallbackHandler.call_event"),
    Name("transformers.configuration_utils:PreTrainedConfig._attn_implementation", USED, "model/attention.py",
         "rows laid end to end may see each other",
         seen_in="transformers.modeling_utils:PreTrainedModel.set_attn_implementation"),
    Name("transformers.modeling_utils:PreTrainedModel._can_set_attn_implementation", USED, "model/attention.py",
         "a model with an attention of its own is given ours"),
    Name("transformers.modeling_utils:PreTrainedModel._supports_sdpa", USED, "model/attention.py",
         "a model with an attention of its own is given ours"),
    Name("transformers.modeling_utils:PreTrainedModel._keep_in_fp32_modules", USED, "model/quantized.py",
         "layers that must stay whole are in 4 bits"),
    Name("transformers.modeling_utils:PreTrainedModel().is_quantized", USED, "model/load.py",
         "a model of quantised weights is trained, or fails later",
         seen_in="transformers.quantizers.base:HfQuantizer.preprocess_model"),
    Name("transformers.modeling_utils:PreTrainedModel.enable_input_require_grads", ASSIGNED, "model/adapters.py",
         "frozen layers below an adapter are computed again for nothing",
         seen_in="PreTrainedModel._activation_checkpointing_enable"),
    Name("transformers.modeling_utils:PreTrainedModel._keys_to_ignore_on_load_unexpected", USED, "model/load.py",
         "nobody hears of published weights that are left out",
         seen_in="PreTrainedModel._adjust_missing_and_unexpected_keys"),
    Name("transformers.modeling_layers:GradientCheckpointingLayer()._gradient_checkpointing_func", ASSIGNED,
         "model/offload.py", "layers' inputs stay on the device",
         seen_in="GradientCheckpointingLayer.__init_subclass__"),
    Name("transformers.configuration_utils:PreTrainedConfig().rope_parameters", ASSIGNED, "model/rotary.py",
         "positions are not scaled, and config.json does not say that they are",
         seen_in="transformers.modeling_rope_utils:RotaryEmbeddingConfigMixin.standardize_rope_params"),
    Name("transformers.configuration_utils:PreTrainedConfig().original_max_position_embeddings", ASSIGNED,
         "plan/rope.py", "positions are scaled from another length than rope_scaling says",
         seen_in="transformers.modeling_rope_utils:RotaryEmbeddingConfigMixin.standardize_rope_params"),
    Name("transformers.models.llama.modeling_llama:LlamaRotaryEmbedding().rope_type", USED, "model/rotary.py",
         "models whose positions can be scaled are refused",
         seen_in="transformers.modeling_rope_utils:dynamic_rope_update"),
    Name("transformers.modeling_utils:PreTrainedModel.loss_function", ASSIGNED, "model/loss.py",
         "the loss has the logits of all tokens at once"),
    Name("transformers.integrations.peft:PeftAdapterMixin._hf_peft_config_loaded", ASSIGNED, "model/adapters.py",
         "Trainer refuses adapters on weights in 4 bits",
         seen_in="transformers.trainer_utils:validate_quantization_for_training"),
    Name("transformers.models.mixtral.modeling_mixtral:MixtralExperts().has_gate", USED, "model/experts.py",
         "experts are not found: a slow loop computes them, and nobody counts their tokens",
         seen_in="transformers.integrations.moe:use_experts_implementation"),
    Name("transformers.models.mixtral.modeling_mixtral:MixtralExperts().is_transposed", USED, "model/experts.py",
         "experts are not found: a slow loop computes them, and nobody counts their tokens",
         seen_in="transformers.integrations.moe:use_experts_implementation"),
    Name("transformers.models.mixtral.modeling_mixtral:MixtralExperts._apply_gate", USED, "model/experts.py",
         "experts are not computed on a CPU", seen_in="transformers.integrations.moe:use_experts_implementation"),
    Name("transformers.masking_utils:fast_all", ASSIGNED, "model/padding.py",
         "padded batches wait for the device in each micro batch", seen_in="_ignore_causal_mask_sdpa"),
    Name("transformers.masking_utils:create_recurrent_attention_mask", ASSIGNED, "model/padding.py",
         "padded batches of linear attention wait for the device"),
    Name("transformers/models/falcon_mamba/modeling_falcon_mamba.py", TEXT, "model/targets.py",
         "adapters are put where a model does not call the layer, and learn nothing", as_read="self.x_proj.weight,"),
    Name("transformers/models/gemma/modeling_gemma.py", TEXT, "model/fused.py", "norms are not fused",
         as_read="output = output * (1.0 + self.weight.float())"),
    Name("transformers/models/gemma2/modeling_gemma2.py", TEXT, "model/loss.py",
         "the loss has the logits of all tokens at once",
         as_read="if self.config.final_logit_softcapping is not None:"),
    Name("transformers/models/gemma3/modeling_gemma3.py", TEXT, "model/attention.py",
         "a model with a mask of its own is given our attention", as_read="or_mask_function="),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/fused.py", "norms are not fused",
         as_read="return self.weight * hidden_states.to(input_dtype)"),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/fused.py", "rotations are not fused",
         as_read="q_embed = (q * cos) + (rotate_half(q) * sin)"),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/fused.py", "rotations are not fused",
         as_read="return torch.cat((-x2, x1), dim=-1)"),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/fused.py", "gates are not fused",
         as_read="self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/loss.py",
         "the loss has the logits of all tokens at once", as_read="logits = self.lm_head(hidden_states"),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/loss.py",
         "the loss has the logits of all tokens at once", as_read="loss = self.loss_function("),
    Name("transformers/models/llama/modeling_llama.py", TEXT, "model/load.py", "batches are padded",
         as_read="create_causal_mask("),
    Name("transformers/models/mistral/modeling_mistral.py", TEXT, "model/attention.py",
         "models with a sliding window mask all pairs of tokens", as_read="sliding_window="),
    Name("transformers/models/mixtral/modeling_mixtral.py", TEXT, "model/routing.py",
         "experts are balanced over a micro batch, not over a step", as_read="def load_balancing_loss_func("),
    Name("transformers/models/mixtral/modeling_mixtral.py", TEXT, "model/routing.py",
         "experts are balanced over a micro batch, not over a step",
         as_read="loss += self.router_aux_loss_coef * aux_loss.to(loss.device)"),
    Name("transformers/trainer_utils.py", TEXT, "config/upstream_keys.py",
         "a wrong word for a key of TrainingArguments is not refused", as_read="class SaveStrategy(ExplicitEnum)"),
    Name("transformers/training_args.py", TEXT, "config/upstream_keys.py", "no key of TrainingArguments is known",
         as_read="class TrainingArguments"),
    # torch
    Name("torch.nn.modules.module:Module.forward", ASSIGNED,
         "model/fused.py model/loss.py model/tiling.py",
         "fused kernels, the loss in chunks and tiled MLPs are not called", seen_in="Module._call_impl"),
    Name("torch.nn.modules.module:Module()._parameters", USED, "model/working_copy.py",
         "weights are computed with in float32", seen_in="Module.__init__"),
    Name("torch:Tensor._version", USED, "model/offload.py",
         "a layer that changes its input in place learns from what it was not given"),
    Name("torch:_foreach_copy_", USED, "training/optimizer.py model/working_copy.py",
         "16-bit copies of the weights are not made, and optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_add_", USED, "training/optimizer.py model/working_copy.py",
         "gradients of several micro batches are not added, and optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_lerp_", USED, "training/optimizer.py", "optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_mul_", USED, "training/optimizer.py", "optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_addcmul_", USED, "training/optimizer.py", "optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_sqrt", USED, "training/optimizer.py", "optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_div_", USED, "training/optimizer.py", "optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_foreach_addcdiv_", USED, "training/optimizer.py", "optimizer_dtype: bfloat16 makes no step"),
    Name("torch:_softmax_backward_data", USED, "model/attention.py", "short rows have no gradient on a CPU"),
    Name("torch.autograd:Variable._execution_engine", USED, "training/metrics.py",
         "communication_share is too small under DDP"),
    Name("torch.optim.lr_scheduler:LambdaLR()._last_lr", ASSIGNED, "training/hyperparameters.py",
         "the first rate that a resumed run logs is the checkpoint's", seen_in="LRScheduler.get_last_lr"),
    Name("torch.utils.file_baton:FileBaton.try_acquire", ASSIGNED, "engine/builds.py",
         "a build that was killed is waited for without end", seen_in="torch.utils.cpp_extension:_jit_compile"),
    # accelerate
    Name("accelerate.accelerator:Accelerator.backward", ASSIGNED, "training/metrics.py",
         "communication_share is too small under DDP", seen_in="transformers.trainer:Trainer.training_step"),
    Name("accelerate.optimizer:AcceleratedOptimizer()._is_overflow", ASSIGNED, "training/nonfinite.py",
         "the schedule counts steps that on_nonfinite: skip leaves out",
         seen_in="AcceleratedOptimizer.step_was_skipped"),
    # datasets
    Name("datasets.arrow_dataset:Dataset()._indices", USED, "data/batches.py data/batch.py data/micro_batches.py",
         "rows that were chosen are read as all rows", seen_in="Dataset.__init__"),
    # huggingface_hub
    Name("huggingface_hub.constants:HF_HUB_OFFLINE", ASSIGNED, "plan/source.py",
         "each file waits for a hub that cannot be reached", seen_in="is_offline_mode"),
    # peft
    Name("peft.tuners.lora.layer:LoraLayer().lora_A", USED, "export/merge.py model/adapters.py",
         "adapters are neither described nor merged", seen_in="LoraLayer.__init__"),
    Name("peft.tuners.lora.layer:LoraLayer().cast_input_dtype_enabled", ASSIGNED, "model/adapters.py",
         "activations of adapters are cast to float32 and back", seen_in="LoraLayer.__init__"),
    Name("peft.tuners.lora.layer:ParamWrapper().parameter_name", USED, "export/merge.py model/adapters.py",
         "adapters on experts are neither described nor merged", seen_in="ParamWrapper.__init__"),
    Name("peft.utils.other:ModulesToSaveWrapper().modules_to_save", USED,
         "export/merge.py model/adapters.py model/loss.py", "modules that are trained whole are not found",
         seen_in="ModulesToSaveWrapper.init_modules"),
    Name("peft.tuners.tuners_utils:BaseTuner().peft_config", ASSIGNED, "export/merge.py",
         "a merged model is taken for an adapter's", seen_in="BaseTuner.__init__"),
    # bitsandbytes
    Name("bitsandbytes.nn.modules:Params4bit().quant_state", USED, "model/quantized.py",
         "weights in 4 bits are counted as half as many", seen_in="Params4bit.__new__"),
    Name("bitsandbytes.nn.modules:Linear4bit().support_avx512bf16_for_cpu", ASSIGNED, "model/quantized.py",
         "on a CPU layers below one in 4 bits get no gradient after an evaluation", seen_in="Linear4bit.forward"),
    # sacrebleu
    Name("sacrebleu.metrics.base:Metric._extract_corpus_statistics", USED, "evaluation/scores.py",
         "answers have no chrF"),
    Name("sacrebleu.metrics.base:Metric._compute_score_from_stats", USED, "evaluation/scores.py",
         "answers have no chrF"),
    # swanlab
    Name("swanlab.sdk.internal.run.greeting:_print_offline_tip", ASSIGNED, "tracking/swanlab_run.py",
         "SwanLab says how to upload one start, and not the run", seen_in="goodbye"),
    # deepspeed
    Name("deepspeed.runtime.engine:DeepSpeedEngine.forward", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed", seen_in="torch.nn.modules.module:Module._call_impl"),
    Name("deepspeed.runtime.engine:DeepSpeedEngine.backward", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed",
         seen_in="accelerate.utils.deepspeed:DeepSpeedEngineWrapper.backward"),
    Name("deepspeed.runtime.engine:DeepSpeedEngine.step", ASSIGNED, "training/metrics.py training/nonfinite.py",
         "under ZeRO-0 a step whose gradients are no numbers is kept",
         seen_in="accelerate.utils.deepspeed:DeepSpeedEngineWrapper.backward"),
    Name("deepspeed.runtime.engine:DeepSpeedEngine._copy_recovery_script", ASSIGNED, "training/resumable.py",
         "checkpoints of adapters come with a script that makes a wrong model of them",
         seen_in="DeepSpeedEngine._save_zero_checkpoint"),
    Name("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.save", ASSIGNED,
         "training/resumable.py", "a full disk ends the run, and other ranks wait",
         seen_in="deepspeed.runtime.engine:DeepSpeedEngine._save_zero_checkpoint"),
    Name("deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine:TorchCheckpointEngine.makedirs", ASSIGNED,
         "training/resumable.py", "a full disk ends the run, and other ranks wait",
         seen_in="deepspeed.runtime.engine:DeepSpeedEngine.save_checkpoint"),
    Name("deepspeed.comm.comm:cdb", USED, "training/metrics.py", "what DeepSpeed's ranks wait for is not timed",
         seen_in="all_reduce"),
    Name("deepspeed.comm.torch:TorchBackend.all_reduce", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.all_reduce_coalesced", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.reduce", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.reduce_scatter", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.reduce_scatter_tensor", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.broadcast", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.all_gather", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.all_gather_into_tensor", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.all_gather_coalesced", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.all_to_all_single", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.comm.torch:TorchBackend.barrier", ASSIGNED, "training/metrics.py",
         "what DeepSpeed's ranks wait for is not timed"),
    Name("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.overlapping_partition_gradients_reduce_epilogue",
         ASSIGNED, "training/metrics.py", "what a GPU waits for is not timed"),
    Name("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.average_tensor", ASSIGNED, "training/metrics.py",
         "what a GPU waits for is not timed"),
    Name("deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator.fetch_sub_module",
         ASSIGNED, "training/metrics.py", "what a GPU waits for is not timed"),
    Name("deepspeed.runtime.zero.partitioned_param_coordinator:"
         "PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release",
         USED, "engine/release.py", "the memory of training stays, and the trained model may find none"),
    Name("deepspeed.runtime.zero.parameter_offload:FWD_MODULE_STACK", USED, "engine/release.py",
         "the memory of training stays, and the trained model may find none"),
    Name("deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer().clip_grad", ASSIGNED,
         "training/hyperparameters.py", "a resumed run clips at the checkpoint's max_grad_norm",
         seen_in="DeepSpeedZeroOptimizer.__init__"),
    Name("deepspeed.runtime.zero.partition_parameters:Parameter().ds_id", USED,
         "engine/values.py model/adapters.py", "frozen weights of ZeRO-3 are exported as empty",
         seen_in="Init._convert_to_deepspeed_param"),
    Name("deepspeed.runtime.zero.partition_parameters:Parameter().ds_tensor", USED, "model/adapters.py",
         "weights that ZeRO-3 has partitioned are cast", seen_in="Init._convert_to_deepspeed_param"),
    Name("deepspeed.runtime.zero.partition_parameters:Parameter().ds_numel", USED, "model/quantized.py",
         "parameters of ZeRO-3 are counted as none", seen_in="Init._convert_to_deepspeed_param"),
    Name("deepspeed.runtime.zero.partition_parameters:Parameter().ds_shape", USED,
         "model/adapter_files.py training/muon.py model/targets.py", "adapters of ZeRO-3 have the wrong sizes",
         seen_in="Init._convert_to_deepspeed_param"),
    Name("deepspeed.runtime.lr_schedules:WarmupLR().last_batch_iteration", USED, "training/hyperparameters.py",
         "the first rate of a resumed run is the checkpoint's", seen_in="WarmupLR.__init__"),
    Name("deepspeed.runtime.compiler:compile", ASSIGNED, "engine/builds.py",
         "each start loads torch's compiler, which nothing uses"),
    Name("deepspeed/runtime/constants.py", TEXT, "engine/zero.py", "a misspelt key of a DeepSpeed file is not found",
         as_read="GRADIENT_CLIPPING = 'gradient_clipping'"),
    Name("deepspeed/runtime/precision_config.py", TEXT, "engine/zero.py",
         "a misspelt key of a DeepSpeed file is not found", as_read="class DeepSpeedBF16Config("),
    Name("deepspeed/runtime/precision_config.py", TEXT, "engine/zero.py",
         "a misspelt key of a DeepSpeed file is not found", as_read="class DeepSpeedFP16Config("),
    Name("deepspeed/runtime/zero/config.py", TEXT, "engine/zero.py", "a misspelt key of a DeepSpeed file is not found",
         as_read="class DeepSpeedZeroConfig("),
    Name("deepspeed/runtime/zero/offload_config.py", TEXT, "engine/zero.py",
         "a misspelt key of a DeepSpeed file is not found", as_read="class DeepSpeedZeroOffloadOptimizerConfig("),
    Name("deepspeed/runtime/zero/offload_config.py", TEXT, "engine/zero.py",
         "a misspelt key of a DeepSpeed file is not found", as_read="class DeepSpeedZeroOffloadParamConfig("),
)
# fmt: on


def require_names(*libraries: str) -> None:
    """See that what is imported by now has all names; of these libraries, or of all.

    Raises:
        UserError: one has not: the version, and what would stop working.
    """
    found = next(faults(name for name in NAMES if not libraries or name.library in libraries), None)
    if found is not None:
        raise UserError(describe(*found))


def faults(names: Iterable[Name] = NAMES) -> Iterator[tuple[Name, str]]:
    """Each of these names that is otherwise in what is installed and imported, and how."""
    for name in names:
        if name.library in sys.modules and (found := _fault(name)):
            yield name, found


def describe(name: Name, found: str) -> str:
    """One line for a user."""
    installed, read = importlib.metadata.version(name.library), READ_IN[name.library]
    wanted = f"'{name.library}>={read},<{next_minor(read)}'"
    return (
        f"{name.library} {installed}: {found}; ds_sft was written against {read}. Here {name.stops}: "
        f"pip install {wanted}"
    )


def next_minor(version: str) -> str:
    """The first version of which nothing was read."""
    major, minor, *_ = version.split(".")
    return f"{major}.{int(minor) + 1}"


def _fault(name: Name) -> str | None:
    if name.kind == TEXT:
        return _fault_of_text(name)
    return _fault_of_use(name) or _fault_of_itself(name)


def _fault_of_text(name: Name) -> str | None:
    file = Path(str(sys.modules[name.library].__file__)).parents[1] / name.path
    return None if name.as_read in _source(file) else f"{name.path} has no `{name.as_read}`"


def _fault_of_use(name: Name) -> str | None:
    """Whether the library itself uses a name where it did; a caller that is gone uses nothing."""
    if not name.seen_in:
        return None
    try:
        caller = find(name.caller)
    except AttributeError:
        return f"{_dotted(name.caller)}, which used {name.last}, is gone"
    if caller is None or name.last in mentioned(caller):
        return None
    return f"{_dotted(name.caller)} does not use {name.last}"


def _fault_of_itself(name: Name) -> str | None:
    try:
        found = find(name.path)
    except AttributeError:
        return f"{_dotted(name.path)} is gone"
    if name.kind != OVERRIDDEN or found is None or parameters(found) == name.as_read:
        return None
    return f"{_dotted(name.path)} takes ({parameters(found)}) instead of ({name.as_read})"


def _dotted(path: str) -> str:
    return path.replace(":", ".")


@lru_cache(maxsize=1)  # rows of a file stand together
def _source(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def find(path: str) -> Any:
    """What is at MODULE:NAME.NAME, of MODULE:NAME().NAME what is called; None where the module is not imported.

    Raises:
        AttributeError: there is no such name, or no such module in a package that is imported.
    """
    module, _, name = path.partition("().")[0].partition(":")
    if module in sys.modules:
        return attrgetter(name)(sys.modules[module])
    package = module.rpartition(".")[0]
    if package in sys.modules and importlib.util.find_spec(module) is None:
        raise AttributeError(path)
    return None


def mentioned(function: Any) -> set[str]:
    """Words in the code of a function, and of those inside of it: attributes, globals, strings."""
    return set(_words(_code(function)))


def _words(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _words(constant)


def parameters(function: Any) -> str:
    """Parameters of a function by their names, without types and defaults."""
    code = _code(function)
    plain = code.co_argcount + code.co_kwonlyargcount
    names, many = list(code.co_varnames[:plain]), iter(code.co_varnames[plain:])
    if code.co_flags & inspect.CO_VARARGS:
        names.insert(code.co_argcount, f"*{next(many)}")
    if code.co_flags & inspect.CO_VARKEYWORDS:
        names.append(f"**{next(many)}")
    return ", ".join(names)


def _code(function: Any) -> CodeType:
    """Of a function or a property, without its decorators."""
    function = function.fget if isinstance(function, property) else function
    code: CodeType = inspect.unwrap(function).__code__
    return code
