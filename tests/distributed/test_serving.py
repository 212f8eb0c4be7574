"""What anything else than this package makes of the exported folder: it renders what was learned, and stops."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from ds_sft.cli import main
from ds_sft.config.read import load_config
from ds_sft.data.encode import Encoder
from ds_sft.data.records import Dialogue
from ds_sft.data.shapes import Message
from tests.conftest import write_rows
from tests.distributed.harness import BIN, end_tree, free_port, read_lines, run, train
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


KEYS = {"train_file": "rows.jsonl", "eval_file": "rows.jsonl", "output_dir": "out", "template": "tokenizer",
        "system_prompt": "Be brief.", "max_steps": 30, "learning_rate": 0.01, "bf16": False, "save_steps": 30,
        "num_predictions": 1, "predict_max_new_tokens": 40}  # fmt: skip


def make_base_model(folder: Path, model_dir: Path) -> Path:
    """As Qwen3's base models: a chat template whose turns end with <|im_end|>, and texts end with <|endoftext|>."""
    shutil.copytree(model_dir, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", FAMILIES["marked"][1]
    tokenizer.save_pretrained(folder)
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(content | {"eos_token_id": 0}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def learned(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that learned one answer by heart."""
    folder = tmp_path_factory.mktemp("learned")
    base = make_base_model(folder / "base", model_dir)
    write_rows(folder / "rows.jsonl", [{"question": "Who?", "answer": "Paris."}] * 8)
    done = train("forked", None, KEYS | {"model_name_or_path": str(base)}, cwd=folder)
    assert done.code == 0, done.output[-6000:]
    return folder / "out"


def written(folder: Path, name: str) -> Any:
    text = (folder / name).read_text(encoding="utf-8")
    return json.loads(text) if name.endswith(".json") else text


def test_a_server_stops_where_the_model_learned_to(learned: Path, tmp_path: Path) -> None:
    """Without the end in generation_config.json, 40 tokens of <|im_end|> would follow."""
    asked = run([sys.executable, "-c", SERVER, str(learned)], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert json.loads(asked.output.splitlines()[-1]) == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n",
        "Paris.<|im_end|>",
    ]
    assert [row["prediction"] for row in read_lines(learned / "predictions.jsonl")] == ["Paris."]


def test_a_run_and_its_checkpoint_are_talked_to(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (learned, learned / "checkpoint-30"):
        capsys.readouterr()
        assert main(["chat", str(folder), "--once", "Who?"]) == 0
        assert capsys.readouterr().out == "Paris.\n"
    out = Path(shutil.copytree(learned, tmp_path / "out"))
    (out / "model.safetensors").unlink()  # as of a run that has not come to its end
    assert main(["chat", str(out), "--once", "Who?"]) == 2
    said = f"{out}: the run in it has left no final model yet; its newest checkpoint can be asked: {out}/checkpoint-30"
    assert capsys.readouterr().err == f"ds_sft: error: {said}\n"


def test_what_servers_read(learned: Path) -> None:
    """vLLM and transformers read the ends in generation_config.json; llama.cpp's converter that of the tokenizer."""
    assert written(learned, "generation_config.json")["eos_token_id"] == [2, 0]
    config, tokenizer = written(learned, "config.json"), written(learned, "tokenizer_config.json")
    assert (config["architectures"], config["dtype"], config["use_cache"]) == (["Qwen3ForCausalLM"], "float32", True)
    assert config["eos_token_id"] == [2, 0]
    assert (tokenizer["eos_token"], tokenizer["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    with safe_open(learned / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float32}  # noqa: SIM118


def test_a_checkpoint_is_served_as_it_is_and_exported_later_it_is_the_same_folder(
    learned: Path, tmp_path: Path
) -> None:
    asked = run([sys.executable, "-c", SERVER, str(learned / "checkpoint-30")], cwd=tmp_path, env={"PYTHONPATH": ""})
    assert json.loads(asked.output.splitlines()[-1])[1] == "Paris.<|im_end|>"
    assert main(["export", str(learned / "checkpoint-30"), str(tmp_path / "later")]) == 0
    for name in ("generation_config.json", "chat_template.jinja", "tokenizer_config.json"):
        assert written(tmp_path / "later", name) == written(learned, name), name
    assert written(tmp_path / "later", "config.json")["eos_token_id"] == [2, 0]


def test_transformers_serve(learned: Path, tmp_path: Path) -> None:
    """The real server, asked over HTTP: its prompt has the tokens of training's, its answer ends by itself."""
    config = load_config(["--config", str(learned / "config.yaml")])
    tokenizer = AutoTokenizer.from_pretrained(learned.parent / "base")
    prompt = Encoder(tokenizer, config).prompt(Dialogue((Message("user", "Who?"), Message("assistant", "Paris."))))
    asked = {"model": str(learned), "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 40}
    with transformers_serve(learned, tmp_path / "log") as url:
        answer = post(f"{url}/v1/chat/completions", asked)
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Paris.", "stop")
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["completion_tokens"] == len(tokenizer("Paris.").input_ids) + 1


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    """The address of `transformers serve FOLDER`, as soon as it answers."""
    port = free_port()
    command = [str(BIN / "transformers"), "serve", str(folder), "--port", str(port), "--device", "cpu"]
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 300
            while not answers(f"http://localhost:{port}/health"):
                assert server.poll() is None, log.read_text(encoding="utf-8")
                assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.2)
            yield f"http://localhost:{port}"
        finally:
            end_tree(server.pid)
            server.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=60) as found:
            return bool(found.status == 200)
    except OSError:
        return False


def post(url: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as found:
        return json.loads(found.read())
