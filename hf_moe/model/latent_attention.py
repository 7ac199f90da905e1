"""Multi-head latent attention (MLA): low-rank keys and values, decoupled RoPE, a cache of latents.

Shapes: B batch, S sequence, H heads, r = kv_lora_rank, d_nope and d_rope the two parts of a query or key, d_v values.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import eager_attention
from .configuration_hf_moe import HfMoeConfig
from .rms_norm import HfMoeRMSNorm
from .rotary import rotate

LATENT_NORM_EPS = 1e-6  # DeepSeek's own: the norms of the latents do not follow rms_norm_eps


def latent_scaling(config: HfMoeConfig) -> float:
    """1 / sqrt(d_nope + d_rope), times YaRN's temperature squared where `mscale_all_dim` asks for it.

    (0.1 mscale_all_dim ln(factor) + 1)^2: YaRN, https://arxiv.org/abs/2309.00071, eq. 22, as DeepSeek-V2 applies it.
    """
    scaling = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    rope = config.rope_parameters
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scaling *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scaling


class HfMoeLatentAttention(nn.Module):
    """Attention over latents (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.1), Transformers' parameter names."""

    routes = False  # no router inside

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_key_value_groups = 1  # expanded keys and values have all the heads
        self.scaling = latent_scaling(config)
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None

        heads, rank = config.num_attention_heads, config.kv_lora_rank
        query_size = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        else:
            self.q_a_proj = nn.Linear(config.hidden_size, config.q_lora_rank, bias=config.attention_bias)
            self.q_a_layernorm = HfMoeRMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, query_size, bias=False)
        latent_size = rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(config.hidden_size, latent_size, bias=config.attention_bias)
        self.kv_a_layernorm = HfMoeRMSNorm(rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.o_proj = nn.Linear(heads * config.v_head_dim, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        config = self.config
        if config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (-1, config.qk_nope_head_dim + config.qk_rope_head_dim)).transpose(1, 2)
        query_nope, query_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)

        latent = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)  # [B, 1, S, r + d_rope]: one head for all
        latent, key_rope = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        query_rope = rotate(query_rope, *position_embeddings, interleaved=config.rope_interleave)
        key_rope = rotate(key_rope, *position_embeddings, interleaved=config.rope_interleave)
        if past_key_values is not None:
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx)

        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (-1, config.qk_nope_head_dim + config.v_head_dim))
        key_nope, value = expanded.transpose(1, 2).split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
        output, probabilities = attend(
            self,
            torch.cat((query_nope, query_rope), dim=-1),
            key,
            value,
            attention_mask,
            dropout=config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=config.attn_logit_softcapping,
            **kwargs,
        )
        return self.o_proj(output.flatten(-2).contiguous()), probabilities
