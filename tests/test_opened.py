"""What a model is asked with: its files, the run's keys, the template that training had; and what is refused."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from ds_sft.cli import main
from ds_sft.commands.opened import Opened, open_model
from ds_sft.config.keys import Config
from ds_sft.data.encode import Encoder
from ds_sft.data.prompts import Prompts
from ds_sft.data.records import Dialogue
from ds_sft.data.serving import authors_template, serving
from ds_sft.data.shapes import Message
from ds_sft.errors import UserError
from ds_sft.model.adapter_files import find_base
from ds_sft.plan.adapter import base_of
from ds_sft.ranks.launch import Launch
from tests.families import FAMILIES
from tests.test_adapter_files import make_adapter

ALONE = Launch(launcher="python")
QUESTION = Dialogue((Message("user", "Who?"), Message("assistant", "x")))


def run_of(model_dir: Path, output_dir: Path, **keys: Any) -> tuple[Config, Any]:
    """The output folder of a finished run with these keys; its configuration and the tokenizer it had."""
    shutil.copytree(model_dir, output_dir)
    config = Config(**{"model_name_or_path": str(model_dir), "train_file": "t", "system_prompt": "S",
                       "training": {"output_dir": str(output_dir)}, **keys})  # fmt: skip
    config.save(output_dir / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    exported = AutoTokenizer.from_pretrained(model_dir)
    exported.chat_template = serving(config, tokenizer).chat_template
    exported.save_pretrained(output_dir)
    return config, tokenizer


def opened(name: Path | str, *words: str) -> Opened:
    with open_model(str(name), words, ALONE) as found:
        return found


@pytest.fixture
def with_template(model_dir: Path, tmp_path: Path) -> Path:
    """A base with a chat template like Qwen3's."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "base"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = FAMILIES["qwen"][1]
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("system", ["S\n\"}} ' {{ ] + messages %}{%- endif %}", ""])
@pytest.mark.parametrize("thinking", ["keep", "drop", "empty"])
@pytest.mark.parametrize("template", ["reference", "tokenizer", "file"])
def test_a_run_is_asked_as_it_was_taught(
    with_template: Path, tmp_path: Path, template: str, thinking: str, system: str
) -> None:
    """Also when the file of its template has gone: the exported one is taken apart again."""
    file = tmp_path / "t.jinja"
    file.write_text(FAMILIES["marked"][1], encoding="utf-8")
    key = str(file) if template == "file" else template
    keys = {"template": key, "thinking": "keep" if template == "file" else thinking, "system_prompt": system}
    config, tokenizer = run_of(with_template, tmp_path / "out", **keys)
    taught = Encoder(tokenizer, config).prompt(QUESTION)
    file.unlink()
    found = opened(tmp_path / "out")
    assert found.trained
    assert found.path == str(tmp_path / "out")
    assert Encoder(found.tokenizer, found.config).prompt(QUESTION) == taught
    without = replace(found.config, system_prompt="")
    assert "system" not in tokenizer.decode(Encoder(found.tokenizer, without).prompt(QUESTION)) or key == "reference"


@pytest.mark.parametrize("source", ["", "x\n{{ y }}", "\n\nx", "{%- if messages[0]['role'] != 'system' %}\nmine"])
def test_an_authors_template_is_found_again(source: str) -> None:
    assert authors_template(source) == source


def test_keys_win_over_the_runs(with_template: Path, tmp_path: Path) -> None:
    run_of(with_template, tmp_path / "out", predict_max_new_tokens=7)
    file = tmp_path / "own.jinja"
    file.write_text(FAMILIES["marked"][1], encoding="utf-8")
    assert opened(tmp_path / "out").config.predict_max_new_tokens == 7
    found = opened(tmp_path / "out", "--predict_max_new_tokens", "9", "--template", str(file), "--system_prompt", "T")
    assert (found.config.predict_max_new_tokens, found.config.template) == (9, str(file))
    assert found.config.system_prompt == "T"


def test_another_model_is_asked_by_its_own_chat_template(with_template: Path, tmp_path: Path) -> None:
    """So is what `ds-sft export` leaves: its template writes the system turn."""
    found = opened(with_template)
    assert not found.trained
    prompts = Prompts(found.tokenizer, found.config, reasoning=False)
    assert found.tokenizer.decode(prompts.prompt([Message("user", "Who?")]).ids) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    config, tokenizer = run_of(with_template, tmp_path / "out")
    (tmp_path / "out/config.yaml").unlink()
    found = opened(tmp_path / "out")
    assert not found.trained
    assert Encoder(found.tokenizer, found.config).prompt(QUESTION) == Encoder(tokenizer, config).prompt(QUESTION)


def test_an_adapter_by_its_folder_and_by_its_runs(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    adapter = make_adapter(model_dir, out)
    config = Config(model_name_or_path=str(model_dir), train_file="t", system_prompt="S", adapter="lora",
                    training={"output_dir": str(out)})  # fmt: skip
    config.save(out / "config.yaml")
    for name in (out, adapter):
        found = opened(name)
        assert (found.path, found.trained, found.config.system_prompt) == (str(adapter), True, "S")
    (out / "config.yaml").unlink()
    assert not opened(adapter).trained


def test_an_adapter_without_its_base(model_dir: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(model_dir, tmp_path / "base"))
    adapter = make_adapter(base, tmp_path / "out")
    base.rename(tmp_path / "moved")
    said = (
        rf"^{adapter}/adapter_config.json: base_model_name_or_path: {base}: no such folder.*: write there where the "
        "base of the adapter is now$"
    )
    with pytest.raises(UserError, match=said):
        opened(adapter)


def test_an_adapter_finds_a_base_that_has_moved_with_its_run(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter_config.json has the place of then; the run's config.yaml has the folder that both were in."""
    project = tmp_path / "project"
    base = Path(shutil.copytree(model_dir, project / "base"))
    monkeypatch.chdir(project)
    make_adapter(base, project / "out")
    keys: dict[str, Any] = {"model_name_or_path": "base", "train_file": "t", "adapter": "lora"}
    Config(**keys, training={"output_dir": "out"}).save(project / "out/config.yaml")
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    assert opened("moved/out").path == "moved/out/adapter"
    assert find_base(Path("moved/out/adapter")) == str(tmp_path / "moved/base")
    assert main(["export", "moved/out/adapter", "exported", "--adapter-only"]) == 0
    assert base_of(Path("exported/adapter")) == str(tmp_path / "moved/base")


def test_a_run_that_is_not_finished(model_dir: Path, tmp_path: Path) -> None:
    run_of(model_dir, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    said = rf"^{tmp_path}/out: the run in it has left no final model yet; and no checkpoint yet$"
    with pytest.raises(UserError, match=said):
        opened(tmp_path / "out")


@pytest.mark.parametrize("name", ["./nowhere", "no/where/at/all"])
def test_what_is_no_model(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name}: no such folder"):  # and no key is named, as there was none
        opened(name)


def test_a_checkpoint_is_exported_into_a_folder_that_goes(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tokenizer = run_of(model_dir, tmp_path / "out")
    checkpoint = tmp_path / "out/checkpoint-3"
    shutil.copytree(model_dir, checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 3}), encoding="utf-8")
    with open_model(str(checkpoint), [], ALONE) as found:
        assert sorted(path.name for path in Path(found.path).iterdir() if path.suffix == ".safetensors") == [
            "model.safetensors"
        ]
        assert Path(found.path).parent == tmp_path / "out"
        assert Encoder(found.tokenizer, found.config).prompt(QUESTION) == Encoder(tokenizer, config).prompt(QUESTION)
    assert not Path(found.path).exists()
    assert capsys.readouterr().out == "Exporting checkpoint-3 first, into a folder that is removed afterwards.\n"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM], ids=["a closed terminal", "kill"])
def test_whoever_is_ended_leaves_no_exported_folder(model_dir: Path, tmp_path: Path, number: signal.Signals) -> None:
    run_of(model_dir, tmp_path / "out")
    checkpoint = Path(shutil.copytree(model_dir, tmp_path / "out/checkpoint-3"))
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 3}), encoding="utf-8")
    before = signal.getsignal(number)

    def ended() -> None:
        with open_model(str(checkpoint), [], ALONE):
            assert signal.getsignal(number) != before  # or it would end the tests
            signal.raise_signal(number)

    with pytest.raises(SystemExit) as end:
        ended()
    assert end.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert list((tmp_path / "out").glob(".checkpoint-3*")) == []


def test_a_checkpoint_without_the_file_of_its_template(model_dir: Path, tmp_path: Path) -> None:
    """Nothing else would know where its answers end."""
    file = tmp_path / "t.jinja"
    file.write_text(FAMILIES["marked"][1], encoding="utf-8")
    run_of(model_dir, tmp_path / "out", template=str(file))
    checkpoint = Path(shutil.copytree(model_dir, tmp_path / "out/checkpoint-3"))
    (checkpoint / "trainer_state.json").write_text("{}", encoding="utf-8")
    file.unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/out/config.yaml: template: {file}: no such file \(the current "):
        opened(checkpoint)
    assert list((tmp_path / "out").glob(".checkpoint-3*")) == []
