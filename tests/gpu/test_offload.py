"""Layers' inputs that wait in host memory, and MLPs in tiles, on a GPU: the same bits, and less memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from ds_sft.model.offload import InputOffload, StreamCopies
from ds_sft.model.tiling import TILE, TiledMLP
from tests.gpu.lane import DEVICE, GPU, ON_GPU, make
from tests.test_offload import LateCopies

pytestmark = GPU
LAYERS, WIDTH = 8, 256
ROW = 3 * TILE if ON_GPU else 100  # tokens
BUFFER = 2**20  # bytes: a layer's input takes some


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    with sdpa_kernel(SDPBackend.MATH if not ON_GPU else SDPBackend.FLASH_ATTENTION):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def folder(tmp_path: Path, tokenizer_dir: Path) -> Path:
    return make(tmp_path / "model", tokenizer_dir, num_hidden_layers=LAYERS, hidden_size=WIDTH, intermediate_size=1024)


def load(folder: Path, *, away: bool = False, tiled: bool = False) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(DEVICE).train()
    if tiled:
        for layer in model.model.layers:
            layer.mlp.forward = TiledMLP(layer.mlp)
    model.activation_checkpointing_enable({"use_reentrant": False})
    if away:
        InputOffload(StreamCopies(torch.device(DEVICE)) if ON_GPU else LateCopies(), BUFFER).wrap(model)
    return model


def passes(model: Any) -> tuple[list[torch.Tensor], int]:
    """Losses and gradients of micro batches of several sizes, whose gradients add up, and bytes they took at most."""
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    losses = []
    for tokens in (ROW, ROW // 3, ROW, ROW // 2, ROW):
        ids = (torch.arange(tokens, device=DEVICE) * 7 % 397 + 3)[None]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        losses.append(hidden.float().square().mean())
        losses[-1].backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [*losses, *gradients], torch.cuda.max_memory_allocated() - before if ON_GPU else 0


def test_offloaded_inputs_are_the_same_bits_and_off_the_device(folder: Path) -> None:
    kept, with_all = passes(load(folder))
    moved, with_few = passes(load(folder, away=True))
    assert all(torch.equal(one, other) for one, other in zip(kept, moved, strict=True))
    if ON_GPU:  # in backward of a layer there are its own, and that of the layer below
        assert with_all - with_few > (LAYERS - 3) * ROW * WIDTH * 2


def test_tiles_take_less_and_are_as_exact(folder: Path) -> None:
    whole, at_once = passes(load(folder))
    tiles, in_tiles = passes(load(folder, tiled=True))
    for one, other in zip(whole, tiles, strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * one.float().norm()
    if ON_GPU:  # three of the tensors between the matrices, at least, of two of the three tiles
        assert at_once - in_tiles > 3 * 2 * TILE * 1024 * 2
