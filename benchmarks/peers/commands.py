"""How each program is asked for the same training: what it is given, its command and its files."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]

ALPHA = 2  # lora_alpha / rank


@dataclass(frozen=True)
class Candidate:
    """A program and the layout of its micro batches.

    Layouts: `padded`: all rows that a rank learns from in a step, padded; `single`: one row at a time, accumulated;
    `flat`: those rows end to end (padding-free; LLaMA-Factory's neat_packing).
    """

    program: str
    layout: str
    recompute: bool = True  # gradient checkpointing; the default of every peer and of the reference
    recommended: bool = False  # what the program's own documentation or examples use

    @property
    def name(self) -> str:
        return f"{self.program} {self.layout}{'' if self.recompute else ', not recomputed'}"


CANDIDATES = [
    Candidate("ours", "flat", recompute=False, recommended=True),
    Candidate("ours", "flat"),
    Candidate("ours", "single"),
    Candidate("reference", "single", recommended=True),
    Candidate("trl", "padded", recommended=True),  # its default: eight rows a rank
    Candidate("trl", "single"),
    Candidate("trl", "flat"),
    Candidate("llamafactory", "padded"),
    Candidate("llamafactory", "single", recommended=True),  # examples/train_full
    Candidate("llamafactory", "flat"),
    Candidate("ms-swift", "padded"),
    Candidate("ms-swift", "single", recommended=True),  # its default
    Candidate("ms-swift", "flat"),
]


@dataclass(frozen=True)
class Job:
    """The training that all are asked for."""

    folder: Path  # rows.jsonl, rendered.jsonl, messages.jsonl
    model: Path
    system: str
    batch: int  # rows a step, over all ranks
    steps: int
    longest: int  # tokens of the longest row
    tokens: int  # of all rows
    ranks: int = 1
    stage: int = 0  # DeepSpeed's; 0: no DeepSpeed
    threads: int = 1  # of each rank
    most: int | None = None  # rows of a micro batch, at most
    device: str = "cpu"
    logging: int = 1  # steps between two losses
    lora: int = 0  # rank of adapters on all linear layers; 0: all weights are trained
    more: dict[str, Any] = field(default_factory=dict)  # keys of this run, over all others; ours: None leaves one out

    def micro(self, candidate: Candidate) -> int:
        return 1 if candidate.layout == "single" else min(self.batch // self.ranks, self.most or self.batch)

    def keys(self, candidate: Candidate, out: Path) -> dict[str, Any]:
        """Fields of TrainingArguments, the same for all; the rows come in the file's order."""
        micro = self.micro(candidate)
        keys: dict[str, Any] = {
            "output_dir": str(out),
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": self.batch // self.ranks // micro,
            "num_train_epochs": 1,
            "learning_rate": 2e-5,
            "lr_scheduler_type": "constant",
            "weight_decay": 0.0,
            "adam_beta2": 0.999,
            "max_grad_norm": 1.0,
            "bf16": True,
            "logging_steps": self.logging,
            "save_strategy": "no",
            "report_to": "none",
        }
        if self.device == "cpu":
            keys |= {"use_cpu": True, "dataloader_num_workers": 0, "dataloader_pin_memory": False}
        if self.stage:
            keys["deepspeed"] = str(ROOT / "ds_configs" / f"zero{self.stage}.json")
        return keys


def command_for(candidate: Candidate, job: Job, out: Path, home: Path | None) -> tuple[list[str], dict[str, str]]:
    """The command, whose files it writes beside `out`, and what its environment needs besides the common.

    Args:
        home: the peer's virtual environment, None for ours and the reference.
    """
    write = {"ours": ours, "reference": reference, "trl": trl, "llamafactory": llamafactory, "ms-swift": ms_swift}
    return write[candidate.program](candidate, job, out, home or Path(sys.executable).parents[1])


def environment(candidate: Candidate, job: Job, probe: Path, home: Path | None) -> dict[str, str]:
    """The same for all: threads, no network, the probe; caches and compiled ops beside the peer."""
    own, found = dict(os.environ), os.environ.get("PYTHONPATH")
    own |= {
        "OMP_NUM_THREADS": str(job.threads),
        "OMP_WAIT_POLICY": "PASSIVE",  # a thread that waits for another does not count as work
        "DS_SFT_PROBE": str(probe),
        # What this Python finds, its own programs find, too.
        "PYTHONPATH": os.pathsep.join([str(HERE / "probe"), *([found] if found and home is None else [])]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(job.folder / "huggingface"),
        "MODELSCOPE_CACHE": str(job.folder / "modelscope"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if home is not None:
        own["PATH"] = f"{home / 'bin'}{os.pathsep}{own.get('PATH', '')}"
    if job.stage and candidate.program != "ours" and job.device == "cpu":  # ours does it by itself
        own["DS_SFT_PROBE_GLOO"] = "yes"
    own["TORCH_EXTENSIONS_DIR"] = str((home or ROOT / ".cache") / "torch_extensions")
    return own


def python(job: Job, home: Path) -> list[str]:
    """Python, or torchrun where there are ranks or an engine."""
    own = home == Path(sys.executable).parents[1]  # which may have another name
    if job.ranks == 1 and not job.stage:
        return [sys.executable if own else str(home / "bin" / "python")]
    torchrun = [sys.executable, "-m", "torch.distributed.run"] if own else [str(home / "bin" / "torchrun")]
    return [*torchrun, f"--nproc_per_node={job.ranks}", f"--master_port={free_port()}"]


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return str(listener.getsockname()[1])


def ours(candidate: Candidate, job: Job, out: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    keys = job.keys(candidate, out) | {
        "model_name_or_path": job.model,
        "train_file": job.folder / "rows.jsonl",
        "cache_dir": job.folder / "cache",
        "system_prompt": job.system,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": candidate.recompute,
        "num_predictions": 0,
        "verify_export": False,
        "swanlab_mode": "disabled",
    }
    if candidate.layout == "flat":
        keys["batching"] = "padding_free"
    if job.lora:
        keys |= {"adapter": "lora", "lora_rank": job.lora, "lora_alpha": ALPHA * job.lora, "merge": "no"}
    keys |= job.more
    flags = [str(word) for key, value in keys.items() if value is not None for word in (f"--{key}", value)]
    return [*python(job, home), str(ROOT / "ds_sft" / "train.py"), *flags], {}


def reference(candidate: Candidate, job: Job, out: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    keys = job.keys(candidate, out) | {
        "model": str(job.model),
        "rows": str(job.folder / "rendered.jsonl"),
        "bf16": bool(job.stage),  # as written it has no autocast: the weights themselves are bfloat16
        "gradient_checkpointing": True,
        "train_sampling_strategy": "sequential",
        **job.more,
    }
    return [*python(job, home), str(HERE / "reference.py"), written(keys, out)], {}


def trl(candidate: Candidate, job: Job, out: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    keys = job.keys(candidate, out) | {
        "model": str(job.model),
        "rows": str(job.folder / "rendered.jsonl"),
        "gradient_checkpointing": candidate.recompute,
        "padding_free": candidate.layout == "flat",
        "max_length": None if candidate.layout == "flat" else 2048,
        "train_sampling_strategy": "sequential",
        **job.more,
    }
    if job.lora:
        keys["lora"] = {"r": job.lora, "lora_alpha": ALPHA * job.lora, "target_modules": "all-linear"}
        keys["model_init_kwargs"] = {"dtype": "bfloat16"}
    return [*python(job, home), str(HERE / "trl_sft.py"), written(keys, out)], {}


def llamafactory(candidate: Candidate, job: Job, out: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    """Its template `empty` leaves the rendered rows as they are, so that all learn the same tokens."""
    columns = {"prompt": "prompt", "response": "completion"}
    listed = {"rows": {"file_name": "rendered.jsonl", "columns": columns}}
    (job.folder / "dataset_info.json").write_text(json.dumps(listed), encoding="utf-8")
    keys = job.keys(candidate, out) | {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(job.model),
        "template": "empty",
        "dataset": "rows",
        "dataset_dir": str(job.folder),
        "cutoff_len": 2048,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": not candidate.recompute,
    }
    if job.lora:
        keys |= {"finetuning_type": "lora", "lora_rank": job.lora, "lora_alpha": ALPHA * job.lora, "lora_target": "all"}
    if candidate.layout == "flat":  # a sequence for each rank and step, of the same number of tokens
        length = max(job.longest + 1, -(-job.tokens // (job.steps * job.ranks)))
        length = -(-length // 8) * 8  # it pads ids to a multiple of 8, and positions not
        keys |= {"packing": True, "neat_packing": True, "cutoff_len": length}
        keys |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    launch = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(job.ranks), "MASTER_PORT": free_port()}
    several = job.ranks > 1 or job.stage > 0
    return [str(home / "bin" / "llamafactory-cli"), "train", written(keys, out)], launch if several else {}


def ms_swift(candidate: Candidate, job: Job, out: Path, home: Path) -> tuple[list[str], dict[str, str]]:
    """Its template `dummy` renders a prompt as it is, and the model's end of turn after the answer."""
    model_type = json.loads((job.model / "config.json").read_text(encoding="utf-8"))["model_type"]
    keys = job.keys(candidate, out) | {
        "model": job.model,
        "model_type": model_type,
        "template": "dummy",
        "tuner_type": "full",
        "dataset": job.folder / "messages.jsonl",
        "torch_dtype": "bfloat16",
        "use_hf": True,
        "check_model": False,
        "split_dataset_ratio": 0,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "max_length": 2048,
        "gradient_checkpointing": candidate.recompute,
        "padding_free": candidate.layout == "flat",
        "warmup_ratio": 0,
        "add_version": False,
    }
    if job.lora:
        keys |= {"tuner_type": "lora", "lora_rank": job.lora, "lora_alpha": ALPHA * job.lora, "lora_dropout": 0,
                 "target_modules": "all-linear"}  # fmt: skip
    flags = [str(word) for key, value in keys.items() for word in (f"--{key}", value)]
    launch = {"NPROC_PER_NODE": str(job.ranks), "MASTER_PORT": free_port()} if job.ranks > 1 or job.stage else {}
    return [str(home / "bin" / "swift"), "sft", *flags], launch


def written(keys: dict[str, Any], out: Path) -> str:
    """The keys as a JSON file, which is YAML, too. LLaMA-Factory goes by the ending."""
    file = out.with_suffix(".yaml")
    file.write_text(json.dumps(keys), encoding="utf-8")
    return str(file)
