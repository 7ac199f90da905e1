"""The hf_moe model, top to bottom: experts, MoE layer, decoder layer, decoder, heads.

Shapes: B batch, S sequence, T = B S tokens, D hidden size, I expert intermediate size, E routed experts, K experts per
token, V vocabulary. Everything here is the definition; faster paths for the experts come through Transformers' experts
interface and must agree with it.
"""

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import MASKS, HfMoeAttention
from .configuration_hf_moe import HfMoeConfig
from .decoding import HfMoeDecoding
from .dispatch import HfMoeDispatch
from .hashing import HfMoeHashTables
from .host import CACHE, host_arguments, knows_empty_slots
from .latent_attention import HfMoeLatentAttention
from .long_rope import HfMoeLongRope
from .losses import asked_parts, recorded_for, with_parts
from .mixture_of_heads import HfMoeMixtureOfHeads
from .mlp import HfMoeMLP, activation, clamped_swiglu
from .multi_token import HfMoeMultiToken, HfMoeMultiTokenLayer, predict_ahead
from .norms import HfMoeUnitOffsetRMSNorm, make_norm, norms_of
from .outputs import HfMoeCausalLMOutput, HfMoeModelOutput
from .padding import as_attention_reads, check_mask, valid_tokens
from .recomputation import HfMoeCheckpointing
from .rotary import HfMoeRotaryEmbedding, HfMoeRotaryEmbeddings, position_embeddings
from .router import HfMoeRouter, HfMoeRouters
from .router_losses import HfMoeRouterLosses
from .routing import make_router
from .unquantized import HfMoeUnquantized

ATTENTIONS = {"gqa": HfMoeAttention, "mla": HfMoeLatentAttention, "moa": HfMoeMixtureOfHeads}


@use_experts_implementation
class HfMoeExperts(nn.Module):
    """E feed-forward networks in fused tensors, one row block an expert.

    Gated: down(act(gate(x)) * up(x)) with gate_up_proj [E, 2I, D]; plain: down(act(up(x))) with up_proj [E, I, D];
    down_proj [E, D, I]; a bias beside each if mlp_bias. D is `moe_latent_size` where there is one.
    """

    def __init__(self, config: HfMoeConfig):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.expert_hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = activation(config)
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

        An index of E, an empty slot or an expert on another rank (expert parallelism), adds nothing.
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


class HfMoeClampedExperts(HfMoeExperts):
    """Experts whose gate is `clamped_swiglu`."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return clamped_swiglu(gate_up, self.config.experts_swiglu_limit, self.config.experts_swiglu_alpha)


class HfMoeSparseMoeBlock(nn.Module):
    """sum_shared FFN_s(x) + sum_i g_i FFN_i(x) (DeepSeekMoE, https://arxiv.org/abs/2401.06066, eq. 9-11).

    All shared experts are one MLP of their total width, which is the same sum. With `expert_input_scaling` the weight
    multiplies the input of an expert instead: FFN_i(g_i x). With `moe_latent_size` routed experts work in fewer
    dimensions: U sum_i g_i FFN_i(V x) (LatentMoE, https://arxiv.org/abs/2601.18089; Nemotron 3,
    https://arxiv.org/abs/2512.20856); the router and the shared experts see x itself.
    """

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.gate = make_router(config, layer_idx)
        self.experts = self.make_experts(config)
        if not self.gate.router.fills:
            knows_empty_slots(self.experts)
        # The decorator sets one value per class; ours is per configuration.
        self.experts.has_gate, self.experts.has_bias = config.gated_mlp, config.mlp_bias
        self.scales_input = config.expert_input_scaling
        self.fc1_latent_proj = self.fc2_latent_proj = None
        if config.moe_latent_size is not None:
            self.fc1_latent_proj = nn.Linear(config.hidden_size, config.expert_hidden_size, bias=False)
            self.fc2_latent_proj = nn.Linear(config.expert_hidden_size, config.hidden_size, bias=False)
        self.shared_experts = self.shared_expert_gate = None
        if config.n_shared_experts > 0:
            width = config.n_shared_experts * config.shared_expert_intermediate_size
            self.shared_experts = HfMoeMLP(config, width)
            if config.shared_expert_gate:
                self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False)

    def make_experts(self, config: HfMoeConfig) -> HfMoeExperts:
        return (HfMoeExperts if config.experts_swiglu_limit is None else HfMoeClampedExperts)(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B, S, D] to [B, S, D]; `token_mask` [B, S] is 0 on padding, `input_ids` [B, S] are for hash routers."""
        tokens = hidden_states.flatten(0, -2)  # [T, D]
        mask = None if token_mask is None else token_mask.reshape(-1)
        ids = None if input_ids is None else input_ids.reshape(-1)
        _, weights, index, row_token, _ = self.route(tokens, mask, ids)
        experts = self.scaled_inputs if self.scales_input else self.experts
        x = tokens if self.fc1_latent_proj is None else self.fc1_latent_proj(tokens)
        if row_token is None:
            output = experts(x, index, weights)
        else:
            rows = experts(x[row_token], index, weights)
            output = torch.zeros_like(x).index_add(0, row_token, rows.to(x.dtype))
        if self.fc2_latent_proj is not None:
            output = self.fc2_latent_proj(output)
        if self.shared_experts is not None:
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
            output = output + shared
        return output.view_as(hidden_states)

    def route(self, tokens: torch.Tensor, mask: torch.Tensor | None, ids: torch.Tensor | None) -> tuple:
        """What the router answers of the tokens [T, D]."""
        return self.gate(tokens, mask, ids)

    def scaled_inputs(self, tokens: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """sum_k FFN_{index_{t,k}}(weight_{t,k} x_t), [T, D]: every slot of a weight above 0 is a row."""
        rows = (tokens.unsqueeze(1) * weights.unsqueeze(-1)).to(tokens.dtype).flatten(0, 1)  # [T K, D]
        output = self.experts(rows, index.reshape(-1, 1), (weights != 0).to(weights.dtype).reshape(-1, 1))
        return output.view(*weights.shape, -1).sum(dim=1)


class HfMoeDecoderLayer(GradientCheckpointingLayer):
    """x + attention(x), then x + mlp(x), the MLP dense or sparse; norms before them, after them, or both."""

    def __init__(self, config: HfMoeConfig, layer_idx: int):
        super().__init__()
        self.residual_multiplier = config.residual_multiplier
        self.norms = norms_of(config, layer_idx)
        for name in filter(None, self.norms):
            setattr(self, name, make_norm(config, config.hidden_size))
        self.self_attn = ATTENTIONS[config.attention_type](config, layer_idx)
        self.sparse = config.mlp_layer_types[layer_idx] == "sparse"
        self.mlp = (
            HfMoeSparseMoeBlock(config, layer_idx) if self.sparse else HfMoeMLP(config, config.intermediate_size)
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        token_mask: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        layer_cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor:
        if layer_cache is not None:
            # Until 5.23 the host takes a cache by its own name away from layers in training mode with checkpointing,
            # also where there is no gradient to checkpoint for; where there is one, the model has done so.
            kwargs["past_key_values"] = layer_cache
        routing = {"token_mask": token_mask, "input_ids": input_ids}
        heads_routing, mlp_routing = (routing if routes else {} for routes in (self.self_attn.routes, self.sparse))
        before_attention, after_attention, before_mlp, after_mlp = self.norms
        attended, _ = self.self_attn(self.normed(hidden_states, before_attention), **heads_routing, **kwargs)
        hidden_states = self.added(hidden_states, self.normed(attended, after_attention))
        changed = self.mlp(self.normed(hidden_states, before_mlp), **mlp_routing)
        return self.added(hidden_states, self.normed(changed, after_mlp))

    def normed(self, x: torch.Tensor, name: str | None) -> torch.Tensor:
        return x if name is None else getattr(self, name)(x)

    def added(self, residual: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return residual + (change if self.residual_multiplier == 1 else change * self.residual_multiplier)


@torch.no_grad()
def draw(module: nn.Module, std: float) -> None:
    """First weights of experts and routers: N(0, std), biases 0; a router knows what else it has."""
    if isinstance(module, HfMoeRouter):
        module.draw(std)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if name.endswith("bias"):
            init.zeros_(parameter)
        else:
            init.normal_(parameter, mean=0.0, std=std)


# What `output_...` may ask the decoder for. Of its own layers: those in `mtp_layers` are not recorded.
RECORDERS = {
    "router_logits": OutputRecorder(HfMoeRouter, index=0),
    "router_indices": OutputRecorder(HfMoeRouter, index=2),
    "router_tokens": OutputRecorder(HfMoeRouter, index=3),
    "router_loss_inputs": OutputRecorder(HfMoeRouter, index=4),
    "hidden_states": OutputRecorder(HfMoeDecoderLayer, layer_name="layers"),
    "attentions": [OutputRecorder(x, index=1, layer_name="layers") for x in ATTENTIONS.values()],
}


class HfMoePreTrainedModel(
    HfMoeCheckpointing, HfMoeUnquantized, HfMoeDispatch, HfMoeHashTables, HfMoeRouters, PreTrainedModel
):
    """What Transformers needs to know of the family: initialisation, what it supports, what it can record."""

    config_class = HfMoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HfMoeDecoderLayer"]  # FSDP refuses classes that the model has no module of
    _skip_keys_device_placement = ["past_key_values", CACHE]
    _keys_to_ignore_on_load_unexpected = [r"\bmtp_layers\."]  # only a causal language model has them
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = RECORDERS

    def __init__(self, config: HfMoeConfig, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        # FSDP2 changes the class to one of PyTorch's own, and it is this name's module that is saved as the code.
        self.__module__ = type(self).__module__

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (HfMoeExperts, HfMoeMixtureOfHeads, HfMoeRouter)):
            draw(module, std)
        elif isinstance(module, HfMoeUnitOffsetRMSNorm):
            init.zeros_(module.weight)
        elif isinstance(module, HfMoeAttention) and self.config.attention_sinks:
            init.normal_(module.sinks, mean=0.0, std=std)


class HfMoeModel(HfMoePreTrainedModel):
    """The decoder: embedding, layers, final norm."""

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        # An id that is no row, as of a token that only the tokenizer has, pads with none of them.
        has_padding = config.pad_token_id is not None and 0 <= config.pad_token_id < config.vocab_size
        padding = config.pad_token_id if has_padding else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding)
        self.layers = nn.ModuleList(HfMoeDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        rotary = HfMoeRotaryEmbeddings if config.rope_by_layer_type else HfMoeRotaryEmbedding
        self.rotary_emb = rotary(config)
        self.mtp_layers = nn.ModuleList()  # a causal language model has them
        self.gradient_checkpointing = False
        self.post_init()

    @host_arguments(*RECORDERS)
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
        output_mtp_hidden_states: bool = False,
        **kwargs,
    ) -> HfMoeModelOutput:
        """Normed states [B, S, D] of input_ids [B, S] or inputs_embeds [B, S, D]; ValueError for both or neither."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        inputs_embeds = self.scaled(inputs_embeds)
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            past_key_values = None  # the recomputation would fill it again
        elif use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)

        token_mask = self.token_mask(attention_mask, inputs_embeds, past_key_values)
        masks = self.attention_masks(attention_mask, inputs_embeds, past_key_values, position_ids)
        hidden_states = inputs_embeds
        shared = {"position_ids": position_ids, "token_mask": token_mask, "input_ids": input_ids} | kwargs
        rotary = position_embeddings(self.rotary_emb, hidden_states, position_ids, self.config.layer_types)
        kept = self.config.layer_types[: self.config.num_hidden_layers]  # `assistant_early_exit` lowers the number
        for layer, layer_type in zip(self.layers, kept, strict=False):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[layer_type],
                position_embeddings=rotary[layer_type],
                layer_cache=past_key_values,
                **shared,
            )
        hidden_states, mtp_hidden_states, mtp_masks = self.norm(hidden_states), None, None
        if output_mtp_hidden_states:
            last = self.config.layer_types[-1]
            shared |= {"attention_mask": masks[last], "position_embeddings": rotary[last]}
            mtp_hidden_states, mtp_masks = predict_ahead(self.mtp_layers, hidden_states, inputs_embeds, **shared)
        return HfMoeModelOutput(
            last_hidden_state=hidden_states,
            **{CACHE: past_key_values if use_cache else None},
            mtp_hidden_states=mtp_hidden_states,
            mtp_masks=mtp_masks,
            token_mask=token_mask,
        )

    def attention_masks(
        self,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
        position_ids: torch.Tensor,
    ) -> dict[str, torch.Tensor | None]:
        """One mask a layer type; `generate` prepares them itself."""
        mask = as_attention_reads(attention_mask, inputs_embeds.dtype, self.config._attn_implementation)
        if isinstance(mask, dict):
            return mask
        return {
            layer_type: MASKS[layer_type](self.config, inputs_embeds, mask, past_key_values, position_ids=position_ids)
            for layer_type in dict.fromkeys(self.config.layer_types)
        }

    def token_mask(
        self,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
        inputs_embeds: torch.Tensor,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """[B, S] False on padding, which takes no place at an expert; None where there is none."""
        implementation = str(self.config._attn_implementation)
        if implementation.startswith("paged|") or not isinstance(past_key_values, Cache | None):
            return None  # continuous batching packs its rows
        check_mask(attention_mask, implementation)
        return valid_tokens(attention_mask, *inputs_embeds.shape[:2], past_key_values, self.config.layer_types)

    def scaled(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Embeddings times embedding_multiplier, which is rounded to their dtype first, as Gemma does."""
        multiplier = torch.tensor(self.config.embedding_multiplier, dtype=inputs_embeds.dtype)
        return inputs_embeds if self.config.embedding_multiplier == 1 else inputs_embeds * multiplier


class HfMoeForCausalLM(
    HfMoeRouterLosses, HfMoeMultiToken, HfMoeDecoding, HfMoeLongRope, HfMoePreTrainedModel, GenerationMixin
):
    """The decoder with a language-modelling head, its loss, and the losses of its routers and of its MTP modules."""

    _keys_to_ignore_on_load_unexpected = None
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HfMoeConfig):
        super().__init__(config)
        self.model = HfMoeModel(config)
        depths = range(1, config.num_mtp_layers + 1)
        self.model.mtp_layers.extend(HfMoeMultiTokenLayer(config, HfMoeDecoderLayer, depth) for depth in depths)
        if depths:
            self._no_split_modules = [*self._no_split_modules, "HfMoeMultiTokenLayer"]
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @host_arguments(*RECORDERS)
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
        output_mtp_loss: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> HfMoeCausalLMOutput:
        """Logits [B, S, V]; with `labels` [B, S] (-100 is ignored) the loss.

        In training the loss includes the router losses whose coefficients are not 0. Outside training they are
        computed, and added, where `output_router_logits` asks for them. `output_router_logits=False` leaves them out.
        The MTP loss is added in the same way, mtp_loss_coef times, and `output_mtp_loss` asks for it.
        """
        parts = asked_parts(self, labels, output_router_logits, output_mtp_loss)
        if "multi_token" in parts and past_key_values is not None:
            raise ValueError("The MTP loss is that of whole sequences: leave out past_key_values, or mtp_loss_coef=0.")
        outputs: HfMoeModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **recorded_for(parts),
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits, loss = self.predict(outputs.last_hidden_state[:, kept], labels, **kwargs)
        loss, told = with_parts(self, parts, outputs, logits, labels, kwargs.get("num_items_in_batch"), loss)
        return HfMoeCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: getattr(outputs, CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            router_indices=outputs.router_indices,
            **told,
        )

    def predict(
        self, hidden_states: torch.Tensor, labels: torch.LongTensor | None, **kwargs
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits [B, S, V] of the normed [B, S, D] and, with labels, their loss; a kernel that gives the loss alone
        takes this method's place."""
        logits = self.project(hidden_states)
        return logits, None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [..., V] of the head for the normed [..., D]."""
        logits, cap = self.lm_head(hidden_states), self.config.final_logit_softcapping
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        return logits if cap is None else cap * torch.tanh(logits / cap)


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
