"""What a run with an adapter leaves: peft's files, the merged model, what both are served with, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_sft.checkpoints.base import hash_base
from ds_sft.checkpoints.manifest import FACTS
from ds_sft.checkpoints.other_run import is_exported, is_finished
from ds_sft.checkpoints.space import export_size, predict_size
from ds_sft.checkpoints.storage import Site
from ds_sft.cli import main
from ds_sft.config.keys import Config
from ds_sft.errors import UserError
from ds_sft.export.merge import merge, merge_as_asked
from ds_sft.export.verify import ExportError, Question, loss_on_disk, require_verified, verify, verify_or_keep
from ds_sft.export.weights import finish_adapter, say_where_answers_end
from ds_sft.finish import merge_later, use_model
from ds_sft.model.adapter_files import ADAPTER, exported, from_anywhere, load_on_disk, save_adapter
from ds_sft.model.tokenizer import load_tokenizer
from ds_sft.plan.adapter import base_of
from ds_sft.ranks.launch import Launch
from ds_sft.ranks.stop import StopRequests
from tests.conftest import make_model
from tests.mixtures import FAMILIES as MIXTURES
from tests.mixtures import make_mixture, published
from tests.test_export import ends
from tests.test_verify import ROWS

IDS = torch.arange(5, 25)[None]
TARGETS = ["q_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """An adapter to be made: on which base, with what."""

    base: str
    options: dict[str, Any]


CASES = {
    "lora": Case("tied", {}),
    "rslora": Case("untied", {"use_rslora": True}),
    "dora": Case("tied", {"use_dora": True}),
    "head trained whole": Case("untied", {"modules_to_save": ["lm_head"]}),
    "tied ends trained whole": Case("tied", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
}


@pytest.fixture(scope="module")
def bases(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    untied = make_model(root / "untied", tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(untied, dtype="auto")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 50)
    model.save_pretrained(untied)
    return {"tied": make_model(root / "tied", tokenizer_dir), "untied": untied}


def make_adapter(base: Path, output_dir: Path, **options: Any) -> Path:
    """The folder `adapter` of a run whose training gave an adapter these values."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    asked = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(base), r=4, lora_alpha=8,
                       **{"target_modules": TARGETS} | options)  # fmt: skip
    inject_adapter_in_model(asked, model, adapter_name=ADAPTER)
    torch.manual_seed(2)
    weights = {n: p.detach() + torch.randn_like(p) / 20 for n, p in model.named_parameters() if p.requires_grad}
    save_adapter(model, weights, output_dir / ".export")
    tokenizer = AutoTokenizer.from_pretrained(base)
    finish_adapter(output_dir, output_dir / ".export", tokenizer, end_ids=[0], chat_template="{{ messages }}")
    return output_dir / "adapter"


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path) -> tuple[str, Path, Path]:
    """Its name, its base, its adapter."""
    base = bases[CASES[request.param].base]
    return request.param, base, make_adapter(base, tmp_path / "out", **CASES[request.param].options)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS).logits
    return found


def check_readers(base: Path, adapter: Path) -> None:
    """peft, transformers and we make the same model of it, which is not the base."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    before = logits(model)
    by_peft = logits(PeftModel.from_pretrained(model, str(adapter)))
    assert (by_peft - before).abs().max() > 0.01
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter, dtype="float32")), by_peft)
    assert torch.equal(logits(load_on_disk(adapter, dtype="float32")), by_peft)


def test_peft_and_transformers_read_the_same_adapter(case: tuple[str, Path, Path]) -> None:
    """transformers would leave DoRA's magnitudes at their beginning under the names that peft gives them."""
    _, base, adapter = case
    check_readers(base, adapter)
    assert AutoTokenizer.from_pretrained(adapter).chat_template == "{{ messages }}"


def oracle(base: Path, adapter: Path, name: str) -> torch.Tensor:
    """A merged weight from LoRA's and DoRA's definitions, in float32."""
    weight, options = load_file(base / "model.safetensors"), json.loads((adapter / "adapter_config.json").read_text())
    values = {
        n.removeprefix("base_model.model."): v for n, v in load_file(adapter / "adapter_model.safetensors").items()
    }
    layer = name.removesuffix(".weight")
    if name in values:  # trained whole
        return values[name]
    if f"{layer}.lora_A.weight" not in values:
        return weight[name].float()
    scale = 8 / 4 if not options["use_rslora"] else 8 / 4**0.5
    merged = weight[name].float() + values[f"{layer}.lora_B.weight"] @ values[f"{layer}.lora_A.weight"] * scale
    if not options["use_dora"]:
        return merged
    return merged / merged.norm(dim=1, keepdim=True) * values[f"{layer}.lora_magnitude_vector.weight"][:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_merged_in_float32_and_rounded_once(case: tuple[str, Path, Path], dtype: torch.dtype) -> None:
    name, base, adapter = case
    out = adapter.parent
    merge(adapter, out, dtype, max_shard_size="5GB", trust_remote_code=False)
    found = load_file(out / "model.safetensors")
    assert found.keys() == load_file(base / "model.safetensors").keys()
    for weight, value in found.items():
        expected, published = oracle(base, adapter, weight), load_file(base / "model.safetensors")[weight].float()
        if name == "dora":  # the norm may be summed in another order
            assert value.dtype == dtype
            torch.testing.assert_close(value.float(), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)
        else:
            assert torch.equal(value, expected.to(dtype)), weight
        trained = any(target in weight for target in TARGETS) or weight in WHOLE.get(name, ())
        assert trained != torch.equal(expected, published)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert model.config.tie_word_embeddings is (CASES[name].base == "tied")
    if dtype == torch.float32:
        assert (logits(model) - logits(load_on_disk(adapter, dtype=dtype))).abs().max() < 1e-5


WHOLE = {"head trained whole": ["lm_head.weight"], "tied ends trained whole": ["model.embed_tokens.weight"]}


# ---- What is in the folders


ON_EXPERTS = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest, tokenizer_dir: Path, tmp_path: Path) -> tuple[str, Path, Path]:
    """A family's name, a model of it as published, an adapter on its experts."""
    base = make_mixture(tmp_path / "base", request.param, tokenizer_dir)
    return request.param, base, make_adapter(base, tmp_path / "out", **ON_EXPERTS)


def with_adapters(family: str, name: str, weight: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor of all experts, [experts, out, in], gpt-oss's [experts, in, out], and each expert's B A, times 2."""
    block, _, tensor = name.rpartition(".")
    inner = "base_layer." if tensor == "gate_up_proj" else ""  # the first of two has the second around it
    a, b = (values[f"base_model.model.{block}.{inner}lora_{part}.weight"] for part in "AB")
    rank, merged = 4, weight.float().clone()
    for number in range(len(weight)):
        product = b[:, number :: len(weight)] @ a[number * rank : (number + 1) * rank]
        merged[number] += 2 * (product.T if family == "gpt_oss" else product)
    return merged


def test_experts_of_peft_and_of_transformers_are_the_same(mixture: tuple[str, Path, Path]) -> None:
    _, base, adapter = mixture
    check_readers(base, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_experts_are_merged_and_published_as_before(mixture: tuple[str, Path, Path], dtype: torch.dtype) -> None:
    """In the tensors of the base's files, in float32, rounded once; as peft merges them in float32."""
    family, base, adapter = mixture
    merge(adapter, adapter.parent, dtype, max_shard_size="5GB", trust_remote_code=False)
    found, names = load_file(adapter.parent / "model.safetensors"), load_file(base / "model.safetensors").keys()
    assert found.keys() == names
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    values = load_file(adapter / "adapter_model.safetensors")
    experts = {n: with_adapters(family, n, v, values) for n, v in model.state_dict().items() if v.dim() == 3}
    assert len(experts) == 2 * sum("experts.base_layer.lora_A" in name for name in values)
    for name, value in published(family, experts):
        torch.testing.assert_close(found[name], value.to(dtype), rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    by_peft: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    for name, value in published(family, by_peft.state_dict()):
        if "e_score_correction_bias" not in name:
            assert torch.equal(found[name], value.to(dtype)), name


def test_both_folders_say_where_an_answer_ends(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["tied"], tmp_path)
    beside = ["chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    assert names(adapter) == sorted(["adapter_config.json", "adapter_model.safetensors", *beside])
    (adapter / "trained_on.json").write_text('{"quantization": "none"}', encoding="utf-8")
    merge(adapter, tmp_path, torch.bfloat16, max_shard_size="5GB", trust_remote_code=False)
    assert names(tmp_path) == sorted(["adapter", "config.json", "model.safetensors", *beside])
    for folder in (adapter, tmp_path):  # 0 was learned, 2 is the model's own
        assert json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [0, 2]
        assert load_on_disk(folder).generation_config.eos_token_id == [0, 2]
        assert {(folder / name).stat().st_mode & 0o777 for name in beside} == {0o644}
    assert exported(tmp_path) == tmp_path
    make_adapter(bases["tied"], tmp_path)  # another one: the merged model is not its own
    assert names(tmp_path) == ["adapter", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert exported(tmp_path) == adapter


def test_a_base_that_ends_answers_elsewhere_is_said(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers and vLLM read the base's own files beside an adapter: answers would not stop at 0."""
    adapter = make_adapter(bases["tied"], tmp_path)
    assert AutoModelForCausalLM.from_pretrained(adapter).generation_config.eos_token_id == 2
    capsys.readouterr()
    say_where_answers_end(adapter, [2])
    assert capsys.readouterr().out == ""
    say_where_answers_end(adapter, [0, 2])
    assert f" gives the server {adapter}/generation_config.json, or answers do not stop.\n" in capsys.readouterr().out


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_base_is_found_from_every_folder(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases["tied"].parent)
    adapter = make_adapter(Path(bases["tied"].name), tmp_path)
    assert base_of(adapter) == str(bases["tied"])
    assert from_anywhere("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"


def test_the_merge_is_of_the_weights_that_4_bits_trained_against(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["tied"], tmp_path)
    (adapter / "trained_on.json").write_text('{"quantization": "nf4", "computed_in": "float32"}', encoding="utf-8")
    merge(adapter, tmp_path, torch.float32, max_shard_size="5GB", trust_remote_code=False)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    four_bits = load_on_disk(adapter, dtype="float32", trust_remote_code=False)
    assert four_bits.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.uint8
    assert (logits(rounded) - logits(four_bits)).abs().max() < 1e-5
    published = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(bases["tied"], dtype="float32"), adapter)
    assert (logits(rounded) - logits(published)).abs().max() > 0.01


# ---- Verified in a fresh process


def test_the_merged_model_and_the_adapter_are_asked(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(bases["tied"], tmp_path)
    merge(adapter, tmp_path, torch.bfloat16, max_shard_size="5GB", trust_remote_code=False)
    trained = loss_on_disk(str(adapter), ROWS, use_cpu=True, trust_remote_code=False)["loss"]
    asked = Question(rows=ROWS, trained_loss=trained, dtypes=["float32", "bfloat16"], use_cpu=True)
    found = verify(tmp_path, asked)
    assert found["verified"] is True
    assert 1e-7 < found["difference"] < found["bound"]
    assert abs(found["loss_of_adapter"] - trained) < 1e-3
    assert found["merge"].keys() == {"largest_difference", "largest_logit", "tokens"}
    assert 1e-4 < found["merge"]["largest_difference"] < 0.05
    assert (0.5 < found["merge"]["largest_logit"] < 5, found["merge"]["tokens"]) == (True, 4)
    require_verified(found, tmp_path)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"Export verified: {tmp_path}, loaded in a fresh process, has loss ")
    assert f" {adapter} on its base has {found['loss_of_adapter']:.6f} (bound 6.1e-04)." in first
    assert second.startswith("Rounding of the merge: logits of the merged model and of base + adapter differ by 0.0")
    damage(adapter)
    found = verify(tmp_path, asked)
    assert found["difference"] < found["bound"]  # the merged model is right
    assert found["bound_of_adapter"] < abs(found["loss_of_adapter"] - trained) < found["bound"]
    with pytest.raises(ExportError, match=f"Export NOT verified: .* {adapter} on its base has "):
        require_verified(found, tmp_path)


def damage(adapter: Path) -> None:
    """By less than a merge may round in bfloat16."""
    damaged = {name: value * 1.1 for name, value in load_file(adapter / "adapter_model.safetensors").items()}
    save_file(damaged, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def test_an_adapter_alone_is_asked(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make_adapter(bases["untied"], tmp_path)
    trained = loss_on_disk(str(adapter), ROWS, use_cpu=True, trust_remote_code=False)["loss"]
    asked = Question(ROWS, trained, ["float32", "bfloat16"], use_cpu=True)  # export_dtype is of a merged model
    require_verified(verify(tmp_path, asked), tmp_path)
    assert capsys.readouterr().out.startswith(f"Export verified: {adapter} on its base, loaded in a fresh process, has")
    damage(adapter)
    assert verify(tmp_path, asked)["verified"] is False


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "alone"])
def test_verified_later(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    merged: bool,
) -> None:  # fmt: skip
    """`ds-sft verify` of a run with an adapter that had no memory for it; run.json keeps what else it says."""
    adapter = make_adapter(bases["tied"], tmp_path)
    trained = loss_on_disk(str(adapter), ROWS, use_cpu=True, trust_remote_code=False)["loss"]
    if merged:
        merge(adapter, tmp_path, torch.bfloat16, max_shard_size="5GB", trust_remote_code=False)
    (tmp_path / "run.json").write_text(json.dumps({"adapter": {"kind": "lora"}, "export": None}), encoding="utf-8")
    with monkeypatch.context() as patched:
        killed = subprocess.CompletedProcess([], -9, stdout="", stderr="")
        patched.setattr("subprocess.run", lambda *args, **kwargs: killed)
        verify_or_keep(tmp_path, Question(ROWS, trained, ["float32", "bfloat16"], use_cpu=True))
        assert main(["verify", str(tmp_path)]) == 1
    assert (tmp_path / "verify.json").is_file()
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    what = str(tmp_path) if merged else f"{adapter} on its base"
    assert said[0].startswith(f"Export verified: {what}, loaded in a fresh process, has loss ")
    assert [line.partition(":")[0] for line in said[1:]] == ["Rounding of the merge"] * merged
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert (record["adapter"], record["export"]["verified"]) == ({"kind": "lora"}, True)
    assert ("merge" in record["export"]) is merged
    assert not (tmp_path / "verify.json").exists()
    (tmp_path / "verify.json").write_text(json.dumps(asdict(Question(ROWS, trained + 1, ["float32"], use_cpu=True))))
    assert main(["verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.startswith(f"Export NOT verified: {what}, loaded in a fresh process, has loss ")


# ---- No room, and what is refused


def config(bases: dict[str, Path], output_dir: Path, **changes: Any) -> Config:
    training = {"output_dir": str(output_dir), "bf16": True}
    return Config(model_name_or_path=str(bases["tied"]), train_file="t", adapter="lora", training=training, **changes)


def test_without_room_the_adapter_stays(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(bases["tied"], tmp_path)
    before = names(adapter)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        why = f"{tmp_path}: the merged model takes about 194.8 KiB, the disk has 1,000 bytes free"
        later = f"the adapter is complete in {adapter}, and ds-sft export {adapter} FOLDER merges it elsewhere"
        assert merge_as_asked(config(bases, tmp_path)) == why
        assert capsys.readouterr().out == f"Not merged: {why}; {later}.\n"
        with pytest.raises(UserError, match=re.escape(f"merge: yes: {why}; {later}")):
            merge_as_asked(config(bases, tmp_path, merge="yes"))

    with monkeypatch.context() as patched:
        patched.setattr("ds_sft.export.merge.free_memory_here", lambda: 100_000)
        assert merge_as_asked(config(bases, tmp_path)) == (
            "a merge takes about 197.2 KiB of memory, of which 97.7 KiB are free"
        )

    def full(*given: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:  # filled meanwhile
        patched.setattr("ds_sft.export.merge.move_into", full)
        assert merge_as_asked(config(bases, tmp_path)) == "[Errno 28] No space left on device"
    assert merge_as_asked(config(bases, tmp_path, merge="no")) == "merge: no"
    assert (names(tmp_path), names(adapter)) == (["adapter"], before)
    assert merge_as_asked(config(bases, tmp_path)) is None


def test_an_adapter_of_another_model(bases: dict[str, Path], tokenizer_dir: Path, tmp_path: Path) -> None:
    adapter = make_adapter(bases["tied"], tmp_path / "out")
    wider = make_model(tmp_path / "wider", tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(wider)
    model.config.intermediate_size = 96
    type(model)(model.config).save_pretrained(wider)
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(written | {"base_model_name_or_path": str(wider)}), encoding="utf-8")
    why = r"not an adapter of .*wider: \S+\.0\.mlp\.down_proj\.lora_A is \[4, 128\] in it, \[4, 96\] in the model"
    with pytest.raises(UserError, match=why):
        merge(adapter, tmp_path / "out", torch.float32, max_shard_size="5GB", trust_remote_code=False)
    assert names(tmp_path / "out") == ["adapter"]


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_never_merged_into(bases: dict[str, Path], tmp_path: Path, target: str) -> None:
    """peft warns, and merges: logits moved by 2.5."""
    with pytest.warns(UserWarning, match="tie"):
        adapter = make_adapter(bases["tied"], tmp_path, target_modules=[target])
    with pytest.raises(UserError, match=rf"cannot be merged: the weight of \S*{target} is another module's, too "):
        merge(adapter, tmp_path, torch.float32, max_shard_size="5GB", trust_remote_code=False)
    assert names(tmp_path) == ["adapter"]


def test_an_adapter_is_no_model_to_train(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter = make_adapter(bases["tied"], tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(replace(config(bases, tmp_path), model_name_or_path=str(adapter)), Launch(launcher="python"))
    assert str(caught.value) == (
        f"model_name_or_path: {adapter}: is an adapter of {bases['tied']}, not a model: write model_name_or_path: "
        f"{bases['tied']}, or a folder that it is merged into: ds-sft export {adapter} FOLDER"
    )


# ---- ds-sft export


def checkpoint(bases: dict[str, Path], run: Path, **facts: Any) -> Path:
    """checkpoint-4 of a run with an adapter, as every engine leaves it."""
    folder = run / "checkpoint-4"
    made = make_adapter(bases["tied"], run / "made")
    shutil.copytree(made, folder, ignore=shutil.ignore_patterns("generation_config.json"))
    shutil.rmtree(run / "made")
    (run / "data_report.json").write_text("{}", encoding="utf-8")
    keys = {"model_name_or_path": str(bases["tied"]), "bf16": True, "output_dir": "o", "train_file": "t"}
    (run / "config.yaml").write_text(json.dumps(keys), encoding="utf-8")
    manifest = dict.fromkeys(FACTS, 0) | {"format": 1, "files": {}, "config": keys, **facts}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_checkpoint_becomes_what_a_run_leaves(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, again = checkpoint(bases, tmp_path / "run"), tmp_path / "out", tmp_path / "again"
    (source / "manifest.json").write_text(
        json.dumps(json.loads((source / "manifest.json").read_text()) | {"base": hash_base(str(bases["tied"]))})
    )
    assert main(["export", str(source), str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{source} -> {out}/adapter: an adapter of {bases['tied']}.",
        "The base ends answers at other tokens: who serves it with the adapter gives the server "
        f"{out}/adapter/generation_config.json, or answers do not stop.",
        f"{out}: {bases['tied']} with the adapter merged in float32, in bfloat16.",
    ]
    assert json.loads((out / "adapter" / "trained_on.json").read_text(encoding="utf-8")) == {
        "quantization": "none", "computed_in": "bfloat16", "base": hash_base(str(bases["tied"])),
    }  # fmt: skip
    assert "system_turn" in AutoTokenizer.from_pretrained(out).chat_template  # the run's own, of its config.yaml
    assert main(["export", str(out / "adapter"), str(again), "--dtype", "bfloat16", "--merge"]) == 0
    for file in (path for path in out.rglob("*") if path.is_file()):
        assert file.read_bytes() == (again / file.relative_to(out)).read_bytes(), file
    assert main(["export", str(source), str(tmp_path / "alone"), "--adapter-only"]) == 0
    assert names(tmp_path / "alone") == ["adapter"]


def test_an_adapter_that_peft_has_written(bases: dict[str, Path], tmp_path: Path) -> None:
    """It has no tokenizer, and says nothing of what it was trained beside."""
    adapter, out = make_adapter(bases["tied"], tmp_path / "made"), tmp_path / "out"
    for name in set(names(adapter)) - {"adapter_config.json", "adapter_model.safetensors"}:
        (adapter / name).unlink()
    by_peft = adapter.rename(tmp_path / "by_peft")
    assert main(["export", str(by_peft), str(out), "--dtype", "float32"]) == 0
    merged: Any = AutoModelForCausalLM.from_pretrained(out, dtype="float32")
    assert (logits(merged) - logits(load_on_disk(by_peft, dtype="float32"))).abs().max() < 1e-5
    assert merged.generation_config.eos_token_id == 2  # the base's own
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(bases["tied"]).get_vocab()


def test_what_export_refuses(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    def said(*argv: Any) -> str:
        capsys.readouterr()
        assert main(["export", *map(str, argv)]) == 2
        return capsys.readouterr().err

    source, out = checkpoint(bases, tmp_path / "run", base="0123456789"), tmp_path / "out"
    found = hash_base(str(bases["tied"]))
    assert said(source, out) == (
        f"ds_sft: error: {source}: {bases['tied']} differs in its weights from the base that it was trained on (hash "
        f"0123456789, found {found}): give its own: --base FOLDER\n"
    )
    elsewhere = make_adapter(bases["tied"], tmp_path / "sent")
    file = elsewhere / "adapter_config.json"
    file.write_text(file.read_text(encoding="utf-8").replace(str(bases["tied"]), "/not/here"), encoding="utf-8")
    elsewhere = elsewhere.rename(tmp_path / "received")
    assert said(elsewhere, out) == (
        f"ds_sft: error: {elsewhere}: its base /not/here is neither a folder here nor in the hub's cache: say "
        "where it is, --base FOLDER, or fetch it: hf download\n"
    )
    assert said(bases["tied"], out, "--merge") == (
        f"ds_sft: error: {bases['tied']}: has no adapter (adapter_config.json): leave out --merge\n"
    )
    assert said(bases["tied"], out, "--merge=no").endswith(": leave out --adapter-only\n")
    assert said(bases["tied"], out, "--base", bases["untied"]) == (
        f"ds_sft: error: {bases['tied']}: has all its weights: leave out --base\n"
    )
    assert said(source, out, "--base", tmp_path / "no") == (
        f"ds_sft: error: --base: {tmp_path / 'no'}: no such folder (the current directory is {Path.cwd()}), and not a "
        "hub id such as Qwen/Qwen3-0.6B\n"
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    source = checkpoint(bases, tmp_path / "other")
    assert "the merged model takes about 194.8 KiB, the disk has 1,000 bytes free" in said(source, out, "--merge")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
        patched.setattr("ds_sft.export.merge.free_memory_here", lambda: 1000)
        assert "a merge takes about 197.2 KiB of memory, of which 1,000 bytes are free" in said(source, out, "--merge")
    assert not out.exists()
    assert main(["export", str(source), str(out)]) == 0
    assert "Not merged: " in capsys.readouterr().out
    assert names(out) == ["adapter"]


def test_the_key_of_a_run_is_understood(bases: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoint(bases, tmp_path / "run")
    for number, words in enumerate((["--merge", "no"], ["--merge", "auto"], ["--merge"])):
        assert main(["export", *words, str(source), str(tmp_path / str(number))]) == 0
    assert names(tmp_path / "0") == ["adapter"]
    assert names(tmp_path / "1") == names(tmp_path / "2")
    assert "model.safetensors" in names(tmp_path / "1")


@pytest.mark.parametrize("kind", ["adapter", "layers"])
def test_a_base_that_has_moved(bases: dict[str, Path], tmp_path: Path, kind: str) -> None:
    moved, gone = shutil.copytree(bases["tied"], tmp_path / "moved"), "/not/here"
    source = checkpoint(bases, tmp_path / "run", base=hash_base(str(moved)))
    record, asked = source.parent / "config.yaml", source / "adapter_config.json"
    for file in (record, asked):
        file.write_text(file.read_text(encoding="utf-8").replace(str(bases["tied"]), gone), encoding="utf-8")
    if kind == "layers":
        asked.unlink()
        save_file({"model.norm.weight": torch.full([64], 1.5)}, source / "trained.safetensors")
    assert main(["export", str(source), str(tmp_path / "out")]) == 2
    assert main(["export", str(source), str(tmp_path / "out"), "--base", str(moved)]) == 0
    assert "model.safetensors" in names(tmp_path / "out")
    if kind == "adapter":
        assert base_of(tmp_path / "out" / "adapter") == str(moved)  # so it loads: by transformers, by peft
        AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter")


def test_trained_layers_and_the_frozen_ones_of_the_base(bases: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoint(bases, tmp_path / "run")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (source / name).unlink()
    value = torch.full([64], 1.001)
    save_file({"model.norm.weight": value}, source / "trained.safetensors", metadata={"format": "pt"})
    assert main(["export", str(source), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    found, base = load_file(tmp_path / "out" / "model.safetensors"), load_file(bases["tied"] / "model.safetensors")
    assert torch.equal(found.pop("model.norm.weight"), value)
    assert all(torch.equal(weight, base[name].float()) for name, weight in found.items())
    assert found.keys() == base.keys() - {"model.norm.weight"}
    assert ends(tmp_path / "out") == ([0, 2], [0, 2])


# ---- Around it


def test_a_run_that_left_an_adapter_is_finished(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {"config": {}, "data": "d", "eval_data": ""}
    (tmp_path / "run.json").write_text(json.dumps({"identity": run}), encoding="utf-8")
    launch, asked = Launch(launcher="python"), config(bases, tmp_path)
    assert not is_finished(asked, run, launch)
    make_adapter(bases["tied"], tmp_path)
    assert is_finished(asked, run, launch)
    assert is_finished(replace(asked, merge="no"), run, launch)
    done = f"This run is finished: {tmp_path} holds its adapter. "
    assert capsys.readouterr().out.splitlines() == [
        f"{done}(merge: yes merges it; --resume never trains it anew.)",
        f"{done}(--resume never trains it anew.)",
    ]


def test_a_run_that_was_stopped_behind_its_export(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not finished, goes on with its own weights alone, and is never another run's."""
    run = {"config": {}, "data": "d", "eval_data": ""}
    launch, asked = Launch(launcher="python"), config(bases, tmp_path)
    (tmp_path / "exported.json").write_text(json.dumps({"identity": run}), encoding="utf-8")
    assert not is_exported(asked, run, launch)  # no weights
    make_adapter(bases["tied"], tmp_path)
    assert not is_finished(asked, run, launch)
    assert is_exported(asked, run, launch)
    with pytest.raises(UserError, match="is of another run, which differs in: "):
        is_exported(asked, {**run, "data": "other"}, launch)
    assert capsys.readouterr().out == (
        f"This run is trained, {tmp_path} has its weights: going on with verification and answers.\n"
    )


def test_weights_that_are_not_the_trained_ones_are_not_gone_on_with(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise ExportError("Export NOT verified")

    monkeypatch.setattr("ds_sft.finish.merge_and_verify", refuse)
    (tmp_path / "exported.json").touch()
    data: Any = SimpleNamespace(eval=None, train=Dataset.from_list([{"input_ids": [7]}] * 9))
    nobody: Any = object()
    exported = {"results": {"steps": 2}, "loss_trained": 2.5, "identity": {}}
    with pytest.raises(ExportError):
        use_model(exported, config(bases, tmp_path), data, nobody, nobody, StopRequests(Launch(launcher="python")))
    assert not (tmp_path / "exported.json").exists()


@pytest.mark.parametrize(("merge", "asked"), [("yes", True), ("auto", False), ("no", False)])
def test_a_later_merge_is_verified_by_the_loss_that_training_had(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: str, asked: bool
) -> None:
    done = {"export": {"loss_trained": 2.5}, "adapter": {"not_merged": "merge: no"}}
    (tmp_path / "run.json").write_text(json.dumps(done), encoding="utf-8")
    make_adapter(bases["tied"], tmp_path)
    calls: list[Any] = []
    monkeypatch.setattr(
        "ds_sft.finish.merge_and_verify", lambda config, rows, loss, run: calls.append(([*rows], loss, run))
    )
    data: Any = SimpleNamespace(eval=None, train=Dataset.from_list([{"input_ids": [7]}] * 9))
    launch, given = Launch(launcher="python"), config(bases, tmp_path, merge=merge)
    merge_later(given, data, launch, StopRequests(launch))
    assert calls == ([([{"input_ids": [7]}] * 8, 2.5, done)] if asked else [])
    (tmp_path / "model.safetensors").touch()  # by a start that was killed before it was verified
    merge_later(given, data, launch, StopRequests(launch))
    assert len(calls) == 2 * asked
    (tmp_path / "run.json").write_text(json.dumps(done | {"adapter": {"not_merged": None}}), encoding="utf-8")
    merge_later(given, data, launch, StopRequests(launch))
    assert len(calls) == 2 * asked


def test_disk_for_the_adapter_and_what_must_be_merged(bases: dict[str, Path], tmp_path: Path) -> None:
    alone = Site(Launch(launcher="python"), shared=True)
    model: Any = AutoModelForCausalLM.from_pretrained(bases["tied"], dtype="bfloat16")
    whole = sum(parameter.numel() for parameter in model.parameters())
    inject_adapter_in_model(LoraConfig(r=4, target_modules=TARGETS), model, adapter_name=ADAPTER)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert predict_size(model, None, alone) == 12 * count
    assert predict_size(model, 3, alone) == 16 * count
    assert export_size(model, config(bases, tmp_path), alone) == 4 * count
    assert export_size(model, config(bases, tmp_path, merge="yes"), alone) == 4 * count + 2 * whole


def test_importing_peft_says_nothing_of_packages_that_nobody_uses() -> None:
    code = "import ds_sft, peft, bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gemm_4bit_forward" not in done.stdout + done.stderr
