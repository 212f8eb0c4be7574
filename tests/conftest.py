"""A tokenizer and a model small enough to make on the spot, and what holds of every test: skips, no leftovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.installed import Installed

TEXTS = [
    "What is the capital of France? The capital of France is Paris. You are a helpful assistant.",
    "你是一个对话助手，你需要根据用户的问题，给出相应的回答。今天天气怎么样？",
    "Привет! Как дела? Хорошо, спасибо. system user assistant",
]
os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when imported
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each lane
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a shell, a scheduler or a hook of git may have set, and the product or what it calls would obey; before any
# fixture, as those of modules start runs, too.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "MASTER_ADDR",
           "MASTER_PORT", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HF_TOKEN", "COLUMNS", "LINES", "FORCE_COLOR",
           "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONWARNINGS", "CXX", "GIT_DIR", "GIT_WORK_TREE",
           "GIT_INDEX_FILE", "SWANLAB_MODE")  # fmt: skip
FOREIGN_PREFIXES = ("SLURM_", "SBATCH_", "TORCHELASTIC_", "DS_SFT_", "SWANLAB_API", "SWANLAB_PROJ", "SWANLAB_WORKSPACE")
for foreign in [name for name in os.environ if name in FOREIGN or name.startswith(FOREIGN_PREFIXES)]:
    del os.environ[foreign]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In one process unit tests come first; in two (`make test`) the longest come first, to end together.

    Slurm's requeueing is mostly waiting for its timers, so it goes beside what computes.
    """
    two = hasattr(config, "workerinput")
    items.sort(key=lambda item: (item.get_closest_marker("distributed") is None) == two)
    if two:
        items.sort(key=lambda item: item.path.parts[-2:] != ("slurm", "test_requeue.py"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Under CI=true a skipped test has failed: what it needs must be installed there; but a GPU cannot be."""
    report: Any = yield
    skipped = report.skipped and not hasattr(report, "wasxfail")
    if skipped and os.environ.get("CI") == "true" and not lacks_gpu(item):
        report.outcome = "failed"
        report.longrepr = f"skipped under CI=true: {report.longrepr[2]}"
    return report


def lacks_gpu(item: pytest.Item) -> bool:
    """Whether a test wants a CUDA device, and there is none."""
    import torch

    return item.get_closest_marker("gpu") is not None and not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """What a test, or the product in it, changes of this process is put back: the next test, and the runs it starts,
    must not depend on it."""
    environment, folder = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    torch = sys.modules.get("torch")
    threads, dtype = (torch.get_num_threads(), torch.get_default_dtype()) if torch else (None, None)
    cudnn = torch.backends.cuda.cudnn_sdp_enabled() if torch else True
    yield
    left = {number: signal.getsignal(number) for number in handlers}
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.chdir(folder)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    if torch:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
    if "transformers.integrations.deepspeed" in sys.modules:  # a global of TrainingArguments: the next model would be
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()  # partitioned while loading
    assert left == handlers, "signal handlers are left behind"


@pytest.fixture(scope="session", autouse=True)
def own_environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test, and no fixture of a module, reads a developer's caches or reaches for the network."""
    os.environ["SWANLAB_MODE"] = "disabled"
    os.environ["DS_SFT_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(folder: Path) -> Path:
    """A byte-level BPE tokenizer with ChatML's special tokens, like Qwen3's, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokenizer_dir)


@pytest.fixture(scope="session")
def model_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), tokenizer_dir)


@pytest.fixture
def copy(model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model in a folder that a test may change."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


def make_model(folder: Path, tokenizer_dir: Path, **changes: Any) -> Path:
    """A two-layer Qwen3 with tied embeddings and its tokenizer, in bfloat16 as published models are."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
        **changes,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """An environment with the wheel of this tree: see installed.py."""
    from tests.installed import install

    return install(tmp_path_factory.mktemp("installed"))


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write a JSON Lines file; a `str` row goes in as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def questions_and_answers(count: int) -> list[dict[str, str]]:
    """Rows of different lengths in three scripts."""
    answers = ["Paris.", "Привет, хорошо!", "今天天气很好。", "The capital of France is Paris, " * 3]
    return [{"question": f"What is {i}?", "answer": answers[i % 4] + f" ({i})"} for i in range(count)]
