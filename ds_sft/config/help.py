"""What `--help` says of every key."""

from __future__ import annotations

from ds_sft.config.keys import ENGINES, MUON, TORCH_ADAMW, TRAINING_DEFAULTS
from ds_sft.config.upstream_keys import ALIASES, Key, our_keys, training_keys

OUR_WORDS = {
    "deepspeed": f"{', '.join(ENGINES)}, or a JSON file of DeepSpeed's options",
    "activation_checkpointing": "keep each layer's input alone and compute the layer again in backward; offload: keep "
                                "it in host memory",
    "optim": f"AdamW ({TORCH_ADAMW[0]}), adamw_8bit, {MUON}, another of transformers', or your my.module:Optimizer",
    "report_to": "trackers of the curves: swanlab, tensorboard, wandb, mlflow, ..., your my.module:Tracker, or none",
}  # fmt: skip


def help_text(prog: str) -> str:
    """Ours first, then every field of TrainingArguments."""
    lines = [
        f"usage: {prog} FILE.yaml [--key value ...]",
        "",
        "Fine-tunes a chat model on dialogues. Every key below goes into the YAML file or on the command line,",
        "spelled the same; flags win over the file, the file over the defaults. A list or a mapping is one word, as in",
        "YAML: --report_to '[swanlab, tensorboard]' --lr_scheduler_kwargs '{min_lr_rate: 0.1}'",
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
