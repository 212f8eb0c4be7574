"""What LLaMA-Factory, axolotl, ms-swift and TRL call keys of ours, and what to do with those that have no counterpart.

Whoever brings a file of theirs reads in one answer what each of its lines is here; docs/moving.md has the same by
program.
"""

from __future__ import annotations

# Their name -> ours.
CALLED_HERE: dict[str, str] = {
    **dict.fromkeys(("model", "base_model"), "model_name_or_path"),
    **dict.fromkeys(("dataset", "datasets", "dataset_name"), "train_file"),
    **dict.fromkeys(("eval_dataset", "val_dataset", "test_datasets"), "eval_file"),
    **dict.fromkeys(("val_set_size", "split_dataset_ratio"), "val_size"),
    "system": "system_prompt",
    **dict.fromkeys(("chat_template", "chat_template_path", "tool_format", "agent_template"), "template"),
    **dict.fromkeys(("mask_history", "loss_scale", "assistant_only_loss", "completion_only_loss"), "mask"),
    **dict.fromkeys(("cutoff_len", "sequence_len", "max_seq_length"), "max_length"),
    **dict.fromkeys(("truncation_strategy", "excess_length_strategy"), "overlong"),
    **dict.fromkeys(("neat_packing", "sample_packing", "packing_strategy"), "packing"),
    "padding_free": "batching",
    **dict.fromkeys(("batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    "eval_batch_size": "per_device_eval_batch_size",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    **dict.fromkeys(("torch_dtype", "dtype"), "bf16"),
    "pure_bf16": "optimizer_dtype",
    **dict.fromkeys(("finetuning_type", "train_type", "tuner_type", "use_peft", "use_dora", "peft_use_dora"),
                    "adapter"),
    **dict.fromkeys(("lora_r", "r"), "lora_rank"),
    **dict.fromkeys(("target_modules", "target_parameters", "lora_target_modules", "lora_target", "lora_target_linear"),
                    "lora_targets"),
    **dict.fromkeys(("modules_to_save", "additional_target"), "lora_modules_to_save"),
    "peft_use_rslora": "use_rslora",
    "init_lora_weights": "lora_init",
    "merge_lora": "merge",
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "quant_bits", "quant_method"), "quantization"),
    **dict.fromkeys(("freeze_trainable_layers", "freeze_trainable_modules", "freeze_parameters", "trainable_parameters",
                     "unfrozen_parameters"), "train_only"),
    "resize_vocab": "resize_embeddings",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    **dict.fromkeys(("flash_attn", "flash_attention", "attn_impl"), "attn_implementation"),
    "enable_liger_kernel": "fused_kernels",
    **dict.fromkeys(("disable_gradient_checkpointing", "activation_offloading"), "gradient_checkpointing"),
    **dict.fromkeys(("sequence_parallel_size", "sequence_parallel_degree", "sp_size", "context_parallel_size"),
                    "sequence_parallel"),
    **dict.fromkeys(("dataset_num_proc", "dataset_processes"), "preprocessing_num_workers"),
    **dict.fromkeys(("tokenized_path", "dataset_prepared_path"), "cache_dir"),
    "evals_per_epoch": "eval_steps",
    "saves_per_epoch": "save_steps",
    "auto_resume_from_checkpoints": "resume",
    "export_size": "export_max_shard_size",
    "predict_with_generate": "evaluate_rows",
    **dict.fromkeys(("use_swanlab", "use_tensorboard", "use_mlflow"), "report_to"),
    **dict.fromkeys(("swanlab_run_name", "swanlab_exp_name", "wandb_name"), "run_name"),
}  # fmt: skip
_ROW_BY_ROW = "delete it: rows lie end to end, without padding"
_IN_FILE = "write it beside the path: train_file: [{path: FILE, %s}]"
# Their name -> what to write instead of it.
NOT_HERE: dict[str, str] = {
    "stage": "delete it: every run is supervised fine-tuning",
    **dict.fromkeys(("rl", "rlhf_type"), "there is no preference training here"),
    **dict.fromkeys(("dataset_dir", "dataset_info"), "delete it: train_file names the files, and shapes of rows are "
                                                     "recognised"),
    "max_samples": _IN_FILE % "limit: 1000",
    **dict.fromkeys(("mix_strategy", "interleave_probs"), _IN_FILE % "weight: 2"),
    **dict.fromkeys(("overwrite_cache", "load_from_cache_file"), "delete it: rows that have changed are encoded anew"),
    **dict.fromkeys(("train_on_prompt", "train_on_inputs"), "delete it: answers alone are learned"),
    **dict.fromkeys(("pad_to_sequence_len", "pad_to_multiple_of"), _ROW_BY_ROW),
    **dict.fromkeys(("train_on_eos", "train_on_eot", "eos_token"), "delete it: the end of turn is learned"),
    **dict.fromkeys(("special_tokens", "tokenizer_type", "model_type"), "delete it: the model's own files say it"),
    "plot_loss": "delete it: `ds-sft report` draws the curves",
    "load_in_8bit": "there are 4 bits, quantization: nf4, and no 8",
    "loss_type": "delete it: the loss is the mean over the supervised tokens of a step",
    "streaming": "delete it: rows are encoded once into files that are read piece by piece",
    **dict.fromkeys(("use_wandb", "wandb_project", "wandb_entity"), "write report_to: wandb, and set WANDB_PROJECT and "
                                                                    "WANDB_ENTITY"),
    **dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
                     "liger_fused_linear_cross_entropy", "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"),
                    "delete it; fused_kernels says which kernels there are"),
    **dict.fromkeys(("plugins", "dataset_kwargs", "model_author", "model_name", "loraplus_lr_ratio", "pissa_init",
                     "use_galore", "use_badam", "use_apollo", "use_unsloth", "shift_attn", "loss_watchdog_threshold",
                     "loss_watchdog_patience", "strict"), "there is nothing like it here: delete it"),
}  # fmt: skip
_NF4 = "write nf4"
# A key of ours and a value that they give it, or theirs of that meaning -> what to write.
VALUES_NOT_HERE: dict[tuple[str, str], str] = {
    ("adapter", "qlora"): "write lora, and quantization: nf4",
    **dict.fromkeys((("adapter", "full"), ("adapter", "false")), "delete the line, or write none"),
    ("adapter", "true"): "write lora or dora",
    ("adapter", "freeze"): "delete it, and name what is trained in train_only",
    **dict.fromkeys((("quantization", "true"), ("quantization", "4"), ("quantization", "bnb")), _NF4),
    ("packing", "true"): "delete it: rows lie end to end anyway; concat fills sequences of max_length",
    ("packing", "false"): "delete it, or write none",
    ("bf16", "auto"): "delete it",
}
