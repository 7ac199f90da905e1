"""Mixture of attention heads (MoA): a router chooses each token's query and output projections, keys are shared.

Shapes: B batch, S sequence, T = B S tokens, D hidden size, E attention experts, K experts per token, H_kv key-value
heads, d head size. An expert owns H_kv query heads, one a key-value head.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import HfMoeHeads, attention_settings, eager_attention
from .configuration_hf_moe import HfMoeConfig
from .grouped import takes_rows
from .host import grouped_product
from .norms import make_norm
from .rotary import rotate
from .routing import make_router


def looped_linear(rows: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """y_r = W_{expert_r} x_r: [R, out] from rows [R, in], expert [R] and weight [E, out, in]. The definition."""
    output = torch.zeros(len(rows), weight.shape[1], dtype=rows.dtype, device=rows.device)
    for i in range(len(weight)):
        chosen = torch.where(expert == i)[0]
        output = output.index_copy(0, chosen, nn.functional.linear(rows[chosen], weight[i]).to(rows.dtype))
    return output


def batched_linear(rows: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same with a copy of its expert's weight for every row: for the few rows of a decoding step."""
    return torch.bmm(weight[expert], rows.to(weight.dtype).unsqueeze(-1)).squeeze(-1)


def grouped_linear(rows: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The same with the rows sorted by expert and one grouped product, where that takes the dtype and rows' bytes."""
    if not all(takes_rows(size, weight.dtype) for size in weight.shape[1:]):
        return batched_linear(rows, expert, weight)
    expert, order = expert.sort()
    experts = torch.arange(len(weight), device=expert.device)
    ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
    return grouped_product(rows[order], weight, ends)[order.argsort()]


# `experts_implementation` -> how the heads' projections are computed; None is a layer on its own, outside a model.
# Kernels for whole feed-forward experts have no part to play here: with them the heads are grouped.
LINEARS = {None: looped_linear, "eager": looped_linear, "batched_mm": batched_linear}


class HfMoeMixtureOfHeads(HfMoeHeads):
    """sum_k g_{t,k} W_o[i_k] attention(W_q[i_k] x_t, keys, values) + o_bias over a token's K chosen experts i_k.

    Mixture of attention heads (https://arxiv.org/abs/2210.05144), with several heads an expert as in ModuleFormer
    (https://arxiv.org/abs/2306.04640) and JetMoE (https://arxiv.org/abs/2404.07413). The router is the MLPs': same
    types, experts per token, capacity and losses; an expert that drops a token adds 0 to it. `attentions`
    [B, H_kv K, S, S_kv] hold head h of a token's k-th expert at h K + k. Compiles as one graph, except with "eager"
    experts.
    """

    routes = True  # forward also takes token_mask and input_ids

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # num_key_value_groups is K
        size = config.num_key_value_heads * config.head_dim
        self.gate = make_router(config, layer_idx + config.num_hidden_layers)  # hashes unlike any MLP's
        self.q_experts = nn.Parameter(torch.empty(config.num_experts, size, config.hidden_size))
        self.k_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.o_experts = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, size))
        self.o_bias = nn.Parameter(torch.empty(config.hidden_size)) if config.attention_output_bias else None
        if config.qk_norm == "head":
            self.q_norm, self.k_norm = make_norm(config, config.head_dim), make_norm(config, config.head_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        token_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, S, D] to [B, S, D]; `token_mask` [B, S] is 0 on padding, `input_ids` [B, S] are for hash routers."""
        tokens = hidden_states.flatten(0, 1)  # [T, D]
        mask = None if token_mask is None else token_mask.reshape(-1)
        ids = None if input_ids is None else input_ids.reshape(-1)
        _, weights, index, _, _ = self.gate(tokens, mask, ids)
        experts, top_k = index.reshape(-1), index.shape[-1]
        linear = LINEARS.get(self.config._experts_implementation, grouped_linear)

        key, value = self.k_proj(hidden_states), self.v_proj(hidden_states)
        # Under autocast a grouped product keeps the weights' dtype, which would differ from the keys'.
        query = linear(tokens.repeat_interleave(top_k, dim=0), experts, self.q_experts).to(key.dtype)
        if self.config.clip_qkv is not None:
            query, key, value = (x.clamp(-self.config.clip_qkv, self.config.clip_qkv) for x in (query, key, value))
        query = query.view(*hidden_states.shape[:2], top_k, -1, self.head_dim)  # [B, S, K, H_kv, d]
        key, value = (x.view(*x.shape[:-1], -1, self.head_dim) for x in (key, value))  # [B, S, H_kv, d]
        if self.config.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        # The K queries of one key-value head stand side by side, as in grouped-query attention.
        query = query.permute(0, 3, 2, 1, 4).flatten(1, 2)  # [B, H_kv K, S, d]
        key, value = key.transpose(1, 2), value.transpose(1, 2)

        if self.has_rope:
            query = rotate(query, *position_embeddings, interleaved=self.config.rope_interleave)
            key = rotate(key, *position_embeddings, interleaved=self.config.rope_interleave)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx, kwargs=kwargs)

        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        kwargs |= attention_settings(self)
        output, probabilities = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        heads = output.reshape(*hidden_states.shape[:2], -1, top_k, self.head_dim).transpose(-3, -2)
        heads = heads.reshape(experts.shape[0], -1)  # [T K, H_kv d]
        output = linear(heads, experts, self.o_experts).view(*weights.shape, -1)  # [T, K, D]
        output = (output * weights.unsqueeze(-1)).sum(dim=1).to(hidden_states.dtype)
        if self.o_bias is not None:
            output = output + self.o_bias
        return output.view_as(hidden_states), probabilities
