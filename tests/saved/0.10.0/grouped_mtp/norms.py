"""The norms of a block and where they stand."""

from functools import partial

import torch
from torch import nn

from .configuration_hf_moe import HfMoeConfig
from .rms_norm import HfMoeRMSNorm


class HfMoeUnitOffsetRMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight) over the last dimension, all of it in float32, as in Gemma."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = l2_norm(hidden_states.float(), self.variance_epsilon)
        return (normed * (1.0 + self.weight.float())).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def l2_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in float32: length sqrt(d), no weight (Llama 4)."""
    squares = x.float().square().mean(dim=-1, keepdim=True)
    return (x.float() * torch.rsqrt(squares + eps)).to(x.dtype)


# norm_type and rms_norm_unit_offset -> the norm of a size and an eps.
NORMS = {
    ("rms_norm", False): HfMoeRMSNorm,
    ("rms_norm", True): HfMoeUnitOffsetRMSNorm,
    ("layer_norm", False): partial(nn.LayerNorm, bias=False),  # https://arxiv.org/abs/1607.06450
}

# layer_norm_placement -> the norms before and after attention, before and after the MLP; None where there is none.
# The names are those of Llama, OLMo-2 and Gemma 2.
PLACEMENTS = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def norms_of(config: HfMoeConfig, layer_idx: int) -> tuple[str | None, ...]:
    """The names of a layer's norms, in the order of PLACEMENTS."""
    norms = PLACEMENTS[config.layer_norm_placement]
    normed = config.sparse_output_norm and config.mlp_layer_types[layer_idx] == "sparse"
    return (*norms[:-1], "post_feedforward_layernorm") if normed else norms


def make_norm(config: HfMoeConfig, size: int) -> nn.Module:
    """A norm over a last dimension of `size`, of the kind that the configuration names."""
    return NORMS[config.norm_type, config.rms_norm_unit_offset](size, config.rms_norm_eps)
