"""The model card of a pushed model: README.md with what the run knows of itself, and nothing that is private.

Numbers, names of the hub and versions only: no path, host or user, no row of the data, no key but those named here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from shlex import quote
from string import Template
from typing import Any

import yaml

from ds_sft import __version__

LICENSE_OPEN = (
    "The author of this model has not chosen a licence yet. It must agree with that of the base model and of the data; "
    "`license: ...` at the top of this file says it."
)
NOT_COMPARED = "The weights were not compared with the trained ones after they were written."
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # of --max-lora-rank
USE_MODEL = """
## Use

The chat template and the tokens that end an answer are in the files: what a server sends is what training taught.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$repo")
model = AutoModelForCausalLM.from_pretrained("$repo", dtype="auto")
messages = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```

```bash
vllm serve $repo
```
"""
USE_ADAPTER = """
## Use

The chat template and the tokens that end an answer are in the files, beside the adapter: a server is given both.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, ${more}GenerationConfig

tokenizer = AutoTokenizer.from_pretrained("$repo")
model = AutoModelForCausalLM.from_pretrained("$base", $loading)
model = PeftModel.from_pretrained(model, "$repo")
ends = GenerationConfig.from_pretrained("$repo")
messages = [{"role": "user", "content": "Hello!"}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**prompt, generation_config=ends, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
```
"""
SERVE_ADAPTER = """
```bash
hf download $repo --local-dir $name
vllm serve $base --tokenizer $name --generation-config $name \\
    --enable-lora --max-lora-rank $rank --lora-modules $name=$name$overrides
```
"""
# What of a run's keys others need to train alike; keys with a text of the user's or a path are not among them.
TRAINING_KEYS = (
    "adapter", "lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "lora_modules_to_save", "use_rslora",
    "lora_init", "train_only", "quantization",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
    "max_tokens_per_batch", "max_length", "rope_scaling", "overlong", "packing", "mask", "thinking", "bf16", "fp16",
    "seed",
)  # fmt: skip
OF_ADAPTERS = TRAINING_KEYS[:10]
DATA_ROWS = {
    "rows_read": "rows read",
    "rows_kept": "rows kept",
    "rows_truncated": "rows cut at `max_length`",
    "rows_per_epoch": "rows an epoch",
    "tokens": "tokens",
    "supervised_tokens": "supervised tokens",
    "recommended_max_length": "`max_length` that holds 99 % of the rows whole",
}
VERSIONS = ("ds_sft", "transformers", "torch", "deepspeed", "peft", "tokenizers", "datasets", "python")


@dataclass(frozen=True)
class Facts:
    """What a card is written from.

    Args:
        repo: OWNER/NAME.
        run, keys, data: run.json, config.yaml and data_report.json of the run; empty where there are none.
        base: hub id of the model that training began with; None where it has none.
        datasets: hub ids.
        adapter: whether an adapter is pushed, and not a whole model.
        loading: arguments of `from_pretrained` for a base in 4 bits, see `loading_in_4_bits`; "" for others.
        base_changes: keys of the base's config.json with the values that an adapter was trained with.
        license: an identifier of the hub's such as apache-2.0; None: not chosen.
    """

    repo: str
    run: Mapping[str, Any]
    keys: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]]
    base: str | None
    datasets: list[str]
    adapter: bool
    loading: str
    base_changes: Mapping[str, Any]
    license: str | None


def model_card(facts: Facts) -> str:
    """README.md: YAML front matter as the hub reads it, and Markdown."""
    sections = [_title(facts), _use(facts), _results(facts), _data(facts), _training(facts), _versions(facts)]
    sections += [] if facts.license else [f"## Licence\n\n{LICENSE_OPEN}"]
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Facts) -> dict[str, Any]:
    kind = facts.keys.get("adapter", "none")
    tags = ["ds_sft", "sft", "conversational", *([kind] if kind != "none" else [])]
    front: dict[str, Any] = {"license": facts.license} if facts.license else {}
    if facts.base:
        front |= {"base_model": facts.base, "base_model_relation": "adapter" if facts.adapter else "finetune"}
    front |= {"library_name": "peft" if facts.adapter else "transformers", "pipeline_tag": "text-generation"}
    front |= {"tags": tags}
    return front | ({"datasets": facts.datasets} if facts.datasets else {})


def _title(facts: Facts) -> str:
    name = facts.repo.partition("/")[2]
    of = f"[{facts.base}](https://huggingface.co/{facts.base})" if facts.base else "a chat model"
    how = f"{'An adapter for' if facts.adapter else 'Supervised fine-tuning of'} {of}, made with ds_sft."
    return f"# {name}\n\n{how}"


def _use(facts: Facts) -> str:
    """How to load it: transformers and vLLM, an adapter through peft."""
    names = {
        "repo": facts.repo,
        "name": facts.repo.partition("/")[2],
        "base": facts.base,
        "loading": ", ".join([facts.loading or 'dtype="auto"', *(f"{k}={v!r}" for k, v in facts.base_changes.items())]),
        "overrides": f" \\\n    --hf-overrides {quote(json.dumps(facts.base_changes))}" if facts.base_changes else "",
        "more": "BitsAndBytesConfig, " if facts.loading else "",
    }
    text = USE_ADAPTER if facts.adapter else USE_MODEL
    vllm_takes_it = (
        facts.keys.get("adapter") == "lora" and not facts.keys.get("lora_modules_to_save") and not facts.loading
    )
    text += SERVE_ADAPTER if facts.adapter and vllm_takes_it else ""
    return Template(text.strip()).substitute(names, rank=_served_rank(facts.keys.get("lora_rank", 16)))


def _served_rank(rank: int) -> int:
    """The smallest of the ranks that vLLM has room for: it knows no others."""
    return next((size for size in VLLM_RANKS if size >= rank), rank)


def _results(facts: Facts) -> str:
    run, export = facts.run, facts.run.get("export") or {}
    rows = []
    first, last = run.get("eval_loss_first"), run.get("eval_loss")
    if last is not None:
        rows += [] if first is None else [("validation loss, first evaluation", f"{first:.4f}")]
        best = " (best checkpoint)" if run.get("best_checkpoint") else ", last evaluation"
        rows.append((f"validation loss{best}", f"{last:.4f}"))
    for name in ("steps", "tokens", "parameters", "trained_parameters"):
        if run.get(name) is not None:
            rows.append((name.replace("_", " "), f"{run[name]:,}"))
    if run.get("epochs") is not None:
        rows.append(("epochs", f"{run['epochs']:.4g}"))
    return _section("Results", rows, _verified(export))


def _verified(export: Mapping[str, Any]) -> str:
    if not export.get("verified"):
        return NOT_COMPARED
    return (
        f"The files were loaded in a fresh process: their loss on {export['rows']} rows is "
        f"{export['loss_on_disk']:.6f}, that of the trained model {export['loss_trained']:.6f} "
        f"(difference {export['difference']:.1e}, bound {export['bound']:.1e})."
    )


def _data(facts: Facts) -> str:
    """The data report's numbers, a column each split."""
    splits = list(facts.data)
    if not splits:
        return ""
    found = {text: [facts.data[split].get(name, 0) for split in splits] for name, text in DATA_ROWS.items()}
    reasons = dict.fromkeys(reason for split in splits for reason in facts.data[split].get("rows_dropped", {}))
    for reason in reasons:
        found[f"rows dropped: {reason}"] = [facts.data[s].get("rows_dropped", {}).get(reason, 0) for s in splits]
    rows = [(text, *(f"{count:,}" for count in counts)) for text, counts in found.items()]
    return _section("Data", rows, head=("", *splits))


def _training(facts: Facts) -> str:
    adapts = facts.keys.get("adapter", "none") != "none"
    names = [name for name in TRAINING_KEYS if adapts or name not in OF_ADAPTERS]
    rows = [(f"`{name}`", f"`{value}`") for name in names if (value := facts.keys.get(name)) is not None]
    for name in ("world_size", "zero_stage"):
        if facts.run.get(name) is not None:
            rows.append((name.replace("_", " "), str(facts.run[name])))
    return _section("Training", rows)


def _versions(facts: Facts) -> str:
    found = {"ds_sft": __version__} | dict(facts.run.get("versions", {}))
    return _section("Versions", [(name, found[name]) for name in VERSIONS if name in found])


def _section(title: str, rows: Iterable[tuple[str, ...]], text: str = "", *, head: tuple[str, ...] = ("", "")) -> str:
    """A heading, a table and a line of text; nothing where there is neither."""
    lines = [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    if not lines and not text:
        return ""
    table = "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]) if lines else ""
    return "\n\n".join(part for part in (f"## {title}", table, text) if part)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
