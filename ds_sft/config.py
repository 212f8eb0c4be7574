"""The run's keys: ours and every field of `transformers.TrainingArguments`, from YAML and flags.

Precedence: defaults < YAML < flags. A key is spelled the same in both. Imports neither torch nor transformers, so that
mistakes and `--help` are answered at once.
"""

from __future__ import annotations

import ast
import difflib
import glob
import importlib.util
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ds_sft.errors import UserError, nearest

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

# transformers 5 renamed these; everybody still says the old name. And our name for what Trainer calls differently.
ALIASES = {
    "resume_from_checkpoint": "resume",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
GONE = {  # keys that TrainingArguments no longer has -> what to write
    "group_by_length": "write train_sampling_strategy: group_by_length",
    "warmup_ratio": "write warmup_steps with a value below 1, which is a share of all steps",
    "evaluation_strategy": "write eval_strategy",
    "overwrite_output_dir": "delete it",
    "save_safetensors": "delete it: weights are always safetensors",
    "logging_dir": "delete it: output_dir has the logs",
    "no_cuda": "write use_cpu",
    "dataset_text_field": "write data_fields",
}
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
_NO_OPTIONS = "no optimizer of a run here has options of its own"
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
    **dict.fromkeys(("optim_args", "optim_target_modules"), (None, _NO_OPTIONS)),
}  # fmt: skip
# Keys that mean nothing without `adapter`.
OF_ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_modules_to_save", "use_rslora",
               "lora_init", "merge")  # fmt: skip
AGAINST_ADAPTERS = {
    "train_only": "an adapter freezes all weights of the model (lora_modules_to_save trains some of them)",
    "resize_embeddings": "new rows of a frozen embedding would never be learned, and the adapter would fit no base",
}
ELSEWHERE = {  # what other programs call a key of ours
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "dataset": "train_file",
    "cutoff_len": "max_length",
    **dict.fromkeys(("sequence_parallel_size", "sp_size", "context_parallel_size"), "sequence_parallel"),
    **dict.fromkeys(("finetuning_type", "tuner_type", "use_peft", "use_dora"), "adapter"),
    **dict.fromkeys(("lora_r", "r"), "lora_rank"),
    **dict.fromkeys(("target_modules", "target_parameters", "lora_target_modules", "lora_target"), "lora_targets"),
    "modules_to_save": "lora_modules_to_save",
    "init_lora_weights": "lora_init",
    **dict.fromkeys(("load_in_4bit", "quantization_bit", "quant_bits"), "quantization"),
}
MUON = "muon"  # a value of `optim` that transformers has not
UNTESTED_OPTIMS = ("adamw_torch_8bit", "adamw_torch_4bit")  # torchao's
TORCH_ADAMW = ("adamw_torch", "adamw_torch_fused")
LOG_LEVELS = ("detail", "debug", "info", "warning", "error", "critical", "passive")  # of transformers.utils.logging
SECRETS = ("hub_token",)
POSITIVE = ("early_stopping_patience", "max_length", "lora_rank", "max_tokens_per_batch", "sequence_parallel",
            "preprocessing_num_workers", "predict_max_new_tokens", "per_device_train_batch_size",
            "per_device_eval_batch_size", "gradient_accumulation_steps")  # fmt: skip
# A word that a key of transformers takes here beside its own values.
ALSO = {"activation_checkpointing": "offload"}
RESUME_WORDS = dict.fromkeys(("auto", "true", "yes"), "auto") | dict.fromkeys(("never", "false", "no"), "never")
MODES = ("online", "cloud", "offline", "local", "disabled")
TRUE, FALSE = ("true", "yes", "on", "1", "y"), ("false", "no", "off", "0", "n")
NOT_NEGATIVE = ("lora_dropout", "router_aux_loss_coef", "num_predictions", "evaluate_rows", "val_size", "learning_rate",
                "weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers", "seed", "data_seed",
                "eval_delay", "neftune_noise_alpha", "label_smoothing_factor")  # fmt: skip
SHARES = ("lora_dropout", "label_smoothing_factor")
# Steps below 1 are a share of all.
ABOVE_ZERO = ("lora_alpha", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
NOT_EMPTY = ("lora_targets", "lora_modules_to_save", "train_only")  # lists
FILES = ("train_file", "eval_file")  # a text, or a list of texts and mappings
TEMPLATES = ("reference", "tokenizer", "hermes")  # values of `template` that are no file
PATHS: dict[str, tuple[str, ...]] = {  # keys that may name a file or a folder -> values that never do
    **dict.fromkeys(("model_name_or_path", *FILES, "output_dir", "cache_dir"), ()),
    "template": TEMPLATES, "deepspeed": ENGINES, "resume": tuple(RESUME_WORDS),
}  # fmt: skip
MADE = ("output_dir", "cache_dir")  # those of them that a run makes
RECORD = "config.yaml"  # what a run leaves of its keys in its output folder
STARTED_IN = "started_in"  # a line of it that is no key: the folder that its relative paths are of
# Options of `generation`: type, smallest and largest value, in words. The names are transformers' own.
GENERATION: dict[str, tuple[Any, float, float, str]] = {
    "do_sample": (bool, 0, 1, "true or false"),
    "temperature": ((int, float), 0.01, 100, "a number above 0"),
    "top_p": ((int, float), 0.01, 1, "a number above 0, 1 at most"),
    "top_k": (int, 1, 1e9, "a whole number, 1 or more"),
    "min_p": ((int, float), 0, 1, "a number from 0 to 1"),
    "num_beams": (int, 1, 1000, "a whole number, 1 or more"),
    "repetition_penalty": ((int, float), 0.01, 100, "a number above 0"),
    "no_repeat_ngram_size": (int, 0, 1e9, "a whole number, 0 or more"),
}
SAMPLING = ("temperature", "top_p", "top_k", "min_p")
# What `rope_scaling` may say: type -> its options and whether each must be given. The names are transformers' own.
ROPE_TYPES: dict[str, dict[str, bool]] = {
    "linear": {"factor": True},
    "yarn": {"factor": True, "original_max_position_embeddings": False, "attention_factor": False, "beta_fast": False,
             "beta_slow": False, "mscale": False, "mscale_all_dim": False, "truncate": False},
    "llama3": {"factor": True, "original_max_position_embeddings": False, "low_freq_factor": True,
               "high_freq_factor": True},
}  # fmt: skip
UNSCALED_ROPE = {  # types whose rotation of a row depends on the other rows of its micro batch
    "dynamic": "it turns all rows of a micro batch by the longest so far",
    "longrope": "it turns all rows of a micro batch by the longest",
}
A_ROPE_SCALING = "a mapping such as {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 32768}"


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
    data_format: str = key("shape of the rows; auto: told from the fields of each",
                           choices=("auto", "qa", "alpaca", "sharegpt", "messages", "prompt_completion"),
                           default="auto")  # fmt: skip
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
    attn_implementation: str | None = key("sdpa, eager, flash_attention_2, ...; default: the model's", default=None)
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
        keys = {name: _whole(value) for name, value in self.to_dict().items()} | {STARTED_IN: str(Path.cwd())}
        text = yaml.safe_dump(keys, allow_unicode=True, sort_keys=False, width=1000)
        beside.write_text("# Every key of this run; feed it back with --config.\n" + text, encoding="utf-8")
        os.replace(beside, path)


@dataclass(frozen=True)
class Key:
    """What is known of a key before a value is seen."""

    name: str
    type: str  # as annotated: "int", "float | None", "SchedulerType | str"
    default: str
    help: str
    choices: tuple[str, ...] = ()

    @property
    def optional(self) -> bool:
        return "None" in self.type


@dataclass(frozen=True)
class Given:
    """A value as a person wrote it, and where."""

    where: str  # "run.yaml:3: " or "--"
    value: Any  # text, or a list or dict of a YAML file
    plain: bool = True  # not quoted: null and ~ mean nothing
    alias: str = ""  # the name that the key was written by, where it is another one

    @property
    def empty(self) -> bool:
        """Whether it is a way to write that there is no value."""
        return isinstance(self.value, str) and self.plain and self.value.lower() in ("", "null", "~", "none")


# ---- What keys exist


@cache
def our_keys() -> dict[str, Key]:
    return {
        f.name: Key(f.name, str(f.type), str(f.default), f.metadata["help"], f.metadata["choices"])
        for f in fields(Config)
        if f.name != "training"
    }


@cache
def training_keys() -> dict[str, Key]:
    """Fields of `TrainingArguments` from its source: importing transformers takes seconds."""
    source = _transformers() / "training_args.py"
    tree = ast.parse(source.read_text(encoding="utf-8"))
    choices = _enums(tree) | _enums(ast.parse((_transformers() / "trainer_utils.py").read_text(encoding="utf-8")))
    body = next(n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "TrainingArguments")
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            found[node.target.id] = _training_key(node.target.id, ast.unparse(node.annotation), node.value, choices)
    return found


def _transformers() -> Path:
    spec = importlib.util.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformers is not installed: pip install transformers")
    return Path(spec.submodule_search_locations[0])


def _enums(tree: ast.Module) -> dict[str, tuple[str, ...]]:
    """Class name -> its values, for the enumerations of strings."""
    return {
        node.name: tuple(
            item.value.value
            for item in node.body
            if isinstance(item, ast.Assign)
            and isinstance(item.value, ast.Constant)
            and isinstance(item.value.value, str)
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(base) for base in node.bases)
    }


def _training_key(name: str, annotation: str, call: ast.Call, choices: Mapping[str, tuple[str, ...]]) -> Key:
    given = {keyword.arg: keyword.value for keyword in call.keywords}
    default = ast.unparse(given["default"]) if "default" in given else "None"
    help_text = ""
    if isinstance(given.get("metadata"), ast.Dict):
        text = given["metadata"].values[0]  # type: ignore[attr-defined]
        help_text = str(ast.literal_eval(text)) if isinstance(text, ast.Constant) else ""
    # A list of options (debug) is checked by transformers; here only keys with one value.
    enum = next((values for cls, values in choices.items() if annotation.startswith(f"{cls} |")), ())
    enum = enum or (LOG_LEVELS if name.startswith("log_level") else _listed(given.get("metadata")))
    enum += (MUON,) if name == "optim" else ()
    return Key(name, annotation, default, " ".join(help_text.split()), enum)


def _listed(metadata: ast.expr | None) -> tuple[str, ...]:
    """The values that a field's metadata lists; transformers gives them to its own parser of flags alone."""
    if not isinstance(metadata, ast.Dict):
        return ()
    values = {ast.unparse(name): value for name, value in zip(metadata.keys, metadata.values, strict=True) if name}
    listed = values.get("'choices'")
    return tuple(ast.literal_eval(listed)) if isinstance(listed, ast.List) else ()


def all_keys() -> dict[str, Key]:
    return our_keys() | training_keys()


def _known(name: str, where: str, flags: Iterable[str] = ()) -> Key:
    """A key by its name; `flags`: what else may be meant on the command line."""
    if name in all_keys():
        return all_keys()[name]
    flag = where == "--"
    place = f"--{name}: " if flag else where
    if name in GONE:
        raise UserError(f"{place}{name} is not a key of today's transformers: {GONE[name]}")
    obeyed = training_keys().keys() - UNSAFE.keys() - UNUSED.keys()
    near = ELSEWHERE.get(name) or nearest(name, flags, our_keys(), obeyed)
    remedy = f"did you mean {'--' if flag else ''}{near}?" if near else "--help lists all keys"
    raise UserError(f"{place}unknown key{'' if flag else f' {name!r}'}: {remedy}")


# ---- Reading


def load_config(argv: Sequence[str], prog: str = "train.py", *, flags: Iterable[str] = ()) -> Config:
    """The configuration that a command line describes. `--help` prints and raises SystemExit.

    The first word may be the file, without --config.

    Args:
        flags: names of flags that a command has beside the keys, and has taken out; one may be meant by a wrong key.

    Raises:
        UserError: unknown key, wrong value, missing key, unreadable file.
    """
    if any(word in ("-h", "--help") for word in argv):
        print(help_text(prog))
        raise SystemExit(0)
    read = _read_flags(argv, flags)
    file = read.pop("config", None)
    given = {} if file is None else _read_yaml(config_file(str(file.value)))
    return _resolve(_merge(given, read))


def config_file(given: str) -> Path:
    """The file that `--config` names; a run's output folder stands for its config.yaml.

    Raises:
        UserError: a folder that has none.
    """
    path = Path(given)
    if not path.is_dir():
        return path
    if not (path / RECORD).is_file():
        above = path.resolve().parent  # of an adapter or a checkpoint
        meant = f"did you mean {above / RECORD}?" if (above / RECORD).is_file() else "give the YAML file of a run"
        raise UserError(f"{path}: a folder, and no output folder of a run, which has a {RECORD}: {meant}")
    return path / RECORD


def _merge(*sources: Mapping[str, Given]) -> dict[str, Given]:
    merged: dict[str, Given] = {}
    for source in sources:
        renamed = {ALIASES.get(name, name): replace(value, alias=name) if name in ALIASES else value
                   for name, value in source.items()}  # fmt: skip
        if len(renamed) < len(source):
            both = next(f"{old} and {new}" for old, new in ALIASES.items() if {old, new} <= source.keys())
            raise UserError(f"{both} are the same key: give one of them")
        merged |= renamed
    return merged


def _read_flags(argv: Sequence[str], others: Iterable[str]) -> dict[str, Given]:
    flags: dict[str, Given] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        file = word.endswith((".yaml", ".yml")) or Path(word).exists()
        first = not flags.keys() - {"local_rank"}  # which `deepspeed` puts before all words
        if file and first:
            word = f"--config={word}"
        if not word.startswith("--") or word == "--":
            if file and "config" in flags:
                raise UserError(f"{word!r}: expected --key value: a run has one file, and flags beside it")
            expected = f"--config {word}" if file else f"{'FILE.yaml or ' if first else ''}--key value"
            raise UserError(f"{word!r}: expected {expected}")
        name, equals, value = word[2:].partition("=")
        if name != "config":
            _known(name, "--", others)
        elif name in flags:
            raise UserError("--config is given twice: a run has one file, and flags beside it")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else _bare(name)
        flags[name] = Given("--", value)
    return flags


def given_twice(argv: Sequence[str]) -> list[str]:
    """Remarks for the flags that are there more than once: the last counts."""
    times = Counter(word[2:].partition("=")[0] for word in argv if word.startswith("--"))
    return [f"--{name} is given {number} times: the last counts." for name, number in times.items() if number > 1]


def _bare(name: str) -> str:
    if name != "config" and "bool" in all_keys()[name].type:
        return "true"
    raise UserError(f"--{name}: expected a value after it")


def _read_yaml(path: Path) -> dict[str, Given]:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file (the current directory is {Path.cwd()})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: expected lines of `key: value`")
    given = _given_of(root, path)
    started = given.pop(STARTED_IN, None)
    return given if started is None else _found_again(given, Path(str(started.value)), path)


def _given_of(root: yaml.MappingNode, path: Path) -> dict[str, Given]:
    given: dict[str, Given] = {}
    lines: dict[str, int] = {}
    for key_node, node in root.value:
        line = key_node.start_mark.line + 1
        name = str(key_node.value)
        if name != STARTED_IN:
            _known(name, f"{path}:{line}: ")
        if name in given:
            raise UserError(f"{path}:{line}: {name} is given twice, first in line {lines[name]}")
        lines[name] = line
        scalar = isinstance(node, yaml.ScalarNode)
        value = node.value if scalar else _plain(node)
        given[name] = Given(f"{path}:{line}: ", value, plain=not scalar or node.style is None)
    return given


def _found_again(given: dict[str, Given], started: Path, record: Path) -> dict[str, Given]:
    """The keys of a run with the relative paths among them as they are named from here.

    They are of the folder where the run was started. It may have been moved with the output folder in it: that is so
    where one of them is found from there. What is not found stays as it is written, as the name of a model of the hub.
    """
    places, record = [started], record.absolute()
    output_dir = started / str(given["output_dir"].value) if "output_dir" in given else started
    if (record.parent.name, record.name) == (output_dir.name, RECORD) and started in output_dir.parents:
        above = os.path.relpath(started, output_dir)
        places.insert(0, Path(os.path.normpath(record.parent / above)))
    paths = {name: value for name, value in given.items() if name in PATHS and not value.empty}
    sought = [(name, value.value) for name, value in paths.items() if name not in MADE]
    home = next((place for place in places if any(_located(value, place, name) != value for name, value in sought)),
                started)  # fmt: skip
    if home.is_dir() and home.samefile(Path.cwd()):
        return given
    located = {name: replace(value, value=_located(value.value, home, name)) for name, value in paths.items()}
    return {**given, **located}


def _located(value: Any, home: Path, name: str) -> Any:
    """A path, a glob, or a list of these and of mappings with one, the value of a key, where it is in `home`."""
    if isinstance(value, list):
        return [_located(item, home, name) for item in value]
    if isinstance(value, dict):
        return {inner: _located(item, home, name) if inner == "path" else item for inner, item in value.items()}
    if not isinstance(value, str) or value in ("", *PATHS[name]) or value.startswith(("/", "~")):
        return value
    there = home.is_dir() if name in MADE else (home / value).exists() or any(glob.iglob(str(home / value)))
    return str(home / value) if there else value


def _plain(node: Any) -> Any:
    """A YAML list or mapping as Python values; inside it scalars mean what YAML says, and 2e-5 is a number."""
    if isinstance(node, yaml.MappingNode):
        return {str(k.value): _plain(v) for k, v in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if node.style is None and node.tag == "tag:yaml.org,2002:str":
        return _number(node.value)
    return yaml.safe_load(node.value) if node.style is None else node.value


def _number(text: str) -> Any:
    """A number where YAML 1.1 sees text: it wants a dot in 2e-5."""
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else text


# ---- Writing


def with_changes(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a configuration with other values of some keys; None takes a key out. All else stays as written."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)  # it was read before
    left = {name: value for name, value in changes.items() if value is not None}
    if root.flow_style:
        named = ((ALIASES.get(str(key_node.value), str(key_node.value)), node) for key_node, node in root.value)
        kept = {name: _plain(node) for name, node in named if name not in changes}
        return _yaml({name: _whole(value) for name, value in (kept | left).items()})
    for key_node, node in reversed(root.value):  # from the end: places before it stay
        name = ALIASES.get(str(key_node.value), str(key_node.value))
        if name in changes:
            text = _exchanged(text, key_node, node, left.pop(name, None))
    lines = [f"{name}: {_in_one_line(value)}\n" for name, value in left.items()]
    return "".join([text if text.endswith("\n") or not text else f"{text}\n", *lines])


def _exchanged(text: str, key_node: yaml.Node, node: yaml.Node, value: Any) -> str:
    """The text with another value for one key, or without the key."""
    end = len(text[: _end(node)].rstrip())
    if value is None:
        return text[: key_node.start_mark.index] + text[end:]
    behind_colon = text.index(":", key_node.end_mark.index) + 1
    return f"{text[:behind_colon]} {_in_one_line(value)}{text[max(end, behind_colon) :]}"


def _end(node: yaml.Node) -> int:
    """Where the text of a value ends; a block's own mark stands behind the comments that follow it."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _in_one_line(value: Any) -> str:
    return _yaml([_whole(value)], flow=True).strip()[1:-1]


def _yaml(value: Any, *, flow: bool = False) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=flow, allow_unicode=True, sort_keys=False, width=math.inf)
    return text


def _whole(value: Any) -> Any:
    """4 for 4.0: a number of steps is read as a float, since it may be a share."""
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 else value


# ---- Meaning


def _resolve(given: Mapping[str, Given]) -> Config:
    values = {name: _convert(all_keys()[name], value) for name, value in given.items()}
    values.pop("local_rank", None)  # DeepSpeed's launcher adds it; the environment says the same
    if values.get("fp16") and values.setdefault("bf16", False):
        raise UserError(f"{given['fp16'].where}fp16: yes beside bf16: yes: take one of the two")
    missing = [name for name in ("model_name_or_path", "train_file", "output_dir") if values.get(name) is None]
    if missing:
        raise UserError(f"missing: {', '.join(missing)}: give each in the --config file or as --{missing[0]} VALUE")
    ours = {name: values.pop(name) for name in list(values) if name in our_keys()}
    if ours.get("eval_file") is not None and ours.get("val_size"):
        raise UserError(f"{given['val_size'].where}val_size: with an eval_file nothing is set aside: give one of them")
    has_eval = ours.get("eval_file") is not None or bool(ours.get("val_size"))
    ours["resume"] = RESUME_WORDS.get(str(ours.get("resume") or "auto").lower(), ours.get("resume"))
    if not has_eval and values.get("eval_strategy", "no") != "no":
        where = given["eval_strategy"].where
        raise UserError(f"{where}eval_strategy: {values['eval_strategy']} needs an eval_file (or val_size)")
    if not has_eval and ours.get("evaluate_rows"):
        raise UserError(f"{given['evaluate_rows'].where}evaluate_rows: it needs an eval_file (or val_size)")
    defaults = TRAINING_DEFAULTS | (EVAL_DEFAULTS if has_eval else {})
    if ours.get("max_tokens_per_batch") is not None:  # then it is absent unless given, and `save` keeps it so
        defaults = {name: value for name, value in defaults.items() if name != "per_device_train_batch_size"}
    config = Config(**ours, training=defaults | values)
    _check_batching(config, given)
    _check_checkpointing(config, given)
    _check_sequence_parallel(config, given)
    _check_adapter(config, given)
    _check_optimizer(config, given)
    _check_push(config, given)
    _check_best(config, given)
    _check_company(config, given)
    named = config.training["report_to"] or []
    if "none" in named and config.trackers:
        raise UserError(f"{given['report_to'].where}report_to: {', '.join(named)}: none is said alone")
    return config


def _check_batching(config: Config, given: Mapping[str, Given]) -> None:
    order, name = config.training.get("train_sampling_strategy", "random"), "max_tokens_per_batch"
    if config.packing != "none" and config.max_tokens_per_batch is not None:
        raise UserError(
            f"{given[name].where}{name}: packing: concat fills sequences of max_length, and a micro batch is "
            "per_device_train_batch_size of them: leave out one of the two"
        )
    if config.packing != "none" and config.batching == "padded":
        raise UserError(f"{given['batching'].where}batching: padded: packing: concat has no padding: leave out one")
    if config.max_tokens_per_batch is not None and order not in OUR_ORDERS:
        raise UserError(f"{given[name].where}{name}: train_sampling_strategy {order} makes batches of its own")
    if config.fills_batches and order == "group_by_length":
        raise UserError(
            f"{given[name].where}{name}: micro batches filled by tokens are about equal, train_sampling_strategy "
            "group_by_length has nothing to order: leave it out, or give per_device_train_batch_size"
        )


def _check_checkpointing(config: Config, given: Mapping[str, Given]) -> None:
    """Keys of what is kept of a layer, and of how its MLP is computed, beside others that exclude them."""
    options = config.training.get("activation_checkpointing_kwargs")
    if isinstance(options, dict) and "offload" in options:
        raise UserError(
            f"{given['activation_checkpointing_kwargs'].where}activation_checkpointing_kwargs: offload: computation "
            "would wait for its copies: write activation_checkpointing: offload"
        )
    compiler = "torch_compile" if config.training.get("torch_compile") else "fused_kernels"
    if compiler == "fused_kernels" and config.fused_kernels != "compile":
        return
    for name, value in (("activation_checkpointing", "offload"), ("tiled_mlp", "yes")):
        if config.to_dict().get(name) == value:
            raise UserError(
                f"{given[name].where}{name}: {value}: beside {compiler}: {given[compiler].value} a layer is compiled "
                "in one: leave out one of the two"
            )


# Keys that a row over several ranks cannot be exact with, where they have another value than this -> why.
AGAINST_SEQUENCE_PARALLEL: dict[str, tuple[Any, str]] = {
    "batching": ("padding_free", "parts are cut from rows laid end to end"),
    "attn_implementation": (None, "only this package's attention exchanges heads between ranks"),
    "lora_dropout": (0.0, "what is left out would depend on the number of ranks"),
    "fp16": (False, "a model's own loss, which float16 keeps, would lose the first token of every part"),
    "torch_compile": (False, "no test trains with both"),
    "neftune_noise_alpha": (None, "its noise depends on the tokens that a rank has"),
}


def _check_sequence_parallel(config: Config, given: Mapping[str, Given]) -> None:
    """Keys that exclude `sequence_parallel`."""
    if config.sequence_parallel == 1:
        return
    place = f"{given['sequence_parallel'].where}sequence_parallel: {config.sequence_parallel}"
    found = config.to_dict()
    for name, (allowed, why) in AGAINST_SEQUENCE_PARALLEL.items():
        if found.get(name, allowed) != allowed:
            raise UserError(f"{place}: {name}: {given[name].value}: {why}: leave out one of the two")
    if config.fused_kernels == "compile":
        raise UserError(f"{place}: fused_kernels: compile: no test trains with both: write liger, none or auto")
    order = config.training.get("train_sampling_strategy", "random")
    if order not in OUR_ORDERS:
        raise UserError(f"{place}: train_sampling_strategy: {order}: it makes batches of its own: leave it out")


def _check_adapter(config: Config, given: Mapping[str, Given]) -> None:
    """Keys of adapters beside others that exclude them, or without `adapter`, which alone turns them on."""
    ours = {f.name: f.default for f in fields(Config)}
    alone = [name for name in OF_ADAPTERS if name in given and getattr(config, name) != ours[name]]
    if config.adapter == "none" and alone:
        raise UserError(
            f"{given[alone[0]].where}{alone[0]}: it is of adapters: write adapter: lora too, or leave it out"
        )
    if config.adapter == "none" and config.quantization != "none":
        raise UserError(
            f"{given['quantization'].where}quantization: {config.quantization}: weights of 4 bits cannot be trained: "
            "write adapter: lora too"
        )
    if config.adapter == "none":
        return
    if config.lora_init == "orthogonal" and config.lora_rank % 2:
        where = given.get("lora_rank", given["lora_init"]).where
        raise UserError(f"{where}lora_rank: {config.lora_rank}: lora_init: orthogonal wants an even rank")
    compiler = "torch_compile" if config.training.get("torch_compile") else "fused_kernels"
    if config.adapter == "dora" and (compiler == "torch_compile" or config.fused_kernels == "compile"):
        raise UserError(
            f"{given[compiler].where}{compiler}: {given[compiler].value}: Dynamo breaks layers with peft's DoRA into "
            "dozens of pieces, each compiled: leave it out, or write adapter: lora"
        )
    for name, why in AGAINST_ADAPTERS.items():
        if getattr(config, name):
            raise UserError(f"{given[name].where}{name}: {why}: leave out {name} or adapter: {config.adapter}")


def _check_optimizer(config: Config, given: Mapping[str, Given]) -> None:
    """Optimizers that no run here has, and keys that leave `optimizer_dtype` nothing to be of."""
    optim = config.training.get("optim", TORCH_ADAMW[0])
    if optim in UNTESTED_OPTIMS:
        raise UserError(f"{given['optim'].where}optim: {optim}: no training with it is tested: write adamw_8bit")
    if optim == MUON and config.adapter != "none":
        raise UserError(
            f"{given['optim'].where}optim: {MUON}: an adapter's matrices are no updates of their own, their product "
            f"is: leave out one of optim: {MUON} and adapter: {config.adapter}"
        )
    if config.optimizer_dtype == "float32":
        return
    place = f"{given['optimizer_dtype'].where}optimizer_dtype: {config.optimizer_dtype}: "
    if not config.training.get("bf16"):
        raise UserError(f"{place}forward and backward are not in bfloat16: write bf16: yes too, or leave it out")
    if config.adapter != "none":
        raise UserError(f"{place}the states of adapter: {config.adapter} are small, and stay float32: leave it out")
    if optim not in TORCH_ADAMW:
        raise UserError(f"{place}optim: {optim} rounds to nearest, which loses small updates: leave out one of the two")


def _check_push(config: Config, given: Mapping[str, Given]) -> None:
    """A run pushes to a repository with a name, what was verified."""
    if not config.training.get("push_to_hub"):
        return
    where = given["push_to_hub"].where
    if config.training.get("hub_model_id") is None:
        raise UserError(f"{where}push_to_hub: to which repository? write hub_model_id: OWNER/NAME too")
    if not config.verify_export:
        raise UserError(
            f"{given['verify_export'].where}verify_export: push_to_hub: yes pushes what was verified: leave it out, "
            "or push later with ds-sft push --unverified"
        )


# Keys of transformers that do nothing without another one -> that, and what to write.
ALONE_NOTHING = {
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"),
                    ("dataloader_num_workers", "dataloader_num_workers: 2")),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode"), ("torch_compile", "torch_compile: yes")),
}  # fmt: skip
FIXED_SCHEDULES = ("constant", "constant_with_warmup")  # which transformers gives no options
WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")  # what it gives no warm-up


def _check_company(config: Config, given: Mapping[str, Given]) -> None:
    """Keys of transformers that it would leave out beside others without a word."""
    training = config.training
    for name, (needed, remedy) in ALONE_NOTHING.items():
        if training.get(name) and not training.get(needed):
            raise UserError(f"{given[name].where}{name}: it does nothing alone: write {remedy} too, or leave it out")
    schedule = training.get("lr_scheduler_type", "linear")
    if training.get("lr_scheduler_kwargs") and schedule in FIXED_SCHEDULES:
        raise UserError(
            f"{given['lr_scheduler_kwargs'].where}lr_scheduler_kwargs: lr_scheduler_type: {schedule} has no options: "
            "leave it out"
        )
    if training.get("warmup_steps") and schedule in WITHOUT_WARMUP:
        instead = "write constant_with_warmup" if schedule == "constant" else "leave it out"
        raise UserError(
            f"{given['warmup_steps'].where}warmup_steps: lr_scheduler_type: {schedule} has no warm-up: {instead}"
        )


def _so_anyway(known: Key, given: Given) -> Any:
    """The value of a key that no run here would obey: it may only say what is so anyway."""
    so, why = (UNSAFE | UNUSED)[known.name]
    try:
        value = None if given.empty else _by_type(known, given.value, empty=False)
    except ValueError:
        value = given.value
    if not value or str(value).lower() in FALSE:
        value = None
    if value == (so or None):
        return so
    place = f"{given.where}{given.alias or known.name}: "
    if known.name in UNUSED:
        raise UserError(f"{place}{_shown(given.value)}: {why}: leave it out")
    expected = "nothing" if so is None else str(so).lower()
    raise UserError(f"{place}expected {expected} ({why}), found {_shown(given.value)!r}")


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_best(config: Config, given: Mapping[str, Given]) -> None:
    """What is the best model, for the keys that ask for it."""
    asked = [name for name, value in (("load_best_model_at_end", True), ("save_strategy", "best"))
             if config.training.get(name) == value]  # fmt: skip
    if config.early_stopping_patience is not None and "load_best_model_at_end" not in asked:
        raise UserError(
            f"{given['early_stopping_patience'].where}early_stopping_patience: the run would end with a model that is "
            "not the best: write load_best_model_at_end: yes too"
        )
    if asked and config.training.get("eval_strategy", "no") == "no":
        raise UserError(
            f"{given[asked[0]].where}{asked[0]}: {given[asked[0]].value}: it needs an eval_file (or val_size), and an "
            "eval_strategy"
        )


def _convert(known: Key, given: Given) -> Any:
    if known.name in UNSAFE or known.name in UNUSED:
        return _so_anyway(known, given)
    value = given.value
    empty = given.empty
    if empty and known.optional and not (value.lower() == "none" and known.name == "report_to"):
        return None
    if given.where == "--" and value == "":
        empty = False  # --system_prompt "" is an empty text; `system_prompt:` in a file is a line not finished
    also = ALSO.get(known.name)
    if also is not None and isinstance(value, str) and value.lower() == also:
        return also
    try:
        result = _by_type(known, value, empty)
        _check(known, result)
    except ValueError as error:
        expected = f"yes, no or {also}" if also else str(error)
        place = f"{given.where}{given.alias or known.name}"
        raise UserError(f"{place}: expected {expected}, found {_shown(value)!r}") from None
    return result


def _by_type(known: Key, value: Any, empty: bool) -> Any:
    """The value as the key's type. Raises ValueError saying what was expected."""
    names = set(re.findall(r"\w+", known.type))
    if known.choices and isinstance(value, (list, dict)) and not {"list", "dict"} & names:
        raise ValueError(_one_of(known.choices, ""))
    if isinstance(value, dict):
        return _expect("dict" in names, value, _noun(names))
    if known.name in FILES:  # a path may well begin with a bracket: [ab].jsonl
        return value if isinstance(value, list) or not value.startswith(("[{", "[ ")) else _flow(value, list)
    if isinstance(value, list):
        return _expect("list" in names, [str(item) for item in value], _noun(names))
    if "dict" in names and value.lstrip().startswith("{"):
        return _flow(value, dict)
    if "list" in names:
        return _flow(value, list) if value.lstrip().startswith("[") else [value]
    if "bool" in names and "str" in names:  # include_num_input_tokens_seen: yes, or all
        return _bool(value) if value.lower() in TRUE + FALSE else value
    for name, convert in (("bool", _bool), ("int", _int), ("float", _float)):
        if name in names and "str" not in names:
            return convert(value)
    return _expect("str" in names and not (empty and value != "none"), value, _noun(names))


def _expect(right: bool, value: Any, noun: str) -> Any:
    if not right:
        raise ValueError(noun)
    return value


def _noun(names: set[str]) -> str:
    for name, noun in (("bool", "true or false"), ("int", "a whole number"), ("float", "a number"), ("list", "a list")):
        if name in names:
            return noun
    return "a mapping" if "dict" in names and "str" not in names else "text"


def _bool(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise ValueError("true or false")


def _int(text: str) -> int:
    number = _parse_number(text, "a whole number such as 2048")
    if number != int(number):
        raise ValueError("a whole number such as 2048")
    return int(number)


def _float(text: str) -> float:
    return float(_parse_number(text, "a number such as 2e-5"))


def _parse_number(text: str, noun: str) -> int | float:
    """An int where the text is one: a float would lose digits of a long seed."""
    if not re.fullmatch(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?", text):
        raise ValueError(noun)
    try:
        number = int(text) if re.fullmatch(r"[-+]?[\d_]+", text) else float(text)
    except ValueError:  # 1__0, or thousands of digits
        raise ValueError(noun) from None
    return _expect(math.isfinite(number), number, noun)  # type: ignore[no-any-return]


def _flow(text: str, kind: type) -> Any:
    """A list or mapping given as text, on the command line."""
    noun = "a list such as [a, b]" if kind is list else "a mapping such as {a: 1}"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        raise ValueError(noun) from None
    value = None if node is None else _plain(node)
    return _expect(isinstance(value, kind), value, noun)


def _check(known: Key, value: Any) -> None:
    if known.choices and value not in known.choices:
        raise ValueError(_one_of(known.choices, str(value)))
    if known.name in POSITIVE and value is not None and value < 1:
        raise ValueError("1 or more")
    if known.name == "data_fields" and isinstance(value, str):
        raise ValueError("a mapping such as {question: prompt}")
    if known.name in NOT_NEGATIVE and value is not None and value < 0:
        raise ValueError("0 or more")
    if known.name in SHARES and value >= 1:
        raise ValueError("a share below 1")
    if known.name in NOT_EMPTY and value is not None and not all([value, *(name.strip() for name in value)]):
        raise ValueError("a name or more, such as [a, b]; or leave it out")
    if known.name == "max_steps" and value < 1 and value != -1:
        raise ValueError("1 or more; -1: as num_train_epochs says")
    if known.name == "metric_for_best_model" and value not in (None, "loss", "eval_loss"):
        raise ValueError("eval_loss, which is all that validation measures")
    if known.name in ABOVE_ZERO and value is not None and value <= 0:
        raise ValueError("a number above 0")
    if known.name == "generation" and value is not None:
        check_generation(value)
    if known.name == "rope_scaling" and value is not None:
        check_rope_scaling(value)
    if known.name == "profile_steps" and value is not None and step_range(value) is None:
        raise ValueError("steps such as 10-12, the first 1 or more, the last not before it")
    if known.name == "hub_strategy" and value != "end":
        raise ValueError("end (a run pushes once, after its export was verified)")
    if known.name == "hub_model_id" and value is not None and not is_repo(value):
        raise ValueError("a repository such as me/my-model")
    if known.name == "export_max_shard_size" and not is_size(value):
        raise ValueError("a size such as 5GB or 500MB")


def check_generation(options: Any) -> None:
    """`generation` is checked here because answers come last: hours after a mistake in it.

    Raises:
        ValueError: saying what was expected.
    """
    if not isinstance(options, dict):
        raise ValueError("a mapping such as {do_sample: true, temperature: 0.7}")
    for name, value in options.items():
        if name == "max_new_tokens":
            raise ValueError("no max_new_tokens here: its key is predict_max_new_tokens")
        if name not in GENERATION:
            raise ValueError(_option_meant(GENERATION, name))
        kind, low, high, noun = GENERATION[name]
        right = isinstance(value, bool) if kind is bool else isinstance(value, kind) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            raise ValueError(f"{name} to be {noun}")
    sampling = [name for name in SAMPLING if name in options]
    if sampling and not options.get("do_sample"):
        raise ValueError(f"do_sample: true beside {sampling[0]}, which greedy answers ignore")


def check_rope_scaling(options: Any) -> None:
    """Names and numbers of `rope_scaling`; whether a model can take it `runtime/rotary.py` finds out.

    Raises:
        ValueError: saying what was expected.
    """
    if not isinstance(options, dict) or not options:
        raise ValueError(A_ROPE_SCALING)
    if "type" in options:
        raise ValueError("rope_type, the name of today, in place of type")
    kind = str(options.get("rope_type"))
    if kind in UNSCALED_ROPE:
        raise ValueError(f"rope_type to be one of {', '.join(ROPE_TYPES)} ({kind}: {UNSCALED_ROPE[kind]})")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type to be {_one_of(ROPE_TYPES, kind)}")
    known = ROPE_TYPES[kind] | {"rope_theta": False}
    for name, value in options.items():
        if name != "rope_type" and name not in known:
            raise ValueError(_option_meant(known, name, f" of {kind}"))
        if noun := _rope_noun(name, value):
            raise ValueError(f"{name} to be {noun}")
    missing = [name for name, needed in known.items() if needed and name not in options]
    if missing:
        raise ValueError(f"{missing[0]} beside rope_type: {kind}")
    if kind == "llama3" and options["high_freq_factor"] <= options["low_freq_factor"]:
        raise ValueError("high_freq_factor to be above low_freq_factor")


def _rope_noun(name: str, value: Any) -> str | None:
    """What an option of `rope_scaling` should be; None where it is that."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if name == "truncate":
        return None if isinstance(value, bool) else "true or false"
    if name == "original_max_position_embeddings":
        return None if isinstance(value, int) and number and value > 0 else "a whole number of tokens, such as 32768"
    if name == "factor":
        return None if number and 1 <= value < math.inf else "a number, 1 or more"
    return None if name == "rope_type" or (number and 0 < value < math.inf) else "a number above 0"


def step_range(text: str) -> tuple[int, int] | None:
    """First and last step of A-B, or of A alone; None where it is no such range."""
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    return (first, last) if 1 <= first <= last else None


def is_repo(text: str) -> bool:
    """Whether it is OWNER/NAME, as the hub names a repository."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None


def is_size(text: str) -> bool:
    """Whether huggingface_hub reads it as a number of bytes."""
    return re.fullmatch(r"[1-9]\d*[KMGT]B", text.upper()) is not None


def _option_meant(known: Iterable[str], name: str, of: str = "") -> str:
    """What was expected where an option of a mapping is called `name`."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{near[0]} in place of {name}" if near else f"options{of} ({', '.join(known)}) and no {name}"


def _one_of(choices: Iterable[str], value: str) -> str:
    near = difflib.get_close_matches(value, list(choices), n=1)
    few = list(choices)[:8]
    dots = ", ..." if len(list(choices)) > 8 else ""
    return f"one of {', '.join(few)}{dots}" + (f" ({near[0]}?)" if near and near[0] not in few else "")


# ---- Help

OUR_WORDS = {
    "deepspeed": f"{', '.join(ENGINES)}, or a JSON file of DeepSpeed's options",
    "activation_checkpointing": "keep each layer's input alone and compute the layer again in backward; offload: keep "
                                "it in host memory",
}  # fmt: skip


def help_text(prog: str) -> str:
    """Ours first, then every field of TrainingArguments."""
    lines = [
        f"usage: {prog} FILE.yaml [--key value ...]",
        "",
        "Fine-tunes a chat model on dialogues. Every key below goes into the YAML file or on the command line,",
        "spelled the same; flags win over the file, the file over the defaults.",
        "",
        "Keys of ds_sft (* must be given, and so must output_dir):",
        *(_help_line(known) for known in our_keys().values()),
        "",
        "Keys of transformers.TrainingArguments (defaults marked + are the reference script's):",
        *(_help_line(known) for known in training_keys().values() if known.name not in ALIASES),
    ]
    return "\n".join(lines)


def _help_line(known: Key) -> str:
    ours = known.name in our_keys()
    default = "*" if "MISSING" in known.default else "" if known.default == "None" else f"[{known.default}]"
    if known.name in TRAINING_DEFAULTS:
        default = f"[+{TRAINING_DEFAULTS[known.name]}]"
    if known.name == "system_prompt":
        default = "[the reference's]"
    text = known.help if ours else OUR_WORDS.get(known.name) or known.help.split(". ")[0][:100]
    if known.choices and len(known.choices) <= 6:
        text += f" ({', '.join(known.choices)})"
    return f"  --{known.name:<34} {text} {default}".rstrip()
