"""Which models are given rows end to end, and which padded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ds_sft.errors import UserError
from ds_sft.model.padding_free_support import uses_padding
from ds_sft.ranks.launch import Launch
from tests.test_load import make

ALONE = Launch(launcher="python")


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        ("qwen3_next", "full_attention, linear_attention"),
        ("mamba", "linear_attention"),
        ("gpt_oss", "its mask knows no position ids"),
        ("none_of_them", None),
    ],
)
def test_a_model_that_would_mix_rows_is_given_padded_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, layers: str | None
) -> None:
    """And packing is refused, by its configuration alone: there are no weights here."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind if layers else "vit"}), encoding="utf-8")
    assert uses_padding(make(tmp_path), ALONE)
    said = capsys.readouterr().out
    assert said.count("would mix rows that are laid end to end") == 1
    assert f"({layers or 'its own code'})" in said
    with pytest.raises(UserError, match=r"^packing: concat: ") as caught:
        uses_padding(make(tmp_path, packing="concat"), ALONE)
    assert f"Config ({layers or 'its own code'}) does not keep packed rows apart; write none" in str(caught.value)


def test_rows_are_laid_end_to_end_unless_asked_otherwise(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not uses_padding(make(model_dir), ALONE)
    assert not uses_padding(make(model_dir, packing="concat"), ALONE)
    assert uses_padding(make(model_dir, batching="padded"), ALONE)
    assert capsys.readouterr().out == ""
