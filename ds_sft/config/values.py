"""A value as a person wrote it -> a value of its key's type, within the bounds of that key."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from ds_sft.config.elsewhere import VALUES_NOT_HERE
from ds_sft.config.extension import EXAMPLE, is_dotted
from ds_sft.config.keys import ALSO, FILES
from ds_sft.config.refused import UNSAFE, UNUSED
from ds_sft.config.upstream_keys import Key
from ds_sft.errors import UserError, nearest_value

POSITIVE = ("early_stopping_patience", "max_length", "lora_rank", "max_tokens_per_batch", "sequence_parallel",
            "preprocessing_num_workers", "predict_max_new_tokens", "per_device_train_batch_size",
            "per_device_eval_batch_size", "gradient_accumulation_steps", "save_total_limit", "torch_empty_cache_steps",
            "ddp_bucket_cap_mb", "ddp_timeout")  # fmt: skip
TRUE, FALSE = ("true", "yes", "on", "1", "y"), ("false", "no", "off", "0", "n")
NOT_NEGATIVE = ("lora_dropout", "router_aux_loss_coef", "num_predictions", "evaluate_rows", "val_size", "learning_rate",
                "weight_decay", "warmup_steps", "max_grad_norm", "dataloader_num_workers", "seed", "data_seed",
                "eval_delay", "neftune_noise_alpha", "label_smoothing_factor", "adam_beta1", "adam_beta2",
                "adam_epsilon")  # fmt: skip
SHARES = ("lora_dropout", "label_smoothing_factor", "adam_beta1", "adam_beta2")
# Options of `activation_checkpointing_kwargs`: transformers' and those of torch.utils.checkpoint.
OF_CHECKPOINTING = ("use_reentrant", "every_n_layers", "offload", "preserve_rng_state", "determinism_check", "debug",
                    "early_stop")  # fmt: skip
# Steps below 1 are a share of all.
ABOVE_ZERO = ("lora_alpha", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")
STEPS = ("warmup_steps", "logging_steps", "eval_steps", "save_steps")
EXTENSIBLE = ("data_format", "optim", "attn_implementation")  # keys of choices that also name a user's own code
NOT_EMPTY = ("lora_targets", "lora_modules_to_save", "train_only")  # lists
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


def plain(node: Any) -> Any:
    """A YAML list or mapping as Python values; inside it scalars mean what YAML says, and 2e-5 is a number."""
    if isinstance(node, yaml.MappingNode):
        return {str(k.value): plain(v) for k, v in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    if node.style is None and node.tag == "tag:yaml.org,2002:str":
        return _number(node.value)
    return yaml.safe_load(node.value) if node.style is None else node.value


def _number(text: str) -> Any:
    """A number where YAML 1.1 sees text: it wants a dot in 2e-5."""
    return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else text


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


def convert(known: Key, given: Given) -> Any:
    if known.name in UNSAFE or known.name in UNUSED:
        return _so_anyway(known, given)
    value = given.value
    empty = given.empty
    if empty and known.optional and not (value.lower() == "none" and known.name == "report_to"):
        return None
    if empty and known.name == "resume" and value in ("null", "~"):  # resume_from_checkpoint: null, as many write
        return known.default
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
        meant = _meant(known, value)
        raise UserError(f"{place}: expected {expected}, found {_shown(value)!r}{meant}") from None
    return result


def _meant(known: Key, value: Any) -> str:
    """What to write instead of a wrong value, where that can be told."""
    if not isinstance(value, str):
        return ""
    if (known.name, value.lower()) in VALUES_NOT_HERE:
        return f": {VALUES_NOT_HERE[known.name, value.lower()]}"
    near = nearest_value(value, known.choices)
    return f": did you mean {near}?" if near and near != value else ""  # a choice may be one that is refused


def _by_type(known: Key, value: Any, empty: bool) -> Any:
    """The value as the key's type. Raises ValueError saying what was expected."""
    names = set(re.findall(r"\w+", known.type))
    if known.choices and isinstance(value, (list, dict)) and not {"list", "dict"} & names:
        raise ValueError(_one_of(known.choices))
    if isinstance(value, dict):
        return _expect("dict" in names, value, _noun(names))
    if known.name in FILES:  # a path may well begin with a bracket: [ab].jsonl
        return value if isinstance(value, list) or not value.startswith(("[{", "[ ")) else _flow(value, list)
    if isinstance(value, list):
        items = value if "Any" in names else [str(item) for item in value]
        return _expect("list" in names, items, _noun(names))
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
    value = None if node is None else plain(node)
    return _expect(isinstance(value, kind), value, noun)


def _check(known: Key, value: Any) -> None:
    extended = known.name in EXTENSIBLE
    if known.choices and value not in known.choices and not (extended and is_dotted(value)):
        if known.name == "attn_implementation" and is_repo(re.split("[@:]", value)[0]):
            return  # a kernel of the hub's: OWNER/NAME@REVISION:FUNCTION
        raise ValueError(_one_of(known.choices) + f", or {EXAMPLE}" * extended)
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
    if known.name == "include_num_input_tokens_seen" and value not in (True, False, "all", "non_padding"):
        raise ValueError("yes, no, all or non_padding")
    if known.name == "activation_checkpointing_kwargs" and value is not None:
        _check_options(value, OF_CHECKPOINTING, "a mapping such as {use_reentrant: false}")
    if known.name in STEPS and value is not None and value >= 1 and value != int(value):
        raise ValueError("a whole number of steps, or a share below 1")
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
    if known.name == "callbacks" and value is not None:
        check_callbacks(value)
    if known.name == "profile_steps" and value is not None and step_range(value) is None:
        raise ValueError("steps such as 10-12, the first 1 or more, the last not before it")
    if known.name == "hub_strategy" and value != "end":
        raise ValueError("end (a run pushes once, after its export was verified)")
    if known.name == "hub_model_id" and value is not None and not is_repo(value):
        raise ValueError("a repository such as me/my-model")
    if known.name == "export_max_shard_size" and not is_size(value):
        raise ValueError("a size such as 5GB or 500MB")


def _check_options(options: Any, names: Iterable[str], example: str) -> None:
    """The names of a mapping's options."""
    if not isinstance(options, dict):
        raise ValueError(example)
    for name in options:
        if name not in names:
            raise ValueError(_option_meant(names, name))


def check_callbacks(items: Any) -> None:
    """Names of `callbacks`, each alone or with the arguments that it is made with; whether there is one is seen later.

    Raises:
        ValueError: saying what was expected.
    """
    for item in items:
        pair = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, {})
        if not is_dotted(pair[0]) or not isinstance(pair[1], dict):
            found = json.dumps(item, ensure_ascii=False, default=str)
            raise ValueError(f"each to be my.module:Thing, or {{my.module:Thing: {{argument: 1}}}}; {found} is neither")


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
    """Names and numbers of `rope_scaling`; whether a model can take it `model/rotary.py` finds out.

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
        raise ValueError(f"rope_type to be {_one_of(ROPE_TYPES)}")
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


def _one_of(choices: Iterable[str]) -> str:
    return f"one of {', '.join(choices)}"
