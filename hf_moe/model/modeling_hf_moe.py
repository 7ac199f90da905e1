"""The hf_moe model, top to bottom: experts, router, MoE layer, decoder layer, decoder, heads.

Shapes: B batch, S sequence, T = B S tokens, D hidden size, I expert intermediate size, E routed experts, K experts per
token, V vocabulary. Everything here is the definition; faster paths for the experts come through Transformers' experts
interface and must agree with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import HfMoeAttention
from .balancing import load_balancing_loss, router_z_loss
from .configuration_hf_moe import HfMoeConfig
from .latent_attention import HfMoeLatentAttention
from .rms_norm import HfMoeRMSNorm
from .rotary import HfMoeRotaryEmbedding
from .routing import ROUTERS, route

ATTENTIONS = {"gqa": HfMoeAttention, "mla": HfMoeLatentAttention}
MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


@dataclass
class HfMoeModelOutput(MoeModelOutputWithPast):
    """`router_logits` and `router_indices` hold one tensor per sparse layer: [T, E] float32 and [T, K] int64."""

    router_indices: tuple[torch.Tensor, ...] | None = None


@dataclass
class HfMoeCausalLMOutput(MoeCausalLMOutputWithPast):
    """`aux_loss` and `z_loss` are scalars, averaged over the sparse layers and not yet weighted."""

    z_loss: torch.Tensor | None = None
    router_indices: tuple[torch.Tensor, ...] | None = None


@use_experts_implementation
class HfMoeExperts(nn.Module):
    """E feed-forward networks in fused tensors, one row block an expert.

    Gated: down(act(gate(x)) * up(x)) with gate_up_proj [E, 2I, D]; plain: down(act(up(x))) with up_proj [E, I, D];
    down_proj [E, D, I]; a bias beside each if mlp_bias.
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = ACT2FN[config.hidden_act]
        self.up_name = "gate_up_proj" if config.gated_mlp else "up_proj"
        up_size = self.intermediate_dim * (2 if config.gated_mlp else 1)
        setattr(self, self.up_name, nn.Parameter(torch.empty(self.num_experts, up_size, self.hidden_dim)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        if config.mlp_bias:
            setattr(self, f"{self.up_name}_bias", nn.Parameter(torch.empty(self.num_experts, up_size)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t): [T, D] from hidden_states [T, D], index and weights [T, K].

        An index of E means "an expert on another rank" (expert parallelism) and adds nothing.
        """
        dtype = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        output = torch.zeros_like(hidden_states, dtype=dtype)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() > 0:
                weighted = self.feed_forward(hidden_states[token], expert) * top_k_weights[token, slot, None]
                output = output.index_add(0, token, weighted.to(dtype))
        return output.to(hidden_states.dtype)

    def feed_forward(self, hidden_states: torch.Tensor, expert: int) -> torch.Tensor:
        bias = (lambda name: getattr(self, f"{name}_bias")[expert]) if self.has_bias else (lambda name: None)
        hidden = nn.functional.linear(hidden_states, getattr(self, self.up_name)[expert], bias(self.up_name))
        hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
        return nn.functional.linear(hidden, self.down_proj[expert], bias("down_proj"))


class HfMoeRouter(nn.Module):
    """Router logits x W^T, then `route`: logits [T, E], weights [T, K] and expert indices [T, K].

    In float32 whatever the model's dtype and under autocast (ST-MoE, https://arxiv.org/abs/2202.08906, 3.3).
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        if config.router_args.get("selection_bias"):
            # Moved by balancing, not by gradients; steps of 1e-3 would vanish in bfloat16.
            bias = torch.zeros(config.num_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
        else:
            self.e_score_correction_bias = None

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config = self.config
        with torch.autocast(device_type=hidden_states.device.type, enabled=False):
            logits = nn.functional.linear(hidden_states.float(), self.weight.float())
            weights, index = route(
                logits,
                config.router_type,
                config.num_experts_per_tok,
                norm_topk_prob=config.norm_topk_prob,
                scaling_factor=config.routed_scaling_factor,
                bias_E=self.e_score_correction_bias,
                n_group=config.n_group,
                topk_group=config.topk_group,
                group_score=config.router_args.get("group_score", "two_best"),
            )
        return logits, weights, index


class HfMoeMLP(nn.Module):
    """A dense feed-forward network: down(act(gate(x)) * up(x)), or down(act(up(x))) where MLPs are not gated."""

    def __init__(self, config: HfMoeConfig, intermediate_size: int):
        super().__init__()
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.gated_mlp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(hidden_states)
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * up if self.gated else self.act_fn(up))


class HfMoeSparseMoeBlock(nn.Module):
    """sum_shared FFN_s(x) + sum_i g_i FFN_i(x) (DeepSeekMoE, https://arxiv.org/abs/2401.06066, eq. 9-11).

    All shared experts are one MLP of their total width, which is the same sum.
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.gate = HfMoeRouter(config)
        self.experts = HfMoeExperts(config)
        # The decorator sets one value per class; ours is per configuration.
        self.experts.has_gate, self.experts.has_bias = config.gated_mlp, config.mlp_bias
        self.shared_experts = self.shared_expert_gate = None
        if config.n_shared_experts > 0:
            width = config.n_shared_experts * config.shared_expert_intermediate_size
            self.shared_experts = HfMoeMLP(config, width)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)  # [T, D]
        _, weights, index = self.gate(tokens)
        output = self.experts(tokens, index, weights)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            output = output + shared
        return output.view_as(hidden_states)


class HfMoeDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)), the MLP dense or sparse."""

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = HfMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = ATTENTIONS[config.attention_type](config, layer_idx)
        self.post_attention_layernorm = HfMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = HfMoeSparseMoeBlock(config) if sparse else HfMoeMLP(config, config.intermediate_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class HfMoePreTrainedModel(PreTrainedModel):
    """What Transformers needs to know of the family: initialisation, what it supports, what it can record."""

    config_class = HfMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfMoeDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "router_logits": OutputRecorder(HfMoeRouter, index=0),
        "router_indices": OutputRecorder(HfMoeRouter, index=2),
        "hidden_states": HfMoeDecoderLayer,
        "attentions": [HfMoeAttention, HfMoeLatentAttention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, HfMoeExperts):
            for name, parameter in module.named_parameters(recurse=False):
                if name.endswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, HfMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)

    def _sdpa_can_dispatch(self, is_init_check: bool = False) -> bool:
        if self.config.attn_logit_softcapping is not None:
            raise ValueError(
                f"attn_logit_softcapping ({self.config.attn_logit_softcapping}) needs attn_implementation eager, "
                "flex_attention or flash_attention_2: sdpa cannot cap logits."
            )
        return super()._sdpa_can_dispatch(is_init_check)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = torch.utils.checkpoint.checkpoint, **kwargs
    ):
        reentrant = getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant", False)
        if enable and reentrant and (self.config.router_aux_loss_coef or self.config.router_z_loss_coef):
            raise ValueError(
                "use_reentrant=True would cut the balance losses off from the router; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}, or set router_aux_loss_coef and '
                "router_z_loss_coef to 0."
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class HfMoeModel(HfMoePreTrainedModel):
    """The decoder: embedding, layers, final norm."""

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(HfMoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = HfMoeRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = HfMoeRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> HfMoeModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        masks = attention_mask
        if not isinstance(masks, dict):  # `generate` prepares one mask a layer type
            masks = {
                layer_type: MASKS[layer_type](
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    past_key_values=past_key_values,
                    position_ids=position_ids,
                )
                for layer_type in dict.fromkeys(self.config.layer_types)
            }

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids)
        for layer, layer_type in zip(self.layers, self.config.layer_types, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        return HfMoeModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values if use_cache else None
        )


class HfMoeForCausalLM(HfMoePreTrainedModel, GenerationMixin):
    """The decoder with a language-modelling head, its loss, and the losses of its routers."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.model = HfMoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> HfMoeCausalLMOutput:
        """Logits [B, S, V]; with `labels` [B, S] (-100 is ignored) the loss.

        In training the loss includes the balance losses whose coefficients are not 0. Outside training they are
        computed, and added, where `output_router_logits` asks for them. `output_router_logits=False` leaves them out.
        """
        config = self.config
        if output_router_logits is None:
            balanced = self.training and labels is not None and self.has_router_loss()
            output_router_logits = config.output_router_logits or balanced

        outputs: HfMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            output_router_indices=output_router_logits,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        if config.final_logit_softcapping is not None:
            logits = config.final_logit_softcapping * torch.tanh(logits / config.final_logit_softcapping)

        loss = aux_loss = z_loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if outputs.router_logits:
            aux_loss, z_loss = self.router_losses(outputs, attention_mask)
            if loss is not None:
                router_loss = config.router_aux_loss_coef * aux_loss + config.router_z_loss_coef * z_loss
                loss = loss + router_loss.to(loss.device)
        return HfMoeCausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            z_loss=z_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
        )

    def has_router_loss(self) -> bool:
        return bool(self.config.router_aux_loss_coef or self.config.router_z_loss_coef)

    def router_losses(
        self, outputs: HfMoeModelOutput, attention_mask: torch.Tensor | dict | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Load-balance loss and z-loss, averaged over the sparse layers. Padding in a [B, S] mask never counts."""
        mask = None
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            mask = attention_mask[:, -outputs.last_hidden_state.shape[1] :].reshape(-1)
        affinity = ROUTERS[self.config.router_type].affinity
        aux_losses, z_losses = [], []
        for logits, index in zip(outputs.router_logits, outputs.router_indices, strict=True):
            layer_mask = mask if mask is None else mask.to(logits.device)
            aux_losses.append(load_balancing_loss(affinity(logits), index, layer_mask))
            z_losses.append(router_z_loss(logits, layer_mask))
        device = aux_losses[0].device  # layers may live on several
        return tuple(torch.stack([x.to(device) for x in losses]).mean() for losses in (aux_losses, z_losses))


class HfMoeForSequenceClassification(GenericForSequenceClassification, HfMoePreTrainedModel):
    """The decoder with one label per sequence, read at its last token that is not padding."""

    def __init__(self, config: HfMoeConfig):
        # The generic constructor asks AutoModel for the decoder, which fails where only the Hub's files know us.
        HfMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfMoeModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class HfMoeForTokenClassification(GenericForTokenClassification, HfMoePreTrainedModel):
    """The decoder with one label per token."""

    def __init__(self, config: HfMoeConfig):
        HfMoePreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = HfMoeModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


__all__ = [
    "HfMoeForCausalLM",
    "HfMoeForSequenceClassification",
    "HfMoeForTokenClassification",
    "HfMoeModel",
    "HfMoePreTrainedModel",
]
