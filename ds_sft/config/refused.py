"""Keys of transformers that a run would not obey, and why; docs/trainer.md has them beside all others.

Each may have the value that is so anyway.
"""

from __future__ import annotations

from typing import Any

# Keys of transformers that break what a run here promises, where they have another value than this -> how, and what to
# write instead.
UNSAFE: dict[str, tuple[Any, str]] = {
    "enable_jit_checkpoint": (False, "ranks would save at different steps and wait for each other; runs stop and save "
                                     "anyway"),
    "auto_find_batch_size": (False, "it changes the rows a step in mid-run; `ds-sft plan` tells what fits"),
    "use_liger_kernel": (False, "it exchanges classes for the whole process, and the loss; write fused_kernels: liger"),
    "liger_kernel_config": (None, "it is of use_liger_kernel; write fused_kernels: liger"),
    "ignore_data_skip": (False, "a resumed run would learn its first rows again"),
    "logging_nan_inf_filter": (False, "it would log a loss that is no number as 0.0; see on_nonfinite"),
    "hub_always_push": (False, "a run pushes once, after its export was verified"),
    "restore_callback_states_from_checkpoint": (False, "callbacks with a state go on from it in any case"),
    "use_cache": (False, "training does not read the cache, and with one rows laid end to end would see each other"),
    "average_tokens_across_devices": (True, "a step's loss would be a mean of its ranks' means, and depend on their "
                                            "number"),
    **dict.fromkeys(("fsdp", "fsdp_config"),
                    (None, "ZeRO-3 divides weights, gradients and states here; write deepspeed: zero3")),
    "parallelism_config": (None, "deepspeed: zero3 divides weights, and sequence_parallel rows; write these"),
    "accelerator_config": (None, "batches are made without accelerate, the same for any number of ranks"),
    "dataloader_in_order": (True, "every run would have another order of batches"),
    "ddp_static_graph": (False, "DDP fails with it where gradients are accumulated"),
    "debug": (None, "it reads every weight in every layer, and fails under ZeRO-3; on_nonfinite finds the step and its "
                    "rows"),
}  # fmt: skip
_NO_LOGITS = "validation computes eval_loss and keeps no logits; answers are scored by evaluate_rows"
_IN_16_BITS = "validation computes in the precision of training"
# Keys of transformers that nothing here reads, or that say what is so anyway, where they have another value than this
# -> why.
UNUSED: dict[str, tuple[Any, str]] = {
    "do_train": (False, "a run always trains"),
    "do_eval": (False, "a run validates where it has an eval_file or val_size"),
    "do_predict": (False, "a run answers validation rows at its end; see num_predictions"),
    "remove_unused_columns": (True, "rows have token ids and labels alone"),
    "label_names": (None, "labels are made from the answers; see mask"),
    "length_column_name": ("length", "tokens of a row are counted"),
    "dataloader_multiprocessing_context": (None, "workers start in Python's own way"),
    **dict.fromkeys(("prediction_loss_only", "eval_use_gather_object", "batch_eval_metrics"), (False, _NO_LOGITS)),
    **dict.fromkeys(("eval_accumulation_steps", "include_for_metrics"), (None, _NO_LOGITS)),
    "eval_do_concat_batches": (True, _NO_LOGITS),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), (False, _IN_16_BITS)),
    "optim_target_modules": (None, "no optimizer of a run here takes some modules alone"),
}  # fmt: skip
