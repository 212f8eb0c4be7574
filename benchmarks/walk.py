"""The walk of a row: the modules of ds_sft that one row passes from its file to its gradient, and the returns in them.

    python benchmarks/walk.py

One row and one step of the tests' small model, in float32, by `ds_sft.train.main`; what runs inside the functions of
STOPS counts. A generator returns once for each thing that it yields. docs/row.md shows what each stop makes of a row.
"""

from __future__ import annotations

import io
import os
import sys
from collections import Counter, defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
PACKAGE = f"{sys.path[0]}/ds_sft/"
STOPS = {"load_data": "file to store", "get_batch_samples": "store to batch", "training_step": "batch to gradient"}
passed, inside = defaultdict[str, Counter[str]](Counter), list[str]()  # stop -> module -> returns; STOPS under way


def count(frame: FrameType, event: str, _: object) -> None:
    code = frame.f_code
    if event not in ("call", "return") or not code.co_filename.startswith(PACKAGE) or code.co_name.startswith("<"):
        return
    if event == "call" and code.co_name in STOPS:
        inside.append(code.co_name)
    if event == "return" and inside:
        passed[STOPS[inside[0]]][code.co_filename.removeprefix(PACKAGE)] += 1
        if code.co_name in STOPS:
            inside.pop()


def main() -> None:
    from ds_sft.train import main as train
    from tests.conftest import make_model, make_tokenizer, questions_and_answers, write_rows

    with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        work = Path(folder)
        model = make_model(work / "model", make_tokenizer(work))
        rows = write_rows(work / "rows.jsonl", questions_and_answers(1))
        os.environ.update(SWANLAB_MODE="disabled", DS_SFT_CACHE=str(work / "cache"))
        sys.setprofile(count)
        keys = "--max_steps 1 --bf16 no --use_cpu yes --num_predictions 0 --verify_export no --save_strategy no"
        assert not train(f"--model_name_or_path {model} --train_file {rows} --output_dir {work / 'o'} {keys}".split())
        sys.setprofile(None)
    for stop, modules in passed.items():
        print(f"{stop}: {len(modules)} modules, {sum(modules.values())} returns")
        print(*(f"  {module} {number}" for module, number in modules.most_common()), sep="\n")
    print(f"in all: {len(set().union(*passed.values()))} modules, {sum(map(Counter.total, passed.values()))} returns")


if __name__ == "__main__":
    main()
