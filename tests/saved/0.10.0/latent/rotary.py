"""Rotary position embedding, with every scaling type that Transformers knows."""

import copy

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_hf_moe import HfMoeConfig


def default_frequencies(config: HfMoeConfig, **kwargs) -> tuple[torch.Tensor, float]:
    """theta^(-2i/d) for the first `partial_rotary_factor` of a head (https://arxiv.org/abs/2104.09864, eq. 15)."""
    rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0


class HfMoeRotaryEmbedding(nn.Module):
    """cos and sin [B, S, rotary dim] of position_ids [B, S], in the dtype of `x`."""

    compute_default_rope_parameters = staticmethod(default_frequencies)  # Transformers refills the buffers with it

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.config = config
        # `dynamic_rope_update` reads and moves these four for the types that depend on the length.
        self.rope_type = config.rope_parameters["rope_type"]
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        compute = default_frequencies if self.rope_type == "default" else ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = compute(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


class HfMoeRotaryEmbeddings(nn.ModuleDict):
    """One rotary embedding a layer type, where each type has RoPE parameters of its own (Gemma 3)."""

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        for layer_type in dict.fromkeys(config.layer_types):
            own = copy.copy(config)
            own.rope_parameters = config.rope_parameters[layer_type]
            self[layer_type] = HfMoeRotaryEmbedding(own)


def position_embeddings(
    rotary_emb: nn.Module, x: torch.Tensor, position_ids: torch.Tensor, layer_types: list[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """cos and sin [B, S, rotary dim] for each of the `layer_types`."""
    if isinstance(rotary_emb, HfMoeRotaryEmbeddings):
        return {layer_type: rotary_emb[layer_type](x, position_ids) for layer_type in dict.fromkeys(layer_types)}
    return dict.fromkeys(layer_types, rotary_emb(x, position_ids))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False) -> torch.Tensor:
    """Rotate the first dimensions of x [B, heads, S, head_dim] by cos and sin [B, S, d]; i pairs with i + d / 2.

    Interleaved, 2i pairs with 2i + 1; the result has the first of all pairs, then the second, and so equal inner
    products, as long as queries and keys are both rotated here.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = (rotated[..., 0::2], rotated[..., 1::2]) if interleaved else rotated.chunk(2, dim=-1)
    rotated = torch.cat((first, second), dim=-1) * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, passed), dim=-1)
