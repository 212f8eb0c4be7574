"""Under ZeRO-3 no rank ever holds the whole model, and nothing is left of the process group at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed.harness import run_forked, script
from tests.distributed.test_trajectory import settings

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_parameter_is_partitioned_while_loading(model_dir: Path, tmp_path: Path, ranks: int) -> None:
    """From several shards; 3 ranks divide no parameter of the model evenly, so the last share is padded."""
    shards = tmp_path / "shards"
    AutoModelForCausalLM.from_pretrained(model_dir).save_pretrained(shards, max_shard_size="50KB")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(shards)
    assert len(list(shards.glob("model-*.safetensors"))) > 2
    keys = settings(shards, tmp_path, "zero3", 1, 1, max_steps=1, eval_strategy="no")
    flags = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    done = run_forked([script("partition"), *flags], ranks, cwd=tmp_path, env={"FOUND": str(tmp_path)})
    assert done.code == 0, done.output[-6000:]
    for rank in range(ranks):
        found = json.loads((tmp_path / str(rank)).read_text(encoding="utf-8"))
        assert found["whole"] == []
        assert found["asked"] == ["dtype", "trust_remote_code"]  # device_map would load all of it
        assert found["elements"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(shards).parameters())
        assert found["elements"] / ranks <= found["held"] < found["elements"] / ranks + 100  # padding
        assert found["group_left"] is False
