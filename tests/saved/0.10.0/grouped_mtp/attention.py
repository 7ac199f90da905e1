"""Multi-head, grouped-query and multi-query attention, through Transformers' attention interface."""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_hf_moe import HfMoeConfig
from .norms import l2_norm, make_norm
from .rotary import rotate

MASKS = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
}


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(q k^T * scaling + mask) v: the definition. Query [B, H, S, d], key and value [B, H_kv, S_kv, d].

    Of the sinks `s_aux` [H] each is one more logit in its head's softmax, whose probability goes nowhere.
    """
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[-2]]
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (probabilities @ value).transpose(1, 2).contiguous(), probabilities


def attention_settings(module: nn.Module) -> dict:
    """What the function that `attn_implementation` names is told, but for the scaling.

    Its call stands in each attention's own forward, with the scaling by name: vLLM reads it there, in the source.
    """
    return {
        "dropout": module.config.attention_dropout if module.training else 0.0,
        "sliding_window": module.sliding_window,
        "softcap": module.config.attn_logit_softcapping,
    }


def attention_scaling(config: HfMoeConfig) -> float:
    """What q k^T is multiplied by."""
    return config.head_dim**-0.5 if config.attention_multiplier is None else config.attention_multiplier


def temperature(position_ids: torch.Tensor, config: HfMoeConfig) -> torch.Tensor:
    """1 + attn_scale ln(1 + floor((p + 1) / floor_scale)) for queries without RoPE: [B, 1, S, 1] of p [B, S].

    Llama 4's form of the scalable softmax, https://arxiv.org/abs/2501.19399.
    """
    steps = torch.floor((position_ids.float() + 1) / config.floor_scale)
    return (1 + config.attn_scale * torch.log1p(steps))[:, None, :, None]


def has_rope(config: HfMoeConfig, layer_idx: int) -> bool:
    return config.no_rope_layers is None or bool(config.no_rope_layers[layer_idx])


class HfMoeHeads(nn.Module):
    """What attention functions and caches read of an attention with heads of one size, under Transformers' names."""

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = attention_scaling(config)
        self.is_causal = True
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.has_rope = has_rope(config, layer_idx)


class HfMoeAttention(HfMoeHeads):
    """Attention with num_key_value_heads from 1 (MQA) to num_attention_heads (MHA)."""

    routes = False  # no router inside

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        if config.qk_norm in ("head", "head_after_rope", "projection"):
            per_head = config.qk_norm != "projection"
            self.q_norm = make_norm(config, config.head_dim if per_head else query_size)
            self.k_norm = make_norm(config, config.head_dim if per_head else key_size)
        if config.attention_sinks:  # paged attention goes by the attribute
            self.sinks = nn.Parameter(torch.zeros(config.num_attention_heads))

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.clip_qkv is not None:
            query, key, value = (x.clamp(-self.config.clip_qkv, self.config.clip_qkv) for x in (query, key, value))

        query, key, value = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (query, key, value))  # [B, S, heads, d]
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))

        if self.has_rope:
            query, key = self.rotated(query, key, *position_embeddings)
            if self.config.qk_norm == "l2":
                query, key = (l2_norm(x, self.config.rms_norm_eps) for x in (query, key))
        elif self.config.attn_temperature_tuning:
            query = query * temperature(kwargs["position_ids"], self.config).to(query.dtype)
        if self.config.qk_norm == "head_after_rope":
            query, key = self.q_norm(query), self.k_norm(key)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        if self.config.attention_sinks:
            kwargs["s_aux"] = self.sinks
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        kwargs |= attention_settings(self)
        output, probabilities = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        # [B, S, H, d]; of vLLM, which keeps keys and values itself, [B S, H d].
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), probabilities

    def rotated(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Query and key [B, heads, S, d] at their positions; kernels take this method's place."""
        return tuple(rotate(x, cos, sin, interleaved=self.config.rope_interleave) for x in (query, key))
