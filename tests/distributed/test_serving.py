"""What anything else than this package makes of the exported folder: it renders what was learned, and stops."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ds_sft.cli import main
from tests.conftest import write_rows
from tests.distributed.harness import read_lines, run, train
from tests.families import FAMILIES

pytestmark = pytest.mark.distributed

# A program of somebody else's: the folder, transformers, and nothing that training knew.
SERVER = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = (loaded.from_pretrained(sys.argv[1]) for loaded in (AutoTokenizer, AutoModelForCausalLM))
asked = [{"role": "user", "content": "Who?"}]
prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
new = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1]:]
print(json.dumps([tokenizer.decode(prompt["input_ids"][0]), tokenizer.decode(new)]))
"""


@pytest.fixture
def base_model(model_dir: Path, tmp_path: Path) -> Path:
    """As Qwen3's base models: a chat template whose turns end with <|im_end|>, and texts end with <|endoftext|>."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", FAMILIES["marked"][1]
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | {"eos_token_id": 0}), encoding="utf-8")
    return folder


def written(folder: Path, name: str) -> Any:
    text = (folder / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text


def test_a_server_stops_where_the_model_learned_to(
    base_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One answer learned by heart: without the end in generation_config.json, 40 tokens of <|im_end|> would follow."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "Who?", "answer": "Paris."}] * 8)
    keys = {"model_name_or_path": str(base_model), "train_file": str(rows), "eval_file": str(rows), "output_dir": "out",
            "template": "tokenizer", "system_prompt": "Be brief.", "max_steps": 30, "learning_rate": 0.01,
            "bf16": False, "save_steps": 30, "num_predictions": 1, "predict_max_new_tokens": 40}  # fmt: skip
    done = train("forked", None, keys, cwd=tmp_path)
    assert done.code == 0, done.output[-6000:]
    out = tmp_path / "out"
    assert written(out, "generation_config.json")["eos_token_id"] == [2, 0]
    assert written(out, "config.json")["eos_token_id"] == [2, 0]
    asked = run([sys.executable, "-c", SERVER, str(out)], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert json.loads(asked.output.splitlines()[-1]) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "Paris.<|im_end|>",
    ]
    assert [row["prediction"] for row in read_lines(out / "predictions.jsonl")] == ["Paris."]
    for folder in (out, out / "checkpoint-30"):
        capsys.readouterr()
        assert main(["chat", str(folder), "--once", "Who?"]) == 0
        assert capsys.readouterr().out == "Paris.\n"
    # The last checkpoint, exported later, is the same folder.
    # The last checkpoint is served as it is, and exported later it is the same folder.
    as_it_is = run([sys.executable, "-c", SERVER, str(out / "checkpoint-30")], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert as_it_is.output.splitlines()[-1] == asked.output.splitlines()[-1]
    assert main(["export", str(out / "checkpoint-30"), str(tmp_path / "later")]) == 0
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert written(tmp_path / "later", name) == written(out, name), name
    assert written(tmp_path / "later", "config.json")["eos_token_id"] == [2, 0]
    (out / "model.safetensors").unlink()  # as of a run that has not come to its end
    assert main(["chat", str(out), "--once", "Who?"]) == 2
    said = f"{out}: the run in it has left no final model yet; its newest checkpoint can be asked: {out}/checkpoint-30"
    assert capsys.readouterr().err == f"ds-sft: error: {said}\n"
