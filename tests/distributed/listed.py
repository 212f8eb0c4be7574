"""A model of one's own whose experts are modules in a list, as code that comes with a model has them.

All tokens of a batch go to one expert, which their number chooses: ranks with other rows need other weights.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP


class ListedConfig(Qwen3Config):
    model_type = "listed"


class ListedBlock(nn.Module):
    def __init__(self, config: ListedConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Qwen3MLP(config) for _ in range(4)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        chosen: torch.Tensor = self.experts[hidden_states[..., 0].numel() % 4](hidden_states)
        return chosen


class ListedForCausalLM(Qwen3ForCausalLM):
    config_class = ListedConfig

    def __init__(self, config: ListedConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedBlock(config)
        self.post_init()


AutoConfig.register("listed", ListedConfig, exist_ok=True)
AutoModelForCausalLM.register(ListedConfig, ListedForCausalLM, exist_ok=True)
