"""The run's keys: ours, as fields of `Config`, beside those of `transformers.TrainingArguments`, which it holds.

Nothing in this room imports torch or transformers, so that mistakes and `--help` are answered at once.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

# The system prompt of the reference script: "You are a dialogue assistant; answer the user's questions."
REFERENCE_PROMPT = "你是一个对话助手，你需要根据用户的问题，给出相应的回答。"

# The reference script's hyper-parameters. transformers' own defaults hold for the rest.
TRAINING_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 4,
    "num_train_epochs": 2.0,
    "learning_rate": 1e-4,
    "logging_steps": 10.0,
    "save_steps": 400.0,
    "save_on_each_node": True,
    "activation_checkpointing": True,
    "bf16": True,
    "report_to": ["swanlab"],
}
EVAL_DEFAULTS = {"eval_strategy": "steps", "eval_steps": 100.0}  # where there is an eval_file
ENGINES = ("zero2", "zero3", "zero2_offload", "zero3_offload")  # values of `deepspeed` that need no file: the package's
OUR_ORDERS = ("random", "sequential", "group_by_length")  # of train_sampling_strategy: the same on any number of ranks

MUON = "muon"  # a value of `optim` that transformers has not
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
ADAFACTOR, LION = "adafactor", "lion_32bit"
# Values of `optim`: of transformers' those that tests train with.
OPTIMS = (*TORCH_ADAMW, "adamw_8bit", "adamw_bnb_8bit", LION, ADAFACTOR, MUON)
SECRETS = ("hub_token",)
# A word that a key of transformers takes here beside its own values.
ALSO = {"activation_checkpointing": "offload"}
MODES = ("online", "cloud", "offline", "local", "disabled")
FILES = ("train_file", "eval_file")  # a text, or a list of texts and mappings
# Values of `data_format` that are no user's function: data/shapes.py has what each of them reads.
DATA_FORMATS = ("auto", "qa", "alpaca", "sharegpt", "messages", "prompt_completion")
# Values of `attn_implementation` that are no user's function: what transformers calls those that training can have.
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
TEMPLATES = ("reference", "tokenizer", "hermes")  # values of `template` that are no file
RECORD = "config.yaml"  # what a run leaves of its keys in its output folder
STARTED_IN = "started_in"  # a line of it that is no key: the folder that its relative paths are of


def key(help_text: str, *, choices: tuple[str, ...] = (), **options: Any) -> Any:
    """A dataclass field with what `--help` says of it."""
    return field(metadata={"help": help_text, "choices": choices}, **options)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a run was asked to do. `training` holds the keywords of `TrainingArguments`."""

    model_name_or_path: str = key("model to start from: a folder, or a hub id such as Qwen/Qwen3-0.6B")
    train_file: str | list[Any] = key("rows to learn from: a file, folder, glob, hub data set, or a list of them")
    eval_file: str | list[Any] | None = key("rows to measure the loss on, same forms", default=None)
    val_size: float = key("without eval_file: rows of train_file set aside for it, a share or a number", default=0.0)
    system_prompt: str = key("the system turn before every question", default=REFERENCE_PROMPT)
    data_format: str = key("shape of the rows; auto: told from the fields of each; or your my.module:function",
                           choices=DATA_FORMATS, default="auto")  # fmt: skip
    data_fields: dict[str, str] | None = key("names of fields in the files: {question: prompt}", default=None)
    template: str = key("reference (ChatML), tokenizer (the model's own), hermes (ChatML with tools), or a Jinja file",
                        default="reference")  # fmt: skip
    mask: str = key("answers to learn; `train` in a message overrides it", choices=("all", "last"), default="all")
    thinking: str = key("<think> blocks in answers; empty: an empty one before each",
                        choices=("keep", "drop", "empty"), default="keep")  # fmt: skip
    allow_special_tokens: bool = key("let <|im_end|> in a row's text end a turn, with other templates than reference",
                                     default=False)  # fmt: skip
    max_length: int = key("tokens of a row; see overlong", default=2048)
    overlong: str = key("longer rows: cut at the end, left out, an error, or cut between turns",
                        choices=("truncate", "drop", "error", "split"), default="truncate")  # fmt: skip
    packing: str = key("concat: rows that share a sequence up to max_length, each blind to the others",
                       choices=("none", "concat"), default="none")  # fmt: skip
    batching: str = key("rows of a micro batch: laid end to end, each blind to the others, or padded to the longest",
                        choices=("padding_free", "padded"), default="padding_free")  # fmt: skip
    max_tokens_per_batch: int | None = key(
        "of a micro batch, which has as many rows as fit; with per_device_train_batch_size only a limit", default=None
    )
    sequence_parallel: int = key("ranks that share each row, every one with a part of its tokens (Ulysses); 1: none",
                                 default=1)  # fmt: skip
    on_bad_row: str = key("what an unusable row does: end the run, or be skipped and counted",
                          choices=("error", "skip"), default="error")  # fmt: skip
    preprocessing_num_workers: int | None = key("processes that encode; default: all cores", default=None)
    cache_dir: str | None = key("encoded data; default: DS_SFT_CACHE, else ~/.cache/ds_sft", default=None)
    trust_remote_code: bool = key("run code that comes with the model", default=False)
    rope_scaling: dict[str, Any] | None = key("rotary positions for rows longer than the model was made for, such as "
                                              "{rope_type: yarn, factor: 4.0}", default=None)  # fmt: skip
    resize_embeddings: bool = key("add rows, the mean of the others, for tokens that the model has none for",
                                  default=False)  # fmt: skip
    attn_implementation: str | None = key("an attention of transformers', or your my.module:function; default: the "
                                          "model's", choices=ATTENTIONS, default=None)  # fmt: skip
    fused_kernels: str = key("norms, rotations, gates: Liger's (auto: on a GPU that has them), or compiled layers",
                             choices=("auto", "liger", "compile", "none"), default="auto")  # fmt: skip
    tiled_mlp: str = key("compute a layer's MLP for some of its tokens at a time; auto: in micro batches of 16,384 or "
                         "more", choices=("auto", "yes", "no"), default="auto")  # fmt: skip
    router_aux_loss_coef: float | None = key("what the load balancing loss of a mixture of experts counts, 0: none; "
                                             "default: as the model's configuration says", default=None)  # fmt: skip
    adapter: str = key("train small matrices beside the frozen model's: LoRA, or DoRA; none: all weights",
                       choices=("none", "lora", "dora"), default="none")  # fmt: skip
    lora_rank: int = key("columns of an adapter's matrices", default=16)
    lora_alpha: float = key("an adapter's product counts lora_alpha / lora_rank", default=32.0)
    lora_dropout: float = key("share of an adapter's inputs left out", default=0.0)
    lora_targets: list[str] | None = key("what gets adapters: names such as [q_proj, v_proj], regular expressions of "
                                         "whole names, experts; default: all-linear, all but the output projection",
                                         default=None)  # fmt: skip
    lora_modules_to_save: list[str] | None = key("modules trained whole beside the adapters, such as [lm_head]",
                                                 default=None)  # fmt: skip
    use_rslora: bool = key("an adapter's product counts lora_alpha / sqrt(lora_rank)", default=False)
    lora_init: str = key("how adapters begin, with a product of nothing: A as Kaiming, or normal; A and B orthogonal",
                         choices=("default", "gaussian", "orthogonal"), default="default")  # fmt: skip
    train_only: list[str] | None = key("without adapters: weights to train, by parts of names such as [layers.27., "
                                       "lm_head, norm]; the others are frozen", default=None)  # fmt: skip
    optimizer_dtype: str = key("of the weights that are updated, gradients and states; bfloat16: 8 bytes a parameter, "
                               "rounded at random", choices=("float32", "bfloat16"), default="float32")  # fmt: skip
    quantization: str = key("of the frozen weights under an adapter: nf4, 4 bits (bitsandbytes)",
                            choices=("none", "nf4"), default="none")  # fmt: skip
    merge: str = key("also export the model with its adapter merged; auto: where the disk has room",
                     choices=("auto", "yes", "no"), default="auto")  # fmt: skip
    export_dtype: str = key("of the final weights; auto: the dtype trained in",
                            choices=("auto", "float32", "bfloat16", "float16"), default="auto")  # fmt: skip
    export_max_shard_size: str = key("of a file of the final weights, such as 5GB or 500MB", default="5GB")
    verify_export: bool = key("load the final model in a fresh process and compare its loss", default=True)
    num_predictions: int = key("validation rows answered at the end", default=3)
    predict_max_new_tokens: int | None = key("tokens of an answer at most; default: max_length", default=None)
    generation: dict[str, Any] | None = key(
        "how answers are made, such as {do_sample: true, temperature: 0.7}; default: greedy", default=None
    )
    predict_before: bool = key("also show what the model answered before training", default=False)
    evaluate_rows: int = key("validation rows whose answers are scored at the end (exact match, chrF, ROUGE-L), under "
                             "predict_before also those from before", default=0)  # fmt: skip
    swanlab_project: str | None = key("default: SWANLAB_PROJECT, SWANLAB_PROJ_NAME, else ds_sft", default=None)
    swanlab_mode: str | None = key("default: SWANLAB_MODE, else online", choices=MODES, default=None)
    resume: str = key("auto: from the newest usable checkpoint in output_dir; never; or the folder of one",
                      default="auto")  # fmt: skip
    resume_anyway: bool = key("resume although keys or data have changed since", default=False)
    on_save_error: str = key("a checkpoint that cannot be written ends the run, or is done without",
                             choices=("stop", "continue"), default="stop")  # fmt: skip
    on_nonfinite: str = key("a step whose loss or gradients are no numbers ends the run, or is left out and counted",
                            choices=("stop", "skip"), default="stop")  # fmt: skip
    early_stopping_patience: int | None = key("with load_best_model_at_end: end training after so many "
                                              "validations in a row that are no new best", default=None)  # fmt: skip
    callbacks: list[Any] | None = key("your TrainerCallbacks by name, in order, such as [my.module:Thing, "
                                      "{transformers:EarlyStoppingCallback: {early_stopping_patience: 3}}]",
                                      default=None)  # fmt: skip
    profile_steps: str | None = key("write a torch profiler trace of these steps, such as 10-12, into output_dir",
                                    default=None)  # fmt: skip
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])

    @property
    def trackers(self) -> list[str]:
        """What `report_to` names; nothing for `none`, SwanLab where the key is not given."""
        given = self.training.get("report_to")
        names = TRAINING_DEFAULTS["report_to"] if given is None else [given] if isinstance(given, str) else given
        return [name for name in names if name != "none"]

    @property
    def fills_batches(self) -> bool:
        """Whether a micro batch has as many rows as `max_tokens_per_batch` holds, and not a number of them."""
        return self.max_tokens_per_batch is not None and "per_device_train_batch_size" not in self.training

    @property
    def offloads(self) -> bool:
        """Whether what checkpointing keeps of a layer waits in host memory."""
        return bool(self.training.get("activation_checkpointing") == ALSO["activation_checkpointing"])

    @property
    def freezes(self) -> bool:
        """Whether some weights are not trained; checkpoints are without these."""
        return self.adapter != "none" or bool(self.train_only)

    @property
    def micro_batch(self) -> int:
        """Rows of a micro batch as Trainer and DeepSpeed count them: one that tokens fill is one."""
        return int(self.training.get("per_device_train_batch_size", 1))

    def to_dict(self) -> dict[str, Any]:
        """All keys flat, ours first, without secrets."""
        ours = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "training"}
        return ours | {name: value for name, value in self.training.items() if name not in SECRETS}

    def save(self, path: Path) -> None:
        """Write YAML that `--config` reads back to an equal configuration; elsewhere, to one of the same files."""
        beside = path.with_name(path.name + ".tmp")
        keys = {name: whole(value) for name, value in self.to_dict().items()} | {STARTED_IN: str(Path.cwd())}
        text = yaml.safe_dump(keys, allow_unicode=True, sort_keys=False, width=1000)
        beside.write_text("# Every key of this run; feed it back with --config.\n" + text, encoding="utf-8")
        os.replace(beside, path)


def whole(value: Any) -> Any:
    """4 for 4.0: a number of steps is read as a float, since it may be a share."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value
