"""Feed-forward networks: the dense one, and how an expert's gate acts where that is not act(gate) * up."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_hf_moe import HfMoeConfig


def activation(config: HfMoeConfig) -> Callable[[torch.Tensor], torch.Tensor]:
    """hidden_act's, or one that a grafted layer has for itself."""
    return getattr(config, "act_fn", None) or ACT2FN[config.hidden_act]


class HfMoeMLP(nn.Module):
    """A dense feed-forward network: down(act(gate(x)) * up(x)), or down(act(up(x))) where MLPs are not gated."""

    def __init__(self, config: HfMoeConfig, intermediate_size: int):
        super().__init__()
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = activation(config)
        self.gated = config.gated_mlp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up if self.gated else self.act_fn(up))


def clamped_swiglu(gate_up: torch.Tensor, limit: float, alpha: float) -> torch.Tensor:
    """(up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within +-limit: gpt-oss.

    [..., I] from gate_up [..., 2I], gate first (https://arxiv.org/abs/2508.10925).
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)
