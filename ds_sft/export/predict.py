"""What the model answers: greedy answers to a few validation rows, from the exported folder, as any user would load it.

Only rank 0 generates, after the engine's memory is free, so nothing here is a collective and nothing can hang.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ds_sft.config.keys import Config
from ds_sft.config.values import SAMPLING
from ds_sft.data.bad_row import BadRow
from ds_sft.data.encode import Encoder
from ds_sft.data.records import Dialogue
from ds_sft.export.placement import cache_size, place
from ds_sft.model.adapter_files import exported, find_base, load_on_disk
from ds_sft.model.embeddings import make_room
from ds_sft.model.limits import positions_left
from ds_sft.plan.adapter import is_adapter
from ds_sft.ranks.launch import print_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8  # prompts generated together


@dataclass(frozen=True)
class Prediction:
    question: str
    reference: str
    prediction: str
    before: str | None = None  # what the model answered before training


def predict(config: Config, samples: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase) -> list[Prediction]:
    """Answer `samples` with the exported model and, under `predict_before`, with the one that training started from."""
    if not samples:
        return []
    encoder = Encoder(tokenizer, config)
    found = [(sample, prompt) for sample in samples if (prompt := _prompt(encoder, sample))]
    samples, prompts = [sample for sample, _ in found], [prompt for _, prompt in found]
    if not samples:
        return []
    after = generate(str(exported(config.output_dir)), prompts, tokenizer, config)
    before: Sequence[str | None] = [None] * len(samples)
    if config.predict_before:
        before = generate(config.model_name_or_path, prompts, tokenizer, config)
    rows = zip(samples, after, before, strict=True)
    return [Prediction(s.question, s.answer, a, b) for s, a, b in rows]


def _prompt(encoder: Encoder, sample: Dialogue) -> list[int]:
    """What stands before the last answer; nothing where that answer is one the template rewrites and nobody learned."""
    try:
        return encoder.prompt(sample)
    except BadRow:
        return []


def generate(
    model_path: str, prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, config: Config
) -> list[str]:
    """Greedy answers of the model in `model_path` to prompts in token ids, special tokens left out.

    They end where the model's own files say, as with any server: nothing of the run is added.
    """
    import torch

    model = load_to_answer(model_path, tokenizer, config, prompt=max(map(len, prompts)))
    answers: list[str] = []
    torch.manual_seed(config.training.get("seed", 42))  # the same sampled answers again
    started = time.monotonic()
    for start in range(0, len(prompts), BATCH):
        batch = answer_batch(model, prompts[start : start + BATCH], tokenizer, config)
        answers += [answer.text for answer in batch]
        print_line(f"Answered {len(answers)} of {len(prompts)} ({time.monotonic() - started:.0f} s, {model_path})")
    return answers


def load_to_answer(
    model_path: str, tokenizer: PreTrainedTokenizerBase, config: Config, *, prompt: int, rows: int = BATCH
) -> Any:
    """The model in `model_path`, a folder or a hub id, on a GPU where there is one with room, ready to generate.

    Args:
        prompt: tokens of the longest prompt; an answer's are the config's.
        rows: answered together.
    """
    from ds_sft.export.kernels import avoid_plans

    avoid_plans()
    tokens = rows * (prompt + (config.predict_max_new_tokens or config.max_length))
    model = load_on_disk(
        model_path,
        dtype="auto",
        trust_remote_code=config.trust_remote_code,
        **placement(model_path, tokens, config),
    ).eval()
    make_room(model, tokenizer, config)  # the model before training has its own rows
    return model


def placement(model_path: str, tokens: int, config: Config) -> dict[str, Any]:
    """Keywords that put the model, and the keys and values of so many tokens, on one GPU where they fit."""
    from transformers import AutoConfig

    name = find_base(Path(model_path)) if is_adapter(Path(model_path)) else model_path
    found = AutoConfig.from_pretrained(name, trust_remote_code=config.trust_remote_code)
    placed = place(name, working=cache_size(found, tokens), use_cpu=bool(config.training.get("use_cpu")))
    if placed.remark:
        print_line(f"Predicting: {placed.remark}")
    return placed.options


@dataclass(frozen=True)
class Answer:
    """What a model said to one prompt."""

    text: str  # without special tokens
    tokens: int  # that were generated, the one that ends it among them
    cut: bool  # where no more were allowed, before the model ended it


def answer_batch(model: Any, prompts: Sequence[list[int]], tokenizer: Any, config: Config) -> list[Answer]:
    """Answers to prompts that are generated together, padded on the left."""
    import torch

    most = config.predict_max_new_tokens or config.max_length
    if left := positions_left(model):
        prompts = [prompt[1 - left :] for prompt in prompts]
        most = min(most, left - max(map(len, prompts)))
    inputs = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt").to(model.device)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=most,
            **generation_options(config),
            pad_token_id=tokenizer.pad_token_id,
        )
    new, ends = output[:, inputs["input_ids"].shape[1] :].tolist(), end_ids(model)
    texts = tokenizer.batch_decode(new, skip_special_tokens=True)
    lengths = [next((i + 1 for i, token in enumerate(row) if token in ends), None) for row in new]
    return [
        Answer(text.strip(), length or len(row), cut=length is None)
        for text, length, row in zip(texts, lengths, new, strict=True)
    ]


def end_ids(model: Any) -> set[int]:
    """The tokens that end an answer, by the model's own files."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {int(ends)}


def generation_options(config: Config) -> dict[str, Any]:
    """Keywords of `generate`. Greedy without `do_sample`: what a model's author recommends for sampling is left out.

    With it, the model's own generation configuration holds for what is not given.
    """
    given = dict(config.generation or {})
    return given if given.get("do_sample") else {"do_sample": False, **dict.fromkeys(SAMPLING), **given}


def write_predictions(predictions: Sequence[Prediction], path: Path) -> None:
    """One JSON object a line: question, reference, prediction, and before where it was asked for."""
    with path.open("w", encoding="utf-8") as file:
        for row in predictions:
            fields = {name: value for name, value in asdict(row).items() if value is not None}
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def print_predictions(predictions: Sequence[Prediction]) -> None:
    """A table: what was asked, what the model said before and after, what the data says; none of nothing."""
    if not predictions:
        return
    from rich.console import Console
    from rich.table import Table

    with_before = any(row.before is not None for row in predictions)
    table = Table(title="Predictions", title_justify="left", show_lines=True)
    for column in ("question", *(["answer before"] if with_before else []), "answer after", "reference"):
        table.add_column(column, overflow="fold", ratio=1)
    for row in predictions:
        before = [_short(row.before or "")] if with_before else []
        table.add_row(*map(_short, (row.question,)), *before, _short(row.prediction), _short(row.reference))
    console = Console(markup=False)
    console.print(table)


def _short(text: str, limit: int = 400) -> str:
    """Enough of a long answer to judge it; predictions.jsonl has the whole."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def prediction_as_text(row: Prediction) -> str:
    """A prediction as SwanLab shows it: the reference script's form, with the reference answer added."""
    return f"Question: {row.question}\n\nLLM: {row.prediction}\n\nReference: {row.reference}"
