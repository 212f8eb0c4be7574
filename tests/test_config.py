"""Keys from YAML and flags: what a person means, and what is said when it cannot be meant."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_sft.config.change import with_changes
from ds_sft.config.elsewhere import CALLED_HERE, NOT_HERE, VALUES_NOT_HERE
from ds_sft.config.help import help_text
from ds_sft.config.keys import ATTENTIONS, ENGINES, REFERENCE_PROMPT, TRAINING_DEFAULTS, Config
from ds_sft.config.read import given_twice, load_config
from ds_sft.config.upstream_keys import ALIASES, all_keys, our_keys, training_keys
from ds_sft.config.values import Given, convert
from ds_sft.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ["--model_name_or_path", "m", "--train_file", "t", "--output_dir", "o"]


def from_yaml(folder: Path, text: str, *flags: str) -> Config:
    """A configuration from YAML lines; keys that must be given come behind them, as flags."""
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return load_config(["--config", str(folder / "run.yaml"), *NEEDED, *flags])


def value_of(config: Config, name: str) -> Any:
    return config.to_dict()[name]


def said_of(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(list(flags))
    return str(caught.value)


def test_a_runs_output_folder_stands_for_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_config([*NEEDED, "--max_length", "77"]).save(tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path)]).max_length == 77
    monkeypatch.chdir(tmp_path)
    Path("adapter").mkdir()
    Path("elsewhere/model").mkdir(parents=True)
    wanted = "a folder, and no output folder of a run, which has a config.yaml"
    assert said_of("--config", "adapter") == f"adapter: {wanted}: did you mean {tmp_path / 'config.yaml'}?"
    assert said_of("--config", "elsewhere/model") == f"elsewhere/model: {wanted}: give the YAML file of a run"


# ---- What is meant

MEANT = [
    ("learning_rate", "2e-5", 2e-5), ("learning_rate", "2E-5", 2e-5), ("learning_rate", ".5", 0.5),
    ("learning_rate", "1_000", 1000.0), ("learning_rate", "3", 3.0), ("max_length", "1_000", 1000),
    ("max_length", "1e3", 1000), ("max_length", "2048.0", 2048), ("seed", "12345678901234567890", 12345678901234567890),
    ("max_steps", "-1", -1), ("bf16", "no", False), ("bf16", "off", False), ("bf16", "False", False),
    ("bf16", "yes", True), ("bf16", "1", True), ("bf16", "TRUE", True), ("eval_file", "null", None),
    ("eval_file", "none", None), ("system_prompt", "no", "no"), ("run_name", "1_000", "1_000"),
    ("run_name", "2024-01-01", "2024-01-01"), ("report_to", "none", ["none"]),
    ("report_to", "tensorboard", ["tensorboard"]), ("report_to", "[tensorboard, wandb]", ["tensorboard", "wandb"]),
    ("lr_scheduler_type", "cosine", "cosine"), ("lr_scheduler_kwargs", "{min_lr: 1e-6}", {"min_lr": 1e-6}),
    ("deepspeed", "ds_configs/zero2.json", "ds_configs/zero2.json"), ("save_total_limit", "null", None),
    ("include_num_input_tokens_seen", "no", False), ("include_num_input_tokens_seen", "all", "all"),
    ("gradient_checkpointing", "no", False), ("warmup_steps", "0.03", 0.03), ("swanlab_mode", "cloud", "cloud"),
    ("generation", "{do_sample: yes, temperature: 7e-1}", {"do_sample": True, "temperature": 0.7}),
    ("rope_scaling", "{rope_type: yarn, factor: 4}", {"rope_type": "yarn", "factor": 4}),
    ("generation", "{num_beams: 2}", {"num_beams": 2}), ("generation", "null", None),
    ("export_max_shard_size", "500mb", "500mb"), ("profile_steps", "10-12", "10-12"), ("verify_export", "no", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "meant"), MEANT)
@pytest.mark.parametrize("way", ["yaml", "flag", "flag="])
def test_values_mean_what_a_person_means(tmp_path: Path, way: str, name: str, text: str, meant: Any) -> None:
    if way == "yaml":
        config = from_yaml(tmp_path, f"{name}: {text}\n")
    else:
        config = load_config([*NEEDED, *([f"--{name}={text}"] if way == "flag=" else [f"--{name}", text])])
    found = value_of(config, "activation_checkpointing" if name == "gradient_checkpointing" else name)
    assert (found, type(found)) == (meant, type(meant))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ('system_prompt: "null"', "null"), ("system_prompt: ''", ""), ("system_prompt: '1e3'", "1e3"),
        ("system_prompt: |\n  two\n  lines\n", "two\nlines\n"), ('system_prompt: "a: b # c"', "a: b # c"),
        ("system_prompt: 你好 # comment", "你好"),
    ],
)  # fmt: skip
def test_text_stays_text(tmp_path: Path, text: str, meant: str) -> None:
    assert from_yaml(tmp_path, text).system_prompt == meant


def test_structures_in_yaml(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "deepspeed:\n  zero_optimization: {stage: 2, x: 5e8}\n  on: true\nreport_to: [a, b]\n")
    assert config.training["deepspeed"] == {"zero_optimization": {"stage": 2, "x": 5e8}, "on": True}
    assert config.training["report_to"] == ["a", "b"]


def test_flags_win_over_yaml_over_defaults(tmp_path: Path) -> None:
    config = from_yaml(tmp_path, "seed: 1\nmax_length: 10\n", "--seed", "2")
    assert (config.training["seed"], config.max_length, config.on_bad_row) == (2, 10, "error")
    assert (config.training["learning_rate"], config.system_prompt) == (1e-4, REFERENCE_PROMPT)
    # Under either of its names, a flag wins.
    config = from_yaml(tmp_path, "gradient_checkpointing: yes\n", "--activation_checkpointing", "no")
    assert config.training["activation_checkpointing"] is False


def test_what_checkpointing_keeps_may_wait_in_host_memory(tmp_path: Path) -> None:
    for text, offloads, kept in (("offload", True, "offload"), ("yes", False, True), ("no", False, False)):
        config = from_yaml(tmp_path, f"gradient_checkpointing: {text}\n")
        assert (config.offloads, config.training["activation_checkpointing"]) == (offloads, kept)
        config.save(tmp_path / "config.yaml")
        assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_a_bare_flag_is_true() -> None:
    config = load_config([*NEEDED, "--predict_before", "--bf16", "--seed", "3"])
    assert (config.predict_before, config.training["bf16"], config.training["seed"]) == (True, True, 3)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("generation", "greedy", "a mapping such as {do_sample: true, temperature: 0.7}"),
        ("generation", "{do_samle: true}", "do_sample in place of do_samle"),
        ("generation", "{seed: 1}", "options (do_sample, temperature, top_p, top_k, min_p, num_beams, "
         "repetition_penalty, no_repeat_ngram_size) and no seed"),
        ("generation", "{temperature: 0.7}", "do_sample: true beside temperature, which greedy answers ignore"),
        ("generation", "{do_sample: 1}", "do_sample to be true or false"),
        ("generation", "{do_sample: true, temperature: 0}", "temperature to be a number above 0"),
        ("generation", "{do_sample: true, top_p: 1.5}", "top_p to be a number above 0, 1 at most"),
        ("generation", "{num_beams: 2.5}", "num_beams to be a whole number, 1 or more"),
        ("generation", "{max_new_tokens: 4}", "no max_new_tokens here: its key is predict_max_new_tokens"),
        ("rope_scaling", "yarn", "a mapping such as {rope_type: yarn, factor: 4.0, original_max_position_embeddings: "
         "32768}"),
        ("rope_scaling", "{rope_type: [yarn], factor: 2}", "rope_type to be one of linear, yarn, llama3"),
        ("rope_scaling", "{factor: 2}", "rope_type to be one of linear, yarn, llama3"),
        ("rope_scaling", "{rope_type: yarm, factor: 2}", "rope_type to be one of linear, yarn, llama3"),
        ("rope_scaling", "{rope_type: dynamic, factor: 2}", "rope_type to be one of linear, yarn, llama3 (dynamic: it "
         "turns all rows of a micro batch by the longest so far)"),
        ("rope_scaling", "{type: yarn, factor: 2}", "rope_type, the name of today, in place of type"),
        ("rope_scaling", "{rope_type: yarn}", "factor beside rope_type: yarn"),
        ("rope_scaling", "{rope_type: yarn, factor: 0.5}", "factor to be a number, 1 or more"),
        ("rope_scaling", "{rope_type: yarn, factor: yes}", "factor to be a number, 1 or more"),
        ("rope_scaling", "{rope_type: linear, factor: 2, beta_fast: 32}",
         "options of linear (factor, rope_theta) and no beta_fast"),
        ("rope_scaling", "{rope_type: yarn, factor: 2, orignal_max_position_embeddings: 4096}",
         "original_max_position_embeddings in place of orignal_max_position_embeddings"),
        ("rope_scaling", "{rope_type: yarn, factor: 2, beta_fast: -1}", "beta_fast to be a number above 0"),
        ("rope_scaling", "{rope_type: yarn, factor: 2, truncate: 1}", "truncate to be true or false"),
        ("rope_scaling", "{rope_type: yarn, factor: 2, original_max_position_embeddings: 3e4}",
         "original_max_position_embeddings to be a whole number of tokens, such as 32768"),
        ("rope_scaling", "{rope_type: llama3, factor: 2, low_freq_factor: 4, high_freq_factor: 4}",
         "high_freq_factor to be above low_freq_factor"),
        ("export_max_shard_size", "5", "a size such as 5GB or 500MB"),
    ],
)  # fmt: skip
def test_how_answers_and_files_are_made(name: str, value: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config([*NEEDED, f"--{name}", value])
    assert str(caught.value) == f"--{name}: expected {expected}, found {value!r}"


def test_an_empty_text_flag() -> None:
    assert load_config([*NEEDED, "--system_prompt", ""]).system_prompt == ""


def test_deepspeeds_own_flag_is_taken() -> None:
    assert "local_rank" not in load_config(["--local_rank=1", *NEEDED]).training


def test_evaluation_is_on_where_there_is_a_file(tmp_path: Path) -> None:
    assert "eval_strategy" not in load_config(NEEDED).training
    config = load_config([*NEEDED, "--eval_file", "e"])
    assert (config.training["eval_strategy"], config.training["eval_steps"]) == ("steps", 100.0)
    config = load_config([*NEEDED, "--eval_file", "e", "--eval_strategy", "no"])
    assert config.training["eval_strategy"] == "no"


def test_of_a_flag_that_is_given_twice_the_last_counts() -> None:
    words = [*NEEDED, "--seed", "1", "--bf16", "--seed=2", "--bf16", "no", "--seed", "3"]
    config = load_config(words)
    assert (config.training["seed"], config.training["bf16"]) == (3, False)
    assert given_twice(words) == [
        "--seed is given 3 times: the last counts.",
        "--bf16 is given 2 times: the last counts.",
    ]


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("a: 1  # one\nb: x\n", {"a": 2.0}, "a: 2  # one\nb: x\n"),
        ("a: 1\nb: x", {"c": "y: z"}, "a: 1\nb: x\nc: 'y: z'\n"),
        ("a:\nb: x\n", {"a": 3}, "a: 3\nb: x\n"),
        ("a: 1\nb: [1,\n  2]\nc: 3\n", {"b": None}, "a: 1\n\nc: 3\n"),
        ("a:\n- 1\n- 2\nb: x\n", {"a": [3]}, "a: [3]\nb: x\n"),
        ("gradient_checkpointing: yes\n", {"activation_checkpointing": False}, "gradient_checkpointing: false\n"),
        ("{a: 1, b: 2, gradient_checkpointing: yes}\n", {"b": 3.0, "activation_checkpointing": None}, "a: 1\nb: 3\n"),
        ("ж: 'я'\na: 1\n", {"a": "да"}, "ж: 'я'\na: да\n"),
    ],
)
def test_a_file_with_other_values(text: str, changes: dict[str, Any], expected: str) -> None:
    assert with_changes(text, changes) == expected
    assert yaml.safe_load(expected).keys()


# ---- What cannot be meant


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rat", "1"], "--learning_rat: unknown key: did you mean --learning_rate?"),
        (["--max-length", "9"], "--max-length: unknown key: did you mean --max_length?"),
        (["--zzzz", "1"], "--zzzz: unknown key: --help lists all keys"),
        (["--batch_size", "8"], "--batch_size: unknown key: did you mean --per_device_train_batch_size?"),
        (["--lora_target_modules", "q"], "--lora_target_modules: unknown key: did you mean --lora_targets?"),
        (["--load_in_4bit", "yes"], "--load_in_4bit: unknown key: did you mean --quantization?"),
        (["--adapter", "[lora]"], "--adapter: expected one of none, lora, dora, found '[lora]': did you mean lora?"),
        (["--config", "a.yaml", "--config=b.yaml"], "--config is given twice: a run has one file, and flags beside it"),
        (["--lr", "1e-5"], "--lr: unknown key: did you mean --learning_rate?"),
        (["--find_batch_size", "1"], "--find_batch_size: unknown key: did you mean --per_device_train_batch_size?"),
        (["--max_length", "long"], "--max_length: expected a whole number such as 2048, found 'long'"),
        (["--max_length", "1.5"], "--max_length: expected a whole number such as 2048, found '1.5'"),
        (["--max_length", "0"], "--max_length: expected 1 or more, found '0'"),
        (["--num_predictions", "-1"], "--num_predictions: expected 0 or more, found '-1'"),
        (["--dataloader_num_workers", "-7"], "--dataloader_num_workers: expected 0 or more, found '-7'"),
        (["--learning_rate", "fast"], "--learning_rate: expected a number such as 2e-5, found 'fast'"),
        (["--learning_rate", "nan"], "--learning_rate: expected a number such as 2e-5, found 'nan'"),
        (["--learning_rate", "1e999"], "--learning_rate: expected a number such as 2e-5, found '1e999'"),
        (["--learning_rate", "1__0"], "--learning_rate: expected a number such as 2e-5, found '1__0'"),
        (["--bf16", "maybe"], "--bf16: expected true or false, found 'maybe'"),
        (["--on_bad_row", "skp"], "--on_bad_row: expected one of error, skip, found 'skp': did you mean skip?"),
        (["--eval_strategy", "step"],
         "--eval_strategy: expected one of no, steps, epoch, found 'step': did you mean steps?"),
        (["--save_strategy", "epochs"],
         "--save_strategy: expected one of no, steps, epoch, best, found 'epochs': did you mean epoch?"),
        (["--lr_scheduler_type", "cosin"],
         "--lr_scheduler_type: expected one of linear, cosine, cosine_with_restarts, polynomial, constant, "
         "constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr, cosine_warmup_with_min_lr, "
         "warmup_stable_decay, greedy, found 'cosin': did you mean cosine?"),
        (["--attn_implementation", "sdap"],
         "--attn_implementation: expected one of eager, sdpa, flash_attention_2, flash_attention_3, flash_attention_4, "
         "flex_attention, or my.module:thing, found 'sdap': did you mean sdpa?"),
        (["--log_level", "zzz"],
         "--log_level: expected one of detail, debug, info, warning, error, critical, passive, found 'zzz'"),
        ([*NEEDED, "--resume", "nevr"],
         "--resume: expected auto, never or the folder of a checkpoint, found 'nevr': did you mean never?"),
        (["--report_to", "tensorboard", "wandb"],
         "'wandb': expected --key value; a list is one word: --report_to '[tensorboard, wandb]'"),
        (["--callbacks", "[a:A,", "b:B]"],
         "'b:B]': expected --key value; a list is one word: --callbacks '[a:A, b:B]'"),
        (["--seed", "1", "2"], "'2': expected --key value"),
        (["--logging_steps", "1.5"],
         "--logging_steps: expected a whole number of steps, or a share below 1, found '1.5'"),
        (["--lr_scheduler_kwargs", "{a"], "--lr_scheduler_kwargs: expected a mapping such as {a: 1}, found '{a'"),
        (["--auto_find_batch_size", "yes"],
         "--auto_find_batch_size: expected false (it changes the rows a step in mid-run; `ds-sft plan` tells what "
         "fits), found 'yes'"),
        (["--enable_jit_checkpoint"],
         "--enable_jit_checkpoint: expected false (ranks would save at different steps and wait for each other; runs "
         "stop and save anyway), found 'true'"),
        (["--use_cache", "yes"],
         "--use_cache: expected false (training does not read the cache, and with one rows laid end to end would see "
         "each other), found 'yes'"),
        (["--ignore_data_skip", "1"],
         "--ignore_data_skip: expected false (a resumed run would learn its first rows again), found '1'"),
        *((["--profile_steps", steps], "--profile_steps: expected steps such as 10-12, the first 1 or more, the last "
           f"not before it, found {steps!r}") for steps in ("0-2", "5-4", "ten", "3-", "1-2-3")),
        (["--seed"], "--seed: expected a value after it"),
        (["--config"], "--config: expected a value after it"),
        (["train.jsonl"], "'train.jsonl': expected FILE.yaml or --key value"),
        (["--fp16", "yes", "--bf16", "yes"], "--fp16: yes beside bf16: yes: take one of the two"),
        ([*NEEDED, "--report_to", "[none, tensorboard]"], "--report_to: none, tensorboard: none is said alone"),
        (["my.yaml"], "my.yaml: no such file (the current directory is {here})"),
        (["--seed", "1", "my.yaml"], "'my.yaml': expected --config my.yaml"),
        (["my.yaml", "other.yaml"], "'other.yaml': expected --key value: a run has one file, and flags beside it"),
        (["--learning_rate", "-1"], "--learning_rate: expected 0 or more, found '-1'"),
        (["--weight_decay", "-0.1"], "--weight_decay: expected 0 or more, found '-0.1'"),
        (["--logging_steps", "0"], "--logging_steps: expected a number above 0, found '0'"),
        (["--save_steps", "0"], "--save_steps: expected a number above 0, found '0'"),
        (["--num_train_epochs", "0"], "--num_train_epochs: expected a number above 0, found '0'"),
        (["-x"], "'-x': expected FILE.yaml or --key value"),
        (["--config", "none.yaml"], "none.yaml: no such file (the current directory is {here})"),
        (
            ["--config", "."],
            ".: a folder, and no output folder of a run, which has a config.yaml: give the YAML file of a run",
        ),
        (["--warmup_ratio", "0.1"], "--warmup_ratio: warmup_ratio is not a key of today's transformers: "
         "write warmup_steps with a value below 1, which is a share of all steps"),
        ([*NEEDED, "--gradient_checkpointing", "no", "--activation_checkpointing", "no"],
         "gradient_checkpointing and activation_checkpointing are the same key: give one of them"),
        (["--gradient_checkpointing", "some"],
         "--gradient_checkpointing: expected yes, no or offload, found 'some'"),
        ([*NEEDED, "--activation_checkpointing_kwargs", "{offload: true}"],
         "--activation_checkpointing_kwargs: offload: computation would wait for its copies: write "
         "activation_checkpointing: offload"),
        ([*NEEDED, "--gradient_checkpointing", "offload", "--fused_kernels", "compile"],
         "--activation_checkpointing: offload: beside fused_kernels: compile a layer is compiled in one: leave out one "
         "of the two"),
        ([*NEEDED, "--tiled_mlp", "yes", "--torch_compile", "yes"],
         "--tiled_mlp: yes: beside torch_compile: yes a layer is compiled in one: leave out one of the two"),
        ([*NEEDED, "--eval_strategy", "epoch"], "--eval_strategy: epoch needs an eval_file (or val_size)"),
        (["--max_tokens_per_batch", "0"], "--max_tokens_per_batch: expected 1 or more, found '0'"),
        ([*NEEDED, "--max_tokens_per_batch", "99", "--packing", "concat"],
         "--max_tokens_per_batch: packing: concat fills sequences of max_length, and a micro batch is "
         "per_device_train_batch_size of them: leave out one of the two"),
        ([*NEEDED, "--batching", "padded", "--packing", "concat"],
         "--batching: padded: packing: concat has no padding: leave out one"),
        (["--sequence_parallel", "0"], "--sequence_parallel: expected 1 or more, found '0'"),
        ([*NEEDED, "--sequence_parallel", "2", "--batching", "padded"],
         "--sequence_parallel: 2: batching: padded: parts are cut from rows laid end to end: leave out one of the two"),
        ([*NEEDED, "--sequence_parallel", "2", "--attn_implementation", "sdpa"],
         "--sequence_parallel: 2: attn_implementation: sdpa: only this package's attention exchanges heads between "
         "ranks: leave out one of the two"),
        ([*NEEDED, "--sequence_parallel", "2", "--adapter", "lora", "--lora_dropout", "0.1"],
         "--sequence_parallel: 2: lora_dropout: 0.1: what is left out would depend on the number of ranks: leave out "
         "one of the two"),
        ([*NEEDED, "--sequence_parallel", "2", "--fused_kernels", "compile"],
         "--sequence_parallel: 2: fused_kernels: compile: no test trains with both: write liger, none or auto"),
        ([*NEEDED, "--sequence_parallel", "2", "--train_sampling_strategy", "batch_rebalance"],
         "--sequence_parallel: 2: train_sampling_strategy: batch_rebalance: it makes batches of its own: leave it out"),
        ([*NEEDED, "--max_tokens_per_batch", "99", "--train_sampling_strategy", "batch_rebalance"],
         "--max_tokens_per_batch: train_sampling_strategy batch_rebalance makes batches of its own"),
        ([*NEEDED, "--max_tokens_per_batch", "99", "--train_sampling_strategy", "group_by_length"],
         "--max_tokens_per_batch: micro batches filled by tokens are about equal, train_sampling_strategy "
         "group_by_length has nothing to order: leave it out, or give per_device_train_batch_size"),
        (["--train_file", "t"],
         "missing: model_name_or_path, output_dir: give each in the --config file or as --model_name_or_path VALUE"),
    ],
)  # fmt: skip
def test_mistakes_in_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert said_of(*flags) == said.replace("{here}", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nlearning_rat: 1\n", ":2: unknown key 'learning_rat': did you mean learning_rate?"),
        ("\n\nmax_length: long\n", ":3: max_length: expected a whole number such as 2048, found 'long'"),
        ("max_length: [1, 2]\n", ":1: max_length: expected a whole number, found '[1, 2]'"),
        ("max_length:\n", ":1: max_length: expected a whole number such as 2048, found ''"),
        ("system_prompt: null\n", ":1: system_prompt: expected text, found 'null'"),
        ("system_prompt: {a: b}\n", ":1: system_prompt: expected text, found '{\"a\": \"b\"}'"),
        ("seed: 1\nseed: 2\nseed: 3\n", ":2: seed is given twice, first in line 1\n"
         "{file}:3: seed is given twice, first in line 1"),
        ("stage: sft\nseed: 1\ncutoff_len: 9\nseed: 2\n", ":1: unknown key 'stage': delete it: every run is supervised "
         "fine-tuning\n{file}:3: unknown key 'cutoff_len': did you mean max_length?\n"
         "{file}:4: seed is given twice, first in line 2"),
        ("- a\n- b\n", ": expected lines of `key: value`"),
        ("", ": expected lines of `key: value`"),
        ("a: b: c\n", ":1: not YAML: mapping values are not allowed here"),
        ("seed: 1\n\tmax_length: 2\n", ":2: not YAML: found character '\\t' that cannot start any token"),
        ("seed: [1\n", ":2: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("adapter: qlora\n", ":1: adapter: expected one of none, lora, dora, found 'qlora': write lora, and "
         "quantization: nf4"),
        ("packing: true\n", ":1: packing: expected one of none, concat, found 'true': delete it: rows lie end to end "
         "anyway; concat fills sequences of max_length"),
        ("adapter: lora\nlora_targets: all\n", ":2: lora_targets: all: all linear layers are all-linear, which is the "
         "default: leave it out"),
        ("adapter: lora\nlora_targets: q_proj,v_proj\n", ":2: lora_targets: q_proj,v_proj: it is one text: "
         "write a list, [q_proj, v_proj]"),
        ("adapter: lora\nlora_targets: 'self_attn.q_proj, up_proj'\n", ":2: lora_targets: self_attn.q_proj, up_proj: "
         "it is one text: write a list, [self_attn.q_proj, up_proj]"),
        ("wandb_project: chats\n", ":1: unknown key 'wandb_project': write report_to: wandb, and set WANDB_PROJECT and "
         "WANDB_ENTITY"),
        ("group_by_length: yes\n", ":1: group_by_length is not a key of today's transformers: "
         "write train_sampling_strategy: group_by_length"),
        ("eval_strategy: epoch\n", ":1: eval_strategy: epoch needs an eval_file (or val_size)"),
    ],
)  # fmt: skip
def test_mistakes_in_yaml(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        from_yaml(tmp_path, text)
    file = tmp_path / "run.yaml"
    assert str(caught.value) == f"{file}{said.replace('{file}', str(file))}"


def test_a_file_may_say_that_there_is_nothing_to_resume_from(tmp_path: Path) -> None:
    assert from_yaml(tmp_path, "resume_from_checkpoint: null\n").resume == "auto"


def test_values_of_other_programs_are_none_of_ours() -> None:
    for name, value in VALUES_NOT_HERE:
        with pytest.raises(UserError, match=re.escape(f": {VALUES_NOT_HERE[name, value]}") + "$"):
            convert(all_keys()[name], Given("", value))


def test_names_of_other_programs_are_none_of_ours() -> None:
    assert not (CALLED_HERE.keys() | NOT_HERE.keys()) & all_keys().keys()
    assert not CALLED_HERE.keys() & NOT_HERE.keys()
    assert {ALIASES.get(name, name) for name in CALLED_HERE.values()} <= all_keys().keys()


@pytest.mark.parametrize(("content", "said"), [(b"a: \xff", "not UTF-8"), (b"a: \x00", "not YAML")])
def test_files_that_are_no_text(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "run.yaml").write_bytes(content)
    text = said_of("--config", str(tmp_path / "run.yaml"))
    assert text.startswith(f"{tmp_path / 'run.yaml'}: {said}")
    assert "\n" not in text


# ---- Round trip, shipped files, help

AWKWARD = {
    "system_prompt": "你好: #1\n  - \"quoted\" 'twice'\n\ttab \U0001f600\n\n",
    "run_name": "1e3",
    "eval_file": "null",
    "train_file": " leading and trailing ",
    "output_dir": "o/ü",
    "swanlab_project": "yes",
    "predict_max_new_tokens": 7,
}


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    flags = [str(word) for name, value in AWKWARD.items() for word in (f"--{name}", value)]
    flags += ["--model_name_or_path", "m", "--learning_rate", "1e-7", "--lr_scheduler_kwargs", "{a: [1, x], b: null}"]
    flags += [
        "--hub_token",
        "hf_secret",
        "--report_to",
        "[tensorboard]",
        "--deepspeed",
        "{zero_optimization: {stage: 2}}",
    ]
    flags = [flag if flag != "null" else '"null"' for flag in flags]
    config = load_config(flags)
    config = dataclasses.replace(config, eval_file="null")
    config.save(tmp_path / "config.yaml")
    assert "hf_secret" not in (tmp_path / "config.yaml").read_text(encoding="utf-8")
    again = load_config(["--config", str(tmp_path / "config.yaml")])
    training = {name: value for name, value in config.training.items() if name != "hub_token"}
    assert again == dataclasses.replace(config, training=training)
    for name, value in AWKWARD.items():
        assert value_of(again, name) == value


def test_every_default_is_read_back(tmp_path: Path) -> None:
    config = load_config(NEEDED)
    config.save(tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_paths_of_a_run_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder, also where the project has moved, or the output folder alone out of it; what names no path, or
    what is nowhere, stays as it is written. Where the run was started all does."""
    project = tmp_path / "project"
    for folder in ("models/base", "data", "runs/one"):
        (project / folder).mkdir(parents=True)
    for file in ("data/a.jsonl", "data/b.jsonl", "own.jinja", "engine.json"):
        (project / file).write_text("", encoding="utf-8")
    monkeypatch.chdir(project)
    keys = {"model_name_or_path": "models/base", "train_file": "[{path: data/a.jsonl, weight: 2}, hub:x/y, no/rows]",
            "eval_file": "data/[ab].jsonl", "output_dir": "runs/one", "cache_dir": "cache", "template": "own.jinja",
            "deepspeed": "engine.json"}  # fmt: skip
    config = load_config([word for name, value in keys.items() for word in (f"--{name}", value)])
    config.save(Path("runs/one/config.yaml"))
    assert load_config(["runs/one"]) == config

    def names(folder: Path, output: Path) -> None:
        """What the keys are, read from `tmp_path`, of the project in `folder` and the run in `output`."""
        monkeypatch.chdir(tmp_path)
        found = load_config([str(output)])
        assert {name: value_of(found, name) for name in keys} == {
            "model_name_or_path": f"{folder}/models/base",
            "train_file": [{"path": f"{folder}/data/a.jsonl", "weight": 2}, "hub:x/y", "no/rows"],
            "eval_file": f"{folder}/data/[ab].jsonl",
            "output_dir": f"{folder}/runs/one",
            "cache_dir": f"{folder}/cache",
            "template": f"{folder}/own.jinja",
            "deepspeed": f"{folder}/engine.json",
        }

    names(project, project / "runs/one")
    (project / "runs/one").rename(tmp_path / "one")
    names(project, tmp_path / "one")
    (tmp_path / "one").rename(project / "runs/one")
    names(project.rename(tmp_path / "moved"), tmp_path / "moved/runs/one")


def test_a_run_is_read_again_whose_checkpoint_to_resume_from_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best").mkdir()
    config = load_config([*NEEDED, "--resume", "best"])
    config.save(tmp_path / "config.yaml")
    (tmp_path / "best").rmdir()
    assert load_config(["config.yaml"]) == config
    (tmp_path / "mine.yaml").write_text("resume: best\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml:1: resume: expected auto, never or the folder of a checkpoint"):
        load_config(["mine.yaml", *NEEDED])


def test_the_first_word_may_be_the_file(tmp_path: Path) -> None:
    """Also behind what DeepSpeed's launcher puts before it; and a run's output folder."""
    file = tmp_path / "config.yaml"
    file.write_text("max_length: 7\n", encoding="utf-8")
    for words in ([str(file)], [str(tmp_path)], ["--local_rank=0", str(file)], ["--config", str(file)]):
        assert load_config([*words, *NEEDED]).max_length == 7
    assert said_of(str(file), "--config", str(file)) == (
        "--config is given twice: a run has one file, and flags beside it"
    )


@pytest.mark.parametrize(
    ("text", "trackers"),
    [
        ("seed: 1\n", ["swanlab"]), ("report_to:\n", ["swanlab"]), ("report_to: none\n", []), ("report_to: []\n", []),
        ("report_to: swanlab\n", ["swanlab"]), ("report_to: [tensorboard]\n", ["tensorboard"]),
    ],
)  # fmt: skip
def test_trackers_are_what_report_to_names(tmp_path: Path, text: str, trackers: list[str]) -> None:
    """And so they are when the run's keys are read back."""
    config = from_yaml(tmp_path, text)
    config.save(tmp_path / "config.yaml")
    assert config.trackers == load_config(["--config", str(tmp_path / "config.yaml")]).trackers == trackers


def test_tokens_fill_micro_batches_unless_their_rows_are_given(tmp_path: Path) -> None:
    """And so it stays when the run's keys are read back."""
    config = from_yaml(tmp_path, "max_tokens_per_batch: 4096\n")
    assert config.fills_batches
    assert "per_device_train_batch_size" not in config.training
    assert config.micro_batch == 1
    config.save(tmp_path / "config.yaml")
    assert load_config(["--config", str(tmp_path / "config.yaml")]) == config
    config = from_yaml(tmp_path, "max_tokens_per_batch: 4096\n", "--per_device_train_batch_size", "1")
    assert not config.fills_batches
    assert not from_yaml(tmp_path, "max_length: 7\n").fills_batches


@pytest.mark.parametrize("file", sorted((ROOT / "ds_configs").glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_files_load(file: Path) -> None:
    config = load_config(["--config", str(file)])
    assert config.training["deepspeed"] in ENGINES


def test_the_references_hyper_parameters_are_the_defaults() -> None:
    """Spelled out: the reference script's values, in the shipped file and in the code."""
    expected = {
        "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "gradient_accumulation_steps": 4,
        "num_train_epochs": 2.0, "learning_rate": 1e-4, "eval_strategy": "steps", "eval_steps": 100.0,
        "logging_steps": 10.0, "save_steps": 400.0, "save_on_each_node": True, "activation_checkpointing": True,
        "bf16": True,
    }  # fmt: skip
    shipped = load_config(["--config", str(ROOT / "ds_configs" / "qwen3_dialog.yaml")])
    defaults = load_config([*NEEDED, "--eval_file", "e"])
    for name, value in expected.items():
        assert (shipped.training[name], defaults.training[name]) == (value, value), name
    ours = ("system_prompt", "max_length", "on_bad_row", "num_predictions")
    assert [value_of(shipped, name) for name in ours] == [value_of(defaults, name) for name in ours]
    assert [value_of(defaults, name) for name in ours] == [REFERENCE_PROMPT, 2048, "error", 3]
    assert shipped.model_name_or_path == "Qwen/Qwen3-0.6B"


def test_keys_are_those_of_the_installed_transformers() -> None:
    from transformers import TrainingArguments

    assert set(training_keys()) == {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert not set(our_keys()) & set(training_keys())
    assert set(TRAINING_DEFAULTS) <= set(training_keys())


def test_attentions_are_those_of_the_installed_transformers() -> None:
    """But for those that serve; and one more, which a kernel of the hub's has by its name, is no mistake either."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    trains = {name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if "paged" not in name and ":" not in name}
    assert {"eager", *trains} - {"ds_sft_rows"} == set(ATTENTIONS)
    for kernel in ("kernels-community/flash-attn3", "kernels-community/flash-attn3@v1.2:flash_attn"):
        assert load_config([*NEEDED, "--attn_implementation", kernel]).attn_implementation == kernel


def test_converted_values_are_accepted_by_transformers(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    config = from_yaml(
        tmp_path,
        "use_cpu: yes\nlr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n"
        "optim: adamw_torch\nlearning_rate: 2e-5\n"
        "save_total_limit: 2\nreport_to: none\nsave_strategy: epoch\nbf16: no\nwarmup_steps: 0.1\n",
    )
    args = TrainingArguments(**config.training)
    assert (args.learning_rate, args.save_total_limit, args.bf16, args.warmup_steps) == (2e-5, 2, False, 0.1)
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}


def test_help_has_every_key_once_ours_first() -> None:
    lines = [line.split()[0] for line in help_text("train.py").splitlines() if line.startswith("  --")]
    names = [line.removeprefix("--") for line in lines]
    assert names[: len(our_keys())] == list(our_keys())
    # Some of transformers' keys have another name here; help shows the one with the default.
    assert sorted(names) == sorted(set(all_keys()) - set(ALIASES))


def test_help_says_how_a_list_and_a_mapping_are_flags() -> None:
    """With an example, which is read."""
    (line,) = (line for line in help_text("train.py").splitlines() if line.startswith("YAML: "))
    config = load_config([*NEEDED, "--lr_scheduler_type", "cosine_with_min_lr", *shlex.split(line)[1:]])
    assert (config.trackers, config.training["lr_scheduler_kwargs"]) == (
        ["swanlab", "tensorboard"],
        {"min_lr_rate": 0.1},
    )


def test_help_names_what_deepspeed_may_be() -> None:
    (line,) = (line for line in help_text("train.py").splitlines() if line.startswith("  --deepspeed "))
    assert line.split(maxsplit=1)[1] == f"{', '.join(ENGINES)}, or a JSON file of DeepSpeed's options"


@pytest.mark.parametrize("flags", [["--help"], ["--config", "none.yaml", "-h"]])
def test_help_needs_no_torch(flags: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "from ds_sft.config.read import load_config\n"
        "try: load_config(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, [n for n in ('torch', 'transformers') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.startswith("usage: train.py FILE.yaml [--key value ...]\n")
    assert done.stdout.endswith("\n0 []\n")


def test_yaml_is_plain_yaml(tmp_path: Path) -> None:
    """What `save` writes any YAML reader understands."""
    config = load_config(NEEDED)
    config.save(tmp_path / "config.yaml")
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8"))["max_length"] == 2048


OPTIMIZERS = {
    "in float32": (["--optimizer_dtype", "bfloat16", "--bf16", "no"],
                   "--optimizer_dtype: bfloat16: forward and backward are not in bfloat16: write bf16: yes too, or "
                   "leave it out"),
    "fp16": (["--optimizer_dtype", "bfloat16", "--fp16", "yes"],
             "--optimizer_dtype: bfloat16: forward and backward are not in bfloat16: write bf16: yes too, or leave it "
             "out"),
    "an adapter": (["--optimizer_dtype", "bfloat16", "--adapter", "lora"],
                   "--optimizer_dtype: bfloat16: the states of adapter: lora are small, and stay float32: leave it "
                   "out"),
    "8 bits": (["--optimizer_dtype", "bfloat16", "--optim", "adamw_8bit"],
               "--optimizer_dtype: bfloat16: optim: adamw_8bit rounds to nearest, which loses small updates: leave out "
               "one of the two"),
    "muon beside an adapter": (["--optim", "muon", "--adapter", "lora"],
                               "--optim: muon: an adapter's matrices are no updates of their own, their product is: "
                               "leave out one of optim: muon and adapter: lora"),
    "torchao's": (["--optim", "adamw_torch_8bit"],
                  "--optim: expected one of adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit, "
                  "lion_32bit, adafactor, muon, or my.module:thing, found 'adamw_torch_8bit': did you mean "
                  "adamw_torch?"),
    "a beginning": (["--optim", "adamw"],
                    "--optim: expected one of adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit, lion_32bit, "
                    "adafactor, muon, or my.module:thing, found 'adamw': did you mean adamw_torch?"),
    "states of Adam": (["--optim", "adafactor", "--adam_beta2", "0.95"],
                       "--adam_beta2: optim: adafactor has none: leave it out"),
    "states of a user's optimizer": (["--optim", "my_module:SGD", "--adam_beta1", "0.8"],
                                     "--adam_beta1: optim: my_module:SGD has none: write optim_args"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_no_run_has_is_refused(name: str) -> None:
    flags, said = OPTIMIZERS[name]
    with pytest.raises(UserError) as error:
        load_config([*NEEDED, *flags])
    assert str(error.value) == said


def test_optimizers_that_transformers_knows_and_one_that_it_does_not() -> None:
    for optim in ("muon", "adamw_8bit", "adamw_torch"):
        assert load_config([*NEEDED, "--optim", optim]).training["optim"] == optim
    assert (
        load_config([*NEEDED, "--optimizer_dtype", "bfloat16", "--optim", "adamw_torch"]).optimizer_dtype == "bfloat16"
    )
