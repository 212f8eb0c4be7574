"""`ds-sft export`: what it writes, what it refuses, how much memory it takes."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ds_sft.checkpoints.consolidate import SavedWeight
from ds_sft.cli import main
from ds_sft.commands.export import _dtypes
from ds_sft.commands.export import main as export
from ds_sft.errors import UserError
from tests.families import FAMILIES

RANKS = 3


@pytest.fixture
def plain(model_dir: Path, tmp_path: Path) -> Path:
    """A folder as Trainer leaves it without DeepSpeed."""
    folder = Path(shutil.copytree(model_dir, tmp_path / "run" / "checkpoint-4"))
    for name in ("trainer_state.json", "optimizer.pt"):
        (folder / name).write_text("{}", encoding="utf-8")
    return folder


@pytest.fixture
def sharded(plain: Path) -> Path:
    """The same under ZeRO-2 on three ranks, as DeepSpeed 0.19 writes it; test_trajectory.py has real ones."""
    weights = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    write_shards(plain, weights)
    return plain


def write_shards(plain: Path, weights: dict[str, torch.Tensor]) -> None:
    names = sorted(weights)
    vector = torch.cat([weights[name].detach().float().flatten() for name in names])
    vector = torch.cat([vector, torch.zeros(-len(vector) % (2 * RANKS))])
    state = plain / "global_step4"
    state.mkdir()
    (plain / "latest").write_text("global_step4", encoding="utf-8")
    for rank, piece in enumerate(vector.chunk(RANKS)):
        content = {"zero_stage": 2, "single_partition_of_fp32_groups": [piece.clone()]}
        torch.save({"optimizer_state_dict": content}, state / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    torch.save(
        {
            "module": {},
            "buffer_names": [],
            "param_shapes": [{name: weights[name].shape for name in names}],
            "frozen_param_shapes": {},
            "dp_world_size": RANKS,
            "mp_world_size": 1,
        },
        state / "mp_rank_00_model_states.pt",
    )


def test_experts_get_the_names_they_are_published_under(tmp_path: Path) -> None:
    """transformers joins experts in memory; a published folder has them one by one."""
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model, checkpoint = Qwen3MoeForCausalLM(config), tmp_path / "checkpoint-4"
    model.save_pretrained(checkpoint)
    (checkpoint / "model.safetensors").rename(tmp_path / "published.safetensors")
    write_shards(checkpoint, dict(model.named_parameters()))
    assert export([str(checkpoint), str(tmp_path / "out")]) == 0
    found, expected = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "published.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_buffers_keep_their_dtype() -> None:
    """As in the export at the end of a run: a scale in float32 has a reason."""
    model = torch.nn.BatchNorm1d(4)
    weights = {n: SavedWeight(tuple(v.shape), lambda v=v: v, v.dtype) for n, v in model.state_dict().items()}  # type: ignore[misc]
    found = _dtypes(weights, model, torch.bfloat16)
    assert {name for name, dtype in found.items() if dtype == torch.bfloat16} == {"weight", "bias"}
    assert (found["running_mean"], found["num_batches_tracked"]) == (torch.float32, torch.int64)


def test_shards_become_the_model(
    sharded: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(sharded), str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{sharded} (ZeRO-2, 3 ranks) -> {out}: 24 tensors, 0.00 GiB in bfloat16, in ")
    found, expected = load_file(out / "model.safetensors"), load_file(model_dir / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert sorted(path.name for path in out.iterdir() if path.name != "chat_template.jinja") == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert AutoTokenizer.from_pretrained(out).pad_token == "<|endoftext|>"
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_dtype_and_shards(kind: str, request: pytest.FixtureRequest, model_dir: Path, tmp_path: Path) -> None:
    checkpoint = request.getfixturevalue(kind)
    out = tmp_path / "out"
    assert export([str(checkpoint), str(out), "--dtype", "float32", "--max_shard_size", "50KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 3
    model, original = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (out, model_dir))
    assert model.config.use_cache is True
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value.float()), name


def test_auto_is_what_the_run_would_export(plain: Path, tmp_path: Path) -> None:
    for number, (record, dtype) in enumerate(
        [("bf16: true", torch.bfloat16), ("bf16: false", torch.float32), ("export_dtype: float16", torch.float16)]
    ):
        (plain.parent / "config.yaml").write_text(record, encoding="utf-8")
        assert export([str(plain), str(tmp_path / str(number))]) == 0
        weights = load_file(tmp_path / str(number) / "model.safetensors")
        assert {value.dtype for value in weights.values()} == {dtype}


def test_a_checkpoint_that_was_never_completed(plain: Path, tmp_path: Path) -> None:
    (plain.parent / "data_report.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r": it was never completed: no manifest; take another checkpoint$"):
        export([str(plain), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_cache_that_training_switched_off_is_on_again(plain: Path, tmp_path: Path) -> None:
    config = json.loads((plain / "config.json").read_text(encoding="utf-8"))
    (plain / "config.json").write_text(json.dumps(config | {"use_cache": False}), encoding="utf-8")
    assert export([str(plain), str(tmp_path / "out")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.use_cache is True


def test_a_tied_head_that_was_saved_twice_is_written_once(sharded: Path, tmp_path: Path) -> None:
    file = sharded / "global_step4" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=False)
    assert export([str(sharded), str(tmp_path / "out")]) == 0
    embedding = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    stage0 = load_file(tmp_path / "out" / "model.safetensors") | {"lm_head.weight": embedding.clone()}
    torch.save(content | {"param_shapes": None, "module": stage0}, file)
    assert export([str(sharded), str(tmp_path / "again")]) == 0
    assert "lm_head.weight" not in load_file(tmp_path / "again" / "model.safetensors")


def test_it_ends_and_renders_as_the_run_trained(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the run's config.yaml beside the checkpoint: the same as the run itself exports at its end."""
    keys = {"model_name_or_path": "m", "train_file": "t", "output_dir": "o", "system_prompt": "Be brief."}
    record = plain.parent / "config.yaml"
    record.write_text(json.dumps(keys), encoding="utf-8")
    assert export([str(plain), str(tmp_path / "reference")]) == 0
    assert ends(tmp_path / "reference") == ([0, 2], [0, 2])  # the pad token was learned; 2 is the model's own
    question = [{"role": "user", "content": "q"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reference")
    assert tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    template = tmp_path / "chat.jinja"
    template.write_text(FAMILIES["marked"][1], encoding="utf-8")
    record.write_text(json.dumps(keys | {"template": str(template)}), encoding="utf-8")
    assert export([str(plain), str(tmp_path / "file")]) == 0
    assert ends(tmp_path / "file") == (2, 2)
    capsys.readouterr()
    template.unlink()
    assert export([str(plain), str(tmp_path / "gone")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == (
        f"template: {template}: No such file or directory; expected reference, tokenizer, hermes, or a Jinja file: the "
        f"end of an answer and the chat template in {tmp_path / 'gone'} are those of the model before"
    )


def ends(folder: Path) -> tuple[Any, ...]:
    names = ("generation_config.json", "config.json")
    return tuple(json.loads((folder / name).read_text(encoding="utf-8"))["eos_token_id"] for name in names)


def refused(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        export(argv)
    return str(caught.value)


def test_what_is_refused(sharded: Path, tmp_path: Path) -> None:
    out, state = str(tmp_path / "out"), sharded / "global_step4"
    assert refused(str(sharded.parent), out) == (
        f"{sharded.parent}: the folder of a run; give one of its checkpoints: checkpoint-4"
    )
    assert refused(str(tmp_path / "no"), out) == (
        f"{tmp_path}/no: not a checkpoint: no such folder; expected a folder such as output/checkpoint-400"
    )
    assert refused(str(sharded), str(sharded)) == f"{sharded}: exists and is not empty; give a new folder"
    assert refused(str(sharded), out, "--max_shard_size", "5") == (
        "--max_shard_size: expected a size such as 5GB or 500MB, found '5'"
    )
    shard = state / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    whole = shard.read_bytes()
    shard.unlink()
    assert refused(str(sharded), out) == (
        f"{state}: 1 of 3 shards missing: {shard.name}; copy them from the nodes that wrote them"
    )
    shard.write_bytes(whole[: len(whole) // 2])
    assert refused(str(sharded), out).startswith(f"{shard}: cannot be read: ")
    torch.save({"optimizer_state_dict": {"single_partition_of_fp32_groups": [torch.zeros(4)], "zero_stage": 2}}, shard)
    assert "elements where the parameters have" in refused(str(sharded), out)
    (state / "mp_rank_00_model_states.pt").unlink()
    assert refused(str(sharded), out) == f"{state}: no *_model_states.pt in it; the checkpoint is incomplete"
    assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(sharded: Path, tmp_path: Path) -> None:
    config = json.loads((sharded / "config.json").read_text(encoding="utf-8"))
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (sharded / "config.json").write_text(json.dumps(config), encoding="utf-8")
    said = refused(str(sharded), str(tmp_path / "out"))
    assert "model.layers.2." in said
    assert said.endswith("is missing: the weights are not those of its config.json")


def test_a_missing_file_of_several(plain: Path, tmp_path: Path) -> None:
    weights = load_file(plain / "model.safetensors")
    (plain / "model.safetensors").unlink()
    save_file(weights, plain / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    files = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    files["model.norm.weight"] = "model-00002-of-00002.safetensors"
    (plain / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    assert refused(str(plain), str(tmp_path / "out")) == (
        f"{plain}: 1 of 2 shards missing: model-00002-of-00002.safetensors; copy them from the nodes that wrote them"
    )


def peak_above_now(work: Callable[[], object]) -> float:
    """MiB of memory that is no file's: its peak while `work` runs, above that before."""

    def anonymous() -> float:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work has freed could hide what this one takes
    done, before = threading.Event(), anonymous()
    peaks = [before]

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(anonymous())

    thread = threading.Thread(target=watch)
    thread.start()
    work()
    done.set()
    thread.join()
    return max(peaks) - before


def size_and_peak(config: Any, sharded: Path, tmp_path: Path) -> tuple[float, float]:
    """MiB of a model's weights, and the memory in which they are exported as nine files of 10 MB and more."""
    model, big = AutoModelForCausalLM.from_config(config), tmp_path / "big" / "checkpoint-4"
    size = sum(parameter.numel() for parameter in model.parameters()) * 4 / 2**20
    big.mkdir(parents=True)
    config.save_pretrained(big)
    write_shards(big, dict(model.named_parameters()))
    del model
    assert export([str(sharded), str(tmp_path / "small")]) == 0  # everything is imported
    arguments = [str(big), str(tmp_path / "out"), "--dtype", "float32", "--max_shard_size"]
    peak = peak_above_now(lambda: export([*arguments, "10MB"]))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) >= 9
    return size, peak


def test_memory_is_that_of_one_file_of_weights(sharded: Path, tmp_path: Path) -> None:
    """The model is 90 MiB, a file of its weights 10: read, and converted, that is some 20, and allocators keep some."""
    config = Qwen3Config(
        vocab_size=400, hidden_size=512, intermediate_size=1024, num_hidden_layers=9, num_attention_heads=8,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
    )  # fmt: skip
    size, peak = size_and_peak(config, sharded, tmp_path)
    assert 90 < size < 110
    assert peak < 45


def test_memory_of_experts_is_that_of_one_layer(sharded: Path, tmp_path: Path) -> None:
    """The model is 96 MiB, a layer 12, of which all is read, joined and cut into experts, and a file of 10."""
    config = Qwen3MoeConfig(
        vocab_size=400, hidden_size=256, moe_intermediate_size=256, num_hidden_layers=8, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, num_experts=16, num_experts_per_tok=2,
    )  # fmt: skip
    size, peak = size_and_peak(config, sharded, tmp_path)
    assert 96 < size < 100
    assert peak < 75


def test_help_is_answered_at_once() -> None:
    code = (
        "import sys; from ds_sft.cli import main\n"
        "try: main(['export', '--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "CHECKPOINT" in done.stdout
    assert done.stdout.endswith("False\n")
