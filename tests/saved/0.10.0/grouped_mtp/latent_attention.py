"""Multi-head latent attention (MLA): low-rank keys and values, decoupled RoPE, a cache of latents.

Shapes: B batch, s queries, S positions (cached ones included), H heads, r = kv_lora_rank; d_nope, d_rope and d_v the
sizes of a key's two parts and of a value.
"""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import attention_settings, eager_attention
from .configuration_hf_moe import HfMoeConfig
from .growing_layer import grow_in_place
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


def absorbing_is_cheaper(config: HfMoeConfig, queries: int, positions: int) -> bool:
    """Whether the absorbed form takes fewer multiplications than the expanded one, for s queries on S positions.

    Per head: expanded S r (d_nope + d_v) + s S (d_nope + d_rope + d_v), absorbed s r (d_nope + d_v) +
    s S (2 r + d_rope).
    """
    rank, expanded_size = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    saved = (positions - queries) * rank * expanded_size
    return saved > queries * positions * (2 * rank - expanded_size)


class HfMoeLatentAttention(nn.Module):
    """Attention over latents (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.1), Transformers' parameter names.

    The cache holds the normed latents [B, 1, S, r] as keys and the rotated keys [B, 1, S, d_rope] that all heads share
    as values. Two forms give the same output. Expanded: keys and values of every head are computed from the latents,
    and Transformers' attention interface does the rest. Absorbed: the up-projections move to the query and to the
    output, and attention reads the latents alone. `absorb` chooses: True, False, or None for the cheaper one.
    """

    absorb: bool | None = None
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
        query_size = config.qk_nope_head_dim + config.qk_rope_head_dim
        query = query.view(*query.shape[:-1], -1, query_size).transpose(1, 2)
        query_nope, query_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)

        latent = self.kv_a_proj_with_mqa(hidden_states).unsqueeze(1)  # [B, 1, S, r + d_rope]: one head for all
        latent, key_rope = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent = self.kv_a_layernorm(latent)
        query_rope = rotate(query_rope, *position_embeddings, interleaved=config.rope_interleave)
        key_rope = rotate(key_rope, *position_embeddings, interleaved=config.rope_interleave)
        if past_key_values is not None:
            grow_in_place(past_key_values, self.layer_idx)
            latent, key_rope = past_key_values.update(latent, key_rope, self.layer_idx, kwargs=kwargs)

        weight = self.up_projections()
        # Without a cache here there may be one in the attention function (vLLM's), which then has to be asked.
        owns_cache = self.absorb or past_key_values is not None
        if owns_cache and weight is not None and self.absorbs(query.shape[2], latent.shape[2], attention_mask):
            output, probabilities = self.absorbed(query_nope, query_rope, latent, key_rope, attention_mask, weight)
        else:
            query = torch.cat((query_nope, query_rope), dim=-1)
            key, value = self.expanded(latent, key_rope)
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager_attention)
            kwargs |= attention_settings(self)
            output, probabilities = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), probabilities

    def expanded(self, latent: torch.Tensor, key_rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, H, S, d_nope + d_rope] and values [B, H, S, d_v] made from latents and rotated keys."""
        sizes = [self.config.qk_nope_head_dim, self.config.v_head_dim]
        expanded = self.kv_b_proj(latent.squeeze(1))
        expanded = expanded.view(*expanded.shape[:-1], -1, sum(sizes)).transpose(1, 2)
        key_nope, value = expanded.split(sizes, dim=-1)
        key = torch.cat((key_nope, key_rope.expand(-1, key_nope.shape[1], -1, -1)), dim=-1)
        return key, value

    def up_projections(self) -> torch.Tensor | None:
        """The weight [H (d_nope + d_v), r] of kv_b_proj, or None where a product with it is not all that layer does.

        Adapters and quantised layers do more, and an offloaded weight is not here. Of a weight that tensor parallelism
        splits, decoding takes this rank's heads.
        """
        weight = self.kv_b_proj.weight if type(self.kv_b_proj) is nn.Linear else None
        if hasattr(weight, "to_local") and not torch.is_grad_enabled():
            weight = weight.to_local()
        return weight if type(weight) in (nn.Parameter, torch.Tensor) and not weight.is_meta else None

    def absorbs(self, queries: int, positions: int, attention_mask: torch.Tensor | None) -> bool:
        """Whether to use the absorbed form: as `absorb` says, where it can read the mask."""
        if getattr(attention_mask, "ndim", 2) != 4:
            # No mask, or one of padding only (flash attention): readable where it leaves no position to guess.
            in_window = self.sliding_window is None or positions <= self.sliding_window
            if queries > 1 or not in_window or not isinstance(attention_mask, torch.Tensor | None):
                return False
        return absorbing_is_cheaper(self.config, queries, positions) if self.absorb is None else self.absorb

    def absorbed(
        self,
        query_nope: torch.Tensor,
        query_rope: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        attention_mask: torch.Tensor | None,
        weight: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention [B, s, H, d_v] read from the latents: q·(W_UK c) = (W_UK^T q)·c, and W_UV after the sum.

        All heads share the latents, so heads and queries form one matrix and nothing of the cache is copied.
        """
        config, queries = self.config, query_nope.shape[2]
        sizes = [config.qk_nope_head_dim, config.v_head_dim]
        key_up, value_up = weight.view(-1, sum(sizes), config.kv_lora_rank).split(sizes, dim=1)  # [H, d, r]
        query = torch.einsum("bhsd,hdr->bhsr", query_nope, key_up).flatten(1, 2)  # [B, H s, r]
        latent, key_rope = latent.squeeze(1), key_rope.squeeze(1)

        scores = query @ latent.transpose(1, 2) + query_rope.flatten(1, 2) @ key_rope.transpose(1, 2)
        scores = scores.view(len(scores), -1, queries, scores.shape[-1]) * self.scaling  # [B, H, s, S]
        if config.attn_logit_softcapping is not None:
            scores = config.attn_logit_softcapping * torch.tanh(scores / config.attn_logit_softcapping)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None].bool()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        elif attention_mask is not None:
            scores = scores + attention_mask
        probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        probabilities = nn.functional.dropout(probabilities, p=config.attention_dropout, training=self.training)

        output = (probabilities.flatten(1, 2) @ latent).view(len(latent), -1, queries, config.kv_lora_rank)
        return torch.einsum("bhsr,hdr->bshd", output, value_up), probabilities
