"""What goes to the hub, and what never does: by huggingface_hub's own client, to a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ds_sft.checkpoints.base import hash_base
from ds_sft.cli import main
from ds_sft.config.read import load_config
from ds_sft.errors import UserError
from ds_sft.export.hub import push_as_asked, why_not
from ds_sft.export.parcel import pack
from ds_sft.model.adapter_files import changes_of_config
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import StopRequests
from ds_sft.train import push_later
from tests.hub import TOKEN, Hub, serve_hub

SECRET = "a row that nobody may read"
VERIFIED = {"verified": True, "loss_trained": 1.25, "loss_on_disk": 1.2500001, "difference": 1e-7, "bound": 1e-4,
            "rows": 8, "supervised_tokens": 40}  # fmt: skip
DATA = {
    "train": {"file": "/home/ada/rows.jsonl", "rows_read": 1234, "rows_kept": 1230,
              "rows_dropped": {"no answer": 4}, "rows_truncated": 2, "rows_per_epoch": 1230, "tokens": 50000,
              "supervised_tokens": 20000, "recommended_max_length": 512, "longest": [["/home/ada/rows.jsonl:7", 99]],
              "dropped_examples": [f"/home/ada/rows.jsonl:9: {SECRET}"], "hub_datasets": ["tatsu-lab/alpaca"]},
}  # fmt: skip
MODEL = ["README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
         "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja",
           "generation_config.json", "tokenizer.json", "tokenizer_config.json", "trained_on.json"]  # fmt: skip
BASE = "Qwen/Qwen3-0.6B"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Where huggingface_hub pushes to in this process: it read its environment when it was imported."""
    from huggingface_hub import constants

    with serve_hub() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found


@pytest.fixture
def finished(model_dir: Path, tmp_path: Path) -> Path:
    """The output folder of a run, with all that must stay in it."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "out"))
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    leave_run(folder, {"base_model": BASE})
    for name in ("predictions.jsonl", "metrics.jsonl", "notes.json", "train.py", "model.safetensors.bak"):
        (folder / name).write_text(SECRET, encoding="utf-8")
    for name in ("checkpoint-4", "swanlog"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_text(SECRET, encoding="utf-8")
    return folder


def leave_run(folder: Path, more: dict[str, Any]) -> None:
    run = {"versions": {"ds_sft": "0.1.0", "transformers": "5.23.0", "python": "3.11.7"}, "steps": 400, "epochs": 2.0,
           "tokens": 98765, "eval_loss_first": 2.5, "eval_loss": 1.25, "parameters": 1000, "trained_parameters": 1000,
           "world_size": 8, "zero_stage": 2, "export": VERIFIED, "identity": {"config": {"x": SECRET}}}  # fmt: skip
    keys = {"model_name_or_path": "/home/ada/model", "train_file": "/home/ada/rows.jsonl", "learning_rate": 1e-4,
            "output_dir": str(folder), "system_prompt": SECRET, "hub_token": "hf_secret", "max_length": 2048,
            "adapter": "none", "lora_rank": 8}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run | more), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
    (folder / "data_report.json").write_text(json.dumps(DATA), encoding="utf-8")


@pytest.fixture
def adapted(finished: Path) -> Path:
    """The same of a run with an adapter on a model of this machine, which was merged, too."""
    adapter = finished / "adapter"
    adapter.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(finished / name, adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"matrices")
    (adapter / "trained_on.json").write_text('{"base": "5f"}', encoding="utf-8")
    asked = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(finished.parent / "base")}
    (adapter / "adapter_config.json").write_text(json.dumps(asked), encoding="utf-8")
    leave_run(finished, {"base_model": str(finished.parent / "base")})
    keys = yaml.safe_load((finished / "config.yaml").read_text(encoding="utf-8"))
    (finished / "config.yaml").write_text(yaml.safe_dump(keys | {"adapter": "lora"}), encoding="utf-8")
    return finished


@pytest.mark.parametrize(
    ("kept", "words", "said", "code"),
    [
        (None, [], "nobody has seen that {adapter} fits {BASE}: its weights are not here (hf download {BASE}).", 0),
        ("the same", [], "", 0),
        ("the same but for its name", [], "", 0),
        ("config.json", [], "{BASE} differs in its config.json from the base that {adapter} was trained on: ", 2),
        ("weights", [], "{BASE} differs in its weights from the base that {adapter} was trained on: ", 2),
        ("weights", ["--unverified"],
         "nobody has seen that {adapter} fits {BASE}: it differs in its weights from the base of training.", 0),
    ],
)  # fmt: skip
def test_the_base_that_is_named_is_compared_with_the_one_of_training(
    adapted: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    kept: str | None, words: list[str], said: str, code: int,
) -> None:  # fmt: skip
    """As far as the hub's cache has it: whoever loads the adapter gets this base."""
    copy, adapter = adapted.parent / "cached", adapted / "adapter"
    if kept is not None:
        shutil.copytree(model_dir, copy)
        monkeypatch.setattr("ds_sft.export.parcel.model_folder", lambda name: copy if name == BASE else None)
    (adapter / "trained_on.json").write_text(json.dumps({"base": hash_base(str(model_dir))}), encoding="utf-8")
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if kept == "the same but for its name":
        (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": "x"}), encoding="utf-8")
    elif kept == "config.json":
        (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}), encoding="utf-8")
    elif kept == "weights":
        (copy / "model.safetensors").write_bytes(b"others")
    assert main(["push", str(adapted), "me/adapter", "--base", BASE, "--dry-run", *words]) == code
    shown = capsys.readouterr()
    line = f"--base: {said.format(adapter=adapter, BASE=BASE)}" if said else ""
    end = "name that one; --unverified pushes it as it is"
    assert shown.err == (f"ds_sft: error: {line}{end}\n" if code else "")
    assert [found for found in shown.out.splitlines() if found.startswith("--base")] == (
        [line] if line and not code else []
    )


def refused(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that `ds-sft push` ends with."""
    assert main(["push", *words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0].removeprefix("ds_sft: error: ")


# ---- What arrives


def test_the_files_of_a_model_arrive_as_they_are_in_one_commit(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(finished), "me/model"]) == 0
    repo = hub.repos["me/model"]
    assert sorted(repo.files) == MODEL
    for name in MODEL[1:]:
        assert repo.files[name] == (finished / name).read_bytes(), name
    assert (repo.private, repo.messages) == (True, ["Upload a model trained with ds_sft 0.1.0"])
    assert [line for line in hub.asked if line.startswith(("POST", "PUT"))] == [
        "POST /api/repos/create",
        "POST /api/validate-yaml",
        "POST /api/models/me/model/preupload/main",
        "POST /me/model.git/info/lfs/objects/batch",
        f"PUT /lfs/{next(iter(hub.objects))}",
        "POST /api/models/me/model/commit/main",
    ]
    assert list(hub.objects.values()) == [(finished / "model.safetensors").read_bytes()]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Pushing 7 files (")
    assert said[0].endswith(" to me/model (private).")
    assert said[1:] == [f"Pushed: {hub.url}/me/model/commit/{said[1].rpartition('/')[2]}"]


def test_nothing_private_leaves(adapted: Path, hub: Hub) -> None:
    for words in (["me/adapter", "--base", BASE], ["me/merged", "--merged"]):
        assert main(["push", str(adapted), *words]) == 0
    sent = b"".join(content for repo in hub.repos.values() for content in repo.files.values())
    for private in (SECRET, "hf_secret", TOKEN, str(adapted.parent), "/home/ada"):
        assert private.encode() not in sent, private


def test_an_adapter_arrives_on_the_base_that_others_have(adapted: Path, hub: Hub) -> None:
    assert main(["push", str(adapted), "me/adapter", "--base", BASE, "--public", "--message", "First"]) == 0
    repo = hub.repos["me/adapter"]
    assert sorted(repo.files) == ADAPTER
    assert json.loads(repo.files["adapter_config.json"]) == {
        "peft_type": "LORA", "r": 8, "base_model_name_or_path": BASE,
    }  # fmt: skip
    assert repo.files["adapter_model.safetensors"] == b"matrices"
    assert (repo.private, repo.messages) == (False, ["First"])


def test_of_a_merged_adapter_the_whole_model(adapted: Path, hub: Hub) -> None:
    assert main(["push", str(adapted), "me/merged", "--merged"]) == 0
    assert sorted(hub.repos["me/merged"].files) == MODEL


def test_an_update_takes_out_what_the_new_model_has_not(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stale shards would be loaded beside the new weights; what is not of a model stays."""
    assert main(["push", str(finished), "me/model"]) == 0
    there = hub.repos["me/model"].branches["main"]
    there |= {"model-00001-of-00002.safetensors": b"old", "vocab.json": b"{}", "LICENSE": b"mine"}
    there["model.safetensors"] = b"old"
    capsys.readouterr()
    assert refused(str(finished), "me/model", capsys=capsys) == (
        "me/model: exists and has 10 files: ds-sft push --update puts a model in their place (the hub keeps the old "
        "ones in its history), or give another name"
    )
    assert main(["push", str(finished), "me/model", "--update"]) == 0
    assert sorted(hub.repos["me/model"].files) == sorted([*MODEL, "LICENSE"])
    assert there["model.safetensors"] == (finished / "model.safetensors").read_bytes()


def test_a_branch(finished: Path, hub: Hub) -> None:
    assert main(["push", str(finished), "me/model", "--revision", "v1"]) == 0
    assert sorted(hub.repos["me/model"].branches) == ["main", "v1"]
    assert sorted(hub.repos["me/model"].branches["v1"]) == [".gitattributes", *MODEL]
    assert hub.repos["me/model"].files == {}


# ---- The card


def test_the_card_says_what_the_run_knows(finished: Path) -> None:
    card = pack(finished, "me/model").texts["README.md"]
    front, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {
        "base_model": BASE,
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ds_sft", "sft", "conversational"],
        "datasets": ["tatsu-lab/alpaca"],
    }
    for line in (
        "# model",
        'model = AutoModelForCausalLM.from_pretrained("me/model", dtype="auto")',
        "vllm serve me/model",
        "| validation loss, first evaluation | 2.5000 |",
        "| validation loss, last evaluation | 1.2500 |",
        "| steps | 400 |",
        "The files were loaded in a fresh process: their loss on 8 rows is 1.250000, that of the trained model "
        "1.250000 (difference 1.0e-07, bound 1.0e-04).",
        "| rows read | 1,234 |",
        "| rows dropped: no answer | 4 |",
        "| supervised tokens | 20,000 |",
        "| `learning_rate` | `0.0001` |",
        "| world size | 8 |",
        "| transformers | 5.23.0 |",
        "The author of this model has not chosen a licence yet. It must agree with that of the base model and of the "
        "data; `license: ...` at the top of this file says it.",
    ):
        assert line in text.splitlines(), line
    assert "lora_rank" not in text


def test_the_card_of_an_adapter(adapted: Path) -> None:
    card = pack(adapted, "me/adapter", base=BASE, license="apache-2.0").texts["README.md"]
    front, text = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front) == {
        "license": "apache-2.0",
        "base_model": BASE,
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["ds_sft", "sft", "conversational", "lora"],
        "datasets": ["tatsu-lab/alpaca"],
    }
    assert 'model = PeftModel.from_pretrained(model, "me/adapter")' in text.splitlines()
    assert "    --enable-lora --max-lora-rank 8 --lora-modules adapter=adapter" in text.splitlines()
    assert "| `lora_rank` | `8` |" in text.splitlines()
    assert "licence" not in text


@pytest.mark.parametrize(
    ("keys", "vllm"),
    [({"lora_rank": 12}, "--max-lora-rank 16 "), ({"lora_rank": 64}, "--max-lora-rank 64 "),
     ({"adapter": "dora"}, None), ({"lora_modules_to_save": ["lm_head"]}, None)],
    ids=str,
)  # fmt: skip
def test_how_vllm_takes_an_adapter(adapted: Path, keys: dict[str, Any], vllm: str | None) -> None:
    """It has room for some ranks, and takes neither DoRA nor modules that were trained whole."""
    record = yaml.safe_load((adapted / "config.yaml").read_text(encoding="utf-8"))
    (adapted / "config.yaml").write_text(yaml.safe_dump(record | keys), encoding="utf-8")
    card = pack(adapted, "me/adapter", base=BASE).texts["README.md"]
    assert vllm in card if vllm else "vllm" not in card


def test_an_adapter_beside_4_bits_is_loaded_beside_4_bits(adapted: Path) -> None:
    """On the base in 16 bits it is another model than the one that was measured, and vLLM would do that."""
    facts = {"quantization": "nf4", "computed_in": "bfloat16"}
    (adapted / "adapter" / "trained_on.json").write_text(json.dumps(facts), encoding="utf-8")
    lines = pack(adapted, "me/adapter", base=BASE).texts["README.md"].splitlines()
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig" in lines
    assert (
        f"model = AutoModelForCausalLM.from_pretrained(\"{BASE}\", dtype='bfloat16', "
        "quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        "bnb_4bit_compute_dtype='bfloat16'))"
    ) in lines
    assert not [line for line in lines if line.startswith("vllm")]
    merged = pack(adapted, "me/merged", merged=True).texts["README.md"]  # whole by itself
    assert "BitsAndBytes" not in merged
    assert "vllm serve me/merged" in merged


def test_a_card_where_the_first_loss_was_no_number(finished: Path) -> None:
    leave_run(finished, {"eval_loss_first": None})
    lines = pack(finished, "me/model").texts["README.md"].splitlines()
    assert [line for line in lines if "validation loss" in line] == ["| validation loss, last evaluation | 1.2500 |"]


def test_a_dry_run_prints_all_and_sends_nothing(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(finished), "me/model", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith("│ ")] == MODEL
    assert pack(finished, "me/model").texts["README.md"] in said
    assert said.endswith("\nchat_template.jinja:\n\n{{ messages }}\nNothing was sent.\n")
    assert (hub.asked, hub.repos) == ([], {})


# ---- What is not pushed

NOT_VERIFIED = {
    "failed": (
        VERIFIED | {"verified": False},
        "its export was compared and is NOT the trained model (run.json): it is not pushed; make one of the last "
        "checkpoint: ds-sft export {folder}/checkpoint-N OUT",
    ),
    "not asked": (None, "it was not verified (verify_export: no): --unverified pushes it as it is"),
    "no tokens": (
        {"verified": None, "reason": "none of the 8 rows asked has a supervised token"},
        "it was not verified (none of the 8 rows asked has a supervised token): --unverified pushes it as it is",
    ),
}


@pytest.mark.parametrize("name", NOT_VERIFIED)
def test_what_was_not_verified_is_not_pushed(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    export, line = NOT_VERIFIED[name]
    leave_run(finished, {"export": export})
    assert refused(str(finished), "me/model", capsys=capsys) == f"{finished}: {line.format(folder=finished)}"
    assert (hub.asked, hub.repos) == ([], {})
    assert main(["push", str(finished), "me/model", "--unverified"]) == (2 if name == "failed" else 0)
    assert list(hub.repos) == ([] if name == "failed" else ["me/model"])
    if name != "failed":
        line = "The weights were not compared with the trained ones after they were written."
        assert line in hub.repos["me/model"].files["README.md"].decode()


def test_a_merged_model_that_nobody_verified_is_not_pushed_for_its_adapter(
    adapted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Left by a later merge that was killed: run.json still has the comparison of the adapter."""
    leave_run(adapted, {"base_model": BASE, "adapter": {"not_merged": "merge: no"}})
    assert refused(str(adapted), "me/merged", "--merged", capsys=capsys) == (
        f"{adapted}: what was verified is its adapter, and not the merged model beside it, whose making was "
        "interrupted: start the run again with merge: yes"
    )
    leave_run(adapted, {"base_model": BASE, "adapter": {"not_merged": None}})
    assert "model.safetensors" in pack(adapted, "me/merged", merged=True).files


def test_what_there_was_no_memory_to_verify_is_verified_first(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave_run(finished, {"export": {"verified": None, "reason": "no memory", "out_of_memory": True}})
    (finished / "verify.json").write_text("{}", encoding="utf-8")
    assert refused(str(finished), "me/model", capsys=capsys) == (
        f"{finished}: there was no memory to verify it: ds-sft verify {finished}"
    )


def test_an_exported_folder_is_pushed_by_who_knows_it(
    model_dir: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refused(str(model_dir), "me/model", capsys=capsys) == (
        f"{model_dir}: no run.json: not a finished run's output folder, so nobody compared its weights with the "
        "trained ones: push the run's folder; --unverified pushes this one as it is"
    )
    assert main(["push", str(model_dir), "me/model", "--unverified", "--base", BASE]) == 0
    card = hub.repos["me/model"].files["README.md"].decode()
    assert f"Supervised fine-tuning of [{BASE}]" in card
    assert "## Data" not in card


def test_folders_that_have_no_model_to_give(adapted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = adapted / "swanlog"
    (empty / "model.safetensors").unlink()
    (adapted / "checkpoint-4" / "trainer_state.json").write_text("{}", encoding="utf-8")
    for words, line in {
        ("nowhere", "me/x"): "nowhere: no such folder",
        (str(empty), "me/x"): f"{empty}: no model in it (model.safetensors, or adapter/): a run writes it at its end",
        (str(adapted / "checkpoint-4"), "me/x"): (
            f"{adapted}/checkpoint-4: a checkpoint: push the output folder of the finished run, or make a model of it "
            f"first: ds-sft export {adapted}/checkpoint-4 OUT"
        ),
        (str(adapted), "me/x"): (
            f"{adapted}/adapter: an adapter of the folder {adapted.parent}/base, which nobody else has: --base "
            "OWNER/NAME says where the hub has it"
        ),
        (str(adapted), "model"): "OWNER/NAME: expected a repository such as me/my-model, found 'model'",
        (str(adapted), "me/x", "--base", "/a/b"): (
            "--base: expected a repository such as me/my-model, found '/a/b'"
        ),
    }.items():  # fmt: skip
        assert refused(*words, capsys=capsys) == line
    (adapted / "model.safetensors").unlink()
    assert refused(str(adapted), "me/x", "--merged", capsys=capsys) == (
        f"{adapted}: the adapter was not merged (merge: yes)"
    )
    shutil.rmtree(adapted / "adapter")
    assert refused(str(adapted), "me/x", "--merged", capsys=capsys) == (
        f"{adapted}: no adapter in it: leave out --merged"
    )


def test_the_base_is_named_where_it_lies_now(adapted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project that was moved after its run."""
    record = {"model_name_or_path": "base", "train_file": "rows.jsonl", "output_dir": "out", "started_in": "/gone"}
    (adapted / "config.yaml").write_text(yaml.safe_dump(record), encoding="utf-8")
    asked = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": "/gone/base"}
    (adapted / "adapter" / "adapter_config.json").write_text(json.dumps(asked), encoding="utf-8")
    (adapted.parent / "base").mkdir()
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match=f"an adapter of the folder {adapted.parent}/base, which nobody else has"):
        pack(adapted, "me/adapter")


def test_a_card_where_scaled_positions_were_those_of_a_folder_that_is_gone(adapted: Path, model_dir: Path) -> None:
    """What was scaled are the base's numbers: they are read where the base is named to be."""
    facts = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (adapted / "adapter" / "trained_on.json").write_text(json.dumps(facts), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{adapted}/adapter: rope_scaling: config.json of its base /.*/base cannot be "
                       "read: ") as caught:  # fmt: skip
        changes_of_config(adapted / "adapter")
    assert "\n" not in str(caught.value)
    found = changes_of_config(adapted / "adapter", elsewhere=str(model_dir))
    assert found["rope_parameters"]["factor"] == 2.0
    assert found == changes_of_config(moved_base(adapted / "adapter", model_dir), elsewhere="me/not-asked")


def moved_base(adapter: Path, base: Path) -> Path:
    asked = {"peft_type": "LORA", "r": 8, "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(asked), encoding="utf-8")
    return adapter


@pytest.mark.parametrize("base", ["./base", "~/base", "../models/base", "models/of/acme"])
def test_an_adapter_of_another_program_names_no_folder(adapted: Path, base: str) -> None:
    known = json.loads((adapted / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    known["base_model_name_or_path"] = base
    (adapted / "adapter" / "adapter_config.json").write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(UserError, match=f"an adapter of the folder {base}, which nobody else has"):
        pack(adapted, "me/adapter")
    assert base not in "".join(pack(adapted, "me/adapter", base=BASE).texts.values())


def test_the_folder_of_the_adapter_is_that_of_its_run(adapted: Path) -> None:
    assert pack(adapted / "adapter", "me/x", base=BASE) == pack(adapted, "me/x", base=BASE)


def test_a_path_in_the_settings_is_not_pushed(finished: Path) -> None:
    file = finished / "tokenizer_config.json"
    known = json.loads(file.read_text(encoding="utf-8")) | {"name_or_path": str(finished)}
    file.write_text(json.dumps(known), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        pack(finished, "me/model")
    assert str(caught.value) == f"{file}: name_or_path: holds a path of this machine, {finished}: take it out"


@pytest.mark.parametrize(
    ("setting", "private"),
    [
        ({"_name_or_path": "/scratch/of/another/machine"}, True),
        ({"name_or_path": "../customers/acme"}, True),
        ({"name_or_path": "Qwen/Qwen3-0.6B"}, False),
        ({"vocab_file": __file__}, True),
        ({"vocab_file": "~/vocab.txt"}, True),
        ({"extra_special_tokens": ["/", "~", "~~", "/no/such/file", "/think"]}, False),
    ],
    ids=str,
)
def test_what_is_a_path_in_the_settings(
    finished: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], private: bool
) -> None:
    """Tokens may look like one; and a model was perhaps made on another machine."""
    monkeypatch.setenv("HOME", str(finished.parent))
    (finished.parent / "vocab.txt").touch()
    file = finished / "tokenizer_config.json"
    file.write_text(json.dumps(setting), encoding="utf-8")
    if not private:
        assert "tokenizer_config.json" in pack(finished, "me/model").files
        return
    with pytest.raises(UserError, match="holds a path of this machine"):
        pack(finished, "me/model")


def test_code_goes_with_the_model_that_needs_it(finished: Path) -> None:
    (finished / "modeling_own.py").write_text("", encoding="utf-8")
    assert "modeling_own.py" not in pack(finished, "me/model").files
    known = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    known["auto_map"] = {"AutoModelForCausalLM": "modeling_own.Own"}
    (finished / "config.json").write_text(json.dumps(known), encoding="utf-8")
    files = pack(finished, "me/model").files
    assert "modeling_own.py" in files
    assert "train.py" not in files


# ---- The hub says no


def test_each_refusal_is_one_line(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    login = "hf auth login, or HF_TOKEN, with a token of role write (https://huggingface.co/settings/tokens)"
    words = (str(finished), "me/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert refused(*words, capsys=capsys) == f"me/model: the hub does not accept the token: {login}"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(finished / "none"))
    assert refused(*words, capsys=capsys) == f"me/model: not logged in to the hub: {login}"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.refuses = {"repos/create": 403}
    assert refused(*words, capsys=capsys) == (
        "me/model: the token may not write there (status 403): take one of role write, or a name of your own"
    )
    hub.refuses = {"commit/main": 400}
    assert refused(*words, capsys=capsys) == "me/model: nothing was pushed: the hub answered 400: status 400"
    assert hub.repos["me/model"].files == {}
    hub.refuses = {}
    assert main(["push", *words]) == 0  # the empty repository that was left is nobody's
    capsys.readouterr()
    assert refused(*words, "--update", "--public", capsys=capsys) == (
        "me/model: exists and is private: leave out --public, or change it in its settings on the hub"
    )
    hub.repos["me/model"].private = False
    assert refused(*words, "--update", capsys=capsys) == (
        "me/model: exists and is public: --public says you mean it, or change it in its settings on the hub"
    )
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(*words, capsys=capsys) == (
        "me/model: nothing was pushed: 127.0.0.1 cannot be reached (Connection refused)"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert refused(*words, capsys=capsys) == "me/model: nothing was pushed: HF_HUB_OFFLINE is set"


@pytest.mark.parametrize("token", ["hf_secret\n", "hf_sec ret", "hf_sécret"])
def test_a_token_that_cannot_be_one_is_not_repeated(finished: Path, hub: Hub, token: str) -> None:
    """The client's error would have it whole: in the log, and in run.json."""
    config = config_of(finished, "--push_to_hub", "--hub_model_id", "me/model")
    config.training["hub_token"] = token  # as of a block of YAML
    said = "me/model: the token has characters that no token has, such as a blank: hf auth login"
    trouble = why_not(config)
    assert trouble is not None
    assert trouble.startswith(said)
    assert push_as_asked(config)["error"].startswith(said)
    assert hub.asked == []


def test_a_connection_that_breaks_is_one_line(finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    hub.refuses = {"repos/create": 0}
    line = "me/model: nothing was pushed: Server disconnected without sending a response."
    assert refused(str(finished), "me/model", capsys=capsys) == line


def test_interrupted(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the upload: nothing is committed, and the same command goes on."""

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub._commit_api.lfs_upload", lambda **_: interrupt())
        assert main(["push", str(finished), "me/model"]) == 130
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == (
        "me/model has all files of this push or none. The same command goes on: what arrived stays there."
    )
    assert said.err == "\nds_sft: interrupted\n"
    assert hub.repos["me/model"].files == {}
    assert main(["push", str(finished), "me/model"]) == 0
    assert sorted(hub.repos["me/model"].files) == MODEL


def test_the_command_itself(finished: Path, hub: Hub) -> None:
    """As a user starts it, with address and token in the environment; no library's words beside ours."""
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "ds_sft", "push", str(finished), "me/model"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(hub.repos["me/model"].files) == MODEL


# ---- A run's keys


def config_of(folder: Path, *flags: str) -> Any:
    return load_config(["--model_name_or_path", "Qwen/Qwen3-0.6B", "--train_file", "rows.jsonl",
                        "--output_dir", str(folder), *flags])  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--push_to_hub"], "--push_to_hub: to which repository? write hub_model_id: OWNER/NAME too"),
        (["--hub_model_id", "model"], "--hub_model_id: expected a repository such as me/my-model, found 'model'"),
        (
            ["--hub_strategy", "every_save"],
            "--hub_strategy: expected end (a run pushes once, after its export was verified), found 'every_save'",
        ),
        (
            ["--hub_always_push"],
            "--hub_always_push: expected false (a run pushes once, after its export was verified), found 'true'",
        ),
        (
            ["--push_to_hub", "--hub_model_id", "me/x", "--verify_export", "no"],
            "--verify_export: push_to_hub: yes pushes what was verified: leave it out, or push later with ds-sft push "
            "--unverified",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_keys_that_a_run_does_not_do(tmp_path: Path, flags: list[str], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config_of(tmp_path, *flags)
    assert str(caught.value) == line


def test_trainer_itself_pushes_nothing(tmp_path: Path) -> None:
    from ds_sft.training.arguments import training_arguments

    config = config_of(tmp_path, "--push_to_hub", "--hub_model_id", "me/model", "--hub_token", TOKEN, "--use_cpu",
                       "--bf16", "no")  # fmt: skip
    args = training_arguments(config, None, Launch(launcher="python"))
    assert args.push_to_hub is False
    assert args.hub_token is None  # training_args.bin of each checkpoint has them


def test_a_run_pushes_as_its_keys_say(finished: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    config = config_of(finished, "--push_to_hub", "--hub_model_id", "me/model", "--hub_private_repo", "no",
                       "--hub_revision", "v1", "--hub_token", TOKEN)  # fmt: skip
    assert why_not(config) is None
    assert hub.repos == {}
    pushed = push_as_asked(config)
    assert pushed == {"repo": "me/model", "commit": f"{hub.url}/me/model/commit/{pushed['commit'].rpartition('/')[2]}"}
    assert hub.repos["me/model"].private is False
    assert sorted(hub.repos["me/model"].branches["v1"]) == [".gitattributes", *MODEL]


def test_a_finished_run_that_was_not_pushed_is_pushed_when_it_is_started_again(finished: Path, hub: Hub) -> None:
    """As it is merged then; and once."""
    launch = Launch(launcher="python")
    config = config_of(finished, "--push_to_hub", "--hub_model_id", "me/model")
    push_later(config_of(finished), launch, StopRequests(launch))
    assert hub.asked == []
    hub.refuses = {"repos/create": 403}
    push_later(config, launch, StopRequests(launch))
    assert "error" in json.loads((finished / "run.json").read_text(encoding="utf-8"))["pushed"]
    hub.refuses = {}
    for _ in range(2):
        push_later(config, launch, StopRequests(launch))
    run = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    assert run["pushed"]["commit"].startswith(f"{hub.url}/me/model/commit/")
    assert (run["steps"], run["identity"]) == (400, {"config": {"x": SECRET}})
    assert len(hub.repos["me/model"].messages) == 1


def test_a_run_does_not_fail_at_its_end_for_want_of_the_hub(
    finished: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuses = {"repos/create": 403}
    pushed = push_as_asked(config_of(finished, "--push_to_hub", "--hub_model_id", "me/model"))
    why = "me/model: the token may not write there (status 403): take one of role write, or a name of your own"
    assert pushed == {"repo": "me/model", "error": why}
    assert capsys.readouterr().out == f"Not pushed: {why}. Later: ds-sft push {finished} me/model\n"


def test_a_run_that_could_not_push_is_told_before_it_trains(finished: Path, model_dir: Path, hub: Hub) -> None:
    keys = ("--push_to_hub", "--hub_model_id", "me/model")
    login = "hf auth login, or HF_TOKEN, with a token of role write (https://huggingface.co/settings/tokens)"
    assert why_not(config_of(finished, *keys, "--hub_token", "hf_wrong")) == (
        f"me/model: the hub does not accept the token: {login}"
    )
    hub.role = "read"
    assert why_not(config_of(finished, *keys)) == f"me/model: the token may only read: {login}"
    hub.role = "write"
    assert why_not(config_of(finished, *keys)) is None
    assert main(["push", str(finished), "me/model"]) == 0
    full = (
        "me/model: exists and has 7 files: ds-sft push --update puts a model in their place (the hub keeps the old "
        "ones in its history), or give another name"
    )
    assert why_not(config_of(finished, *keys)) == full
    leave_run(finished, {"pushed": {"repo": "me/model", "commit": "c"}})
    assert why_not(config_of(finished, *keys)) is None  # the same command again: the run says that it is finished
    assert why_not(config_of(finished, *keys, "--resume", "never")) == full
    (finished / "run.json").write_text("{", encoding="utf-8")  # all ranks wait for the answer of this one
    assert (why_not(config_of(finished, *keys)) or "").startswith(f"{finished}/run.json: cannot be read: ")
    adapter = ("--resume", "never", "--adapter", "lora", "--model_name_or_path", str(model_dir))
    assert why_not(config_of(finished, *keys, *adapter)) == (
        f"push_to_hub: an adapter of the folder {model_dir}, which nobody else has: leave it out, and when the run has "
        f"ended: ds-sft push {finished} me/model --base OWNER/NAME"
    )
